"""Damage to a graph is found and said; what was there before is forgiven."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graphs import CHAIN, CONV, GEMM, LINEAR, graph

from qcompile import graph as graphs
from qcompile import spec, verify
from qcompile.errors import VerifyError
from qcompile.spec import TensorSpec


def test_a_sound_graph_has_no_findings() -> None:
    for source in (LINEAR, GEMM, CONV, CHAIN):
        assert verify.findings(graph(source)) == []


def reads_later(model: ir.Model) -> None:
    model.graph[0].replace_input_with(0, model.graph[2].outputs[0])


def renamed_twice(model: ir.Model) -> None:
    model.graph[1].outputs[0].name = "h"


def no_writer(model: ir.Model) -> None:
    model.graph.outputs[0] = ir.Value(name="lonely")


def spec_on_nothing(model: ir.Model) -> None:
    spec.write(model.graph[0], 7, TensorSpec("int8"))


def wrong_shape(model: ir.Model) -> None:
    model.graph[0].replace_input_with(1, graphs.add_constant(model, "bad", np.ones((5, 5), "f4")))


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (reads_later, "node 'h' reads 'r' before anything writes it"),
        (renamed_twice, "two values are named 'h'"),
        (no_writer, "output 'lonely' is written by nothing"),
        (spec_on_nothing, "node 'h' has a spec on input 7, which is not there"),
        (wrong_shape, "MatMul"),
    ],
)
def test_damage_is_found(damage: Any, finding: str) -> None:
    model = graph(CHAIN)
    damage(model)
    with pytest.raises(VerifyError, match=finding):
        verify.verify(model)


def test_known_findings_are_forgiven_and_lost_layers_are_not() -> None:
    model = graph(CHAIN)
    spec_on_nothing(model)
    verify.verify(model, verify.findings(model), ["h", "y"])
    with pytest.raises(VerifyError, match="the captured layer 'gone' is lost"):
        verify.verify(model, verify.findings(model), ["gone"])
