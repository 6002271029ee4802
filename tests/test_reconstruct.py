"""Laws of reconstruct, and of the engine that it shares with calibrate-affine."""

from __future__ import annotations

import pathlib
from typing import Any

import fits
import graphs
import numpy as np
import onnx_ir as ir
import pytest

from qcompile import blocks, decisions, graph, pipeline, registry, simulate, text
from qcompile.backends.onnxruntime import OrtCpu
from qcompile.backends.tensorrt import TensorRtRtx
from qcompile.calibrate import Calibration
from qcompile.errors import PassError
from qcompile.models import fashion
from qcompile.passes.reconstruct import Method, Reconstruct
from qcompile.sources import Data, Sample

torch = pytest.importorskip("torch")

from qcompile.importance import importance  # noqa: E402
from qcompile.prefix import Prefix  # noqa: E402
from qcompile.quantized import Quantized  # noqa: E402
from qcompile.reconstruct import Engine, Fitted, Settings  # noqa: E402

METHODS: tuple[Method, ...] = ("adaround", "brecq", "qdrop")
RESIDUAL = """(float[1,4,8,8] x) => (float[1,4,8,8] y)
    <float[4,4,3,3] u, float[4] a, float[4,4,3,3] v, float[4] b, float[4,4,3,3] w> {
    h = Conv<pads=[1,1,1,1]>(x, u, a) r = Relu(h) s = Conv<pads=[1,1,1,1]>(r, v, b) t = Add(s, r)
    y = Conv<pads=[1,1,1,1]>(t, w) }"""
DECIDE = "calibrate,quantize{weight=int4}"


def fitted(
    source: str, options: str, seed: int = 0, said: list[str] | None = None, bits: int = 4
) -> ir.Model:
    """A small graph, decided and reconstructed with ``options``."""
    model = graphs.graph(source)
    passes = f"calibrate,quantize{{weight=int{bits}}},reconstruct{{{options}}}"
    fits.run(model, passes, fits.correlated(model), seed=seed, said=said)
    return model


# -- accuracy -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "target"),
    [*((method, OrtCpu()) for method in METHODS), ("qdrop", TensorRtRtx())],
    ids=str,
)
def test_the_error_of_a_network_on_other_data_is_less(
    method: Method, target: OrtCpu | TensorRtRtx
) -> None:
    data = fits.calibration(40)
    plain, model = fits.shipped(fashion.CNN), fits.shipped(fashion.CNN)
    reference = plain.clone()
    fits.run(plain, fits.FOUR, data, target)
    # What is dropped in a step teaches nothing in it.
    options = f"method={method} steps={160 if method == 'qdrop' else 80} batch=8"
    fits.run(model, f"{fits.FOUR},reconstruct{{{options}}}", data, target)
    one, other = (fits.noise(reference, m, fits.apart(40), target) for m in (plain, model))
    assert other < 0.85 * one


@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_the_error_falls_as_bits_rise(granularity: str) -> None:
    found: list[float] = []
    for bits in (2, 4, 8):
        model = fitted(RESIDUAL, f"steps=20 granularity={granularity}", bits=bits)
        reference = graphs.graph(RESIDUAL)
        found.append(fits.noise(reference, model, fits.correlated(reference).judges))
    assert found == sorted(found, reverse=True) and found[0] > 10 * found[-1]


def test_on_the_samples_that_decide_no_block_is_worse() -> None:
    for options in ("steps=20", "steps=20 rate=1", "steps=20 range-rate=0.5"):
        said: list[str] = []
        fitted(RESIDUAL, options, said=said)
        pairs = [line.split(": ")[1].split(", ")[0].split(" -> ") for line in said]
        dropped = ["dropped" in line for line in said]
        for (before, after), gone in zip(pairs, dropped, strict=True):
            assert gone == (not float(after) <= float(before))


def test_a_harmful_fit_is_dropped_and_leaves_the_bytes_as_they_were() -> None:
    plain = graphs.graph(RESIDUAL)
    fits.run(plain, DECIDE, fits.correlated(plain))
    said: list[str] = []
    model = fitted(RESIDUAL, "method=brecq steps=2 rate=300 range-rate=30 decide=0", said=said)
    assert all("dropped" in line for line in said[:-1])
    assert text.render(model, weights=True) == text.render(plain, weights=True)


def test_all_is_dropped_if_the_outputs_get_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing found yet does that to order; so the fits are turned round behind the decisions on
    # each block: what was rounded up is rounded down.
    plain = graphs.graph(RESIDUAL)
    fits.run(plain, DECIDE, fits.correlated(plain))
    honest = Fitted.from_arrays

    def turned(arrays: Any) -> Fitted:
        found = honest(arrays)
        for codes in found.codes.values():
            codes[...] = codes[::-1].copy()
        return found

    monkeypatch.setattr(Fitted, "from_arrays", staticmethod(turned))
    said: list[str] = []
    model = fitted(RESIDUAL, "steps=5", said=said)
    assert said[-1].endswith("all dropped")
    assert text.render(model, weights=True) == text.render(plain, weights=True)


# -- what is written ----------------------------------------------------------------------------


def test_the_same_seed_makes_the_same_codes_and_another_others() -> None:
    one, other, third = (
        text.render(fitted(RESIDUAL, "steps=25 rate=0.05 batch=4", seed=seed), weights=True)
        for seed in (0, 0, 1)
    )
    assert one == other != third


@pytest.mark.parametrize("method", METHODS)
def test_codes_and_ranges_alone_are_rewritten(method: Method) -> None:
    model = graphs.graph(RESIDUAL)
    data = fits.correlated(model)
    reference = model.clone()
    fits.run(model, DECIDE, data)
    before = text.render(model)
    fits.run(model, f"reconstruct{{method={method} steps=30}}", data)
    changed = text.changes(before, text.render(model))
    assert changed
    for line in changed:
        assert "/fitted" in line or "fitted}" in line or line[0] == "-" or "range" in line, line
    ranges = [line for line in changed if "/fitted" not in line and "fitted" not in line]
    assert method != "adaround" or not [line for line in ranges if line[0] == "+"]
    for layer in graph.layers(model):
        name = layer.weight.value.name or ""
        np.testing.assert_array_equal(graphs.weight(model, name), graphs.weight(reference, name))


def test_the_float_function_is_kept() -> None:
    model = fits.shipped(fashion.CNN)
    steps = pipeline.parse("simplify,fold-bn,calibrate,quantize,reconstruct{steps=3}",
                           registry.passes())  # fmt: skip
    data = fits.calibration(20)
    judge = simulate.Judge(model.clone(), data.judges)
    floats = [fits.shipped(fashion.CNN)]
    fits.run(floats[0], "simplify,fold-bn", data)
    context = pipeline.Context(calibration=data, target=OrtCpu())
    pipeline.run(model, steps, context)
    for value in floats[0].graph.initializers.values():
        if value.name in model.graph.initializers:
            np.testing.assert_array_equal(
                graphs.weight(model, value.name or ""), graphs.weight(floats[0], value.name or "")
            )
    assert judge.worst(simulate.simulate(model, OrtCpu())) > 25


def test_codes_are_those_of_the_floor_or_the_next() -> None:
    model = fitted(RESIDUAL, "method=adaround steps=40 rate=0.1")
    moved = 0
    for layer in graph.layers(model):
        decided = layer.weight.spec
        assert decided is not None and decided.codes
        grid = decisions.grid(model, decided)
        codes = decisions.codes(model, layer.weight.value, decided)
        weight = graph.constant(layer.weight.value)
        assert np.abs(codes - weight / grid.each(weight.shape)[0]).max() <= 1 + 1e-5
        moved += int((codes != grid.quantize(weight)).sum())
    assert moved


SHARED = """(float[2,8] x, float[2,8] z) => (float[2,3] y) <float[8,3] w> {
    a = MatMul(x, w) r = Relu(z) b = MatMul(r, w) y = Add(a, b) }"""


def test_a_shared_weight_is_fitted_once() -> None:
    model = fitted(SHARED, "steps=60 granularity=layer rate=0.03")
    one, other = graph.layers(model)
    assert one.weight.spec == other.weight.spec and one.weight.spec is not None
    assert [n for n in model.graph.initializers if n.endswith("/fitted")] == ["w/fitted"]


# -- what cannot be fitted ----------------------------------------------------------------------

REGIONS = """(float[1,4,8,8] x) => (float[2,4,4,4] y) <float[4,4,3,3] u, float[4,4,1,1] v,
    float[2,4] r = {0,0,4,4,1,1,6,6}, int64[2] i = {0,0}, float[4,4,1,1] w> {
    a = Conv<pads=[1,1,1,1]>(x, u) h = Conv(a, v)
    g = RoiAlign<output_height=4,output_width=4>(h, r, i) y = Conv(g, w) }"""


@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_around_an_operator_that_torch_lacks_layers_are_fitted_one_by_one(granularity: str) -> None:
    said: list[str] = []
    model = graphs.graph(REGIONS)
    data, reference = fits.correlated(model), model.clone()
    options = f"method=adaround steps=80 rate=0.03 granularity={granularity}"
    [*_, step] = fits.run(model, f"{DECIDE},reconstruct{{{options}}}", data, said=said)
    assert step.counters["left alone"] == 0 and step.counters["blocks"] == 3
    assert any("torch cannot run RoiAlign; layers around it" in line for line in said)
    codes = [layer.weight.spec.codes for layer in graph.layers(model) if layer.weight.spec]
    assert len(codes) == 3 and any(codes)
    nearest = reference.clone()
    fits.run(nearest, DECIDE, data)
    one, other = (fits.noise(reference, m, data.judges) for m in (nearest, model))
    assert other < one


def test_brecq_refuses_an_operator_without_a_gradient() -> None:
    with pytest.raises(PassError, match=r"gradients through the whole model, .* run RoiAlign here"):
        fitted(REGIONS, "method=brecq")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps starts at 1, got 0"),
        ({"batch": 0}, "batch starts at 1, got 0"),
        ({"samples": 0}, "samples starts at 1, got 0"),
        ({"rate": 0.0}, "rate must be above 0, got 0"),
        ({"range_rate": -1.0}, "range-rate must be above 0, got -1"),
        ({"decide": -0.5}, "decide starts at 0, got -0.5"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        Reconstruct(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["reconstruct", "calibrate-affine"])
def test_without_a_gpu_that_is_said_before_anything_runs(name: str) -> None:
    steps = pipeline.parse(f"calibrate,quantize,{name}{{device=cuda}}", registry.passes())
    said = r"torch \S+ (is built without CUDA|finds no GPU): choose device=cpu"
    with pytest.raises(PassError, match=said):
        pipeline.check(steps, [OrtCpu()])


@pytest.mark.parametrize("name", ["reconstruct", "gptaq", "calibrate-affine"])
def test_without_torch_the_command_that_installs_it_is_said(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(_: str) -> None:
        return None

    monkeypatch.setattr("importlib.util.find_spec", nothing)
    steps = pipeline.parse(f"calibrate,quantize,{name}", registry.passes())
    with pytest.raises(PassError, match=rf"{name} needs torch: pip install 'qcompile\[torch\]'"):
        pipeline.check(steps, [OrtCpu()])


def test_its_text_reads_back() -> None:
    step = Reconstruct(method="brecq", range_rate=0.01)
    assert str(step) == "reconstruct{method=brecq range-rate=0.01}"
    assert pipeline.parse(str(step), registry.passes()) == [step]


# -- masks and states ---------------------------------------------------------------------------

MASKED = """(float[1,6,8] x, int64[1,6] mask) => (float[1,6,8] y)
    <float[8,8] v, float[8,8] w> { h = MatMul(x, v) r = Relu(h) y = MatMul(r, w) }"""


def padded(noise: float) -> Calibration:
    """Samples of which the last two positions are padding, filled with ``noise``."""
    rng = np.random.default_rng(0)
    found: list[Sample] = []
    for _ in range(24):
        x = rng.standard_normal((1, 6, 8)).astype(np.float32)
        x[:, 4:] *= np.float32(noise)
        found.append({"x": x, "mask": np.array([[1, 1, 1, 1, 0, 0]])})
    return Calibration(Data("test", found), mask="mask")


@pytest.mark.parametrize("passes", ["reconstruct{steps=20 rate=0.05}", "gptaq"])
def test_what_lies_in_padding_changes_nothing(passes: str) -> None:
    found: list[str] = []
    for noise in (0.0, 3.0):
        model = graphs.graph(MASKED)
        fits.run(model, f"{DECIDE},{passes}", padded(noise))
        found.append(text.render(model, weights=True))
    assert found[0] == found[1]


def test_a_state_goes_through_the_frames() -> None:
    model, data = fits.matting(2)
    plain, reference = model.clone(), model.clone()
    fits.run(plain, fits.FOUR, data)
    said: list[str] = []
    options = "method=brecq steps=4 batch=1 rate=0.05 samples=4"
    fits.run(model, f"{fits.FOUR},reconstruct{{{options}}}", data, said=said)
    assert len(said) == 17 and "dropped" not in said[-1]
    one, other = (fits.noise(reference, m, data.judges) for m in (plain, model))
    assert other < one


# -- the weights of brecq -----------------------------------------------------------------------

LINEAR = """(float[1,8] x) => (float[1,3] y) <float[8,5] v, float[5,3] w> {
    h = MatMul(x, v) y = MatMul(h, w) }"""


def test_errors_count_as_the_outputs_feel_them() -> None:
    # Of a linear layer dy/dh is W, so that the diagonal of J^T J is the sum of squares of a row.
    model = graphs.graph(LINEAR)
    data = fits.correlated(model)
    fits.run(model, DECIDE, data)
    parts = blocks.partition(model, {}, "layer")
    prefix = Prefix(Quantized(model, OrtCpu()), parts, data.samples[:2])
    found = importance(prefix, np.random.default_rng(0), draws=400)
    wanted = (graphs.weight(model, "w") ** 2).sum(axis=1)
    for sample in found:
        np.testing.assert_allclose(sample["h"][0], wanted / wanted.mean(), rtol=0.25)
        np.testing.assert_allclose(sample["y"], 1.0)


CHAIN = """(float[N,8] x) => (float[N,6] y) <float[8,8] v, float[8,6] w> {
    h = MatMul(x, v)
    r = Relu(h)
    y = MatMul(r, w)
}"""


def fit_of_the_second(spoilt: bool, **options: Any) -> dict[Any, Any]:
    """The codes of the second layer of CHAIN, fitted behind a first that may be all zeros."""
    model = graphs.graph(CHAIN)
    data = fits.correlated(model)
    fits.run(model, DECIDE, data)
    quantized = Quantized(model, OrtCpu())
    parts = blocks.partition(model, {}, "layer")
    first, second = (block for block in parts if block.layers)
    if spoilt:
        [layer] = quantized.layers(first)
        quantized.codes[quantized.key(layer)] = np.zeros_like(quantized.codes_of(layer))
    samples, apart = data.to_fit(16)
    settings = Settings(
        steps=30, batch=8, mix=0.0, ranges=False, weight_rate=0.1, decide=0.1, **options
    )
    engine = Engine(
        Prefix(quantized, parts, samples), Prefix(quantized, parts, apart), [settings],
        lambda _: np.random.default_rng(0),
    )  # fmt: skip
    for number, block in enumerate(parts):
        engine.enter(number)
        if block is second:
            found = engine.fit(number)
            assert found is not None
            return dict(found.codes)
        engine.leave(number)
    raise AssertionError


def alike(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    return all(np.array_equal(one[key], other[key]) for key in one.keys() | other.keys())


@pytest.fixture
def keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was found is kept."""

    def nothing(_: object) -> float:
        return 0.0

    monkeypatch.setattr("qcompile.reconstruct._Fit._error", nothing)


@pytest.mark.usefixtures("keeps")
def test_a_block_that_reads_floats_alone_does_not_know_what_is_in_front() -> None:
    assert alike(*(fit_of_the_second(spoilt, prefix=False) for spoilt in (False, True)))
    assert not alike(*(fit_of_the_second(spoilt) for spoilt in (False, True)))


@pytest.mark.usefixtures("keeps")
def test_targets_differ_where_a_block_reads_what_is_rounded_and_only_there() -> None:
    floats, again = (
        fit_of_the_second(False, prefix=False, target=t) for t in ("float", "recomputed")
    )
    assert alike(floats, again)
    floats, again = (fit_of_the_second(False, target=t) for t in ("float", "recomputed"))
    assert not alike(floats, again)


# -- runs that are killed -----------------------------------------------------------------------


def test_a_killed_run_goes_on_at_its_block_and_ends_in_the_same_bytes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = f"{fits.FOUR},reconstruct{{steps=3 samples=4 rate=0.1}},insert-qdq"
    fits.resumes(tmp_path, monkeypatch, passes, behind=3)


def test_what_a_block_found_is_kept_exactly() -> None:
    found = Fitted(
        "a/b", 0.1, 1 / 3, True, {("w ü", "s"): np.array([[1, -2]], np.int32)}, {"x": 0.3}
    )
    again = Fitted.from_arrays(found.to_arrays())
    np.testing.assert_array_equal(again.codes["w ü", "s"], [[1, -2]])
    assert (again.block, again.before, again.after, again.kept) == ("a/b", 0.1, 1 / 3, True)
    assert again.factors == {"x": 0.3}
