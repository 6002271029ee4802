"""Laws of gptaq."""

from __future__ import annotations

import pathlib
from typing import Any

import fits
import graphs
import numpy as np
import pytest

from qcompile import decisions, execute, graph, pipeline, registry, simulate, spec, text
from qcompile.backends.base import Target
from qcompile.backends.onnxruntime import OrtCpu
from qcompile.backends.tensorrt import TensorRtRtx
from qcompile.errors import PassError
from qcompile.models import fashion
from qcompile.passes.gptaq import Gptaq
from qcompile.ridge import Seen
from qcompile.sources import Sample
from qcompile.spill import Spill

pytest.importorskip("torch")

DECIDE = "calibrate,quantize{weight=int4}"


@pytest.mark.parametrize(
    ("name", "target"),
    [(fashion.CNN, OrtCpu()), (fashion.CNN, TensorRtRtx()), (fashion.VIT, OrtCpu())],
)
def test_the_error_of_a_network_on_other_data_is_less(
    name: str, target: OrtCpu | TensorRtRtx
) -> None:
    data = fits.calibration(40)
    plain, model = fits.shipped(name), fits.shipped(name)
    reference = plain.clone()
    fits.run(plain, fits.FOUR, data, target)
    fits.run(model, f"{fits.FOUR},gptaq", data, target)
    one, other = (fits.noise(reference, m, fits.apart(40), target) for m in (plain, model))
    assert other < 0.6 * one


@pytest.mark.parametrize("name", [fashion.CNN, fashion.VIT])
def test_scales_that_are_searched_lower_the_error_on_other_data(name: str) -> None:
    data, found = fits.calibration(64), list[float]()
    for option in ("", "{rescale=true}"):
        model = fits.shipped(name)
        reference = model.clone()
        fits.run(model, f"calibrate,quantize{{weight=int3}},gptaq{option}", data)
        found.append(fits.noise(reference, model, fits.apart(64)))
    assert found[1] < 0.8 * found[0]


@pytest.mark.parametrize("option", ["", "{rescale=true}"])
def test_the_error_falls_as_bits_rise(option: str) -> None:
    found: list[float] = []
    for bits in (2, 3, 4, 8):
        model = graphs.graph(graphs.CHAIN)
        reference, data = model.clone(), fits.correlated(model)
        fits.run(model, f"calibrate,quantize{{weight=int{bits}}},gptaq{option}", data)
        found.append(fits.noise(reference, model, data.judges))
    assert found == sorted(found, reverse=True) and found[0] > 10 * found[-1]


def test_blends_fill_up_few_samples() -> None:
    data, codes = fits.calibration(14), set[str]()
    for options, blends in [("", 0), ("{mixup=true}", 16), ("{mixup=true samples=18}", 8)]:
        model = fits.shipped(fashion.CNN)
        *_, step = fits.run(model, f"{fits.FOUR},gptaq{options}", data)
        assert step.counters["blends"] == blends
        codes.add(text.render(model, weights=True))
    assert len(codes) == 3


def test_codes_and_biases_alone_are_rewritten() -> None:
    model = graphs.graph(graphs.CHAIN)
    data, floats = fits.correlated(model), model.clone()
    fits.run(model, DECIDE, data)
    before = text.render(model)
    fits.run(model, "gptaq", data)
    assert text.changes(before, text.render(model))
    for line in text.changes(before, text.render(model)):
        assert line[0] == "-" or "/fitted" in line or "fitted}" in line, line
    for name in ("w1", "b1", "w2"):
        np.testing.assert_array_equal(graphs.weight(model, name), graphs.weight(floats, name))
    assert spec.bias(next(iter(graph.layers(model))).node) == "b1/fitted"


def test_the_bias_keeps_the_mean_of_what_a_layer_writes() -> None:
    # With the input in float the rounded weight is all that moves the mean.
    model = graphs.graph(graphs.GEMM)
    data = fits.correlated(model)
    fits.run(model, "quantize{weight=int2 input=float},gptaq", data)
    [layer] = graph.layers(model)
    decided = layer.weight.spec
    assert decided is not None
    rows = np.concatenate([s["x"] for s in data.to_fit(64)[0]])
    bias, weight = decisions.bias(model, layer), graphs.weight(model, "w")
    assert bias is not None
    rounded = decisions.rounded(model, layer.weight.value, decided)
    wanted = rows @ weight.T + graphs.weight(model, "b")
    np.testing.assert_allclose(
        (rows @ rounded.T + bias).mean(axis=0), wanted.mean(axis=0), atol=1e-4
    )


def test_the_same_run_makes_the_same_codes() -> None:
    found: list[str] = []
    for _ in range(2):
        model = graphs.graph(graphs.CHAIN)
        fits.run(model, f"{DECIDE},gptaq", fits.correlated(model))
        found.append(text.render(model, weights=True))
    assert found[0] == found[1]


def test_a_killed_run_goes_on_at_its_layer_and_ends_in_the_same_bytes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = f"{fits.FOUR},gptaq{{samples=8 rescale=true}},insert-qdq"
    fits.resumes(tmp_path, monkeypatch, passes, behind=3)


SIDE = """(float[2,8] x) => (float[2,3] y) <float[8,5] t, float[5,3] u, float[5,3] v> {{
    h = MatMul(x, t) k = Identity(h) a = MatMul(h, u) b = MatMul({}, v) y = Add(a, b) }}"""


def test_layers_that_read_one_value_share_its_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    add, counts, found = Seen.add, list[int](), list[list[Any]]()

    def counted(seen: Seen, wanted: Any, rounded: Any) -> None:
        counts[-1] += 1
        add(seen, wanted, rounded)

    monkeypatch.setattr(Seen, "add", counted)
    for read in ("k", "h"):
        model = graphs.graph(SIDE.format(read))
        counts.append(0)
        fits.run(model, f"{DECIDE},gptaq", fits.correlated(model))
        decided = [(layer.weight.value, layer.weight.spec) for layer in graph.layers(model)]
        found.append([decisions.codes(model, v, s).tolist() for v, s in decided if s is not None])
    assert found[0] == found[1] and len(found[0]) == 3
    assert 2 * counts[0] == 3 * counts[1] > 0


def test_what_no_layer_reads_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    append, kept = Spill.append, set[str]()

    def watched(file: Spill, arrays: Sample) -> None:
        kept.update(arrays)
        append(file, arrays)

    monkeypatch.setattr(Spill, "append", watched)
    model = graphs.graph(graphs.CHAIN)
    data = fits.correlated(model)
    fits.run(model, f"{DECIDE},gptaq", data)
    assert kept and not kept & {value.name for value in model.graph.outputs}


def test_what_it_cannot_fit_is_left_and_counted() -> None:
    shared = """(float[2,8] x, float[2,8] z) => (float[2,3] y) <float[8,3] w> {
        a = MatMul(x, w) b = MatMul(z, w) y = Add(a, b) }"""
    for source, options, left in ((shared, "", 2), (graphs.CHAIN, "{exclude=*}", 2)):
        model = graphs.graph(source)
        data = fits.correlated(model)
        fits.run(model, DECIDE, data)
        before = text.render(model, weights=True)
        [step] = fits.run(model, f"gptaq{options}", data)
        assert step.counters == {"layers": 0, "left alone": left, "blends": 0}
        assert text.render(model, weights=True) == before


def test_an_operator_that_torch_lacks_is_run_all_the_same() -> None:
    model = graphs.graph("""(float[1,4,8,8] x) => (float[2,4,4,4] y) <float[4,4,3,3] u,
        float[2,4] r = {0,0,4,4,1,1,6,6}, int64[2] i = {0,0}, float[4,4,1,1] w> {
        a = Conv<pads=[1,1,1,1]>(x, u) g = RoiAlign<output_height=4,output_width=4>(a, r, i)
        y = Conv(g, w) }""")
    *_, step = fits.run(model, f"{DECIDE},gptaq", fits.correlated(model))
    assert step.counters["layers"] == 2


def test_a_state_goes_through_the_frames() -> None:
    model, data = fits.matting(2)
    plain, reference = model.clone(), model.clone()
    fits.run(plain, fits.FOUR, data)
    fits.run(model, f"{fits.FOUR},gptaq{{samples=8 rows=64}}", data)
    judges = data.judges
    assert fits.noise(reference, model, judges) < fits.noise(reference, plain, judges)


BLOCKS = "simplify,fold-bn,quantize{weight=int4 input=float granularity=block block=16}"


@pytest.mark.parametrize("target", [OrtCpu(), TensorRtRtx()], ids=str)
def test_scales_below_zero_are_of_weights_alone_on_targets_that_take_them(
    target: Target, tmp_path: pathlib.Path
) -> None:
    model, data = fits.shipped(fashion.VIT), fits.calibration(24)
    fits.run(model, f"{BLOCKS},gptaq{{samples=8 rows=32 rescale=true}}", data, target)
    scales = [
        graph.constant(model.graph.initializers[decided.scale])
        for layer in graph.layers(model)
        if (decided := layer.weight.spec) is not None
    ]
    negative = sum(int((scale < 0).sum()) for scale in scales)
    assert (negative > 0) == (target.name == "ort-cpu")
    if target.name == "ort-cpu":  # as the runtime computes it
        lowered = model.clone()
        target.lower(lowered)
        expected, judges = simulate.simulate(model, target), data.judges[:4]
        execute.save(lowered, tmp_path / "model.onnx")
        actual = execute.Session(tmp_path / "model.onnx")
        for sample in judges:
            for name, array in expected.run(sample).items():
                # Its kernel rounds inputs to 8 bits, a block at a time.
                assert simulate.sqnr(array, actual.run(sample)[name]) > 40


# -- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0.0}, "damping must be above 0, got 0"),
        ({"samples": 0}, "samples starts at 1, got 0"),
        ({"rows": -1}, "rows starts at 1, got -1"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        Gptaq(**options)


def test_its_text_reads_back() -> None:
    step = Gptaq(samples=8, exclude=("a", "*/b"))
    assert str(step) == "gptaq{samples=8 exclude=a,*/b}"
    assert pipeline.parse(str(step), registry.passes()) == [step]
