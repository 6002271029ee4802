"""Laws of decisions: they belong to a use, round-trip, and hold names and scalars only."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import onnx_ir as ir
import pytest
from graphs import GEMM, LINEAR, graph
from hypothesis import given
from hypothesis import strategies as st

from qcompile import execute, spec, text
from qcompile import graph as graphs
from qcompile.spec import TensorSpec

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
specs = st.builds(
    TensorSpec,
    format=st.sampled_from(["int8", "uint4", "int2"]),
    axis=st.none() | st.integers(-4, 4),
    block=st.none() | st.integers(1, 256),
    symmetric=st.booleans(),
    scale_from=st.sampled_from(["static", "tensor", "token", "block"]),
    scale_format=st.sampled_from(["fp32", "fp16"]),
    range=names,
    scale=names,
    zero_point=names,
    codes=names,
)


@given(specs)
def test_write_and_read_round_trip(decided: TensorSpec) -> None:
    node = ir.Node("", "MatMul", [ir.Value(name="a"), ir.Value(name="b")])
    spec.write(node, 1, decided)
    assert spec.read(node, 1) == decided
    assert spec.read(node, 0) is None


def test_what_is_at_its_default_is_not_stored() -> None:
    node = graph(LINEAR).graph[0]
    spec.write(node, 1, TensorSpec("int4", axis=0, scale="w/scale"))
    assert json.loads(node.metadata_props[f"{spec.SPEC}1"]) == {
        "format": "int4",
        "axis": 0,
        "scale": "w/scale",
    }


def test_none_takes_a_decision_back() -> None:
    node = graph(LINEAR).graph[0]
    spec.write(node, 1, TensorSpec("int4"))
    spec.write(node, 1, None)
    spec.write(node, 0, None)
    assert spec.read(node, 1) is None
    assert not any(key.startswith(spec.SPEC) for key in node.metadata_props)


def test_all_specs_are_in_the_order_of_the_inputs() -> None:
    node = graph(GEMM).graph[0]
    for index in (2, 0, 1):
        spec.write(node, index, TensorSpec(f"int{index + 4}"))
    assert list(spec.all_specs(node)) == [0, 1, 2]
    spec.clear(node)
    assert spec.all_specs(node) == {}


def test_clear_leaves_other_metadata() -> None:
    node = graph(LINEAR).graph[0]
    spec.write(node, 1, TensorSpec("int4"))
    spec.clear(node)
    assert graphs.origins(node) == ("y",)


def test_two_readers_of_one_value_may_differ() -> None:
    model = graph("""(float[2,8] x) => (float[2,8] a, float[2,8] b) <float[8,8] w> {
        a = MatMul(x, w) b = MatMul(x, w) }""")
    first, second = graphs.layers(model)
    first.weight.decide(TensorSpec("int8"))
    second.weight.decide(TensorSpec("int4"))
    assert (first.weight.spec, second.weight.spec) == (TensorSpec("int8"), TensorSpec("int4"))
    assert first.weight.value is second.weight.value


@pytest.mark.parametrize("way", ["clone", "file"])
def test_decisions_survive_clone_save_and_load(way: str, tmp_path: pathlib.Path) -> None:
    model = graph(LINEAR)
    decided = TensorSpec("int4", axis=0, block=4, scale="w/scale")
    spec.write(model.graph[0], 1, decided)
    if way == "clone":
        copy = model.clone()
    else:
        execute.save(model, tmp_path / "m.onnx")
        copy = execute.load(tmp_path / "m.onnx")
    assert spec.all_specs(copy.graph[0]) == {1: decided}
    assert text.render(copy) == text.render(model)


def test_a_clone_decides_for_itself() -> None:
    model = graph(LINEAR)
    spec.write(model.clone().graph[0], 1, TensorSpec("int4"))
    assert spec.read(model.graph[0], 1) is None


def test_arrays_are_the_names_that_a_decision_needs() -> None:
    assert TensorSpec("int8").arrays() == ()
    decided = TensorSpec("int8", range="r", scale="s", zero_point="z", codes="c")
    assert decided.arrays() == ("r", "s", "z", "c")


@pytest.mark.parametrize(
    ("decided", "short"),
    [
        (TensorSpec("int8"), "int8"),
        (TensorSpec("int8", axis=0, scale="s"), "int8 axis=0"),
        (TensorSpec("uint4", axis=1, block=8, symmetric=False), "uint4 axis=1 block=8 asymmetric"),
        (TensorSpec("int8", scale_from="token", codes="c"), "int8 token fitted"),
    ],
)
def test_the_short_form_says_what_is_not_plain(decided: TensorSpec, short: str) -> None:
    assert str(decided) == short


def test_a_decision_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TensorSpec("int8").format = "int4"  # type: ignore[misc]
