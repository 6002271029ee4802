"""What goes into an engine: branches that its shapes decide, and nothing that has no kernel."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
from graphs import graph, outputs, samples

import qcompile
from qcompile import execute
from qcompile.backends import trt_graph
from qcompile.errors import TargetError

DETECTOR = """(float[1,16,4,4] x) => (float[1,4,16] scores, int64[K,3] kept, float[1,4,16] twice)
    <float[4,16,1,1] w, float[4,16,1,1] v, int64[3] s = {1, 4, 16}, float o = {0.5},
     float l = {0.1}, int64 m = {3}> {
    c = Conv(x, w) scores = Reshape(c, s) d = Conv(x, v) e = Reshape(d, s)
    boxes = Transpose<perm=[0,2,1]>(e) kept = NonMaxSuppression(boxes, scores, m, o, l)
    n = Cast<to=1>(kept) t = ReduceSum<keepdims=0>(n) twice = Mul(scores, t) }"""
BRANCH = """(float[N,4] x) => (float[N,4] y) {
    s = Shape(x) i = Constant<value_int=1>() f = Constant<value_int=4>() g = Gather(s, i)
    q = Equal(g, f)
    y = If(q) <then_branch = a () => (float[N,4] t) { t = Neg(x) },
               else_branch = b () => (float[N,4] e) { e = Abs(x) }> }"""


def test_head_and_tail_together_are_the_model() -> None:
    model = graph(DETECTOR, 18)
    head, tail = trt_graph.split(model)
    assert tail is not None
    assert not trt_graph.behind(head)
    assert [v.name for v in head.graph.outputs] == ["scores", "boxes"]
    assert [v.name for v in tail.graph.outputs] == ["kept", "twice"]
    for sample in samples(model, 3):
        wanted = outputs(model, sample)
        between = outputs(head, sample)
        read = {v.name or "": between[v.name or ""] for v in tail.graph.inputs}
        for name, array in (outputs(tail, read) | {"scores": between["scores"]}).items():
            np.testing.assert_array_equal(array, wanted[name])


def test_a_model_with_kernels_for_all_is_left_whole() -> None:
    model = graph(BRANCH, 18)
    assert trt_graph.split(model) == (model, None)


def test_a_model_with_nothing_in_front_is_refused() -> None:
    model = graph("(float[2,3] x) => (int64[2,N] y) { y = NonZero(x) }", 18)
    with pytest.raises(TargetError, match=r"no kernel for 'y' \(NonZero\)"):
        trt_graph.split(model)


def test_a_branch_that_the_shapes_decide_is_taken() -> None:
    model = graph(BRANCH, 18)
    taken = trt_graph.settled(model, {"x": [[2, 4], [2, 4], [2, 4]]})
    assert [node.op_type for node in taken.graph] == ["Neg"]
    assert [node.op_type for node in model.graph][-1] == "If"
    [sample] = samples(model)
    np.testing.assert_array_equal(outputs(taken, sample)["y"], outputs(model, sample)["y"])


def test_a_branch_that_the_data_decides_stays() -> None:
    model = graph(BRANCH.replace("(float[N,4] x)", "(float[N,M] x)"), 18)
    taken = trt_graph.settled(model, {"x": [[2, 3], [2, 4], [2, 4]]})
    assert "If" in [node.op_type for node in taken.graph]


def test_a_detector_compiles_with_its_tail_beside_the_engine(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    text = DETECTOR.replace("float[4,16,1,1] w", "float[4,16,1,1] w, float[16,16,3,3] u").replace(
        "c = Conv(x, w)", "h = Conv<pads=[1,1,1,1]>(x, u) c = Conv(h, w)"
    )
    model = graph(text, 18)
    [done] = qcompile.compile(
        model, tmp_path / "out", calib=samples(model, 20), targets=("tensorrt-rtx",)
    )
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "check", "model.engine", "model.onnx", "pipeline.txt", "report.html", "report.json",
        "tail.onnx",
    ]  # fmt: skip
    assert {layer.name: layer.runs for layer in done.report.layers}["h"] == "int8"
    said = json.loads((tmp_path / "out" / "report.json").read_text())["warnings"]
    assert any("tail.onnx holds 4 of" in line and "NonMaxSuppression" in line for line in said)
    execute.Session(tmp_path / "out" / "tail.onnx")
