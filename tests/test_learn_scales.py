"""Laws of learn-scales."""

from __future__ import annotations

from typing import Any

import fits
import graphs
import numpy as np
import onnx_ir as ir
import pytest

from qcompile import decisions, graph, pipeline, registry, simulate, text
from qcompile.backends.base import Target
from qcompile.backends.onnxruntime import OrtCpu
from qcompile.backends.tensorrt import TensorRtRtx
from qcompile.errors import PassError
from qcompile.models import fashion
from qcompile.passes.learn_scales import LearnScales

pytest.importorskip("torch")

DECIDE = "calibrate,quantize{weight=int3}"
ALONE = "quantize{weight=int3 input=float granularity=block block=4}"


@pytest.mark.parametrize("target", [OrtCpu(), TensorRtRtx()], ids=str)
def test_the_error_of_a_network_on_other_data_is_less(target: Target) -> None:
    data, found = fits.calibration(64), list[float]()
    for more in ("", ",learn-scales{steps=100}"):
        model = fits.shipped(fashion.VIT)
        reference = model.clone()
        fits.run(model, f"{DECIDE},gptq{more}", data, target)
        found.append(fits.noise(reference, model, fits.apart(64), target))
    assert found[1] < found[0]


LOGITS = """(float[1,64,8] x) => (float[1,64,6] y) <float[8,16] v, float[16,6] w> {
    h = MatMul(x, v) r = Relu(h) y = MatMul(r, w) }"""


def test_the_divergence_of_logits_on_other_data_is_less() -> None:
    found: dict[str, float] = {}
    for loss in ("", "nsr", "kl"):
        model = graphs.graph(LOGITS)
        reference, data = model.clone(), fits.correlated(model)
        more = f",learn-scales{{loss={loss} rate=0.01}}" if loss else ""
        fits.run(model, f"{DECIDE}{more}", data)
        found[loss] = divergence(reference, model, data.judges)
    assert found["kl"] < 0.8 * found[""] and found["kl"] < found["nsr"]


def divergence(reference: ir.Model, model: ir.Model, samples: Any) -> float:
    """The mean KL divergence of what the outputs are the logits of."""
    judge = simulate.Judge(reference, samples)
    logs: list[Any] = []
    for runs in (judge.wanted, judge.run(simulate.simulate(model, OrtCpu()))):
        rows = np.concatenate([found["y"] for found in runs]).astype(np.float64)
        logs.append(rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True)))
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=-1).mean())


@pytest.mark.parametrize("decide", [DECIDE, ALONE])
def test_scales_alone_are_rewritten(decide: str) -> None:
    model = graphs.graph(graphs.CHAIN)
    data = fits.correlated(model)
    fits.run(model, f"{decide},gptq", data)
    before, codes, scales = text.render(model), codes_of(model), scales_of(model)
    [step] = fits.run(model, "learn-scales{rate=0.01}", data)
    assert step.counters == {"layers": 2, "left alone": 0}
    assert codes_of(model) == codes
    for one, other in zip(scales_of(model), scales, strict=True):
        assert one.shape == other.shape and (one != other).any() and (one > 0).all()
    for line in text.changes(before, text.render(model)):
        assert "scale" in line or "fitted" in line or "{int3" in line, line


def codes_of(model: ir.Model) -> list[Any]:
    """The codes of all weights."""
    found: list[Any] = []
    for layer in graph.layers(model):
        assert layer.weight.spec is not None
        found.append(decisions.codes(model, layer.weight.value, layer.weight.spec).tolist())
    return found


def scales_of(model: ir.Model) -> list[Any]:
    """The scales of all weights."""
    specs = [layer.weight.spec for layer in graph.layers(model)]
    return [decisions.grid(model, spec).scale for spec in specs if spec is not None]


def test_the_same_run_finds_the_same_scales() -> None:
    found: list[str] = []
    for _ in range(2):
        model = graphs.graph(graphs.CHAIN)
        fits.run(model, f"{DECIDE},learn-scales{{steps=20}}", fits.correlated(model))
        found.append(text.render(model, weights=True))
    assert found[0] == found[1]


def test_what_makes_it_worse_is_dropped() -> None:
    model, said = graphs.graph(graphs.CHAIN), list[str]()
    data = fits.correlated(model)
    fits.run(model, DECIDE, data)
    before = text.render(model, weights=True)
    [step] = fits.run(model, "learn-scales{rate=30 steps=1}", data, said=said)
    assert said[-1].endswith("dropped") and step.counters == {"layers": 0, "left alone": 2}
    assert text.render(model, weights=True) == before


def test_a_state_is_that_of_the_float_model() -> None:
    model, data = fits.matting(2)
    said: list[str] = []
    fits.run(model, f"{fits.FOUR},learn-scales{{steps=4 batch=1 samples=4}}", data, said=said)
    assert said[-1].startswith("nsr apart")


def test_gradients_end_at_an_operator_that_torch_lacks() -> None:
    model = graphs.graph("""(float[1,4,8,8] x) => (float[2,4,4,4] y) <float[4,4,3,3] u,
        float[2,4] r = {0,0,4,4,1,1,6,6}, int64[2] i = {0,0}, float[4,4,1,1] w> {
        a = Conv<pads=[1,1,1,1]>(x, u) g = RoiAlign<output_height=4,output_width=4>(a, r, i)
        y = Conv(g, w) }""")
    data = fits.correlated(model)
    fits.run(model, DECIDE, data)
    before = scales_of(model)
    [step] = fits.run(model, "learn-scales", data)
    after = scales_of(model)
    assert step.counters == {"layers": 1, "left alone": 1}
    np.testing.assert_array_equal(after[0], before[0])
    assert not np.allclose(after[1], before[1], rtol=1e-4)


SHIFTED = """(float[N,8] x) => (float[N,6] y, float[N,6] z) <float[8,6] w, float[6] b> {
    h = MatMul(x, w) t = Tanh(h) y = Mul(t, b) z = Sigmoid(h) }"""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{loss=kl}", r"no linear layer writes an output: name those .* outputs=..., of y, z"),
        ("{outputs=a*}", r"outputs=a\* names no output in floats: y, z"),
    ],
)
def test_outputs_that_are_not_there_are_refused(options: str, message: str) -> None:
    model = graphs.graph(SHIFTED)
    data = fits.correlated(model)
    with pytest.raises(PassError, match=message):
        fits.run(model, f"{DECIDE},learn-scales{options}", data)


def test_a_model_without_outputs_in_floats_is_refused() -> None:
    model = graphs.graph("""(float[N,8] x) => (int64[N] y) <float[8,6] w> {
        h = MatMul(x, w) y = ArgMax<axis=1, keepdims=0>(h) }""")
    data = fits.correlated(model)
    with pytest.raises(PassError, match="no output but states holds floats"):
        fits.run(model, f"{DECIDE},learn-scales", data)


def test_only_the_outputs_that_are_named_count() -> None:
    found: list[str] = []
    for options in ("", "outputs=y", "outputs=z", "outputs=*"):
        model = graphs.graph(SHIFTED)
        fits.run(model, f"{DECIDE},learn-scales{{steps=9 {options}}}", fits.correlated(model))
        found.append(text.render(model, weights=True))
    assert found[0] == found[3] and len(set(found)) == 3


def test_excluded_layers_and_models_without_layers_are_left_alone() -> None:
    model = graphs.graph(graphs.CHAIN)
    data = fits.correlated(model)
    fits.run(model, DECIDE, data)
    before = text.render(model, weights=True)
    [step] = fits.run(model, "learn-scales{exclude=*}", data)
    assert step.counters == {"layers": 0, "left alone": 2}
    assert text.render(model, weights=True) == before


@pytest.mark.parametrize("options", [{"steps": 0}, {"batch": 0}, {"samples": 0}, {"rate": 0.0}])
def test_options_that_cannot_work_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PassError):
        LearnScales(**options)


def test_its_text_reads_back() -> None:
    written = "learn-scales{loss=kl outputs=logits steps=9 rate=0.002}"
    [step] = pipeline.parse(written, registry.passes())
    assert str(step) == written
