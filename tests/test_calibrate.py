"""Calibration: sources that fit or are refused in words, and statistics equal to numpy's."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import graphs
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qcompile import calibrate, execute
from qcompile.calibrate import Calibration, Data, Histogram, Input, MinMax, Moments, Sample
from qcompile.errors import CalibrationError, CaptureError

Array = npt.NDArray[Any]

X = Input("x", np.dtype(np.float32), (None, 3))
FIXED = Input("x", np.dtype(np.float32), (2, 3))
MASK = Input("mask", np.dtype(np.int64), (1, 4))

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


def archive(folder: pathlib.Path, **arrays: Array) -> str:
    path = folder / "data.npz"
    np.savez(path, **cast("dict[str, Any]", arrays))
    return str(path)


# -- sources ------------------------------------------------------------------------------------


def test_a_leading_axis_counts_samples(tmp_path: pathlib.Path) -> None:
    x = numbers(5, 2, 3)
    data = calibrate.load(archive(tmp_path, x=x), [X])
    assert len(data.samples) == 5
    np.testing.assert_array_equal(data.samples[4]["x"], x[4])


def test_a_dynamic_batch_axis_is_cut_into_single_samples(tmp_path: pathlib.Path) -> None:
    x = numbers(5, 3)
    data = calibrate.load(archive(tmp_path, x=x), [X])
    assert [s["x"].shape for s in data.samples] == [(1, 3)] * 5
    np.testing.assert_array_equal(np.concatenate([s["x"] for s in data.samples]), x)


def test_a_fixed_batch_axis_is_cut_into_whole_batches(tmp_path: pathlib.Path) -> None:
    x = numbers(6, 3)
    data = calibrate.load(archive(tmp_path, x=x), [FIXED])
    assert [s["x"].shape for s in data.samples] == [(2, 3)] * 3
    np.testing.assert_array_equal(data.samples[1]["x"], x[2:4])


def test_an_array_of_exactly_the_shape_is_a_constant(tmp_path: pathlib.Path) -> None:
    mask = np.arange(4).reshape(1, 4)
    data = calibrate.load(archive(tmp_path, x=numbers(5, 2, 3), mask=mask), [X, MASK])
    assert len(data.samples) == 5
    assert all(np.array_equal(s["mask"], mask) for s in data.samples)


def test_only_constants_are_one_sample(tmp_path: pathlib.Path) -> None:
    assert len(calibrate.load(archive(tmp_path, x=numbers(2, 3)), [FIXED]).samples) == 1


def test_floats_of_another_width_are_converted(tmp_path: pathlib.Path) -> None:
    data = calibrate.load(archive(tmp_path, x=numbers(2, 1, 3).astype(np.float64)), [X])
    assert data.samples[0]["x"].dtype == np.float32


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"y": numbers(2, 3)}, ["no array for input 'x'", "it has y"]),
        ({"x": numbers(2, 3), "xx": numbers(2, 3)}, ["'xx'", "no input", "did you mean 'x'"]),
        ({"x": numbers(2, 4)}, ["'x'", "[1, 4]", "x: float32[?,3]"]),
        ({"x": numbers(3)}, ["'x'", "[3]", "leading sample axis"]),
        ({"x": numbers(2, 2, 2, 3)}, ["'x'", "[2, 2, 2, 3]"]),
        ({"x": np.ones((2, 3), np.int64)}, ["'x'", "int64", "float32"]),
        ({"x": np.array([[1.0, np.nan, 2.0]])}, ["sample 0", "'x'", "NaN"]),
        ({"x": np.array([[1.0, 0, 2], [np.inf, 1, 1]])}, ["sample 1", "'x'", "infinity"]),
        ({"x": numbers(0, 3)}, ["'x'", "no sample"]),
        ({}, ["holds no arrays"]),
    ],
)
def test_an_archive_that_does_not_fit_is_refused(
    tmp_path: pathlib.Path, arrays: dict[str, Array], words: list[str]
) -> None:
    with pytest.raises(CalibrationError) as error:
        calibrate.load(archive(tmp_path, **arrays), [X])
    for word in words:
        assert word in str(error.value)


def test_arrays_with_different_numbers_of_samples_are_refused(tmp_path: pathlib.Path) -> None:
    source = archive(tmp_path, x=numbers(5, 1, 3), mask=np.zeros((4, 1, 4), np.int64))
    with pytest.raises(CalibrationError, match=r"different numbers of samples.*5.*4"):
        calibrate.load(source, [X, MASK])


def test_a_file_that_is_no_archive_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "broken.npz"
    path.write_bytes(b"not a zip file")
    with pytest.raises(CalibrationError, match=r"not a readable \.npz"):
        calibrate.load(str(path), [X])


def test_pickled_objects_are_not_read(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "objects.npz"
    np.savez(path, x=np.array([object()], dtype=object))
    with pytest.raises(CalibrationError, match=r"not a readable \.npz"):
        calibrate.load(str(path), [X])


def test_a_file_of_another_kind_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "pictures.txt"
    path.write_text("")
    with pytest.raises(CalibrationError, match=r"no .npz file; a source is"):
        calibrate.load(str(path), [X])


@pytest.mark.parametrize("name", ["missing.npz", "missing"])
def test_a_missing_file_is_named(tmp_path: pathlib.Path, name: str) -> None:
    path = str(tmp_path / name)
    with pytest.raises(CalibrationError, match=f"there is no file '{path}'"):
        calibrate.load(path, [X])


def stream() -> Iterator[Sample]:
    yield from ({"x": numbers(1, 3)} for _ in range(3))


LISTED: list[Sample] = [{"x": numbers(1, 3)}, {"x": numbers(2, 3)}]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> str:
    made: Any = types.ModuleType("calibration_of_the_user")
    made.stream, made.listed, made.made, made.number = stream, LISTED, stream(), 3
    monkeypatch.setitem(sys.modules, "calibration_of_the_user", made)
    return "calibration_of_the_user"


@pytest.mark.parametrize(("name", "count"), [("stream", 3), ("listed", 2), ("made", 3)])
def test_functions_lists_and_generators_are_sources(module: str, name: str, count: int) -> None:
    assert len(calibrate.load(f"{module}:{name}", [X]).samples) == count


def test_an_iterable_is_a_source() -> None:
    assert len(calibrate.load(stream(), [X]).samples) == 3
    assert len(calibrate.load(LISTED, [X]).samples) == 2


def test_a_source_that_is_not_iterable_is_refused(module: str) -> None:
    with pytest.raises(CalibrationError, match=r"must yield dicts of arrays.*int"):
        calibrate.load(f"{module}:number", [X])


@pytest.mark.parametrize("name", ["no_such_module:x", "sys:no_such_name"])
def test_a_source_that_cannot_be_imported_is_refused(name: str) -> None:
    with pytest.raises((CalibrationError, CaptureError), match="calibration source"):
        calibrate.load(name, [X])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ([], "yields no samples"),
        ([numbers(1, 3)], "sample 0 of 'python' is ndarray, not a dict"),
        ([{"x": numbers(1, 3)}, {"x": numbers(3)}], "sample 1 of 'python'"),
        ({"x": numbers(1, 3)}, "must yield dicts of arrays, one a run; it is dict"),
    ],
)
def test_samples_that_are_none_are_refused(source: Any, words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        calibrate.load(source, [X])


def test_random_data_is_marked_and_depends_on_the_seed() -> None:
    one, same, other = (calibrate.load("random", [X, MASK], seed) for seed in (1, 1, 2))
    assert one.random and not calibrate.load(LISTED, [X]).random
    assert one.digest == same.digest != other.digest


def test_the_digest_depends_on_every_number() -> None:
    changed = [dict(sample) for sample in LISTED]
    changed[1]["x"] = changed[1]["x"] + np.float32(1e-3)
    assert Data("a", LISTED).digest == Data("b", LISTED).digest != Data("a", changed).digest


def test_inputs_say_what_a_sample_must_hold() -> None:
    model = graphs.graph("(float[N,3] x, int64[2] i) => (float[N,3] y) { y = Identity(x) }")
    assert [str(i) for i in calibrate.inputs_of(model)] == ["x: float32[?,3]", "i: int64[2]"]


# -- judges -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "judges"), [(5, 1), (20, 4), (80, 16), (200, 16)])
def test_judges_are_apart_from_samples(count: int, judges: int) -> None:
    samples: list[Sample] = [{"x": np.full(1, i, np.float32)} for i in range(count)]
    calibration = Calibration(Data("test", samples))
    assert calibration.apart
    assert len(calibration.judges) == judges
    assert calibration.samples + calibration.judges == samples


def test_too_few_samples_judge_themselves_and_say_so() -> None:
    calibration = Calibration(Data("test", LISTED))
    assert not calibration.apart
    assert calibration.samples == calibration.judges == LISTED


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
from qcompile.calibrate import Calibration, Data

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
