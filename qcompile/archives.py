"""Samples out of ``.npz`` archives, one at a time: an archive is never in memory as a whole."""

from __future__ import annotations

import contextlib
import math
import pathlib
import tempfile
import zipfile
import zlib
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from qcompile.errors import CalibrationError
from qcompile.ports import Port, check_names

Array = npt.NDArray[Any]
Frame = Mapping[str, Any]


# The array of the answers that samples have beside their inputs, where they are judged by labels.
LABELS = "labels"


def read(
    path: pathlib.Path,
    inputs: Sequence[Port],
    state: Collection[str],
    labelled: bool = False,
) -> Iterator[Frame | Iterable[Frame]]:
    """The samples of an archive, or its sequences of frames.

    An array named like an input of shape ``S`` may have

    * the shape ``[samples, *S]``;
    * the shape ``S`` but for a longer first axis, which is cut into batches (of 1 if the batch is
      dynamic): ``samples`` of them;
    * the shape of one run, for a constant. Where dimensions are dynamic, that is an array whose
      first axis is one batch, beside arrays with more samples; and any scalar of a scalar input;
    * the shape ``[sequences, frames, *S]``. Beside it, ``[sequences, *S]`` is one array a sequence.

    Samples are the frames of one sequence if ``state`` names inputs; what the archive has of those
    is the state of the first frame. If ``labelled``, an array ``labels`` that is no input is cut
    into as many parts as there are samples (``[sequences, frames, ...]`` if there are sequences).

    Raises CalibrationError if the archive cannot be read or does not fit.
    """
    with _readable(path), zipfile.ZipFile(path) as archive:
        arrays = {n.removesuffix(".npy"): _Stored(archive, n) for n in archive.namelist()}
        if not arrays:
            raise CalibrationError(f"{str(path)!r} holds no arrays")
        known = [port for port in inputs if port.name in arrays]
        beside = [LABELS] if labelled and LABELS not in (p.name for p in inputs) else []
        if len(known) < len(arrays):
            check_names(set(arrays) - {*beside}, inputs, str(path), optional=state)
        beside = [name for name in beside if name in arrays]
        depths = {port.name: _depth(arrays[port.name].shape, port) for port in known}
        deepest = max(depths.values())
        if deepest == 2:
            yield from _sequences(arrays, depths, state, path, beside)
        else:
            yield from _samples(arrays, known, depths, state, path, beside)


class _Stored:
    """An array of an archive, read piece by piece in C order."""

    def __init__(self, archive: zipfile.ZipFile, member: str) -> None:
        self._stream: IO[bytes] = archive.open(member)
        headers: dict[Any, Any] = {
            (1, 0): npy.read_array_header_1_0,
            (2, 0): npy.read_array_header_2_0,
        }
        version = npy.read_magic(self._stream)
        if version not in headers:
            raise ValueError(f"array {member!r} has the unknown format {version}")
        self.shape, fortran, self.dtype = headers[version](self._stream)
        if self.dtype.hasobject:
            raise ValueError(f"array {member!r} holds Python objects")
        if fortran and len(self.shape) > 1:
            self._stream = _in_c_order(self._stream, self.shape, self.dtype)

    def read(self, shape: Sequence[int]) -> Array:
        """The next numbers, as an array of ``shape``."""
        wanted = math.prod(shape) * self.dtype.itemsize
        data = self._stream.read(wanted)
        if len(data) != wanted:
            raise EOFError("an array is cut short")
        return np.frombuffer(bytearray(data), self.dtype, math.prod(shape)).reshape(shape)


def _in_c_order(stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> IO[bytes]:
    """``stream`` of an array in Fortran order as a file in C order; no sample is in one piece."""
    with tempfile.TemporaryFile() as whole:
        while chunk := stream.read(1 << 20):
            whole.write(chunk)
        whole.flush()
        found: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - read by the caller
        for row in np.memmap(whole, dtype, "r", shape=shape, order="F"):
            found.write(np.ascontiguousarray(row).tobytes())
    found.seek(0)
    return found


def _depth(shape: tuple[int, ...], port: Port) -> int:
    """How many axes stand before those of ``port``: 2 (sequence, frame), 1 (sample) or 0."""
    depth = len(shape) - len(port.shape)
    if depth not in (0, 1, 2):
        raise CalibrationError(
            f"array {port.name!r} has shape {list(shape)}, but the model reads {port}; "
            "add a leading sample axis or the batch axis"
        )
    if 0 in shape[: max(depth, min(len(shape), 1))]:
        raise CalibrationError(f"array {port.name!r} holds no sample for {port}")
    return depth


def _sequences(
    arrays: Mapping[str, _Stored],
    depths: Mapping[str, int],
    state: Collection[str],
    path: pathlib.Path,
    beside: Sequence[str],
) -> Iterator[Iterable[Frame]]:
    """The sequences of arrays of which some are ``[sequences, frames, ...]``."""
    count = _one("sequences", {n: arrays[n].shape[0] for n, d in depths.items() if d}, path)
    frames = _one("frames", {n: arrays[n].shape[1] for n, d in depths.items() if d == 2}, path)
    for name in beside:
        if arrays[name].shape[:2] != (count, frames):
            raise CalibrationError(
                f"array {name!r} of {str(path)!r} has shape {list(arrays[name].shape)}, which "
                f"does not begin with {count} sequences of {frames} frames"
            )
    constants = {n: arrays[n].read(arrays[n].shape) for n, d in depths.items() if d == 0}
    for _ in range(count):
        once = {n: arrays[n].read(arrays[n].shape[1:]) for n, d in depths.items() if d == 1}
        each = {n: arrays[n].shape[2:] for n, d in depths.items() if d == 2}
        each |= {n: arrays[n].shape[2:] for n in beside}
        yield _frames(constants | once, arrays, each, frames, state, path)


def _samples(
    arrays: Mapping[str, _Stored],
    known: Sequence[Port],
    depths: Mapping[str, int],
    state: Collection[str],
    path: pathlib.Path,
    beside: Sequence[str],
) -> Iterator[Frame | Iterable[Frame]]:
    """The samples of arrays with one leading axis or none; one sequence if there is state."""
    counts: dict[str, int] = {}
    each: dict[str, tuple[int, ...]] = {}
    for port in known:
        shape = arrays[port.name].shape
        if depths[port.name] == 1:
            counts[port.name], each[port.name] = shape[0], shape[1:]
        elif shape:
            batch = port.shape[0] or 1
            # What holds less than one batch is not cut, and does not fit: the caller says so.
            if port.name not in state and (several := shape[0] // batch) > 1:
                counts[port.name], each[port.name] = several, (batch, *shape[1:])
    count = _one("samples", counts, path) if counts else 1
    for name in beside:
        shape = arrays[name].shape
        if not shape or shape[0] == 0 or shape[0] % count:
            raise CalibrationError(
                f"array {name!r} of {str(path)!r} has shape {list(shape)}, which cannot be cut "
                f"into {count} samples"
            )
        each[name] = shape[0] // count, *shape[1:]
    held = {n: arrays[n].read(arrays[n].shape) for n in depths if n not in each}
    frames = _frames(held, arrays, each, count, state, path)
    if state:
        yield frames
    else:
        yield from frames


def _frames(
    held: Mapping[str, Array],
    arrays: Mapping[str, _Stored],
    each: Mapping[str, tuple[int, ...]],
    count: int,
    state: Collection[str],
    path: pathlib.Path,
) -> Iterator[Frame]:
    """``count`` frames of the arrays ``held`` and the next pieces of ``each``."""
    with _readable(path):
        for number in range(count):
            given = {n: a for n, a in held.items() if number == 0 or n not in state}
            yield given | {n: arrays[n].read(shape) for n, shape in each.items()}


def _one(what: str, counts: Mapping[str, int], path: pathlib.Path) -> int:
    """The number that all arrays have of something."""
    if len(set(counts.values())) > 1:
        raise CalibrationError(f"{str(path)!r} has different numbers of {what}: {dict(counts)}")
    return next(iter(counts.values()))


@contextlib.contextmanager
def _readable(path: pathlib.Path) -> Generator[None]:
    """Turn what a broken archive raises into a CalibrationError."""
    try:
        yield
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise CalibrationError(f"{str(path)!r} is not a readable .npz: {error}") from error
