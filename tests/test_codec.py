"""The image codec: its rate and distortion, the BD-rate, the shipped networks, bits for them."""

from __future__ import annotations

import functools
import itertools
import pathlib
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from command import Command

from qcompile import capture, decisions, execute, graph, pareto, pipeline, registry, sensitivity
from qcompile.assignment import Assigner
from qcompile.backends.onnxruntime import OrtCpu
from qcompile.budget import Budget
from qcompile.calibrate import Calibration
from qcompile.candidates import Costs, Items
from qcompile.deciding import Weights
from qcompile.errors import CalibrationError
from qcompile.models import codec
from qcompile.models.codec import Quality
from qcompile.pipeline import Context
from qcompile.ports import inputs_of
from qcompile.sources import load


@functools.cache
def shipped(name: str) -> ir.Model:
    return capture.capture(str(codec.path(name)))


@functools.cache
def coded(name: str) -> tuple[dict[str, Any], ...]:
    """What the shipped network gives for each calibration crop."""
    session = execute.Session(shipped(name).clone())
    return tuple(session.run(sample) for sample in codec.calibration())


def qualities() -> list[Quality]:
    """The mean over the calibration crops at each point."""
    images = [sample["image"] for sample in codec.calibration()]
    return [codec.mean(map(codec.quality, images, coded(name))) for name in codec.MODELS]


CURVE = [Quality(0.2, 100.0), Quality(0.35, 60.0), Quality(0.6, 35.0), Quality(1.0, 20.0)]


# -- rate, distortion and what lies between two curves ------------------------------------------


def test_a_curve_against_itself_loses_nothing() -> None:
    assert codec.bd_rate(CURVE, CURVE) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("factor", [0.5, 1.01, 2.0])
def test_rates_times_a_factor_are_that_bd_rate(factor: float) -> None:
    other = [Quality(factor * point.bpp, point.mse) for point in CURVE]
    assert codec.bd_rate(CURVE, other) == pytest.approx(100 * (factor - 1))


def test_the_bd_rate_counts_shared_psnr_alone() -> None:
    """Outside of what both reach, a curve may do what it likes."""
    other = [Quality(2 * point.bpp, point.mse) for point in CURVE[1:3]]
    shared = [codec.bd_rate(CURVE[1:3], other), codec.bd_rate(CURVE[1:3], [*other, Quality(9, 1)])]
    assert shared[0] == pytest.approx(100)
    assert shared[1] == pytest.approx(100, abs=5)  # the new end bends the cubic


def test_the_bd_rate_is_that_of_the_swapped_curves_inverted() -> None:
    other = [Quality(1.3 * p.bpp**1.1, p.mse * 1.05) for p in CURVE]
    there, back = codec.bd_rate(CURVE, other), codec.bd_rate(other, CURVE)
    assert (1 + there / 100) * (1 + back / 100) == pytest.approx(1)


def test_curves_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"share no PSNR: 28\.13 to 35\.12 dB and 38\.13"):
        codec.bd_rate(CURVE, [Quality(p.bpp, p.mse / 10) for p in CURVE][:2])
    with pytest.raises(CalibrationError, match="2 or more points whose PSNR rises, got 28"):
        codec.bd_rate(CURVE[:1], CURVE)
    with pytest.raises(CalibrationError, match=r"PSNR rises, got 28\.13 dB at 0\.200 bpp, 27"):
        codec.bd_rate([CURVE[0], Quality(0.3, 120.0)], CURVE)


def test_rate_is_minus_log2_of_likelihoods_a_pixel() -> None:
    image = np.zeros((2, 3, 8, 8), np.float32)
    outputs = {
        "reconstruction": image + np.float32(2 / 255),
        "y_likelihoods": np.full((2, 4, 2, 2), 0.25, np.float32),
        "z_likelihoods": np.full((2, 1, 1, 1), 0.5, np.float32),
    }
    found = codec.quality(image, outputs)
    assert found.bpp == pytest.approx((2 * 32 + 2) / (2 * 64))
    assert found.mse == pytest.approx(4)
    assert found.psnr == pytest.approx(20 * np.log10(255 / 2))
    loss = codec.RateDistortion(0.1)([({"image": image}, outputs)])
    assert loss == pytest.approx(found.bpp + 0.1 * found.mse)


def test_a_model_that_is_no_codec_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"has the outputs \['y_likelihoods', 'z_like"):
        codec.quality(np.zeros((1, 3, 8, 8)), {"reconstruction": np.zeros((1, 3, 8, 8))})


# -- the shipped networks -----------------------------------------------------------------------


@pytest.mark.parametrize("name", codec.MODELS)
def test_likelihoods_are_those_of_rounded_latents(name: str) -> None:
    for outputs in coded(name):
        for each in codec.LIKELIHOODS:
            assert outputs[each].min() > 0
            assert outputs[each].max() <= 1


def test_rate_and_psnr_rise_over_the_points() -> None:
    found = qualities()
    assert all(a.bpp < b.bpp and a.mse > b.mse for a, b in itertools.pairwise(found))


def test_each_network_is_the_best_of_all_at_its_own_loss() -> None:
    found = qualities()
    for number, trade in enumerate(codec.TRADES):
        losses = [each.bpp + trade * each.mse for each in found]
        assert int(np.argmin(losses)) == number


def test_the_metric_of_a_point_is_its_loss() -> None:
    runs = zip(codec.calibration(), coded(codec.MODELS[2]), strict=True)
    found = qualities()[2]
    loss = codec.rate_distortion_3(runs)
    assert loss == pytest.approx(found.bpp + codec.TRADES[2] * found.mse)


def test_the_files_are_small() -> None:
    assert sum(codec.path(name).stat().st_size for name in codec.MODELS) < 3e6
    with pytest.raises(FileNotFoundError, match=r"no shipped file 'codec_5\.onnx'"):
        codec.path("codec_5.onnx")


def test_no_picture_is_in_two_splits() -> None:
    names = [name for split in codec.PICTURES.values() for name in split]
    assert len(names) == len(set(names))


def test_crops_depend_on_split_draw_and_number_alone() -> None:
    pytest.importorskip("skimage")
    some, more = (list(codec.crops("calibration", count)) for count in (2, 6))
    other = list(codec.crops("calibration", 6, draw=1))
    np.testing.assert_array_equal(some, more[:2])
    for one, two in itertools.combinations([*more, *other], 2):
        assert np.abs(one - two).mean() > 0.01
    shipped_first = next(iter(codec.calibration()))["image"]
    np.testing.assert_array_equal(shipped_first[0], some[0])


def test_a_picture_too_small_for_a_crop_is_refused() -> None:
    pytest.importorskip("PIL")
    with pytest.raises(CalibrationError, match="128 or more pixels a side, got 127x300"):
        codec.crop(np.zeros((127, 300, 3), np.uint8), np.random.default_rng(0))


# -- bits for them ------------------------------------------------------------------------------


def assigned(budget: float, options: str, point: int = 1) -> tuple[ir.Model, dict[str, Any]]:
    model = shipped(codec.MODELS[point - 1])
    text = (
        f"assign-bits{{budget=bits={budget:g} choices=2,3,4,5,6,7,8 samples=4 {options} "
        f"metric=qcompile.models.codec:rate_distortion_{point}}}"
    )
    decided = model.clone()
    context = Context(calibration=shared(point), target=OrtCpu(), reference=model)
    [done] = pipeline.run(decided, pipeline.parse(text, registry.passes()), context)
    return decided, dict(done.counters)


@functools.cache
def shared(point: int) -> Calibration:
    """One calibration, so that costs are measured once."""
    inputs = inputs_of(shipped(codec.MODELS[point - 1]))
    return Calibration(load(str(codec.path(codec.CALIBRATION)), inputs))


def bits(decided: ir.Model) -> float:
    return pareto.bits_of(shipped(codec.MODELS[0]), decided)


def test_fmpq_stays_within_budgets_and_sizes_fall_with_them() -> None:
    budgets = (2.5, 3, 3.5, 4, 6)
    found = [bits(assigned(budget, "method=fmpq")[0]) for budget in budgets]
    assert all(one <= budget for one, budget in zip(found, budgets, strict=True))
    assert found == sorted(found)


def test_fmpq_runs_less_than_the_whole_table() -> None:
    inputs = inputs_of(shipped(codec.MODELS[1]))
    own = Calibration(load(str(codec.path(codec.CALIBRATION)), inputs))
    model = shipped(codec.MODELS[1])
    text = (
        "assign-bits{budget=bits=4 choices=2,3,4,5,6,7,8 samples=2 method=fmpq "
        "metric=qcompile.models.codec:rate_distortion_2}"
    )
    context = Context(calibration=own, target=OrtCpu(), reference=model)
    [done] = pipeline.run(model.clone(), pipeline.parse(text, registry.passes()), context)
    assert 0 < float(done.counters["forward passes"]) < 84  # 12 weights of 7 widths


def test_costs_of_the_solver_rise_with_fewer_bits_though_the_loss_is_noisy() -> None:
    model, widths = shipped(codec.MODELS[0]).clone(), (2, 3, 4, 5, 6, 7, 8)
    context = Context(calibration=shared(1), target=OrtCpu(), reference=model)
    how = Weights("int8", method="mse")
    items = Items(model, list(graph.layers(model)), widths, how, context)
    metric = sensitivity.metric("qcompile.models.codec:rate_distortion_1")
    samples = context.data().samples.some(4)
    costs = Costs(items, sensitivity.Sensitivity(model, samples, metric))
    Assigner(costs, [Budget("bits", 4)], full=True)
    measured = [costs.guess(item, n) for item in range(len(items)) for n in range(len(widths))]
    assert min(measured) < 0, "the loss of some rounded weights is below that of float"
    for row in costs.table():
        assert (row > 0).all()
        assert (np.diff(row) >= 0).all()


def test_fmpq_loses_less_of_the_loss_than_one_width() -> None:
    """At 3 bits, on the crops that chose: that others agree is the benchmark's business."""
    model, _ = assigned(3, "method=fmpq")
    one = shipped(codec.MODELS[0]).clone()
    steps = pipeline.parse("quantize{weight=int3 input=float method=mse}", registry.passes())
    pipeline.run(one, steps, Context(target=OrtCpu()))
    losses: list[float] = []
    for decided in (model, one):
        for layer in list(graph.layers(decided)):
            assert layer.weight.spec is not None
            array = decisions.rounded(decided, layer.weight.value, layer.weight.spec)
            layer.weight.read_from(graph.add_constant(decided, "rounded", array))
        session = execute.Session(decided)
        runs = ((sample, session.run(sample)) for sample in codec.calibration())
        losses.append(codec.rate_distortion_1(runs))
    assert losses[0] < losses[1]


def test_the_command_line_takes_loss_and_crops(tmp_path: pathlib.Path, qcompile: Command) -> None:
    result = qcompile(
        str(codec.path(codec.MODELS[0])), "--calib", str(codec.path(codec.CALIBRATION)),
        "--passes", "quantize{weight=int8 input=float},insert-qdq", "-o", str(tmp_path),
        "--eval", "qcompile.models.codec:calibration",
        "--metric", "qcompile.models.codec:rate_distortion_1",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "rate_distortion_1" in result.out


# -- training -----------------------------------------------------------------------------------


def test_the_masses_of_a_density_add_up() -> None:
    torch: Any = pytest.importorskip("torch")
    from qcompile.models import train_codec

    numbers = torch.arange(-400, 401, dtype=torch.float64)
    for scale in (0.05, 0.7, 20.0):
        for shift in (0.0, 0.3):
            each = train_codec.likelihood(numbers + shift, torch.tensor(scale))
            assert float(each.sum()) == pytest.approx(1, abs=1e-6)


def test_an_exported_network_is_that_of_torch(tmp_path: pathlib.Path) -> None:
    torch: Any = pytest.importorskip("torch")
    pytest.importorskip("skimage")
    from qcompile.models import train_codec

    torch.manual_seed(0)
    model = train_codec.Codec().eval()
    images = np.stack(list(codec.crops("calibration", 4)))
    model.start(torch.from_numpy(np.round(images * 255)).byte())
    train_codec.export(model, tmp_path / "codec.onnx")  # which compares
    found = execute.Session(capture.capture(str(tmp_path / "codec.onnx"))).run({"image": images})
    wanted = train_codec.evaluate(model, "calibration", 4)
    assert codec.quality(images, found).bpp == pytest.approx(wanted.bpp, rel=1e-3)
    assert codec.quality(images, found).mse == pytest.approx(wanted.mse, rel=1e-3)


def test_training_goes_on_where_it_was_stopped(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch: Any = pytest.importorskip("torch")
    from qcompile.models import train_codec

    monkeypatch.setattr(train_codec, "KEPT", 2)
    rows = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    good = Quality(1.0, 1.0)

    def trained(name: str, stop: bool) -> dict[str, Any]:
        torch.manual_seed(3)
        model = train_codec.Codec()
        model.start(rows)
        stops = iter([stop, False, False])

        def evaluate(*_: Any) -> Quality:
            if next(stops):
                raise KeyboardInterrupt
            return good

        monkeypatch.setattr(train_codec, "evaluate", evaluate)
        for _ in range(1 + stop):
            try:
                train_codec.train(model, 0.01, rows, 4, 1e-3, 5, tmp_path / name)
            except KeyboardInterrupt:
                model = train_codec.Codec()
        return model.state_dict()

    whole, halves = trained("whole.pt", False), trained("halves.pt", True)
    for name, array in whole.items():
        np.testing.assert_array_equal(array.numpy(), halves[name].numpy())
