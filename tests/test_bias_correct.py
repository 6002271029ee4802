"""Laws of bias-correct."""

from __future__ import annotations

import graphs
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from lowering import calibration_of

from qcompile import decisions, execute, graph, pipeline, registry, text
from qcompile.backends.onnxruntime import OrtCpu
from qcompile.calibrate import Calibration
from qcompile.errors import PassError
from qcompile.passes.bias_correct import BiasCorrect
from qcompile.pipeline import Context
from qcompile.sources import Data

BIASED = """(float[1,4,8] x) => (float[1,4,3] y) <float[8,3] w, float[3] b> {
    h = MatMul(x, w) y = Add(h, b) }"""
GROUPED = """(float[1,8,6,6] x) => (float[1,4,6,6] y) <float[4,4,3,3] w, float[4] b> {
    y = Conv<pads=[1,1,1,1], group=2>(x, w, b) }"""
BY_ROW = """(float[4,8] x) => (float[4,3] y) <float[3,8] w, float[4,1] b> {
    y = Gemm<transB=1>(x, w, b) }"""
SCALED = """(float[4,8] x) => (float[4,3] y) <float[3,8] w, float[3] b> {
    y = Gemm<transB=1, alpha=0.5>(x, w, b) }"""


def shifted(model: ir.Model) -> Calibration:
    """Samples whose mean is not zero."""
    listed = [{k: v + np.float32(2) for k, v in s.items()} for s in graphs.samples(model, 12)]
    return Calibration(Data("test", listed))


def run(model: ir.Model, passes: str, calibration: Calibration) -> list[pipeline.Step]:
    steps = pipeline.parse(passes, registry.passes())
    return pipeline.run(model, steps, Context(calibration=calibration, target=OrtCpu()))


def mean_output(model: ir.Model, calibration: Calibration) -> npt.NDArray[np.float64]:
    """The mean of each output channel with the weights as their codes have them."""
    rounded = model.clone()
    for layer in graph.layers(rounded):
        decided = layer.weight.spec
        if decided is not None:
            array = decisions.rounded(rounded, layer.weight.value, decided)
            layer.weight.read_from(graph.add_constant(rounded, "rounded", array))
            bias = decisions.bias(rounded, layer)
            if layer.bias is not None and bias is not None:
                layer.bias.read_from(graph.add_constant(rounded, "bias", bias))
    channel = 1 if any(n.op_type == "Conv" for n in rounded.graph) else -1
    outputs = [execute.execute(rounded, sample)["y"] for sample in calibration.samples]
    rows = [np.moveaxis(y, channel, -1).reshape(-1, y.shape[channel]) for y in outputs]
    return np.concatenate(rows).astype(np.float64).sum(axis=0) / sum(map(len, rows))


@pytest.mark.parametrize("source", [BIASED, GROUPED, graphs.GEMM, graphs.CONV, SCALED])
def test_the_mean_of_each_output_is_that_of_float(source: str) -> None:
    model = graphs.graph(source)
    calibration = shifted(model)
    wanted = mean_output(model, calibration)
    run(model, "quantize{weight=int3 input=float}", calibration)
    before = np.abs(mean_output(model, calibration) - wanted).max()
    run(model, "bias-correct{rows=1000}", calibration)
    after = np.abs(mean_output(model, calibration) - wanted).max()
    assert before > 0.01 and after < 1e-4


def test_only_the_bias_changes() -> None:
    model = graphs.graph(BIASED)
    calibration = calibration_of(model)
    run(model, "quantize{input=float}", calibration)
    before = text.render(model)
    run(model, "bias-correct", calibration)
    assert text.changes(before, text.render(model)) == [
        "+w %b/fitted: f32[3]",
        "-%h: f32[1,4,3] = MatMul(%x, %w{int8 axis=1})",
        "+%h: f32[1,4,3] = MatMul(%x, %w{int8 axis=1}) bias=%b/fitted",
    ]


@pytest.mark.parametrize("source", [graphs.LINEAR, BY_ROW])
def test_what_has_no_bias_for_each_output_is_left_alone(source: str) -> None:
    model = graphs.graph(source)
    step = run(model, "quantize{input=float},bias-correct", calibration_of(model))[-1]
    assert step.counters == {"layers": 0, "left alone": 1}


def test_options_that_cannot_work_are_refused() -> None:
    with pytest.raises(PassError, match="samples starts at 1, got 0"):
        BiasCorrect(samples=0)


def test_its_text_reads_back() -> None:
    step = BiasCorrect(samples=8, exclude=("a",))
    assert str(step) == "bias-correct{samples=8 exclude=a}"
    assert pipeline.parse(str(step), registry.passes()) == [step]
