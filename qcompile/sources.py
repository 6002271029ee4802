"""Calibration sources: samples that fit a model, read from files or from Python.

A *sample* is a complete dict of inputs, one run of the model. Whatever a source yields is checked
against the inputs before anything runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile import capture
from qcompile.errors import CalibrationError, nearest

Array = npt.NDArray[Any]
Sample = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Input:
    """An input of the model: name, element type, and shape with None where it is dynamic."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        shape = ",".join("?" if d is None else str(d) for d in self.shape)
        return f"{self.name}: {self.dtype}[{shape}]"


def inputs_of(model: ir.Model) -> list[Input]:
    """The inputs that a sample must hold."""
    found: list[Input] = []
    for value in model.graph.inputs:
        dims = [d if isinstance(d, int) else None for d in value.shape or ()]
        assert value.dtype is not None
        found.append(Input(value.name or "", np.dtype(value.dtype.numpy()), tuple(dims)))
    return found


@dataclasses.dataclass
class Data:
    """Samples that fit a model, and where they came from."""

    source: str
    samples: list[Sample]
    random: bool = False

    @property
    def digest(self) -> str:
        """A hash of all samples."""
        digest = hashlib.sha256()
        for sample in self.samples:
            for name in sorted(sample):
                digest.update(f"{name}{sample[name].dtype}{sample[name].shape}".encode())
                digest.update(np.ascontiguousarray(sample[name]).tobytes())
        return digest.hexdigest()


def load(source: str | Iterable[Mapping[str, Any]], inputs: Sequence[Input], seed: int = 0) -> Data:
    """Read a source.

    Args:
        source: the path of an ``.npz`` (arrays named like the inputs, with a leading sample axis,
            or exactly the shape of the input for a constant); ``package.module:name`` of an
            iterable of samples, or of a function that returns one; ``random`` for noise, which
            calibrates nothing and is marked as such; or the iterable itself.
        inputs: what the model reads.
        seed: for ``random`` only.

    Raises CalibrationError if the source cannot be read or does not fit the model.
    """
    if not isinstance(source, str):
        return Data("python", _checked(source, inputs, "python"))
    if source == "random":
        return Data("random", _random(inputs, seed), random=True)
    path = pathlib.Path(source)
    if path.suffix == ".npz" or path.exists():
        return Data(source, _checked(_npz(path, inputs), inputs, source))
    if ":" not in source:
        raise CalibrationError(f"there is no file {source!r}; a source is {_SOURCES}")
    found = capture.load_object(source, "calibration source")
    return Data(source, _checked(found() if callable(found) else found, inputs, source))


_SOURCES = "an .npz file, package.module:iterable, or 'random' for noise"


def _npz(path: pathlib.Path, inputs: Sequence[Input]) -> list[Sample]:
    if path.is_dir() or path.suffix != ".npz":
        raise CalibrationError(f"{str(path)!r} is no .npz file; a source is {_SOURCES}")
    if not path.exists():
        raise CalibrationError(f"there is no file {str(path)!r}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays: dict[str, Array] = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise CalibrationError(f"{str(path)!r} is not a readable .npz: {error}") from error
    if not arrays:
        raise CalibrationError(f"{str(path)!r} holds no arrays")
    _same_names(arrays, inputs, str(path))
    counts: dict[str, int] = {}
    pick: dict[str, Callable[[int], Array]] = {}
    for wanted in inputs:
        counts[wanted.name], pick[wanted.name] = _sample_axis(arrays[wanted.name], wanted)
    several = {count for count in counts.values() if count > 0}
    if len(several) > 1:
        raise CalibrationError(f"{str(path)!r} has different numbers of samples: {counts}")
    return [{n: p(i) for n, p in pick.items()} for i in range(several.pop() if several else 1)]


def _sample_axis(array: Array, wanted: Input) -> tuple[int, Callable[[int], Array]]:
    """How many samples ``array`` holds (0 for a constant), and how to take one."""
    rank = len(wanted.shape)
    if array.ndim == rank + 1:
        return _not_empty(array.shape[0], wanted), lambda i: array[i]
    if array.ndim != rank:
        raise CalibrationError(
            f"array {wanted.name!r} has shape {list(array.shape)}, but the model reads {wanted}; "
            "add a leading sample axis or the batch axis"
        )
    if None not in wanted.shape and array.shape == wanted.shape:
        return 0, lambda _: array
    if rank == 0:
        return 0, lambda _: array
    batch = wanted.shape[0] or 1
    return _not_empty(array.shape[0] // batch, wanted), lambda i: array[i * batch : (i + 1) * batch]


def _not_empty(count: int, wanted: Input) -> int:
    if count == 0:
        raise CalibrationError(f"array {wanted.name!r} holds no sample for {wanted}")
    return count


def _random(inputs: Sequence[Input], seed: int) -> list[Sample]:
    rng = np.random.default_rng(seed)
    samples: list[Sample] = []
    for _ in range(16):
        sample: Sample = {}
        for wanted in inputs:
            shape = [1 if d is None else d for d in wanted.shape]
            whole = wanted.dtype.kind in "iub"
            noise = np.zeros(shape) if whole else rng.standard_normal(shape)
            sample[wanted.name] = noise.astype(wanted.dtype)
        samples.append(sample)
    return samples


def _checked(samples: object, inputs: Sequence[Input], source: str) -> list[Sample]:
    """``samples`` as arrays of the right names, types and shapes, without NaN or infinity."""
    if isinstance(samples, Mapping) or not isinstance(samples, Iterable):
        raise CalibrationError(
            f"calibration source {source!r} must yield dicts of arrays, one a run; "
            f"it is {type(cast(object, samples)).__name__}"
        )
    kept: list[Sample] = []
    for number, sample in enumerate(cast("Iterable[object]", samples)):
        where = f"sample {number} of {source!r}"
        if not isinstance(sample, Mapping):
            raise CalibrationError(f"{where} is {type(sample).__name__}, not a dict of arrays")
        named = cast("Mapping[str, Any]", sample)
        _same_names(named, inputs, where)
        kept.append({i.name: _checked_array(np.asarray(named[i.name]), i, where) for i in inputs})
    if not kept:
        raise CalibrationError(f"calibration source {source!r} yields no samples")
    return kept


def _checked_array(array: Array, wanted: Input, where: str) -> Array:
    fits = array.ndim == len(wanted.shape) and all(
        d is None or d == got for d, got in zip(wanted.shape, array.shape, strict=True)
    )
    if not fits:
        raise CalibrationError(
            f"{where}: {wanted.name!r} has shape {list(array.shape)}, the model reads {wanted}"
        )
    if array.dtype != wanted.dtype:
        whole = wanted.dtype.kind in "iub"
        if whole != (array.dtype.kind in "iub"):
            raise CalibrationError(
                f"{where}: {wanted.name!r} is {array.dtype}, the model reads {wanted}"
            )
        array = array.astype(wanted.dtype)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise CalibrationError(f"{where}: {wanted.name!r} has NaN or infinity in it")
    return array


def _same_names(arrays: Mapping[str, Any], inputs: Sequence[Input], where: str) -> None:
    names = [i.name for i in inputs]
    for name in names:
        if name not in arrays:
            raise CalibrationError(
                f"{where} has no array for input {name!r}; it has {', '.join(map(str, arrays))}"
            )
    for name in arrays:
        if name not in names:
            raise CalibrationError(
                f"{where} has an array {name!r}, which is no input; {nearest(str(name), names)}"
            )
