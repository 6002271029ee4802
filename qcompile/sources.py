"""Calibration sources: samples that fit a model, read from files or from Python.

Whatever a source yields is checked against the inputs, one sample at a time, before anything runs,
and kept in a temporary file, so that memory does not grow with the number of samples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from qcompile import archives, capture, images, ports, texts
from qcompile.archives import LABELS
from qcompile.errors import CalibrationError, QCompileError
from qcompile.images import Image
from qcompile.ports import Port
from qcompile.sequences import Sample, Samples, State
from qcompile.spill import Spill
from qcompile.texts import Text

Array = npt.NDArray[Any]


class Data:
    """Samples that fit a model, and where they came from.

    ``random`` marks noise. A list of samples is as good as a lazy one, for small data.
    """

    def __init__(self, source: str, samples: Sequence[Sample], random: bool = False) -> None:
        self.source = source
        self.samples = Samples.of(samples)
        self.random = random

    @property
    def digest(self) -> str:
        """A hash of all samples."""
        return self.samples.digest


@dataclasses.dataclass(frozen=True)
class _Frame:
    """What a source yields, not checked yet.

    ``where`` names it in messages; ``first`` says that it starts a sequence, and ``alone`` that
    the source does not speak of sequences.
    """

    arrays: Mapping[str, Any]
    where: str
    first: bool = True
    alone: bool = True


def load(
    source: str | os.PathLike[str] | Iterable[Any],
    inputs: Sequence[Port],
    seed: int = 0,
    *,
    preprocess: Image | None = None,
    state: State | None = None,
    outputs: Sequence[Port] = (),
    log: Callable[[str], None] = lambda _: None,
    labelled: bool = False,
    text: Text | None = None,
) -> Data:
    """Read a source.

    Args:
        source: the path of an ``.npz`` (see archives.read) or of a folder of them; that of a
            folder of images, which ``preprocess`` makes samples of; that of a file which ``text``
            makes samples of (see texts.read); ``package.module:name`` of an
            iterable, or of a function that returns one; ``random`` for noise, which calibrates
            nothing and is marked as such; or the iterable itself. An iterable yields samples
            (dicts of arrays) or sequences (lists or iterators of such dicts).
        inputs: what the model reads.
        seed: for ``random`` only.
        preprocess: how an image becomes an input.
        state: the inputs that are fed from outputs of the frame before, zero at the start of a
            sequence unless its first frame holds them. If None, the inputs that sequences lack are
            paired with ``outputs`` (see ports.pair), and ``log`` is told.
        outputs: what the model writes.
        labelled: whether samples may hold an array ``labels`` beside their inputs; images that lie
            in folders have the number of their folder as one, in the order of names.
        text: how a text becomes samples.

    Raises CalibrationError if the source cannot be read or does not fit the model.
    """
    for port in inputs:
        if port.dtype.kind == "O":
            raise CalibrationError(f"input {port.name!r} reads strings, which cannot be calibrated")
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    name = source if isinstance(source, str) else "python"
    if text is not None:
        frames = _text(source, text, inputs)
    else:
        frames = _frames_of(source, inputs, seed, preprocess, state or {}, labelled)
    samples = _collect(frames, name, inputs, state, outputs, log, labelled)
    return Data(name, samples, source == "random")


_SOURCES = (
    "an .npz file, a folder of .npz files or of images, a text with --tokenizer, "
    "package.module:iterable, or 'random' for noise"
)


def _text(source: object, how: Text, inputs: Sequence[Port]) -> Iterator[_Frame]:
    path = pathlib.Path(source) if isinstance(source, str) else None
    if path is None or path.suffix == ".npz" or not path.is_file():
        raise CalibrationError(f"--tokenizer is for a text, and there is no text file {source!r}")
    return (_Frame(arrays, where) for arrays, where in texts.read(path, how, inputs))


def _frames_of(
    source: str | Iterable[Any],
    inputs: Sequence[Port],
    seed: int,
    preprocess: Image | None,
    state: State,
    labelled: bool,
) -> Iterator[_Frame]:
    if isinstance(source, str) and source != "random":
        path = pathlib.Path(source)
        if path.is_dir():
            return _folder(path, inputs, preprocess, state, labelled)
        _no_images(preprocess, f"{source!r} is no folder")
        if path.suffix == ".npz" or path.exists():
            return _archive(path, inputs, state, labelled)
        if ":" not in source:
            raise CalibrationError(f"there is no file {source!r}; a source is {_SOURCES}")
        return _frames(_of_the_user(source), source)
    _no_images(preprocess, f"the data is {source if isinstance(source, str) else 'from Python'}")
    if isinstance(source, str):
        return _frames(_random(inputs, seed, state), source)
    return _frames(source, "python")


def _no_images(preprocess: Image | None, what: str) -> None:
    # What is folded into the model leaves nothing to do to other data.
    if preprocess is not None and not preprocess.fold:
        raise CalibrationError(f"--preprocess is for a folder of images; {what}")


def _of_the_user(source: str) -> object:
    found = capture.load_object(source, "calibration source")
    with _blamed(source):
        return found() if callable(found) else found


@contextlib.contextmanager
def _blamed(source: str) -> Generator[None]:
    """Say that what escapes from the user's own code is the source's fault."""
    try:
        yield
    except QCompileError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise CalibrationError(
            f"calibration source {source!r} raises {type(error).__name__}: {error}"
        ) from error


def _archive(
    path: pathlib.Path, inputs: Sequence[Port], state: State, labelled: bool
) -> Iterator[_Frame]:
    if path.suffix != ".npz":
        hint = "; a text needs --tokenizer tokenizer.json" if path.suffix == ".txt" else ""
        raise CalibrationError(f"{str(path)!r} is no .npz file; a source is {_SOURCES}{hint}")
    if not path.exists():
        raise CalibrationError(f"there is no file {str(path)!r}")
    return _frames(archives.read(path, inputs, state, labelled), str(path))


def _folder(
    path: pathlib.Path,
    inputs: Sequence[Port],
    preprocess: Image | None,
    state: State,
    labelled: bool,
) -> Iterator[_Frame]:
    """The archives or the images in a folder and the folders in it, sorted by name."""
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    found = [p for p in files if p.suffix.lower() == ".npz"]
    pictures = [p for p in files if p.suffix.lower() in images.SUFFIXES]
    if found and pictures:
        raise CalibrationError(
            f"the folder {str(path)!r} holds both {found[0].name!r} and {pictures[0].name!r}; "
            "give one with .npz files or with images alone"
        )
    if found:
        _no_images(preprocess, f"{str(path)!r} holds .npz files")
        each = (_archive(file, inputs, state, labelled) for file in found)
        return itertools.chain.from_iterable(each)
    if pictures:
        read = images.read(pictures, preprocess, inputs, str(path))
        if labelled and all(picture.parent != path for picture in pictures):
            return _classed(read, pictures, path)
        return (_Frame({name: array}, where) for name, array, where in read)
    names = ", ".join(repr(p.name) for p in files[:5]) + (", ..." if len(files) > 5 else "")
    raise CalibrationError(
        f"the folder {str(path)!r} holds neither .npz files nor images; it holds "
        f"{names or 'nothing'}"
    )


def _classed(
    read: Iterable[tuple[str, Array, str]], pictures: Sequence[pathlib.Path], path: pathlib.Path
) -> Iterator[_Frame]:
    """Images with the number of the folder in ``path`` that each lies in as its label."""
    within = [picture.relative_to(path).parts[0] for picture in pictures]
    numbers = {name: number for number, name in enumerate(sorted(set(within)))}
    first = 0
    for name, array, where in read:
        taken = within[first : first + len(array)]
        first += len(taken)
        yield _Frame({name: array, LABELS: np.array([numbers[one] for one in taken])}, where)


# How many sequences of noise there are, and their frames if there is state.
_NOISE, _FRAMES = 16, 4


def _random(inputs: Sequence[Port], seed: int, state: State) -> Iterator[Any]:
    """Normal floats; 0 and 1 for integers, which every table and mask takes; pixels for images."""
    rng = np.random.default_rng(seed)

    def sample() -> Sample:
        return {port.name: noise(port) for port in inputs if port.name not in state}

    def noise(port: Port) -> Array:
        shape = port.concrete()
        if port.dtype.kind not in "iub":
            return rng.standard_normal(shape).astype(port.dtype)
        pixels = port.dtype == np.uint8 and len(shape) == 4
        return rng.integers(0, 256 if pixels else 2, shape).astype(port.dtype)

    for _ in range(_NOISE):
        yield [sample() for _ in range(_FRAMES)] if state else sample()


def _frames(items: object, source: str) -> Iterator[_Frame]:
    """The frames of samples (dicts) and of sequences (lists or iterators of dicts)."""
    if isinstance(items, Mapping) or not isinstance(items, Iterable):
        raise CalibrationError(
            f"calibration source {source!r} must yield dicts of arrays, one a run; "
            f"it is {type(cast(object, items)).__name__}"
        )
    with _blamed(source):
        for number, item in enumerate(cast("Iterable[object]", items)):
            if not isinstance(item, list | tuple | Iterator):
                yield _Frame(
                    _dict(item, f"sample {number}", source), f"sample {number} of {source!r}"
                )
                continue
            index = -1
            for index, frame in enumerate(cast("Iterable[object]", item)):
                where = f"frame {index} of sequence {number}"
                arrays = _dict(frame, where, source)
                yield _Frame(arrays, f"{where} of {source!r}", index == 0, alone=False)
            if index < 0:
                raise CalibrationError(f"sequence {number} of {source!r} has no frames")


def _dict(item: object, where: str, source: str) -> Mapping[str, Any]:
    if not isinstance(item, Mapping):
        raise CalibrationError(
            f"{where} of {source!r} is {type(item).__name__}, not a dict of arrays"
        )
    return cast("Mapping[str, Any]", item)


# -- checks -------------------------------------------------------------------------------------


def _collect(
    frames: Iterable[_Frame],
    source: str,
    inputs: Sequence[Port],
    state: State | None,
    outputs: Sequence[Port],
    log: Callable[[str], None],
    labelled: bool,
) -> Samples:
    """``frames`` in a file, each checked: names, types, shapes, numbers; the first with state."""
    spill, starts = Spill(), list[int]()
    for frame in frames:
        if state is None:
            state = _paired(frame, inputs, outputs)
            if state:
                log(f"state: {ports.state_text(state)} (paired by name, type and shape)")
        if frame.first:
            starts.append(len(spill))
        labels: Sample = {}
        if labelled and LABELS not in (port.name for port in inputs):
            frame, labels = _without_labels(frame)
        spill.append(_checked(frame, inputs, state, outputs) | labels)
    if not starts:
        raise CalibrationError(f"calibration source {source!r} yields no samples")
    if state and len(starts) == len(spill):
        log(
            f"state: every sequence of {source!r} has one frame, so that the state is what it holds"
        )
    return Samples(spill, starts, state)


def _without_labels(frame: _Frame) -> tuple[_Frame, Sample]:
    """``frame`` without its labels, and those, if it has any."""
    if LABELS not in frame.arrays:
        return frame, {}
    arrays = dict(frame.arrays)
    try:
        labels = np.asarray(arrays.pop(LABELS))
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationError(f"{frame.where}: {LABELS!r} is no array: {error}") from error
    if labels.dtype.kind not in "iubf":
        raise CalibrationError(f"{frame.where}: {LABELS!r} is {labels.dtype}, not numbers")
    return dataclasses.replace(frame, arrays=arrays), {LABELS: labels}


def _paired(frame: _Frame, inputs: Sequence[Port], outputs: Sequence[Port]) -> State:
    """The state that the first frame of a sequence lacks, paired with outputs."""
    missing = [port for port in inputs if port.name not in frame.arrays]
    if not missing or frame.alone:
        return {}
    state = ports.pair(missing, outputs, frame.where)
    ports.check_state(state, inputs, outputs)
    return state


def _checked(
    frame: _Frame, inputs: Sequence[Port], state: State, outputs: Sequence[Port]
) -> Sample:
    """The arrays of ``frame``, with the state if it is the first of its sequence."""
    try:
        ports.check_names(frame.arrays, inputs, frame.where, optional=state)
    except CalibrationError as error:
        raise CalibrationError(f"{error}{_hint(frame, inputs, outputs)}") from None
    if not frame.first:
        for name in state:
            if name in frame.arrays:
                raise CalibrationError(
                    f"{frame.where} holds input {name!r}, which is fed from output "
                    f"{state[name]!r}; only the first frame may hold it"
                )
    given = [port for port in inputs if port.name in frame.arrays]
    arrays = {p.name: _checked_array(frame.arrays[p.name], p, frame.where) for p in given}
    if frame.first:
        sizes = ports.sizes_of(given, arrays)
        for port in inputs:
            if port.name not in arrays:
                arrays[port.name] = np.zeros(port.concrete(sizes), port.dtype)
    return arrays


def _hint(frame: _Frame, inputs: Sequence[Port], outputs: Sequence[Port]) -> str:
    """What to do if the inputs that ``frame`` lacks are state, if they may be."""
    missing = [port for port in inputs if port.name not in frame.arrays]
    with contextlib.suppress(CalibrationError):
        state = ports.pair(missing, outputs, frame.where)
        ports.check_state(state, inputs, outputs)
        if state:
            return f"; if that is state, give --state {ports.state_text(state)}"
    return ""


def _checked_array(given: Any, wanted: Port, where: str) -> Array:
    try:
        array = np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists, tensors on a device
        raise CalibrationError(f"{where}: {wanted.name!r} is no array: {error}") from error
    if not wanted.takes(array.shape):
        raise CalibrationError(
            f"{where}: {wanted.name!r} has shape {list(array.shape)}, the model reads {wanted}"
        )
    if array.dtype != wanted.dtype:
        array = _converted(array, wanted, where)
    if array.dtype.kind not in "iub" and not np.isfinite(array).all():
        raise CalibrationError(f"{where}: {wanted.name!r} has NaN or infinity in it")
    return array


def _converted(array: Array, wanted: Port, where: str) -> Array:
    """``array`` in the type of ``wanted``: floats to floats, whole numbers to those they fit."""
    whole = wanted.dtype.kind in "iub"
    number = array.dtype.kind in "iubfV" and array.dtype.type is not np.void
    if not number or whole != (array.dtype.kind in "iub"):
        raise CalibrationError(
            f"{where}: {wanted.name!r} is {array.dtype}, the model reads {wanted}"
        )
    with np.errstate(over="ignore"):  # what overflows is infinite, which is looked for
        converted = array.astype(wanted.dtype)
    if whole and not np.array_equal(converted, array):
        raise CalibrationError(
            f"{where}: {wanted.name!r} has numbers that do not fit {wanted.dtype}: "
            f"{array.min()} to {array.max()}"
        )
    return converted
