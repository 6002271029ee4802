"""Sources that fit a model, and those that are refused in words."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile
import types
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import graphs
import numpy as np
import numpy.typing as npt
import pytest

from qcompile import ports, sources
from qcompile.errors import CalibrationError, CaptureError
from qcompile.ports import Port
from qcompile.sequences import Sample, Samples
from qcompile.sources import Data

Array = npt.NDArray[Any]

X = Port("x", np.dtype(np.float32), (None, 3), ("N", ""))
FIXED = Port("x", np.dtype(np.float32), (2, 3))
MASK = Port("mask", np.dtype(np.int64), (1, 4))
RATE = Port("sr", np.dtype(np.int64), ())
STATE = Port("state", np.dtype(np.float32), (2, None, 5), ("", "N", ""))
NEXT = Port("stateN", np.dtype(np.float32), (2, None, 5))
PROBABILITY = Port("p", np.dtype(np.float32), (None, 1))


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
        ({"x": numbers(2, 2, 2, 2, 3)}, ["'x'", "[2, 2, 2, 2, 3]"]),
        ({"x": np.array([["a", "b", "c"]])}, ["'x'", "<U1", "float32"]),
        ({"x": np.ones((2, 3), np.complex64)}, ["'x'", "complex64"]),
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
        ([list[Any]()], "sequence 0 of 'python' has no frames"),
        ([{"x": [[1, 2, 3], [4]]}], "sample 0 of 'python': 'x' is no array"),
        ([[{"x": numbers(1, 3)}, 7]], "frame 1 of sequence 0 of 'python' is int, not a dict"),
        ([{"x": numbers(1, 3) * np.float64(1e300)}], "sample 0 of 'python': 'x' has NaN or inf"),
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
    assert [str(i) for i in ports.inputs_of(model)] == ["x: float32[?,3]", "i: int64[2]"]


def same(actual: Iterable[Sample], wanted: Iterable[Mapping[str, Array]]) -> None:
    """Two collections of samples hold the same arrays."""
    for one, other in zip(actual, wanted, strict=True):
        assert one.keys() == other.keys()
        for name, array in other.items():
            np.testing.assert_array_equal(one[name], array)


# -- laziness -----------------------------------------------------------------------------------


def test_samples_are_a_sequence_that_reads_what_is_asked_for() -> None:
    listed = [{"x": numbers(1 + i % 3, 3) + i, "sr": np.array(i)} for i in range(7)]
    samples = sources.load(iter(listed), [X, RATE]).samples
    assert len(samples) == 7 and len(samples[2:5]) == 3
    same(samples, listed)
    same(samples[2:5], listed[2:5])
    same([samples[-1], samples[5:][0]], [listed[-1], listed[5]])
    assert samples.shapes("x") == [sample["x"].shape for sample in listed]
    assert samples[2:5].shapes("x") == [sample["x"].shape for sample in listed[2:5]]
    with pytest.raises(IndexError):
        samples[7]


def test_what_is_read_is_a_copy() -> None:
    samples = sources.load(LISTED, [X]).samples
    samples[0]["x"] *= 0
    same(samples, LISTED)


def test_a_list_is_as_good_as_a_file() -> None:
    assert Data("a", LISTED).digest == sources.load(LISTED, [X]).digest


def test_the_file_goes_with_the_data(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    data = sources.load(LISTED, [X])
    # Nothing is left behind even if the process is killed now.
    assert not any(tmp_path.iterdir())
    data.samples.close()
    with pytest.raises(ValueError, match="closed file"):
        data.samples[0]


# The high-water mark of this process alone; what getrusage says includes the parent's.
PEAK = """
import re, sys
import numpy as np
from qcompile import sources
from qcompile.ports import Port

port = Port("x", np.dtype(np.float32), (1, 1 << 20))
if sys.argv[1].endswith(".npz"):
    source = sys.argv[1]
else:
    source = ({"x": np.full((1, 1 << 20), i, np.float32)} for i in range(int(sys.argv[1])))
data = sources.load(source, [port])
assert all(sample["x"][0, 0] == i for i, sample in enumerate(data.samples))
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""
LINUX = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")


def peak(source: object) -> int:
    """The most memory, in KiB, of a process that reads ``source`` twice."""
    return int(subprocess.check_output([sys.executable, "-c", PEAK, str(source)]))


@LINUX
def test_memory_does_not_grow_with_the_samples() -> None:
    # 64 MiB and 1 GiB; a few samples of 4 MiB are in memory at a time.
    assert peak(256) - peak(16) < 32 << 10


@LINUX
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_memory_does_not_grow_with_the_archive(tmp_path: pathlib.Path, save: Any) -> None:
    for count in (8, 64):
        x = np.repeat(np.arange(count, dtype=np.float32)[:, None], 1 << 20, axis=1)
        save(tmp_path / f"{count}.npz", x=x)
    assert peak(tmp_path / "64.npz") - peak(tmp_path / "8.npz") < 32 << 10


FULL = """
import resource
import numpy as np
from qcompile import sources
from qcompile.errors import CalibrationError
from qcompile.ports import Port

resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
port = Port("x", np.dtype(np.float32), (1, 1 << 10))
try:
    sources.load(({"x": np.zeros((1, 1 << 10), np.float32)} for _ in range(1000)), [port])
except CalibrationError as error:
    print(error)
"""


def test_a_full_disk_is_said() -> None:
    done = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True, check=True)
    assert "takes no more" in done.stdout and "set TMPDIR to one with room" in done.stdout
    assert done.stderr == ""


# -- archives -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ">f4"])
def test_a_streamed_archive_equals_the_loaded_one(
    tmp_path: pathlib.Path, order: Any, dtype: Any
) -> None:
    x = np.asarray(numbers(5, 2, 3).astype(dtype), order=order)
    source = archive(tmp_path, x=x, mask=np.arange(20).reshape(5, 1, 4))
    with np.load(source) as loaded:
        wanted = [
            {"x": x.astype(np.float32), "mask": m} for x, m in zip(*loaded.values(), strict=True)
        ]
    same(sources.load(source, [X, MASK]).samples, wanted)


def test_a_scalar_of_a_scalar_input_is_a_constant(tmp_path: pathlib.Path) -> None:
    rate = np.array(16000)
    samples = sources.load(archive(tmp_path, x=numbers(5, 1, 3), sr=rate), [X, RATE]).samples
    same(samples, [{"x": x, "sr": rate} for x in numbers(5, 1, 3)])


def test_one_batch_beside_samples_is_a_constant_and_as_many_are_samples(
    tmp_path: pathlib.Path,
) -> None:
    other = Port("t", np.dtype(np.float32), (None, 2))
    table, x = numbers(1, 2), numbers(5, 1, 3)
    samples = sources.load(archive(tmp_path, x=x, t=table), [X, other]).samples
    same(samples, [{"x": row, "t": table} for row in x])
    samples = sources.load(archive(tmp_path, x=x, t=numbers(5, 2)), [X, other]).samples
    same(samples, [{"x": row, "t": t[None]} for row, t in zip(x, numbers(5, 2), strict=True)])
    with pytest.raises(CalibrationError, match=r"different numbers of samples.*'x': 5.*'t': 4"):
        sources.load(archive(tmp_path, x=x, t=numbers(4, 2)), [X, other])


def test_an_archive_that_is_cut_short_is_refused(tmp_path: pathlib.Path) -> None:
    whole = pathlib.Path(archive(tmp_path, x=numbers(500, 1, 3)))
    with zipfile.ZipFile(whole) as good:
        content = good.read("x.npy")
    with zipfile.ZipFile(tmp_path / "cut.npz", "w") as cut:
        cut.writestr("x.npy", content[:-100])
    with pytest.raises(CalibrationError, match=r"not a readable \.npz: an array is cut short"):
        sources.load(str(tmp_path / "cut.npz"), [X])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_archive_is_refused(tmp_path: pathlib.Path, save: Any) -> None:
    ids = Port("ids", np.dtype(np.int64), (None, 3))
    path = tmp_path / "damaged.npz"
    save(path, ids=np.random.default_rng(0).integers(0, 1 << 60, (5000, 1, 3)))
    content = bytearray(path.read_bytes())
    content[20_000:20_100] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=r"not a readable \.npz"):
        sources.load(str(path), [ids])


def test_a_path_is_as_good_as_its_text(tmp_path: pathlib.Path) -> None:
    source = archive(tmp_path, x=numbers(5, 1, 3))
    one, other = (sources.load(s, [X]) for s in (source, pathlib.Path(source)))
    assert (one.source, one.digest) == (other.source, other.digest)


def test_a_folder_of_archives_is_read_in_the_order_of_names(tmp_path: pathlib.Path) -> None:
    (tmp_path / "deep").mkdir()
    for name, number in (("b", 1), ("a", 0), ("deep/c", 2)):
        np.savez(tmp_path / f"{name}.npz", x=np.full((2, 1, 3), number, np.float32))
    (tmp_path / "README").write_text("ours")
    samples = sources.load(str(tmp_path), [X]).samples
    assert [int(sample["x"][0, 0]) for sample in samples] == [0, 0, 1, 1, 2, 2]


def test_a_fault_in_a_folder_names_the_file(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "a.npz", x=numbers(2, 1, 3))
    np.savez(tmp_path / "b.npz", x=numbers(2, 1, 3) * np.nan)
    with pytest.raises(CalibrationError, match=r"sample 0 of '.*b\.npz': 'x' has NaN"):
        sources.load(str(tmp_path), [X])


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "holds neither .npz files nor images; it holds nothing"),
        (["notes.txt", "a.csv"], "neither .npz files nor images; it holds 'a.csv', 'notes.txt'"),
        (["a.npz", "b.png"], "holds both 'a.npz' and 'b.png'"),
        (["b.png"], "say how the model wants them, as in --preprocess 'image{resize=256"),
    ],
)
def test_a_folder_that_holds_no_samples_is_refused(
    tmp_path: pathlib.Path, files: Sequence[str], words: str
) -> None:
    for name in files:
        (tmp_path / name).write_text("")
    with pytest.raises(CalibrationError) as error:
        sources.load(str(tmp_path), [X])
    assert words in str(error.value)


@LINUX
def test_archives_are_closed(tmp_path: pathlib.Path) -> None:
    for number in range(5):
        np.savez(tmp_path / f"{number}.npz", x=numbers(2, 1, 3), sr=np.array(3))
    data = sources.load(str(tmp_path), [X, RATE])
    links = pathlib.Path("/proc/self/fd").iterdir()
    assert not [link for link in links if str(tmp_path) in os.path.realpath(link)]
    assert len(data.samples) == 10


# -- what the user's code does ------------------------------------------------------------------


def test_an_error_of_the_user_is_named_as_the_source_s(module: str) -> None:
    def broken() -> Iterator[Sample]:
        yield LISTED[0]
        raise KeyError("no such column")

    made: Any = sys.modules[module]
    made.broken = broken
    with pytest.raises(CalibrationError, match=r"source '.*:broken' raises KeyError: 'no such col"):
        sources.load(f"{module}:broken", [X])


def test_numbers_that_do_not_fit_are_refused() -> None:
    pixels = Port("x", np.dtype(np.uint8), (1,))
    with pytest.raises(CalibrationError, match="'x' has numbers that do not fit uint8: 300 to 300"):
        sources.load([{"x": np.array([300])}], [pixels])


def test_strings_are_refused() -> None:
    words = Port("words", np.dtype(object), (None,))
    with pytest.raises(CalibrationError, match="'words' reads strings"):
        sources.load([{"words": ["a"]}], [words])


# -- noise --------------------------------------------------------------------------------------


def test_noise_is_what_every_table_mask_and_image_takes() -> None:
    inputs = [
        X,
        Port("ids", np.dtype(np.int64), (1, 50)),
        Port("keep", np.dtype(bool), (50,)),
        Port("image", np.dtype(np.uint8), (1, 16, 16, 3)),
    ]
    samples = sources.load("random", inputs).samples
    for name, most in (("ids", 1), ("keep", 1), ("image", 255)):
        found = np.concatenate([s[name].ravel() for s in samples])
        assert (found.min(), found.max()) == (0, most)
    assert all(s["x"].shape == (1, 3) for s in samples)


# -- sequences ----------------------------------------------------------------------------------

STATEFUL, OUT = [X, RATE, STATE], [PROBABILITY, NEXT]
FEEDS = {"state": "stateN"}


def chunks(count: int, frames: int) -> list[list[dict[str, Array]]]:
    x = numbers(count, frames, 1, 3)
    return [[{"x": x[s, t], "sr": np.array(8)} for t in range(frames)] for s in range(count)]


def flat(sequences: Iterable[Sequence[Mapping[str, Array]]]) -> list[dict[str, Array]]:
    """The frames of ``sequences``, with zeros for the state of the first of each."""
    zeros = {"state": np.zeros((2, 1, 5), np.float32)}
    return [dict(f) | (zeros if t == 0 else {}) for s in sequences for t, f in enumerate(s)]


def test_sequences_are_lists_iterators_and_arrays_with_two_leading_axes(
    tmp_path: pathlib.Path,
) -> None:
    listed = chunks(3, 4)
    x = numbers(3, 4, 1, 3)
    log: list[str] = []
    for source in (
        listed,
        (iter(sequence) for sequence in listed),
        (tuple(sequence) for sequence in listed),
        archive(tmp_path, x=x, sr=np.array(8)),
        archive(tmp_path, x=x, sr=np.full(3, 8)),
        archive(tmp_path, x=x, sr=np.full((3, 4), 8)),
    ):
        samples = sources.load(source, STATEFUL, outputs=OUT, log=log.append).samples
        same(samples, flat(listed))
        assert samples.sequences == 3 and samples.state == FEEDS
    assert set(log) == {"state: state=stateN (paired by name, type and shape)"}


def test_with_state_the_samples_of_an_archive_are_frames_of_one_sequence(
    tmp_path: pathlib.Path,
) -> None:
    for number, sequence in enumerate(chunks(3, 4)):
        x = np.stack([frame["x"] for frame in sequence])
        np.savez(tmp_path / f"{number}.npz", x=x, sr=np.array(8))
    samples = sources.load(str(tmp_path), STATEFUL, state=FEEDS, outputs=OUT).samples
    same(samples, flat(chunks(3, 4)))
    assert samples.sequences == 3


def test_an_archive_may_hold_the_first_state(tmp_path: pathlib.Path) -> None:
    first = numbers(3, 2, 1, 5)
    source = archive(tmp_path, x=numbers(3, 4, 1, 3), sr=np.array(8), state=first)
    samples = sources.load(source, STATEFUL, state=FEEDS).samples
    assert [int("state" in frame) for frame in samples] == [1, 0, 0, 0] * 3
    np.testing.assert_array_equal([samples[i]["state"] for i in (0, 4, 8)], first)
    one = archive(tmp_path, x=numbers(4, 1, 3), sr=np.array(8), state=first[0])
    np.testing.assert_array_equal(
        sources.load(one, STATEFUL, state=FEEDS).samples[0]["state"], first[0]
    )


def test_a_dynamic_dimension_of_the_state_is_that_of_the_other_inputs() -> None:
    sequence = [{"x": numbers(4, 3), "sr": 8}, {"x": numbers(4, 3), "sr": 8}]
    samples = sources.load([sequence], STATEFUL, outputs=OUT).samples
    assert samples[0]["state"].shape == (2, 4, 5)


def test_the_digest_tells_where_sequences_start_and_what_flows() -> None:
    frames = [frame for sequence in chunks(2, 3) for frame in sequence]
    store = flat([frames])
    found = {
        Data("a", Samples(store, starts, state)).digest
        for starts in ([0], [0, 3], None)
        for state in (FEEDS, {"state": "other"}, {})
    }
    assert len(found) == 9


def test_noise_with_state_is_sequences() -> None:
    samples = sources.load("random", STATEFUL, state=FEEDS).samples
    assert len(samples) == 4 * samples.sequences
    assert [int("state" in frame) for frame in samples[:5]] == [1, 0, 0, 0, 1]


def test_state_that_never_flows_is_said() -> None:
    log: list[str] = []
    sources.load([{"x": numbers(1, 3), "sr": 8}], STATEFUL, state=FEEDS, log=log.append)
    assert "every sequence of 'python' has one frame" in log[0]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            [{"x": numbers(1, 3), "sr": 8}],
            "no array for input 'state'; it has x, sr; if that is state, give --state state=stateN",
        ),
        ([[{"x": numbers(1, 3)}]], "no array for input 'sr', and no output has its type"),
        (
            [[{"x": numbers(1, 3), "sr": 8}, {"x": numbers(1, 3)}]],
            "frame 1 of sequence 0 of 'python' has no array for input 'sr'",
        ),
        (
            [flat(chunks(1, 2))[:1] * 2, chunks(1, 1)[0]],
            "frame 0 of sequence 1 of 'python' has no array for input 'state'",
        ),
    ],
)
def test_sequences_that_do_not_fit_are_refused(source: Any, words: str) -> None:
    with pytest.raises(CalibrationError) as error:
        sources.load(source, STATEFUL, outputs=OUT)
    assert words in str(error.value)


def test_a_later_frame_may_not_hold_the_state() -> None:
    twice = flat(chunks(1, 2))[:1] * 2
    with pytest.raises(
        CalibrationError, match=r"frame 1 .* holds input 'state', which is fed from"
    ):
        sources.load([twice], STATEFUL, state=FEEDS)


# -- pairs --------------------------------------------------------------------------------------


def port(name: str, *shape: int | None, dtype: str = "float32") -> Port:
    return Port(name, np.dtype(dtype), shape)


@pytest.mark.parametrize(
    ("missing", "outputs", "pairs"),
    [
        (["state"], ["y", "stateN"], {"state": "stateN"}),
        (["h0", "c0"], ["y", "hn", "cn"], {"h0": "hn", "c0": "cn"}),
        (["h", "c"], ["cn", "hn"], {"h": "hn", "c": "cn"}),
        (["cache_in_0", "cache_in_1"], ["cache_out_1", "cache_out_0"],
         {"cache_in_0": "cache_out_0", "cache_in_1": "cache_out_1"}),
        (["past_3_key"], ["present_3_value", "present_3_key"], {"past_3_key": "present_3_key"}),
        (["a", "h"], ["hn", "z"], {"a": "z", "h": "hn"}),
        (["memory"], ["z"], {"memory": "z"}),
    ],
)  # fmt: skip
def test_states_pair_by_name_and_then_by_what_is_left(
    missing: Sequence[str], outputs: Sequence[str], pairs: dict[str, str]
) -> None:
    ins, outs = [port(n, 1, 4) for n in missing], [port(n, None, 4) for n in outputs]
    others = [port("wide", 1, 8), port("deep", 1, 1, 4), port("whole", 1, 4, dtype="int64")]
    assert ports.pair(ins, [*outs, *others], "here") == pairs


def test_a_pair_that_is_not_clear_is_an_error_with_the_text_that_settles_it() -> None:
    ins, outs = [port("memory", 1, 4)], [port("a", 1, 4), port("b", 1, 4)]
    with pytest.raises(CalibrationError, match="give --state memory=a or --state memory=b"):
        ports.pair(ins, outs, "frame 0")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("state", "expected INPUT=OUTPUT,..., got 'state'"),
        ("state=", "expected INPUT=OUTPUT"),
        ("state=stateN,state=p", "'state' is named twice"),
        ("stat=stateN", "unknown name 'stat'; did you mean 'state'?"),
        ("state=stateM", "unknown name 'stateM'; did you mean 'stateN'?"),
        ("state=p", "output p: float32[?,1] does not fit input state: float32[2,?,5]"),
        ("sr=stateN", "does not fit input sr: int64[]"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(text: str, words: str) -> None:
    with pytest.raises(CalibrationError) as error:
        ports.check_state(ports.parse_state(text), STATEFUL, OUT)
    assert words in str(error.value)


def test_a_state_that_leaves_no_data_is_refused() -> None:
    with pytest.raises(CalibrationError, match="names every input"):
        ports.check_state(FEEDS, [STATE], OUT)


# -- shapes -------------------------------------------------------------------------------------

SHAPED = "(float[N,3,H,H] x, float[N,T] t, float[2] k) => (float[N,3,H,H] y) { y = Relu(x) }"


def test_a_shape_is_noted_where_it_decides_and_survives(tmp_path: pathlib.Path) -> None:
    model = graphs.graph(SHAPED)
    ports.choose_shapes(model, ["x=4x3x8x8", "t=4x9"])
    graphs.execute.save(model, tmp_path / "m.onnx")
    for one in (model, model.clone(), graphs.execute.load(tmp_path / "m.onnx")):
        assert [p.chosen for p in ports.inputs_of(one)] == [(4, 3, 8, 8), (4, 9), None]
    samples = sources.load("random", ports.inputs_of(model)).samples
    assert [a.shape for a in samples[0].values()] == [(4, 3, 8, 8), (4, 9), (2,)]


def test_a_shape_decides_for_the_inputs_that_share_all_their_dimensions() -> None:
    model = graphs.graph(
        "(float[N,T] a, float[T,N] b, float[N,M] c) => (float[N,T] y) { y = Relu(a) }"
    )
    ports.choose_shapes(model, ["a=2x5"])
    assert [p.chosen for p in ports.inputs_of(model)] == [(2, 5), (5, 2), None]


def test_of_a_shape_that_spans_sizes_data_has_the_first_and_an_engine_all() -> None:
    model = graphs.graph(SHAPED)
    ports.choose_shapes(model, ["x=1..4x3x8x8", "t=1..4x0..9"])
    found = ports.inputs_of(model)
    assert [p.chosen for p in found] == [(1, 3, 8, 8), (1, 0), None]
    assert [p.most for p in found] == [(4, 3, 8, 8), (4, 9), None]
    samples = sources.load("random", found).samples
    assert [a.shape for a in samples[0].values()] == [(1, 3, 8, 8), (1, 0), (2,)]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["x"], "expected INPUT=1x3x224x224"),
        (["x=1x3x0x0"], "with sizes above 0"),
        (["x=1x3x?x?"], "expected INPUT=1x3x224x224"),
        (["z=1x3"], "unknown name 'z'"),
        (["xx=1x3"], "did you mean 'x'?"),
        (["x=1x3x8"], "contradicts the model, which reads x: float32[?,3,?,?]"),
        (["x=1x4x8x8"], "contradicts the model"),
        (["x=1x3x8x9"], "dimension 'H' is 8 and 9 at once"),
        (["x=1x3x8x8", "t=2x5"], "dimension 'N' is 1 and 2 at once"),
        (["k=3"], "contradicts the model, which reads k: float32[2]"),
        (["x=1..2x1..3x8x8"], "contradicts the model"),
        (["x=4..2x3x8x8"], "a size ends below where it starts"),
        (["x=0..0x3x8x8"], "with sizes above 0"),
        (["x=1..2x3x8x8", "t=1x5"], "dimension 'N' is 1..2 and 1 at once"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(texts: Sequence[str], words: str) -> None:
    with pytest.raises(CalibrationError) as error:
        ports.choose_shapes(graphs.graph(SHAPED), texts)
    assert words in str(error.value)


# -- masks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [("maks", "did you mean 'mask'?"), ("sr", "a mask is [batch, tokens], the model reads sr")],
)
def test_a_mask_that_cannot_be_one_is_refused(name: str, words: str) -> None:
    with pytest.raises(CalibrationError) as error:
        ports.check_mask(name, [X, MASK, RATE])
    assert words in str(error.value)
