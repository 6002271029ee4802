"""Laws of the noise that is estimated from statistics."""

from __future__ import annotations

import graphs
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qcompile import decisions, execute, graph, noise, numerics, pipeline, registry
from qcompile.backends.onnxruntime import OrtCpu
from qcompile.calibrate import Calibration
from qcompile.graph import Layer
from qcompile.pipeline import Context
from qcompile.sources import Data, Sample

LINEAR = "(float[16,64] x) => (float[16,24] y) <float[64,24] w> { y = MatMul(x, w) }"
CONV = """(float[2,12,9,9] x) => (float[2,16,7,7] y) <float[16,12,3,3] w> {
    y = Conv(x, w) }"""
GROUPED = """(float[2,12,9,9] x) => (float[2,16,7,7] y) <float[16,3,3,3] w> {
    y = Conv<group=4>(x, w) }"""
DEPTHWISE = """(float[2,12,9,9] x) => (float[2,12,7,7] y) <float[12,1,3,3] w> {
    y = Conv<group=12>(x, w) }"""
EVERY = {"linear": LINEAR, "conv": CONV, "grouped": GROUPED, "depthwise": DEPTHWISE}
# A step of the formula is exact for its average; what was drawn spreads by less than this.
WITHIN_DB = 1.5


def estimate(model: ir.Model, data: Calibration, block: int = 0) -> tuple[Layer, noise.Inputs]:
    [layer] = graph.layers(model)
    seen = data.moments(model, {"x": noise.channel_axis(layer)})["x"]
    return layer, noise.inputs(layer, seen, block)


def calibration(model: ir.Model) -> Calibration:
    listed: list[Sample] = graphs.samples(model, 8)
    return Calibration(Data("test", listed))


def decibels(ratio: float) -> float:
    return float(10 * np.log10(ratio))


def ratio(model: ir.Model, rounded: ir.Model, inputs: list[Sample], read: list[Sample]) -> float:
    """Noise to signal of ``rounded``, which reads ``read``, against ``model``, which ``inputs``."""
    error = signal = 0.0
    for one, other in zip(inputs, read, strict=True):
        wanted: npt.NDArray[np.float64] = execute.execute(model, one)["y"].astype(np.float64)
        error += float(((execute.execute(rounded, other)["y"] - wanted) ** 2).sum())
        signal += float((wanted**2).sum())
    return error / signal


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_the_noise_of_weights_is_what_rounding_them_makes(name: str, form: str) -> None:
    model = graphs.graph(EVERY[name])
    data = calibration(model)
    _, inputs = estimate(model, data)
    rounded = model.clone()
    passes = pipeline.parse(f"quantize{{weight={form} input=float}}", registry.passes())
    pipeline.run(rounded, passes, Context(target=OrtCpu()))
    [layer] = graph.layers(rounded)
    assert layer.weight.spec is not None
    array = decisions.rounded(rounded, layer.weight.value, layer.weight.spec)
    layer.weight.read_from(graph.add_constant(rounded, "rounded", array.astype(np.float32)))
    samples = list(data.samples)
    measured = ratio(model, rounded, samples, samples)
    assert abs(decibels(inputs.ratio(form, "float")) - decibels(measured)) < WITHIN_DB


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_the_noise_of_an_activation_is_what_rounding_it_makes(name: str, form: str) -> None:
    model = graphs.graph(EVERY[name])
    data = calibration(model)
    _, inputs = estimate(model, data)
    samples = list(data.samples)
    everything = np.concatenate([s["x"].ravel() for s in samples])
    grid = numerics.parse_format(form)
    step = (everything.max() - everything.min()) / (grid.high - grid.low)
    rounded: list[Sample] = [{"x": (np.rint(s["x"] / step) * step).astype("f4")} for s in samples]
    measured = ratio(model, model, samples, rounded)
    assert abs(decibels(inputs.ratio("float", form)) - decibels(measured)) < WITHIN_DB


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("block", [0, 16])
def test_scales_stand_for_what_is_folded(name: str, block: int) -> None:
    model = graphs.graph(EVERY[name])
    data = calibration(model)
    layer, inputs = estimate(model, data, block)
    scales = np.exp(np.random.default_rng(3).standard_normal(len(inputs.power)))
    folded = model.clone()
    weight = graph.constant(layer.weight.value)
    [other] = graph.layers(folded)
    scaled = weight * noise.along_input(layer, scales, weight.shape)
    other.weight.read_from(graph.add_constant(folded, "scaled", scaled.astype(np.float32)))
    axis = noise.channel_axis(layer)
    shape = [1] * (2 if layer.kind == "linear" else 4)
    shape[axis] = -1
    divided: list[Sample] = [
        {"x": (s["x"] / scales.reshape(shape)).astype(np.float32)} for s in graphs.samples(model, 8)
    ]
    _, after = estimate(folded, Calibration(Data("test", divided)), block)
    for weight_format, entered in (("int8", "float"), ("float", "int8"), ("int4", "int8")):
        # Rounding of float32.
        assert after.ratio(weight_format, entered) == pytest.approx(
            inputs.ratio(weight_format, entered, scales), rel=1e-4
        )


def test_blocks_have_steps_of_their_own() -> None:
    model = graphs.graph(LINEAR)
    data = calibration(model)
    ratios = [estimate(model, data, block)[1].ratio("int4", "float") for block in (8, 32, 0)]
    assert ratios == sorted(ratios) and ratios[0] < ratios[-1]
    assert estimate(model, data, 7)[1].ratio("int4", "float") == ratios[-1]  # 7 divides no 64


def test_nothing_rounded_is_no_noise() -> None:
    model = graphs.graph(CONV)
    assert estimate(model, calibration(model))[1].ratio("float", "float") == 0.0
