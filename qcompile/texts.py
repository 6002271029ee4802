"""A text as samples of a language model: windows of tokens, and what else its inputs ask for."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.errors import CalibrationError
from qcompile.ports import Port

Array = npt.NDArray[Any]

# Tokens of a window if neither the user nor the model says how many.
WINDOW = 256
_OTHERS = ("mask", "position", "type", "segment")


@dataclasses.dataclass(frozen=True)
class Text:
    """How a text becomes samples: the ``tokenizer.json`` of the model, and ``tokens`` a window."""

    tokenizer: str
    tokens: int | None = None

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise CalibrationError(f"--tokens is a number of tokens, from 1; got {self.tokens}")


def read(
    path: pathlib.Path, how: Text, inputs: Sequence[Port]
) -> Iterator[tuple[dict[str, Array], str]]:
    """Samples of batch 1, and where each is from.

    A window holds ``how.tokens`` tokens, with those that the tokenizer puts around a text; the last
    one, which is shorter, is left out unless it is the only one. It feeds the input of whole
    numbers that is ``input_ids``, or the only one that is no mask, position or type. A mask is 1,
    positions count from 0, types are 0, and a past is empty: 0 in every dynamic dimension but the
    first.

    Raises CalibrationError if the text or the tokenizer cannot be read, for a text too short for a
    model of fixed size, and for an input that is none of these.
    """
    wanted = _tokens(inputs)
    fixed = wanted.shape[-1] if wanted.shape else None
    length = how.tokens or fixed or WINDOW
    windows = list(_windows(path, how.tokenizer, length))
    full = [ids for ids in windows if len(ids) == length]
    if not full and (fixed is not None or not windows or not windows[0]):
        count = len(windows[0]) if windows else 0
        raise CalibrationError(
            f"{str(path)!r} has {count} tokens, fewer than the {fixed or 1} that a sample holds"
        )
    for number, ids in enumerate(full or windows):
        arrays = {port.name: _array(port, wanted, ids) for port in inputs}
        yield arrays, f"window {number} of {str(path)!r}"


def _windows(path: pathlib.Path, tokenizer: str, length: int) -> Iterator[list[int]]:
    library: Any = _library()
    if not pathlib.Path(tokenizer).is_file():
        raise CalibrationError(f"--tokenizer: there is no file {tokenizer!r}")
    try:
        encoder = library.Tokenizer.from_file(tokenizer)
    except Exception as error:  # the binding raises Exception itself
        raise CalibrationError(f"--tokenizer {tokenizer!r} cannot be read: {error}") from error
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{str(path)!r} is not readable text: {error}") from error
    encoder.no_padding()
    encoder.enable_truncation(length)
    encoded = encoder.encode(text)
    yield encoded.ids
    for more in encoded.overflowing:
        yield more.ids


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise CalibrationError(
            "a text needs a library to cut it up: pip install 'qcompile[text]'"
        ) from error
    return tokenizers


def _whole(port: Port) -> bool:
    return port.dtype.kind in "iu"


def _tokens(inputs: Sequence[Port]) -> Port:
    """The input that reads tokens."""
    whole = [port for port in inputs if _whole(port)]
    found = [port for port in whole if port.name == "input_ids"] or [
        port for port in whole if not any(word in port.name.lower() for word in _OTHERS)
    ]
    if len(found) != 1:
        names = ", ".join(str(port) for port in found or inputs)
        raise CalibrationError(
            f"which input reads the tokens of the text? {names}; one called 'input_ids' is taken, "
            "or the only one of whole numbers"
        )
    return found[0]


def _array(port: Port, wanted: Port, ids: Sequence[int]) -> Array:
    """What ``port`` reads for a window of ``ids``, whose tokens the port ``wanted`` reads."""
    name = port.name.lower()
    along = np.array(ids, np.int64).reshape((1,) * (len(port.shape) - 1) + (-1,))
    if port is wanted:
        return along
    if "mask" in name and len(port.shape) <= 2:
        return np.ones(along.shape, port.dtype)
    if _whole(port) and "position" in name:
        return np.arange(len(ids)).reshape(along.shape)
    if _whole(port) and ("type" in name or "segment" in name):
        return np.zeros(along.shape, port.dtype)
    sizes = [1 if axis == 0 else 0 for axis in range(len(port.shape))]
    shape = [
        size if known is None else known for known, size in zip(port.shape, sizes, strict=True)
    ]
    if _whole(port) or 0 not in shape:
        raise CalibrationError(
            f"a text does not say what the model reads in {port}: it is no token, mask, position "
            "or type, and no past that may be empty"
        )
    return np.zeros(shape, port.dtype)
