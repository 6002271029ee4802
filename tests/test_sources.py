"""Sources that fit a model, and those that are refused in words."""

from __future__ import annotations

import pathlib
import sys
import types
from collections.abc import Iterator
from typing import Any, cast

import graphs
import numpy as np
import numpy.typing as npt
import pytest

from qcompile import sources
from qcompile.errors import CalibrationError, CaptureError
from qcompile.sources import Data, Input, Sample

Array = npt.NDArray[Any]

X = Input("x", np.dtype(np.float32), (None, 3))
FIXED = Input("x", np.dtype(np.float32), (2, 3))
MASK = Input("mask", np.dtype(np.int64), (1, 4))


def numbers(*shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


def archive(folder: pathlib.Path, **arrays: Array) -> str:
    path = folder / "data.npz"
    np.savez(path, **cast("dict[str, Any]", arrays))
    return str(path)


def test_a_leading_axis_counts_samples(tmp_path: pathlib.Path) -> None:
    x = numbers(5, 2, 3)
    data = sources.load(archive(tmp_path, x=x), [X])
    assert len(data.samples) == 5
    np.testing.assert_array_equal(data.samples[4]["x"], x[4])


def test_a_dynamic_batch_axis_is_cut_into_single_samples(tmp_path: pathlib.Path) -> None:
    x = numbers(5, 3)
    data = sources.load(archive(tmp_path, x=x), [X])
    assert [s["x"].shape for s in data.samples] == [(1, 3)] * 5
    np.testing.assert_array_equal(np.concatenate([s["x"] for s in data.samples]), x)


def test_a_fixed_batch_axis_is_cut_into_whole_batches(tmp_path: pathlib.Path) -> None:
    x = numbers(6, 3)
    data = sources.load(archive(tmp_path, x=x), [FIXED])
    assert [s["x"].shape for s in data.samples] == [(2, 3)] * 3
    np.testing.assert_array_equal(data.samples[1]["x"], x[2:4])


def test_an_array_of_exactly_the_shape_is_a_constant(tmp_path: pathlib.Path) -> None:
    mask = np.arange(4).reshape(1, 4)
    data = sources.load(archive(tmp_path, x=numbers(5, 2, 3), mask=mask), [X, MASK])
    assert len(data.samples) == 5
    assert all(np.array_equal(s["mask"], mask) for s in data.samples)


def test_only_constants_are_one_sample(tmp_path: pathlib.Path) -> None:
    assert len(sources.load(archive(tmp_path, x=numbers(2, 3)), [FIXED]).samples) == 1


def test_floats_of_another_width_are_converted(tmp_path: pathlib.Path) -> None:
    data = sources.load(archive(tmp_path, x=numbers(2, 1, 3).astype(np.float64)), [X])
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
        sources.load(archive(tmp_path, **arrays), [X])
    for word in words:
        assert word in str(error.value)


def test_arrays_with_different_numbers_of_samples_are_refused(tmp_path: pathlib.Path) -> None:
    source = archive(tmp_path, x=numbers(5, 1, 3), mask=np.zeros((4, 1, 4), np.int64))
    with pytest.raises(CalibrationError, match=r"different numbers of samples.*5.*4"):
        sources.load(source, [X, MASK])


def test_a_file_that_is_no_archive_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "broken.npz"
    path.write_bytes(b"not a zip file")
    with pytest.raises(CalibrationError, match=r"not a readable \.npz"):
        sources.load(str(path), [X])


def test_pickled_objects_are_not_read(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "objects.npz"
    np.savez(path, x=np.array([object()], dtype=object))
    with pytest.raises(CalibrationError, match=r"not a readable \.npz"):
        sources.load(str(path), [X])


def test_a_file_of_another_kind_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "pictures.txt"
    path.write_text("")
    with pytest.raises(CalibrationError, match=r"no .npz file; a source is"):
        sources.load(str(path), [X])


@pytest.mark.parametrize("name", ["missing.npz", "missing"])
def test_a_missing_file_is_named(tmp_path: pathlib.Path, name: str) -> None:
    path = str(tmp_path / name)
    with pytest.raises(CalibrationError, match=f"there is no file '{path}'"):
        sources.load(path, [X])


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
    assert len(sources.load(f"{module}:{name}", [X]).samples) == count


def test_an_iterable_is_a_source() -> None:
    assert len(sources.load(stream(), [X]).samples) == 3
    assert len(sources.load(LISTED, [X]).samples) == 2


def test_a_source_that_is_not_iterable_is_refused(module: str) -> None:
    with pytest.raises(CalibrationError, match=r"must yield dicts of arrays.*int"):
        sources.load(f"{module}:number", [X])


@pytest.mark.parametrize("name", ["no_such_module:x", "sys:no_such_name"])
def test_a_source_that_cannot_be_imported_is_refused(name: str) -> None:
    with pytest.raises((CalibrationError, CaptureError), match="calibration source"):
        sources.load(name, [X])


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
        sources.load(source, [X])


def test_random_data_is_marked_and_depends_on_the_seed() -> None:
    one, same, other = (sources.load("random", [X, MASK], seed) for seed in (1, 1, 2))
    assert one.random and not sources.load(LISTED, [X]).random
    assert one.digest == same.digest != other.digest


def test_the_digest_depends_on_every_number() -> None:
    changed = [dict(sample) for sample in LISTED]
    changed[1]["x"] = changed[1]["x"] + np.float32(1e-3)
    assert Data("a", LISTED).digest == Data("b", LISTED).digest != Data("a", changed).digest


def test_inputs_say_what_a_sample_must_hold() -> None:
    model = graphs.graph("(float[N,3] x, int64[2] i) => (float[N,3] y) { y = Identity(x) }")
    assert [str(i) for i in sources.inputs_of(model)] == ["x: float32[?,3]", "i: int64[2]"]
