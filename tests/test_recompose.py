"""LayerNormalization and Gelu are found in what exporters make of them, and nothing else is."""

from __future__ import annotations

import pathlib

import lowering
import pytest
from graphs import assert_same_function, graph

from qcompile import pipeline, text
from qcompile.passes.recompose import Recompose
from qcompile.pipeline import Context

NORM = """m = ReduceMean<axes=[-1]>(x) d = Sub(x, m) p = Pow(d, two) v = ReduceMean<axes=[-1]>(p)
    e = Add(v, eps) r = Sqrt(e) n = Div(d, r)"""
HEAD = "(float[2,5,8] x) => (float[2,5,8] y) <float two = {2}, float eps = {0.001}"
NORMS = {
    "gain and shift": f"{HEAD}, float[8] g, float[8] b> {{ {NORM} s = Mul(n, g) y = Add(s, b) }}",
    "gain alone": f"{HEAD}, float[1,1,8] g> {{ {NORM} y = Mul(g, n) }}",
    "shift alone": f"{HEAD}, float[8] b> {{ {NORM} y = Add(n, b) }}",
    "neither": f"{HEAD}> {{ {NORM} y = Identity(n) }}",
    "a gain a token": f"{HEAD}, float[5,1] g> {{ {NORM} y = Mul(n, g) }}",
    "two subtractions, a product": f"""{HEAD}> {{
        m = ReduceMean<axes=[2]>(x) d = Sub(x, m) c = Sub(x, m) p = Mul(c, c)
        v = ReduceMean<axes=[-1]>(p) e = Add(eps, v) r = Sqrt(e) y = Div(d, r) }}""",
    "two axes": """(float[2,5,8] x) => (float[2,5,8] y)
        <float two = {2}, float eps = {0.001}, float[5,8] g> {
        m = ReduceMean<axes=[1,2]>(x) d = Sub(x, m) p = Pow(d, two)
        v = ReduceMean<axes=[-2,-1]>(p) e = Add(v, eps) r = Sqrt(e) n = Div(d, r)
        y = Mul(n, g) }""",
}
SWISHES = [
    "u = Add(x, three) c = Clip(u, zero, six) p = Mul(x, c) y = Div(p, six)",
    "u = Add(three, x) c = Clip(u, zero, six) p = Mul(c, x) y = Mul(p, sixth)",
    "u = Add(x, three) c = Clip(u, zero, six) d = Div(c, six) y = Mul(x, d)",
]
BOUNDS = "float three = {3}, float zero = {0}, float six = {6}, float sixth = {0.16666667}"
OTHERS = {
    "not the last axes": NORMS["neither"].replace("[-1]", "[1]"),
    "another exponent": NORMS["neither"].replace("two = {2}", "two = {3}"),
    "the squares of something else": NORMS["neither"].replace("Pow(d,", "Pow(x,"),
    "a sum": NORMS["neither"].replace("v = ReduceMean", "v = ReduceMax"),
    "without the axis": NORMS["neither"].replace("<axes=[-1]>", "<axes=[-1], keepdims=0>"),
    "another bound": f"""(float[2,8] x) => (float[2,8] y) <{BOUNDS}> {{
        u = Add(x, three) c = Clip(u, zero, three) p = Mul(x, c) y = Div(p, six) }}""",
    "a clip of something else": f"""(float[2,8] x, float[2,8] z) => (float[2,8] y) <{BOUNDS}> {{
        u = Add(x, three) c = Clip(u, zero, six) p = Mul(z, c) y = Div(p, six) }}""",
    "erf of something else": """(float[2,8] x, float[2,8] z) => (float[2,8] y)
        <float r = {1.41421356}, float one = {1}, float h = {0.5}> {
        u = Div(x, r) e = Erf(u) a = Add(e, one) p = Mul(z, a) y = Mul(p, h) }""",
    "another factor": """(float[2,8] x) => (float[2,8] y)
        <float r = {1.5}, float one = {1}, float h = {0.5}> {
        u = Div(x, r) e = Erf(u) a = Add(e, one) p = Mul(x, a) y = Mul(p, h) }""",
    "an inverse that is no root": """(float[2,8] x, float[2,1] z) => (float[2,8] y) {
        i = Reciprocal(z) y = Mul(x, i) }""",
    "a root that is read elsewhere": """(float[2,8] x, float[2,1] z)
        => (float[2,8] y, float[2,1] i) { r = Sqrt(z) i = Reciprocal(r) y = Mul(x, i) }""",
    "a part that is read elsewhere": """(float[2,8] x) => (float[2,8] y, float[2,8] a)
        <float r = {1.41421356}, float one = {1}, float h = {0.5}> {
        u = Div(x, r) e = Erf(u) a = Add(e, one) p = Mul(x, a) y = Mul(p, h) }""",
}
RMS = """(float[2,5,8] x) => (float[2,5,8] y) <float two = {2}, float eps = {0.001}, float[8] g> {
    p = Pow(x, two) m = ReduceMean<axes=[-1]>(p) e = Add(m, eps) r = Sqrt(e) i = Reciprocal(r)
    n = Mul(x, i) y = Mul(n, g) }"""
CONSTANTS = "<float r = {1.41421356}, float i = {0.70710678}, float one = {1}, float h = {0.5}>"
GELUS = [
    "u = Div(x, r) e = Erf(u) a = Add(e, one) p = Mul(x, a) y = Mul(p, h)",
    "u = Mul(i, x) e = Erf(u) a = Add(one, e) p = Mul(a, x) y = Mul(h, p)",
    "u = Div(x, r) e = Erf(u) a = Add(e, one) k = Mul(x, h) y = Mul(k, a)",
    "u = Div(x, r) e = Erf(u) a = Add(e, one) p = Mul(a, h) y = Mul(x, p)",
]


def recomposed(source: str, opset: int = 17) -> list[str]:
    """The operators of the graph behind the pass; the function is the same."""
    model = graph(source, opset)
    before = model.clone()
    pipeline.run(model, [Recompose()], Context())
    assert_same_function(before, model)
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("case", NORMS)
@pytest.mark.parametrize("opset", [13, 17])
def test_a_layer_norm_is_recomposed(case: str, opset: int) -> None:
    kinds = recomposed(NORMS[case], opset)
    behind = ["Mul"] if case == "a gain a token" else ["Identity"] if case == "neither" else []
    assert kinds == ["LayerNormalization", *behind]


@pytest.mark.parametrize("source", GELUS)
def test_a_gelu_is_recomposed(source: str) -> None:
    assert recomposed(f"(float[2,8] x) => (float[2,8] y) {CONSTANTS} {{ {source} }}") == ["Gelu"]


def test_an_rms_norm_is_divided_by_its_root(tmp_path: pathlib.Path) -> None:
    assert recomposed(RMS) == ["Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul"]
    model = graph(RMS, 17)
    kinds = lowering.operators(lowering.optimized(model, tmp_path))
    assert "SimplifiedLayerNormalization" not in kinds
    pipeline.run(model, [Recompose()], Context())
    kinds = lowering.operators(lowering.optimized(model, tmp_path))
    assert kinds == ["SimplifiedLayerNormalization"]


@pytest.mark.parametrize("source", SWISHES)
def test_a_hard_swish_is_recomposed(source: str) -> None:
    text = f"(float[2,8] x) => (float[2,8] y) <{BOUNDS}> {{ {source} }}"
    assert recomposed(text) == ["HardSwish"]


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_something_else_is_left_alone(case: str) -> None:
    model = graph(OTHERS[case], 17)
    before = text.render(model, weights=True)
    counted = Recompose().run(model, Context())
    assert not any(counted.values())
    assert text.render(model, weights=True) == before


def test_the_opset_is_raised_for_a_gelu_only() -> None:
    model = graph(NORMS["neither"], 17)
    Recompose().run(model, Context())
    assert model.opset_imports[""] == 18
    model = graph(f"(float[2,8] x) => (float[2,8] y) {CONSTANTS} {{ {GELUS[0]} }}", 17)
    Recompose().run(model, Context())
    assert model.opset_imports[""] == 20
