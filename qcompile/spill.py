"""Dicts of arrays in a temporary file, so that memory does not grow with their number.

What is pickled of such a file is its path: other processes read it where it lies.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from qcompile.errors import CalibrationError

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where an array lies in the file: its type, shape, and offset in bytes."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int


class Stored(Sequence[dict[str, Array]]):
    """Dicts of arrays in the file ``path``, read by number; ``index`` says where each lies.

    Reading copies from the file and maps nothing, so that only what is read is in memory. Raises
    CalibrationError if this machine has no such file.
    """

    def __init__(self, path: str, index: Sequence[Mapping[str, _Place]]) -> None:
        self._path, self._index = path, list(index)

    @functools.cached_property
    def _file(self) -> Any:
        try:
            return open(self._path, "rb")
        except FileNotFoundError as error:
            raise missing(self._path) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return Stored, (self._path, self._index)

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, index: int) -> dict[str, Array]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Array]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Array] | list[dict[str, Array]]:
        if isinstance(index, slice):
            return [self._read(places) for places in self._index[index]]
        return self._read(self._index[index])

    def _read(self, places: Mapping[str, _Place]) -> dict[str, Array]:
        found: dict[str, Array] = {}
        for name, place in places.items():
            found[name] = np.empty(place.shape, place.dtype)
            self._file.seek(place.offset)
            self._file.readinto(_bytes(found[name]))
        return found


class Spill(Stored):
    """Dicts of arrays that are appended one at a time and read back by number.

    The file has no name, so that it goes with this object or with the process, whatever ends it;
    one that is pickled gets a name, and stays behind if the process is killed.
    """

    def __init__(self) -> None:
        super().__init__("", [])
        # Kept open as long as this object lives; its type knows no buffers but bytes.
        self._file: Any = tempfile.TemporaryFile(prefix="qcompile-")  # noqa: SIM115
        self._end = 0

    def append(self, arrays: Mapping[str, Array]) -> None:
        """Write ``arrays`` behind the last; raise CalibrationError if there is no room."""
        places: dict[str, _Place] = {}
        try:
            self._file.seek(self._end)
            for name, array in arrays.items():
                self._file.write(_bytes(array))
                places[name] = _Place(array.dtype, array.shape, self._end)
                self._end += array.nbytes
            self._file.flush()
        except OSError as error:
            raise CalibrationError(
                f"{self._end / 1e6:.0f} MB of samples are written, then the folder for temporary "
                f"files {tempfile.gettempdir()!r} takes no more ({error.strerror}); "
                "set TMPDIR to one with room"
            ) from error
        self._index.append(places)

    def shapes(self, name: str) -> list[tuple[int, ...]]:
        """The shapes of ``name`` in the dicts that have it; nothing is read."""
        return [places[name].shape for places in self._index if name in places]

    def close(self) -> None:
        """Remove the file."""
        self._file.close()

    def __reduce__(self) -> tuple[Any, ...]:
        if not self._path:
            named: Any = tempfile.NamedTemporaryFile(prefix="qcompile-")  # noqa: SIM115
            self._file.seek(0)
            shutil.copyfileobj(self._file, named)
            named.flush()
            self._file, self._path = named, named.name
        return super().__reduce__()


def missing(path: str | os.PathLike[str]) -> CalibrationError:
    """What is wrong where a temporary file of another process is not."""
    return CalibrationError(
        f"{socket.gethostname()} has no file {os.fspath(path)!r}: processes on several machines "
        "need a folder for temporary files that all of them see; set TMPDIR to one"
    )


def digest(samples: Iterable[Mapping[str, Array]]) -> str:
    """A hash of ``samples``: names, types, shapes and numbers."""
    found: Any = hashlib.sha256()  # its type knows no arrays
    for arrays in samples:
        for name in sorted(arrays):
            found.update(f"{name}{arrays[name].dtype}{arrays[name].shape}".encode())
            found.update(_bytes(arrays[name]))
    return found.hexdigest()


def _bytes(array: Array) -> npt.NDArray[np.uint8]:
    """The memory of ``array``, or of a copy in C order; types of ml_dtypes have no buffer."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
