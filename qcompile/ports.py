"""What a model reads and writes, and what the user says of it: --shape, --state, --mask.

The shape that a user gives an input is a note on the graph, so that it goes where the graph goes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.errors import CalibrationError, nearest
from qcompile.sequences import State

Array = npt.NDArray[Any]

SHAPE = "qcompile.shape"


@dataclasses.dataclass(frozen=True)
class Port:
    """An input or output of a model.

    * ``shape`` has None where it is dynamic, and ``symbols`` the name of that dimension or "".
    * ``ranked`` is false if not even the number of dimensions is known; ``shape`` is () then.
    * ``chosen`` is the shape that the user gave it, and ``most`` the largest one, of an engine.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]
    symbols: tuple[str, ...] = ()
    ranked: bool = True
    chosen: tuple[int, ...] | None = None
    most: tuple[int, ...] | None = None

    def takes(self, shape: Sequence[int | None]) -> bool:
        """Whether ``shape`` may be one of this port."""
        return not self.ranked or (
            len(shape) == len(self.shape)
            and all(
                a is None or b is None or a == b for a, b in zip(self.shape, shape, strict=True)
            )
        )

    def concrete(self, sizes: Mapping[str, int] | None = None) -> tuple[int, ...]:
        """The shape chosen, else with dynamic dimensions from ``sizes`` by name, or else 1."""
        if self.chosen is not None:
            return self.chosen
        names = self.symbols or ("",) * len(self.shape)
        known = sizes or {}
        pairs = zip(self.shape, names, strict=True)
        return tuple(known.get(name, 1) if d is None else d for d, name in pairs)

    def __str__(self) -> str:
        shape = ",".join("?" if d is None else str(d) for d in self.shape)
        return f"{self.name}: {self.dtype}[{shape}]"


def inputs_of(model: ir.Model) -> list[Port]:
    """The inputs that a sample must hold."""
    weights = model.graph.initializers
    return [_port(value) for value in model.graph.inputs if value.name not in weights]


def outputs_of(model: ir.Model) -> list[Port]:
    """The outputs whose type is known."""
    return [_port(value) for value in model.graph.outputs if value.dtype is not None]


def _port(value: ir.Value) -> Port:
    assert value.dtype is not None, value.name
    dims = tuple(value.shape or ())
    text = value.metadata_props.get(SHAPE)
    chosen, most = (None, None) if text is None else _spans(text)
    return Port(
        name=value.name or "",
        dtype=np.dtype(value.dtype.numpy()),
        shape=tuple(d if isinstance(d, int) else None for d in dims),
        symbols=tuple("" if isinstance(d, int) else d.value or "" for d in dims),
        ranked=value.shape is not None,
        chosen=chosen,
        most=most,
    )


def named(name: str, ports: Iterable[Port], what: str) -> Port:
    """The port called ``name``; raise CalibrationError, with the nearest name, if there is none."""
    known = {port.name: port for port in ports}
    if name not in known:
        raise CalibrationError(f"{what}: unknown name {name!r}; {nearest(name, known)}")
    return known[name]


def check_names(
    names: Collection[str], inputs: Sequence[Port], where: str, optional: Collection[str] = ()
) -> None:
    """Raise CalibrationError if ``names`` lack an input that is not optional, or hold another."""
    known = [port.name for port in inputs]
    for name in known:
        if name not in names and name not in optional:
            raise CalibrationError(
                f"{where} has no array for input {name!r}; it has {', '.join(map(str, names))}"
            )
    for name in names:
        if name not in known:
            raise CalibrationError(
                f"{where} has an array {name!r}, which is no input; {nearest(str(name), known)}"
            )


def sizes_of(ports: Iterable[Port], arrays: Mapping[str, Array]) -> dict[str, int]:
    """The sizes of named dynamic dimensions in ``arrays``, which fit ``ports``."""
    return {
        symbol: size
        for port in ports
        if port.name in arrays
        for symbol, size in zip(port.symbols, arrays[port.name].shape, strict=False)
        if symbol
    }


# -- --shape ------------------------------------------------------------------------------------


def choose_shapes(model: ir.Model, texts: Sequence[str]) -> None:
    """Note the shapes that ``texts`` (such as ``x=1x3x224x224``) give inputs of ``model``.

    ``1..8`` in place of a size is from 1 to 8: the first counts, and an engine holds all of them.
    An input whose dynamic dimensions are all named by another one's shape is noted as well.

    Raises CalibrationError for a text that cannot be read, an unknown input, another number of
    dimensions, and what contradicts the model or another text.
    """
    ports = inputs_of(model)
    values = {value.name: value for value in model.graph.inputs}
    sizes: dict[str, str] = {}
    noted: dict[str, list[str]] = {}
    for text in texts:
        match = re.fullmatch(rf"(.+)=({_SIZE}(?:x{_SIZE})*)", text)
        if match is None:
            raise CalibrationError(
                f"--shape {text}: expected INPUT=1x3x224x224 with sizes above 0, or 1..8, from 1 "
                "to 8"
            )
        port = named(match[1], ports, f"--shape {text}")
        shape = match[2].split("x")
        first, most = _spans(match[2])
        if any(a > b for a, b in zip(first, most, strict=True)):
            raise CalibrationError(f"--shape {text}: a size ends below where it starts")
        if not (port.takes(first) and port.takes(most)):
            raise CalibrationError(f"--shape {text} contradicts the model, which reads {port}")
        for symbol, size in zip(port.symbols, shape, strict=True):
            if symbol and sizes.setdefault(symbol, size) != size:
                raise CalibrationError(
                    f"--shape {text}: dimension {symbol!r} is {sizes[symbol]} and {size} at once"
                )
        noted[port.name] = shape
    for port in ports:
        pairs = list(zip(port.shape, port.symbols, strict=True))
        dynamic = [symbol for size, symbol in pairs if size is None]
        if port.name not in noted and dynamic and all(symbol in sizes for symbol in dynamic):
            noted[port.name] = [sizes[s] if size is None else str(size) for size, s in pairs]
        if port.name in noted:
            values[port.name].metadata_props[SHAPE] = "x".join(noted[port.name])


# A size, or all from one to another, of which the first may be 0: an empty cache.
_SIZE = r"(?:[1-9]\d*|\d+\.\.[1-9]\d*)"


def _spans(text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The first and the largest shape that ``text``, such as ``1x3x8..32``, names."""
    ends = [size.split("..") for size in text.split("x")]
    return tuple(int(end[0]) for end in ends), tuple(int(end[-1]) for end in ends)


# -- --state ------------------------------------------------------------------------------------


def parse_state(text: str) -> dict[str, str]:
    """The pairs of a text such as ``state=stateN,h=hn``; raise CalibrationError if it has none."""
    pairs: dict[str, str] = {}
    for part in text.split(","):
        taken, found, given = (word.strip() for word in part.partition("="))
        if not (taken and found and given):
            raise CalibrationError(f"--state {text}: expected INPUT=OUTPUT,..., got {part!r}")
        if taken in pairs:
            raise CalibrationError(f"--state {text}: input {taken!r} is named twice")
        pairs[taken] = given
    return pairs


def check_state(state: State, inputs: Sequence[Port], outputs: Sequence[Port]) -> None:
    """Raise CalibrationError if a name is unknown or an output does not fit its input."""
    for taken, given in state.items():
        where = f"--state {taken}={given}"
        entered, left = named(taken, inputs, where), named(given, outputs, where)
        if not _fits(entered, left):
            raise CalibrationError(f"{where}: output {left} does not fit input {entered}")
    if len(state) == len(inputs):
        raise CalibrationError("--state names every input, so that no data would be read")


def pair(missing: Sequence[Port], outputs: Sequence[Port], where: str) -> dict[str, str]:
    """The output that feeds each of the inputs ``missing``, of the same type and a fitting shape.

    By name if exactly one fits by name (``h`` and ``hn``, ``state`` and ``stateN``, ``cache_in``
    and ``cache_out``), else the only one that is left. Raises CalibrationError, with the text that
    settles it, if none or several fit.
    """
    fitting = {port.name: [o.name for o in outputs if _fits(port, o)] for port in missing}
    pairs: dict[str, str] = {}
    for taken, names in fitting.items():
        alike = [name for name in names if _alike(taken, name)]
        if len(alike) == 1:
            pairs[taken] = alike[0]
    for taken, names in fitting.items():
        if taken in pairs:
            continue
        left = [name for name in names if name not in pairs.values()]
        if not left:
            raise CalibrationError(
                f"{where} has no array for input {taken!r}, and no output has its type and shape, "
                "so that it is no state"
            )
        if len(left) > 1:
            choices = " or ".join(f"--state {taken}={name}" for name in left)
            raise CalibrationError(
                f"{where} has no array for input {taken!r}; if it is state, several outputs fit: "
                f"give {choices}"
            )
        pairs[taken] = left[0]
    return pairs


def state_text(state: State) -> str:
    """The ``--state`` that says ``state``."""
    return ",".join(f"{taken}={given}" for taken, given in state.items())


def _fits(entered: Port, left: Port) -> bool:
    return entered.dtype == left.dtype and left.takes(entered.shape)


# Words that say which end of a run a name stands at, and nothing of what it names.
_ENDS = frozenset(
    ("in", "out", "input", "output", "new", "next", "n", "old", "prev", "previous", "init",
     "initial", "past", "present")
)  # fmt: skip


def _alike(taken: str, given: str) -> bool:
    """Whether two names differ only in which end of a run they stand at."""
    one, other = _words(taken), _words(given)
    if one[-1:] == ["0"] and other[-1:] != ["0"]:
        one = one[:-1]  # as in h0 and hn
    return bool(one) and "".join(other) in ("".join(one), "".join(one) + "n")


def _words(name: str) -> list[str]:
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name)
    return [word.lower() for word in words if word.lower() not in _ENDS]


# -- --mask -------------------------------------------------------------------------------------


def check_mask(name: str, inputs: Sequence[Port]) -> None:
    """Raise CalibrationError unless ``name`` is an input [batch, tokens] that can be a mask."""
    port = named(name, inputs, f"--mask {name}")
    if len(port.shape) != 2:
        raise CalibrationError(f"--mask {name}: a mask is [batch, tokens], the model reads {port}")


def lined_up(model: ir.Model, mask: str) -> set[str]:
    """The values of the main graph whose first two dimensions are those of the input ``mask``.

    Dimensions are the same if they have one size, or one name. What a Conv reads or writes has
    channels there, and does not line up.
    """
    values = {v.name or "": v for v in model.graph.inputs}
    wanted = _leading(values[mask])
    values |= {v.name or "": v for node in model.graph for v in node.outputs}
    convolved = {
        v.name
        for node in model.graph
        if node.op_type in ("Conv", "ConvTranspose")
        for v in (*node.inputs, *node.outputs)
        if v is not None
    }
    return {
        name
        for name, value in values.items()
        if wanted is not None and _leading(value) == wanted and name not in convolved
    }


def _leading(value: ir.Value) -> tuple[int | str, ...] | None:
    dims = [d if isinstance(d, int) else d.value for d in (value.shape or ())[:2]]
    known = tuple(d for d in dims if d is not None)
    return known if len(known) == 2 else None
