"""The engine's torch function is what simulation computes, whole or block after block."""

from __future__ import annotations

from typing import Any

import fits
import graphs
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qcompile import blocks, graph, sequences, simulate, spec
from qcompile.backends.base import Target
from qcompile.backends.onnxruntime import OrtCpu
from qcompile.backends.tensorrt import TensorRtRtx
from qcompile.execute import Session
from qcompile.models import fashion
from qcompile.sequences import Samples

torch = pytest.importorskip("torch")

from qcompile.prefix import Prefix  # noqa: E402
from qcompile.quantized import Quantized  # noqa: E402

Array = npt.NDArray[Any]

TARGETS = [OrtCpu(), TensorRtRtx()]
INT8, INT4 = "simplify,fold-bn,calibrate,quantize", fits.FOUR
ATTENTION = "simplify,fold-bn,calibrate,quantize{attention=int8}"
ALONE = "simplify,recompose,calibrate,quantize{weight=int4 granularity=block block=16 input=float}"


def rounded_biases(quantized: Quantized, lowered: ir.Model) -> None:
    """Give the engine the biases in int32 that ONNX Runtime adds: it keeps them in float.

    They are 90 dB apart, which moves one code in a few hundred to its neighbour.
    """
    known = lowered.graph.initializers
    for layer in graph.layers(quantized.model):
        name = layer.bias.value.name if layer.bias is not None else ""
        if f"{name}/codes" in known:
            codes, scale = (graphs.weight(lowered, f"{name}/{p}") for p in ("codes", "scale"))
            quantized.biases[layer.name] = (codes * scale).astype(np.float32)


def trajectory(prefix: Prefix) -> list[dict[str, Array]]:
    """The outputs of the model that the blocks of ``prefix`` compute, of each sample."""
    for number in range(len(prefix.blocks)):
        prefix.leave(number, prefix.enter(number))
    given = {name for block in prefix.blocks for name in block.outputs}
    outputs = [v.name or "" for v in prefix.quantized.model.graph.outputs]
    return [
        {name: prefix.rounded.value(name, number) for name in outputs if name in given}
        for number in range(len(prefix.samples))
    ]


def margins(model: ir.Model, target: Target, samples: Samples) -> list[float]:
    """How many dB below quantization noise the engine lies beside simulation, of each sample.

    That of the worst output; at most 80, since what is kept in float has no noise. The engine is
    run block after block, which gives bit by bit what it gives as a whole.
    """
    lowered, quantized, state = (
        simulate.lowered(model, target),
        Quantized(model, target),
        samples.state,
    )
    rounded_biases(quantized, lowered)
    parts, whole = blocks.partition(model, state), [blocks.whole(model)]
    engine, other = (trajectory(Prefix(quantized, found, samples)) for found in (parts, whole))
    worst = [80.0] * len(samples)
    sessions = Session(_plain(model)), Session(lowered, optimize=False)
    wanted, found = (
        [results for _, results in sequences.carry(s, samples, state)] for s in sessions
    )
    for number, arrays in enumerate(engine):
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, other[number][name])
            noise = simulate.sqnr(wanted[number][name], found[number][name])
            gap = simulate.sqnr(found[number][name], array)
            worst[number] = min(worst[number], gap - min(noise, 50.0))
    return worst


def _plain(model: ir.Model) -> ir.Model:
    """``model`` in float."""
    model = model.clone()
    for node in model.graph:
        spec.clear(node)
    return simulate.lowered(model, OrtCpu())


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize(
    ("name", "passes"),
    [
        (fashion.CNN, INT8),
        (fashion.CNN, INT4),
        (fashion.VIT, INT8),
        (fashion.VIT, INT4),
        (fashion.VIT, ATTENTION),
        (fashion.VIT, ALONE),
    ],
)
def test_the_engine_rounds_as_simulation_does(target: Target, name: str, passes: str) -> None:
    model, data = fits.shipped(name), fits.calibration(12)
    fits.run(model, passes, data, target)
    # Equal to the last bits of float32 sums, but where a number lies on a tie, as a probability of
    # one half does, and goes the other way. ONNX Runtime multiplies weights alone in int8.
    exact = passes not in (ATTENTION, ALONE) or target.name != "ort-cpu"
    assert np.median(margins(model, target, data.samples[:5])) > (45 if exact else 10)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_state_is_that_of_the_rounded_model(target: Target) -> None:
    model, data = fits.matting(3)
    fits.run(model, INT8, data, target)
    # A number on a tie moves all frames behind it; a clip without one is the same to its end.
    assert max(min(margins(model, target, data.samples.sequence(n))) for n in range(4)) > 45


SMALL = {
    **{k: getattr(graphs, k) for k in ("LINEAR", "GEMM", "CONV", "CHAIN")},
    "shared": """(float[2,8] x, float[2,8] z) => (float[2,3] y) <float[8,3] w> {
        a = MatMul(x, w) b = MatMul(z, w) y = Add(a, b) }""",
    "embedding": """(int64[2,5] i) => (float[2,5,4] y) <float[9,8] e, float[8,4] w> {
        x = Gather(e, i) y = MatMul(x, w) }""",
    "transposed": """(float[1,4,5,5] x) => (float[1,4,9,9] y) <float[4,4,3,3] w,
        float[4] b> { h = Relu(x) y = ConvTranspose<strides=[2,2],pads=[1,1,1,1]>(h, w, b) }""",
    "no block": """(float[1,4,8,8] x) => (float[1,4,4,4] y) <float[4,4,1,1] v, float[4,8,1,1] w> {
        h = HardSwish(x) p = AveragePool<kernel_shape=[2,2],strides=[2,2]>(h)
        a = Conv(h, v) q = MaxPool<kernel_shape=[2,2],strides=[2,2]>(a)
        c = Concat<axis=1>(p, q) y = Conv(c, w) }""",
    "residual": """(float[1,4,8,8] x) => (float[1,4,8,8] y) <float[4,4,1,1] v, float[4,4,1,1] w> {
        a = Conv(x, v) r = Relu(a) b = Conv(r, w) y = Add(b, x) }""",
    "recurrent": """(float[5,2,8] x) => (float[5,2,3] y)
        <float[1,16,8] w, float[1,16,4] r, int64[1] one = {1}, float[4,3] u> {
        h = LSTM<hidden_size=4>(x, w, r) s = Squeeze(h, one) y = MatMul(s, u) }""",
}


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize("source", SMALL)
def test_the_engine_rounds_every_kind_of_layer(source: str, target: Target) -> None:
    model = graphs.graph(SMALL[source])
    data = fits.correlated(model)
    fits.run(model, "calibrate,quantize", data, target)
    assert min(margins(model, target, data.samples[:4])) > 40
