"""Laws of the text form: stable, complete enough to see every change, one line a node."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graphs import CHAIN, CONV, GEMM, LINEAR, graph

from qcompile import execute, spec, text
from qcompile.models import fashion
from qcompile.spec import TensorSpec

BRANCHES = """(bool[1] c, float[batch,4] x) => (float[batch,4] y) <float[4,4] w> {
    k = Squeeze(c)
    y = If(k) <
        then_branch = then () => (float[batch,4] a) { a = MatMul(x, w) },
        else_branch = otherwise () => (float[batch,4] b) { b = Identity(x) }
    > }"""
ALL = {"linear": LINEAR, "gemm": GEMM, "conv": CONV, "chain": CHAIN, "branches": BRANCHES}


def test_the_form_is_one_line_a_node() -> None:
    model = graph("""(float[batch,1,5,5] x) => (float[batch,4] y) <float[4,25] w> {
        s = Constant<value_ints = [-1, 25]>()
        f = Reshape(x, s)
        p = LeakyRelu<alpha = 0.25>(f)
        y = Gemm<transB = 1>(p, w) }""")
    spec.write(model.graph[2], 1, TensorSpec("int8", axis=0))
    assert text.render(model).splitlines() == [
        "opset onnx 21",
        "graph (%x: f32[batch,1,5,5]) -> (%y: f32[batch,4])",
        "w %s: i64[2]",
        "w %w: f32[4,25]",
        "%f: f32[unk__0,25] = Reshape(%x, %s)",
        "%p: f32[unk__0,25] = LeakyRelu(%f) {alpha=0.25}",
        "%y: f32[batch,4] = Gemm(%p, %w{int8 axis=0}) {transB=1}",
    ]


def test_bodies_are_indented_below_their_node() -> None:
    assert text.render(graph(BRANCHES)).splitlines() == [
        "opset onnx 21",
        "graph (%c: bool[1], %x: f32[batch,4]) -> (%y: f32[batch,4])",
        "w %w: f32[4,4]",
        "%k: bool[] = Squeeze(%c)",
        "%y: f32[batch,4] = If(%k)",
        "  then_branch: graph () -> (%a: f32[batch,4])",
        "  then_branch: %a: f32[batch,4] = MatMul(%x, %w)",
        "  else_branch: graph () -> (%b: f32[batch,4])",
        "  else_branch: %b: f32[batch,4] = Identity(%x)",
    ]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("weights", [False, True])
def test_render_is_stable_over_clone_save_and_load(
    name: str, weights: bool, tmp_path: pathlib.Path
) -> None:
    model = graph(ALL[name])
    rendered = text.render(model, weights)
    assert text.render(model.clone(), weights) == rendered
    execute.save(model, tmp_path / "m.onnx")
    assert text.render(execute.load(tmp_path / "m.onnx"), weights) == rendered
    library: Any = ir  # partly untyped
    library.save(model, tmp_path / "x.onnx", external_data="x.data")
    assert text.render(execute.load(tmp_path / "x.onnx"), weights) == rendered


def test_render_is_stable_on_a_real_model(tmp_path: pathlib.Path) -> None:
    model = execute.load(fashion.path(fashion.CNN))
    rendered = text.render(model, weights=True)
    assert text.render(model.clone(), weights=True) == rendered
    execute.save(model, tmp_path / "m.onnx")
    assert text.render(execute.load(tmp_path / "m.onnx"), weights=True) == rendered


def test_equal_graphs_have_no_changes() -> None:
    assert text.changes(text.render(graph(CHAIN)), text.render(graph(CHAIN))) == []


def test_changes_are_the_lines_that_differ() -> None:
    model = graph(CHAIN)
    before = text.render(model)
    model.graph[1].inputs[1].name = "bias"  # type: ignore[union-attr]
    spec.write(model.graph[3], 0, TensorSpec("int8", symmetric=False))
    assert text.changes(before, text.render(model)) == [
        "-w %b1: f32[8]",
        "+w %bias: f32[8]",
        "-%s: f32[2,8] = Add(%h, %b1)",
        "+%s: f32[2,8] = Add(%h, %bias)",
        "-%y: f32[2,4] = MatMul(%r, %w2)",
        "+%y: f32[2,4] = MatMul(%r{int8 asymmetric}, %w2)",
    ]


def test_changes_undo_each_other() -> None:
    one, other = text.render(graph(CHAIN)), text.render(graph(LINEAR))

    def lines(found: list[str], sign: str) -> list[str]:
        return sorted(line[1:] for line in found if line.startswith(sign))

    there, back = text.changes(one, other), text.changes(other, one)
    assert lines(there, "+") == lines(back, "-")
    assert lines(there, "-") == lines(back, "+")


def test_numbers_are_compared_with_weights_only() -> None:
    one, other = graph(LINEAR, seed=0), graph(LINEAR, seed=1)
    assert text.render(one) == text.render(other)
    changed = text.changes(text.render(one, True), text.render(other, True))
    assert [line.split(" #")[0] for line in changed] == ["-w %w: f32[8,3]", "+w %w: f32[8,3]"]


def test_the_numbers_of_a_constant_node_are_compared_too() -> None:
    def constant(number: float) -> ir.Model:
        tensor = ir.Tensor(np.array([number], np.float32))
        node = ir.Node("", "Constant", [], attributes=[ir.AttrTensor("value", tensor)])
        node.outputs[0].name = "y"
        return ir.Model(
            ir.Graph([], node.outputs, nodes=[node], opset_imports={"": 21}), ir_version=10
        )

    one, other = constant(1.0), constant(2.0)
    assert text.render(one) == text.render(other)
    assert text.render(one, True) != text.render(other, True)


def test_a_change_inside_a_body_is_seen() -> None:
    model = graph(BRANCHES)
    before = text.render(model)
    body = model.graph[1].attributes["then_branch"].as_graph()
    body[0].op_type = "Gemm"
    assert text.changes(before, text.render(model)) == [
        "-  then_branch: %a: f32[batch,4] = MatMul(%x, %w)",
        "+  then_branch: %a: f32[batch,4] = Gemm(%x, %w)",
    ]


def test_an_operand_that_is_left_out_keeps_its_place() -> None:
    model = graph("(float[4] x, float h) => (float[4] y) { y = Clip(x, , h) }")
    assert text.render(model).splitlines()[-1] == "%y: f32[4] = Clip(%x, , %h)"


def test_a_domain_of_its_own_is_named() -> None:
    model = graph(LINEAR)
    model.graph[0].domain = "com.acme"
    assert text.render(model).splitlines()[-1] == "%y: f32[2,3] = com.acme::MatMul(%x, %w)"
