"""Statistics equal to numpy's, judges kept apart, a cache that is keyed by content."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import graphs
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qcompile import calibrate, execute
from qcompile.calibrate import Calibration, Histogram, MinMax, Moments
from qcompile.errors import CalibrationError
from qcompile.sources import Data, Sample

Array = npt.NDArray[Any]

TWO_LAYERS = """(float[N,4] x) => (float[N,2] y) <float[4,3] w1, float[3,2] w2> {
    h = MatMul(x, w1)
    r = Relu(h)
    y = MatMul(r, w2)
}"""
PICTURE = """(float[N,2,4,4] x) => (float[N,3,4,4] y) <float[3,2,1,1] w> {
    y = Conv(x, w)
}"""


def numbers(*shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


# -- judges -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "judges"), [(5, 1), (20, 4), (80, 16), (200, 16)])
def test_judges_are_apart_from_samples(count: int, judges: int) -> None:
    samples: list[Sample] = [{"x": np.full(1, i, np.float32)} for i in range(count)]
    calibration = Calibration(Data("test", samples))
    assert calibration.apart
    assert len(calibration.judges) == judges
    assert calibration.samples + calibration.judges == samples


def test_too_few_samples_judge_themselves_and_say_so() -> None:
    listed: list[Sample] = [{"x": numbers(1, 3)}, {"x": numbers(2, 3)}]
    calibration = Calibration(Data("test", listed))
    assert not calibration.apart
    assert calibration.samples == calibration.judges == listed


# -- statistics ---------------------------------------------------------------------------------


def calibrated(text: str, count: int = 10) -> tuple[ir.Model, Calibration]:
    model = graphs.graph(text)
    return model, Calibration(Data("test", graphs.samples(model, count)))


def every(model: ir.Model, calibration: Calibration, value: str) -> list[Array]:
    """What ``value`` holds for each calibration sample."""
    return [execute.execute(model, sample, [value])[value] for sample in calibration.samples]


@pytest.mark.parametrize("value", ["x", "h", "r", "y"])
def test_min_max_equals_numpy_over_all_samples(value: str) -> None:
    model, calibration = calibrated(TWO_LAYERS)
    found = calibration.stats(model, [value], "minmax")[value]
    assert isinstance(found, MinMax)
    arrays = every(model, calibration, value)
    # The optimized runtime may sum in another order.
    assert found.low == pytest.approx(min(a.min() for a in arrays), rel=1e-6)
    assert found.high == pytest.approx(max(a.max() for a in arrays), rel=1e-6)


def test_the_judges_are_not_observed() -> None:
    model = graphs.graph(TWO_LAYERS)
    samples = graphs.samples(model, 10)
    for sample in samples[8:]:
        sample["x"] *= 100
    found = Calibration(Data("test", samples)).stats(model, ["x"], "minmax")["x"]
    assert isinstance(found, MinMax) and found.high < 10


def test_a_value_that_is_always_empty_has_the_range_zero() -> None:
    model = graphs.graph("(float[N,2] x) => (float[N,2] y) { y = Relu(x) }")
    samples = [{"x": np.zeros((0, 2), np.float32)}] * 3
    found = Calibration(Data("test", samples)).stats(model, ["x", "y"], "minmax")
    assert found == {"x": MinMax(0.0, 0.0), "y": MinMax(0.0, 0.0)}


@pytest.mark.parametrize("value", ["x", "r"])
def test_a_histogram_counts_every_element_between_the_extremes(value: str) -> None:
    model, calibration = calibrated(TWO_LAYERS)
    found = calibration.stats(model, [value], "histogram")[value]
    assert isinstance(found, Histogram)
    numbers = np.concatenate([a.ravel() for a in every(model, calibration, value)])
    assert found.counts.sum() == numbers.size
    assert len(found.counts) == calibrate.BINS == len(found.edges) - 1
    wanted, _ = np.histogram(numbers.astype(np.float64), found.edges)
    # A number within rounding of an edge may fall on either side of it.
    assert np.abs(np.cumsum(found.counts) - np.cumsum(wanted)).max() <= 1


def test_a_constant_value_has_a_histogram() -> None:
    model = graphs.graph("(float[N,2] x) => (float[N,2] y) { z = Sub(x, x) y = Relu(z) }")
    calibration = Calibration(Data("test", graphs.samples(model, 3)))
    found = calibration.stats(model, ["z"], "histogram")["z"]
    assert isinstance(found, Histogram) and found.counts.sum() == 12


@pytest.mark.parametrize(
    ("text", "value", "axes"), [(TWO_LAYERS, "h", (0,)), (PICTURE, "y", (0, 2, 3))]
)
def test_moments_equal_numpy_per_channel(text: str, value: str, axes: tuple[int, ...]) -> None:
    model, calibration = calibrated(text)
    found = calibration.stats(model, [value], "moments")[value]
    assert isinstance(found, Moments)
    whole = np.concatenate(every(model, calibration, value)).astype(np.float64)
    np.testing.assert_allclose(found.mean, whole.mean(axis=axes), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.variance, whole.var(axis=axes), rtol=1e-5)
    assert found.count == whole.size // whole.shape[1]


def test_moments_of_rank_3_are_of_the_last_axis() -> None:
    model, calibration = calibrated("(float[N,3,4] x) => (float[N,3,4] y) { y = Relu(x) }")
    found = calibration.stats(model, ["y"], "moments")["y"]
    assert isinstance(found, Moments) and found.mean.shape == (4,)


@pytest.mark.parametrize("observer", ["minmax", "histogram", "moments"])
def test_nan_inside_the_model_names_value_and_sample(observer: calibrate.Observer) -> None:
    model = graphs.graph("(float[N,2] x) => (float[N,2] y) { l = Sqrt(x) y = Relu(l) }")
    samples = [{"x": np.abs(s["x"]) + 1} for s in graphs.samples(model, 10)]
    samples[3]["x"] = -samples[3]["x"]
    with pytest.raises(CalibrationError, match="value 'l' has NaN or infinity for sample 3"):
        Calibration(Data("test", samples)).stats(model, ["x", "l"], observer)


@pytest.mark.parametrize("place", [0, 37, 63])
def test_one_nan_among_numbers_is_found(place: int) -> None:
    # ONNX Runtime's ReduceMin and ReduceMax pass over a NaN that is not alone.
    model = graphs.graph("(float[1,64] x) => (float[1,64] y) { l = Sqrt(x) y = Relu(l) }")
    x = np.ones((1, 64), np.float32)
    x[0, place] = -1.0
    with pytest.raises(CalibrationError, match="value 'l' has NaN"):
        Calibration(Data("test", [{"x": x}])).stats(model, ["l"], "minmax")


# -- the cache ----------------------------------------------------------------------------------


def counted(calibration: Calibration) -> list[str]:
    """The labels of the sweeps that ``calibration`` makes from now on."""
    sweeps: list[str] = []

    def progress(items: Iterable[Any], label: str) -> Iterable[Any]:
        sweeps.append(label)
        return items

    calibration._progress = progress  # pyright: ignore[reportPrivateUsage]
    return sweeps


def test_one_request_is_one_sweep_and_a_repeated_one_is_none() -> None:
    model, calibration = calibrated(TWO_LAYERS)
    sweeps = counted(calibration)
    first = calibration.stats(model, ["x", "h", "r"], "minmax")
    assert sweeps == ["ranges"]
    assert calibration.stats(model, ["h", "x"], "minmax") == {v: first[v] for v in ("h", "x")}
    assert sweeps == ["ranges"]
    calibration.stats(model, ["h", "y"], "minmax")
    assert sweeps == ["ranges", "ranges"]


def rename(model: ir.Model) -> None:
    next(v for n in model.graph for v in n.outputs if v.name == "h").name = "other"


def set_weight(model: ir.Model) -> None:
    array = graphs.weight(model, "w1") * 2
    model.graph.initializers["w1"].const_value = ir.Tensor(array, name="w1")


def set_later_weight(model: ir.Model) -> None:
    array = graphs.weight(model, "w2") * 2
    model.graph.initializers["w2"].const_value = ir.Tensor(array, name="w2")


@pytest.mark.parametrize(
    ("edit", "same"), [(rename, True), (set_weight, False), (set_later_weight, True)]
)
def test_the_key_of_a_value_is_the_content_that_computes_it(
    edit: Callable[[ir.Model], None], same: bool
) -> None:
    model, calibration = calibrated(TWO_LAYERS)
    before = calibrate.content_keys(model)["r"]
    sweeps = counted(calibration)
    calibration.stats(model, ["r"], "minmax")
    edit(model)
    assert (calibrate.content_keys(model)["r"] == before) == same
    calibration.stats(model, ["r"], "minmax")
    assert len(sweeps) == (1 if same else 2)


def test_attributes_count_for_the_key() -> None:
    one = graphs.graph("(float[2,4] x) => (float[2,4] y) { y = Softmax<axis=0>(x) }")
    other = graphs.graph("(float[2,4] x) => (float[2,4] y) { y = Softmax<axis=1>(x) }")
    assert calibrate.content_keys(one)["y"] != calibrate.content_keys(other)["y"]


def test_shapes_are_those_of_the_first_sample() -> None:
    model, calibration = calibrated(TWO_LAYERS)
    assert calibration.shapes(model) == {"x": (2, 4), "h": (2, 3), "r": (2, 3), "y": (2, 2)}


# -- memory -------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
import numpy as np
import onnx_ir as ir
from qcompile.calibrate import Calibration
from qcompile.sources import Data

model = ir.from_onnx_text(sys.argv[1])
sample = {"x": np.ones((1, 1 << 18), np.float32)}
data = Data("test", [sample] * int(sys.argv[2]))
calibration = Calibration(data)
values = [f"v{i}" for i in range(4)]
for observer in ("minmax", "histogram", "moments"):
    calibration.stats(model, values, observer)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_number_of_samples() -> None:
    nodes = " ".join(f"v{i} = Relu({'x' if i == 0 else f'v{i - 1}'})" for i in range(4))
    text = f"""<ir_version: 10, opset_import: ["": 21]>
        g (float[1,262144] x) => (float[1,262144] v3) {{ {nodes} }}"""
    peaks = [
        int(subprocess.check_output([sys.executable, "-c", MEASURE, text, str(count)]))
        for count in (16, 96)
    ]
    # Kept activations of the 64 further samples would be 256 MiB of about 200.
    assert peaks[1] < 1.15 * peaks[0]
