"""Laws of equalize, and of the channels that it may scale."""

from __future__ import annotations

import graphs
import numpy as np
import onnx_ir as ir
import pytest

from qcompile import channels, graph, pipeline, registry, simulate, text
from qcompile.backends.onnxruntime import OrtCpu
from qcompile.calibrate import Calibration
from qcompile.errors import PassError
from qcompile.passes.equalize import Equalize
from qcompile.pipeline import Context
from qcompile.sources import Data, Sample

NORM = """(float[1,4,8] x) => (float[1,4,3] y) <float[8] g, float[8] b, float[8,3] w> {
    n = LayerNormalization(x, g, b) y = MatMul(n, w) }"""
MLP = """(float[1,4,8] x) => (float[1,4,3] y)
    <float[8,16] u, float[16] b, float[16,3] w> {
    h = MatMul(x, u) s = Add(h, b) r = Relu(s) y = MatMul(r, w) }"""
RESIDUAL = """(float[1,2,6,6] x) => (float[1,3,6,6] y)
    <float[8,2,1,1] a, float[8] ab, float[8,8,3,3] c, float[8] cb, float[3,8,1,1] d> {
    p = Conv(x, a, ab) q = Conv<pads=[1,1,1,1]>(p, c, cb) s = Add(p, q) y = Conv(s, d) }"""
DEPTHWISE = """(float[1,2,6,6] x) => (float[1,3,1,1] y)
    <float[8,2,1,1] a, float[8,1,3,3] c, float[8] cb, float[3,8,1,1] d> {
    p = Conv(x, a) r = Relu(p) q = Conv<group=8>(r, c, cb) m = GlobalAveragePool(q) y = Conv(m, d)
}"""
ATTENTION = """(float[1,4,8] x) => (float[1,4,5] y)
    <float[8,8] q, float[8,8] k, float[8,8] v, float[8] vb, float[8,5] o,
     int64[4] split = {1,4,2,4}, int64[3] whole = {1,4,8}> {
    hq = MatMul(x, q) sq = Reshape(hq, split) tq = Transpose<perm=[0,2,1,3]>(sq)
    hk = MatMul(x, k) sk = Reshape(hk, split) tk = Transpose<perm=[0,2,3,1]>(sk)
    hv = MatMul(x, v) bv = Add(hv, vb) sv = Reshape(bv, split) tv = Transpose<perm=[0,2,1,3]>(sv)
    scores = MatMul(tq, tk) p = Softmax<axis=-1>(scores) mixed = MatMul(p, tv)
    back = Transpose<perm=[0,2,1,3]>(mixed) flat = Reshape(back, whole) y = MatMul(flat, o) }"""
GATED = """(float[1,4,8] x) => (float[1,4,3] y) <float[8,6] u, float[8,6] g, float[6,3] w> {
    a = MatMul(x, u) b = MatMul(x, g) c = Sigmoid(b) d = Mul(a, c) y = MatMul(d, w) }"""
CLIPPED = """(float[1,4,8] x) => (float[1,4,3] y)
    <float[8,6] u, float[6,3] w, float low = {0.0}, float high = {6.0}> {
    a = MatMul(x, u) c = Clip(a, low, high) y = MatMul(c, w) }"""
OUTPUT = """(float[1,4,8] x) => (float[1,4,6] a, float[1,4,3] y) <float[8,6] u, float[6,3] w> {
    a = MatMul(x, u) y = MatMul(a, w) }"""
SHARED = """(float[1,4,8] x) => (float[1,4,8] y) <float[8,8] w> {
    a = MatMul(x, w) y = MatMul(a, w) }"""
FOLDED = {
    "norm": NORM,
    "mlp": MLP,
    "residual": RESIDUAL,
    "depthwise": DEPTHWISE,
    "attention": ATTENTION,
    "gated": GATED,
}
PINNED = {"clipped": CLIPPED, "output": OUTPUT, "shared": SHARED}


def uneven(source: str) -> tuple[ir.Model, Calibration]:
    """A model whose channels differ by orders of magnitude, and its data."""
    model = graphs.graph(source)
    rng = np.random.default_rng(7)
    for fold in channels.trace(model, shapes(model)).folds:
        if fold.ids.ndim == 1 or fold.ids.size == max(fold.ids.shape):
            array = graph.constant(fold.use.value)
            factor = np.exp(1.5 * rng.standard_normal(fold.ids.shape)).astype(np.float32)
            tensor = ir.Tensor(array * factor, name=fold.use.value.name)
            fold.use.value.const_value = tensor
    return model, Calibration(Data("test", graphs.samples(model, 30)))


def shapes(model: ir.Model) -> dict[str, tuple[int, ...]]:
    listed: list[Sample] = graphs.samples(model, 1)
    return Calibration(Data("test", listed)).shapes(model)


def run(model: ir.Model, passes: str, calibration: Calibration) -> list[pipeline.Step]:
    steps = pipeline.parse(passes, registry.passes())
    return pipeline.run(model, steps, Context(calibration=calibration, target=OrtCpu()))


@pytest.mark.parametrize("name", [*FOLDED, *PINNED])
@pytest.mark.parametrize("options", ["", "{input=float weight=int4 block=2}"])
def test_the_function_is_kept(name: str, options: str) -> None:
    model, calibration = uneven((FOLDED | PINNED)[name])
    before = model.clone()
    run(model, f"equalize{options}", calibration)
    graphs.assert_same_function(before, model)


@pytest.mark.parametrize("name", FOLDED)
def test_uneven_channels_lose_less(name: str) -> None:
    model, calibration = uneven(FOLDED[name])
    plain = model.clone()
    # The samples that were seen: evened channels all reach their range, so new ones would clip.
    judge = simulate.Judge(model.clone(), calibration.samples)
    decide = "calibrate,quantize{weight=int8}"
    run(plain, decide, calibration)
    counters = run(model, f"equalize,{decide}", calibration)[0].counters
    assert int(counters["scaled"]) >= 1 and int(counters["layers"]) >= 1
    one, other = (judge.worst(simulate.simulate(m, OrtCpu())) for m in (plain, model))
    assert other > one + 1.0


@pytest.mark.parametrize("name", PINNED)
def test_what_cannot_be_folded_is_left_as_it_is(name: str) -> None:
    model, calibration = uneven(PINNED[name])
    before = text.render(model, weights=True)
    assert run(model, "equalize", calibration)[0].counters["scaled"] == 0
    assert text.render(model, weights=True) == before


def test_the_graph_keeps_its_nodes_and_what_changed_has_a_new_name() -> None:
    model, calibration = uneven(MLP)
    before = text.render(model)
    run(model, "equalize", calibration)
    assert text.changes(before, text.render(model)) == [
        "-w %b: f32[16]",
        "-w %u: f32[8,16]",
        "-w %w: f32[16,3]",
        "-%h: f32[1,4,16] = MatMul(%x, %u)",
        "-%s: f32[1,4,16] = Add(%h, %b)",
        "-%r: f32[1,4,16] = Relu(%s)",
        "-%y: f32[1,4,3] = MatMul(%r, %w)",
        "+w %b/equalized: f32[16]",
        "+w %u/equalized: f32[8,16]",
        "+w %w/equalized: f32[16,3]",
        "+%h/equalized: f32[1,4,16] = MatMul(%x, %u/equalized)",
        "+%s/equalized: f32[1,4,16] = Add(%h/equalized, %b/equalized)",
        "+%r/equalized: f32[1,4,16] = Relu(%s/equalized)",
        "+%y: f32[1,4,3] = MatMul(%r/equalized, %w/equalized)",
    ]


def test_an_excluded_layer_keeps_its_input() -> None:
    model, calibration = uneven(NORM)
    before = text.render(model, weights=True)
    run(model, "equalize{exclude=MatMul}", calibration)
    assert text.render(model, weights=True) == before


def test_the_sides_of_an_add_have_the_same_channels() -> None:
    model = graphs.graph(RESIDUAL)
    found = channels.trace(model, shapes(model))
    by_name = {value.name: ids for value, ids in found.carried.items()}
    np.testing.assert_array_equal(by_name["p"], by_name["q"])
    np.testing.assert_array_equal(by_name["p"], by_name["s"])
    assert found.free[by_name["s"]].all()


def test_channels_go_through_the_heads_of_attention() -> None:
    model = graphs.graph(ATTENTION)
    found = channels.trace(model, shapes(model))
    [reader] = [r for r in found.readers if found.free[r.ids].all()]
    assert reader.layer.weight.value.name == "o"
    by_name = {value.name: ids for value, ids in found.carried.items()}
    np.testing.assert_array_equal(reader.ids, by_name["bv"][0, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": -1}, "got -1"),
        ({"samples": 0}, "starts at 1"),
        ({"weight": "x"}, "unknown format"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(PassError, match=message):
        Equalize(**options)  # type: ignore[arg-type]


def test_its_text_reads_back() -> None:
    step = Equalize(weight="int4", input="float", block=32)
    assert str(step) == "equalize{weight=int4 input=float block=32}"
    assert pipeline.parse(str(step), registry.passes()) == [step]
