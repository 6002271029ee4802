"""Minimum and maximum of values, computed inside the graph, so that they need not leave it.

What only moves elements has the extremes of what it moves, and a Relu or Clip those that it cuts
them to, bit by bit; so they are not looked at themselves. What histograms count leaves the graph:
of pictures every few pixels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile import graph, sequences
from qcompile.sequences import State

# What is computed of a value, and what stands for it where it is padding. The runtime's extremes
# pass over a NaN that is not alone, but no sum does.
_PADDING = {"ReduceMin": np.inf, "ReduceMax": -np.inf, "ReduceSum": 0.0}
_MOVED = frozenset(("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity"))


@dataclasses.dataclass(frozen=True)
class Cut:
    """A value whose elements are those of ``root``, each cut to ``low`` and ``high``, in order."""

    root: str
    cuts: tuple[tuple[float, float], ...] = ()

    def of(self, low: float, high: float) -> tuple[float, float]:
        """The extremes of the value if those of ``root`` are ``low`` and ``high``."""
        for least, most in self.cuts:
            low, high = (min(max(end, least), most) for end in (low, high))
        return low, high


def cuts(model: ir.Model, values: Sequence[str]) -> dict[str, Cut]:
    """Each of ``values`` by the furthest of ``values`` that it is a cut of, or by itself."""
    wanted, found = set(values), dict[str, Cut]()
    written = [v for node in model.graph for v in node.outputs if v.name in wanted]
    for value in written:
        name, passed = value.name or "", list[tuple[float, float]]()
        node = value.producer()
        found[name] = Cut(name)
        while node is not None and (cut := _cut(node)) is not None:
            entered = node.inputs[0]
            assert entered is not None
            passed = [*cut, *passed]
            if entered.name in wanted:
                found[name] = Cut(entered.name or "", tuple(passed))
            node = entered.producer()
    return {name: found.get(name, Cut(name)) for name in values}


def _cut(node: ir.Node) -> list[tuple[float, float]] | None:
    """What ``node`` cuts its first input to, if that is all it does beside moving; else None."""
    if node.domain not in ("", "ai.onnx") or not node.inputs or node.inputs[0] is None:
        return None
    if node.op_type in _MOVED:
        return []
    if node.op_type == "Relu":
        return [(0.0, math.inf)]
    if node.op_type != "Clip":
        return None
    ends = [-math.inf, math.inf]
    for place, value in enumerate(node.inputs[1:3]):
        if value is not None and value.name:
            if not graph.is_constant(value):
                return None
            ends[place] = float(graph.constant(value).item())
    return [(ends[0], ends[1])] if ends[0] <= ends[1] else None


class Reduced:
    """A clone of ``model`` that computes extremes of ``values``, and gives some of their numbers.

    Of the values ``lined`` the positions where the input ``mask`` is 0 do not count.
    """

    def __init__(
        self,
        model: ir.Model,
        values: Sequence[str],
        state: State,
        mask: str | None,
        lined: Collection[str],
    ) -> None:
        self._model = sequences.fetch(model, values, state)
        self._by_name = {v.name or "": v for v in self._model.graph.outputs}
        self._given = [self._by_name[name] for name in dict.fromkeys(state.values())]
        self._lined = lined
        self._pictures = _pictures(self._model)
        self._counts: ir.Value | None = None
        if mask is not None:
            entered = next(v for v in self._model.graph.inputs if v.name == mask)
            kind = ir.DataType.BOOL
            self._counts = _add(self._model, "Cast", [entered], kind, to=int(kind))

    def extremes(self, name: str) -> tuple[str, str, str]:
        """What will hold the minimum, maximum and sum of the value ``name``, a scalar each.

        The sum is NaN if an element is, and where it overflows in both directions. The minimum of
        what a Relu, or a Clip from zero, wrote is not looked for: it counts as zero, which every
        grid holds.
        """
        model, value = self._model, self._by_name[name]
        above_zero = _above_zero(value)
        found: list[str] = []
        for kind, padding in _PADDING.items():
            read = self._kept(value, padding)
            if kind == "ReduceMin" and above_zero:
                nothing = _constant(model, np.zeros((), np.float32), ir.DataType.FLOAT)
                found.append(nothing.name or "")
                continue
            if read is value and (kind == "ReduceSum" or (kind == "ReduceMax" and above_zero)):
                read = _pooled(model, read, kind)
            if kind == "ReduceSum" and read.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
                # Sums of shorter floats overflow.
                read = _add(model, "Cast", [read], ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
            answer = _add(model, kind, [read], read.dtype, keepdims=0)
            answer.shape = ir.Shape(())
            found.append(answer.name or "")
        low, high, total = found
        return low, high, total

    def whole(self, name: str) -> str:
        """What will hold the value ``name``, with NaN where it does not count."""
        value = self._kept(self._by_name[name], np.nan)
        # A name of its own: the value may be an output for a state as well.
        return _add(self._model, "Identity", [value], value.dtype).name or ""

    def pixels(self, name: str, shape: Sequence[int], enough: int) -> str | None:
        """What will hold every k-th pixel of every k-th row of the picture ``name``.

        ``k`` is odd, since what upsamples by two treats even and odd rows in two ways, and leaves
        ``enough`` numbers of ``shape``, that of a sample, as nearly as it can. None of what is no
        picture (those are what a Conv or a pool writes, and what is computed of it pixel by pixel)
        or has positions that do not count.
        """
        value = self._by_name[name]
        if (
            self._is_lined(value)
            or value not in self._pictures
            or len(shape) != 4
            or value.dtype != ir.DataType.FLOAT
        ):
            return None
        odd = range(1, max(shape[2:]) + 2, 2)
        step = min(odd, key=lambda k: abs(math.log(max(_pixels(shape, k), 1) / enough)))
        if step == 1:
            return _add(self._model, "Identity", [value], value.dtype).name
        # The runtime pools what a Conv writes as that left it; any other look has it laid out anew.
        sizes = {"kernel_shape": [1, 1], "strides": [step, step]}
        return _add(self._model, "MaxPool", [value], value.dtype, **sizes).name

    def giving(self, names: Sequence[str]) -> ir.Model:
        """The model, with the outputs ``names``."""
        made = {v.name: v for node in self._model.graph for v in node.outputs}
        made |= {v.name: v for v in self._given}
        self._model.graph.outputs.clear()
        self._model.graph.outputs.extend(made[name] for name in names)
        self._model.graph.sort()
        return self._model

    def _kept(self, value: ir.Value, padding: float) -> ir.Value:
        """``value`` where it counts, else ``padding``."""
        if self._counts is None or not self._is_lined(value):
            return value
        return _kept(self._model, value, self._counts, padding)

    def _is_lined(self, value: ir.Value) -> bool:
        return self._counts is not None and value.name in self._lined


_OF_PIXELS = frozenset(
    (
        "Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "Resize",
        "BatchNormalization", "InstanceNormalization",
    )
)  # fmt: skip
_BY_PIXEL = frozenset(
    (
        "Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Gelu",
        "Add", "Sub", "Mul", "Div", "Concat", "Pad",
    )
)  # fmt: skip


def _pictures(model: ir.Model) -> set[ir.Value]:
    """What a Conv or a pool writes, and what is computed of it pixel by pixel."""
    found: set[ir.Value] = set()
    for node in model.graph:
        read = any(value in found for value in node.inputs if value is not None)
        if node.op_type in _OF_PIXELS or (read and node.op_type in _BY_PIXEL):
            found.update(node.outputs)
    return found


def _pixels(shape: Sequence[int], step: int) -> int:
    """How many numbers every ``step``-th pixel of every ``step``-th row holds."""
    return math.prod([*shape[:2], *(-(-size // step) for size in shape[2:])])


def _above_zero(value: ir.Value) -> bool:
    """Whether a Relu, or a Clip from zero, wrote ``value``."""
    node = value.producer()
    ends = _cut(node) if node is not None else None
    return bool(ends) and ends[0][0] == 0.0


def _pooled(model: ir.Model, value: ir.Value, kind: str) -> ir.Value:
    """One number a channel of a picture, with the maximum of ``value``, or a NaN if it has one.

    The runtime pools what a Conv writes as that left it; any other look has it laid out anew.
    """
    dims = value.shape if value.dtype == ir.DataType.FLOAT else None
    if dims is None or len(dims) != 4 or not all(isinstance(d, int) and d > 0 for d in dims[2:]):
        return value
    pool = "GlobalMaxPool" if kind == "ReduceMax" else "GlobalAveragePool"
    return _add(model, pool, [value], value.dtype)


def _kept(model: ir.Model, value: ir.Value, counts: ir.Value, padding: float) -> ir.Value:
    """``value`` where ``counts`` [batch, tokens] is true, else ``padding``."""
    assert value.shape is not None and value.dtype is not None
    dims = np.array([0, 0, *[1] * (len(value.shape) - 2)])  # 0 keeps a dimension
    shape = _constant(model, dims, ir.DataType.INT64)
    spread = _add(model, "Reshape", [counts, shape], ir.DataType.BOOL)
    fill = _constant(model, np.array(padding, value.dtype.numpy()), value.dtype)
    return _add(model, "Where", [spread, value, fill], value.dtype)


def _constant(model: ir.Model, array: Any, dtype: ir.DataType) -> ir.Value:
    return _add(model, "Constant", [], dtype, value=ir.Tensor(array))


def _add(
    model: ir.Model,
    kind: str,
    inputs: Sequence[ir.Value],
    dtype: ir.DataType | None,
    **attributes: Any,
) -> ir.Value:
    """The output of a new node, with a name that nothing else has.

    It stands behind what writes an input, not at the end, where all inputs would have to wait.
    """
    attrs = ir.convenience.convert_attributes(attributes)
    node = ir.Node("", kind, inputs, attributes=attrs)
    writers = [writer for value in inputs if (writer := value.producer()) is not None]
    if writers:
        model.graph.insert_after(writers[0], node)
    else:
        model.graph.insert_before(model.graph[0], node)
    node.outputs[0].name = f"qcompile/extremes/{model.graph.num_nodes()}"
    node.outputs[0].type = None if dtype is None else ir.TensorType(dtype)
    return node.outputs[0]
