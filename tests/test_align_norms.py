"""Laws of align-norms."""

from __future__ import annotations

import fits
import graphs
import numpy as np
import onnx_ir as ir
import pytest

from qcompile import execute, graph, pipeline, registry, simulate, text
from qcompile.models import fashion
from qcompile.passes.align_norms import AlignNorms

NORM = """(float[1,4,8] x) => (float[1,4,3] y, float[1,4,5] z)
    <float[8] g, float[8] b, float[8,3] w, float[3] c, float[8,5] v, float[5] d> {
    n = LayerNormalization(x, g, b) m = MatMul(n, w) y = Add(m, c)
    k = MatMul(n, v) z = Add(k, d) }"""
GEMM = """(float[4,8] x) => (float[4,3] y) <float[8] g, float[8] b, float[3,8] w, float[3] c> {
    n = LayerNormalization<axis=1>(x, g, b) y = Gemm<transB=1>(n, w, c) }"""
LEFT = {
    "no bias": """(float[1,4,8] x) => (float[1,4,3] y) <float[8] g, float[8] b, float[8,3] w> {
        n = LayerNormalization(x, g, b) y = MatMul(n, w) }""",
    "no shift": """(float[4,8] x) => (float[4,3] y) <float[8] g, float[8,3] w, float[3] c> {
        n = LayerNormalization(x, g) y = Gemm(n, w, c) }""",
    "a residual": """(float[4,8] x) => (float[4,8] y)
        <float[8] g, float[8] b, float[8,8] w, float[8] c> {
        n = LayerNormalization(x, g, b) h = Gemm(n, w, c) y = Add(h, n) }""",
    "an output": """(float[4,8] x) => (float[4,8] n, float[4,3] y)
        <float[8] g, float[8] b, float[8,3] w, float[3] c> {
        n = LayerNormalization(x, g, b) y = Gemm(n, w, c) }""",
    "two axes": """(float[1,4,8] x) => (float[1,4,3] y)
        <float[4,8] g, float[4,8] b, float[8,3] w, float[3] c> {
        n = LayerNormalization<axis=1>(x, g, b) m = MatMul(n, w) y = Add(m, c) }""",
    "a shared weight": """(float[4,8] x) => (float[4,8] y, float[4,8] z)
        <float[8] g, float[8] b, float[8,8] w, float[8] c> {
        n = LayerNormalization(x, g, b) y = Gemm(n, w, c) z = Gemm(x, w, c) }""",
    "a factor": """(float[4,8] x) => (float[4,3] y)
        <float[8] g, float[8] b, float[8,3] w, float[3] c> {
        n = LayerNormalization(x, g, b) y = Gemm<alpha=0.5>(n, w, c) }""",
}


def uneven(source: str) -> ir.Model:
    """A model whose normalization has channels of very different ranges."""
    model = graphs.graph(source)
    rng = np.random.default_rng(3)
    for name, array in (
        ("g", np.exp(rng.uniform(-3, 3, graphs.weight(model, "g").shape))),
        ("b", rng.uniform(-4, 4, graphs.weight(model, "b").shape)),
    ):
        value = model.graph.initializers[name]
        value.const_value = ir.Tensor(array.astype(np.float32), name=name)
    return model


@pytest.mark.parametrize("source", [NORM, GEMM])
def test_the_function_stays_and_all_channels_have_one_range(source: str) -> None:
    model = uneven(source)
    reference, data = model.clone(), fits.correlated(model)
    [step] = fits.run(model, "align-norms", data)
    assert step.counters == {"aligned": 1, "left alone": 0}
    judge = simulate.Judge(reference, data.judges)
    assert judge.worst(execute.Session(model)) > 100
    [norm] = [node for node in model.graph if node.op_type == "LayerNormalization"]
    written = norm.outputs[0].name or ""
    found = data.moments(model, {written: -1})[written]
    np.testing.assert_allclose(found.low, found.low[0], rtol=1e-3)
    np.testing.assert_allclose(found.high, found.high[0], rtol=1e-3)


def test_gains_shifts_weights_and_biases_alone_are_rewritten() -> None:
    model = uneven(NORM)
    data = fits.correlated(model)
    before = text.render(model)
    fits.run(model, "align-norms", data)
    for line in text.changes(before, text.render(model)):
        assert line[0] == "-" or "/aligned" in line, line
    assert [n.op_type for n in model.graph] == [n.op_type for n in graphs.graph(NORM).graph]


@pytest.mark.parametrize("source", LEFT.values(), ids=LEFT)
def test_what_cannot_hold_it_is_left_alone(source: str) -> None:
    model = graphs.graph(source)
    before = text.render(model, weights=True)
    [step] = fits.run(model, "align-norms", fits.correlated(model))
    assert step.counters == {"aligned": 0, "left alone": 1}
    assert text.render(model, weights=True) == before


def test_a_layer_that_is_excluded_keeps_what_it_reads() -> None:
    model = uneven(GEMM)
    [layer] = graph.layers(model)
    before = text.render(model, weights=True)
    fits.run(model, f"align-norms{{exclude={graph.glob_of(layer.name)}}}", fits.correlated(model))
    assert text.render(model, weights=True) == before


@pytest.mark.parametrize("bits", [4, 8])
def test_one_scale_loses_less_of_uneven_channels(bits: int) -> None:
    noises: list[float] = []
    for front in ("", "align-norms,"):
        model = uneven(NORM)
        reference, data = model.clone(), fits.correlated(model)
        fits.run(model, f"{front}calibrate,quantize{{weight=int8 input=int{bits}}}", data)
        noises.append(fits.noise(reference, model, data.judges))
    assert noises[1] < noises[0] / 2


def test_a_transformer_keeps_its_function() -> None:
    model, data = fits.shipped(fashion.VIT), fits.calibration(16)
    reference = model.clone()
    fits.run(model, "simplify,recompose", data)
    [step] = fits.run(model, "align-norms", data)
    assert step.counters["aligned"] and not step.counters["left alone"]
    judge = simulate.Judge(reference, data.judges)
    assert judge.worst(execute.Session(model)) > 80


def test_its_text_reads_back() -> None:
    step = AlignNorms(samples=8)
    assert str(step) == "align-norms{samples=8}"
    assert pipeline.parse(str(step), registry.passes()) == [step]
