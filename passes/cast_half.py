"""Compute in float16 or bfloat16 where that is safe: half the bytes, and the fast kernels of a GPU.

After Micikevicius et al., "Mixed Precision Training" (arXiv 1710.03740, section 3); what stays
float32 is proved by data where there is some (see guards), and the places of the Casts are a
minimum cut, so that they are as few as may be.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qcompile import cut, graph, guards, halves, opset
from qcompile.errors import PassError, nearest
from qcompile.halves import Half, Places
from qcompile.pipeline import Context, Pass, Stats

# What a Cast and an operator in float32 cost: an element of a Cast is 6 bytes of traffic, and one
# of an operator 4 more in float32 than in half. A layer is worth many Casts.
_CAST, _OPERATOR, _LAYER = 3, 2, 1000
# Integers that every half float holds exactly.
_SMALL_INTEGERS = frozenset((ir.DataType.BOOL, ir.DataType.INT8, ir.DataType.UINT8))
# From here on Conv, pooling and recurrent layers take bfloat16.
_BFLOAT16_OPSET = 22
_SHAPES = frozenset(("Shape", "Size"))


@dataclasses.dataclass(frozen=True)
class CastHalf(Pass):
    """Weights and activations become half floats; inputs, outputs and bodies keep their types.

    float32 stay, with Casts around them: sums (norms, Softmax, means), powers, and what divides by
    small numbers, unless the data proves that they fit with ``margin`` to spare; what reads or
    writes numbers beyond ``largest / margin``, as in a mask of -1e9; constants below the smallest
    normal number; steps such as Floor; bodies of control flow, custom operators, and what they
    read. Without data no magnitude is known and nothing of the first kind is proved. In bfloat16
    sums and powers always stay, and the opset is raised to 22.

    Decisions and ranges are kept: before ``insert-qdq``, scales are written in the type of their
    layer. A glob in ``keep`` that matches nothing raises PassError.

    * ``dtype``: ``float16`` or ``bfloat16``.
    * ``keep``: globs over the names and operator types of nodes that stay float32.
    * ``margin``: how many times larger than measured a number may be; from 1.
    """

    name: ClassVar[str] = "cast-half"
    produces: ClassVar[frozenset[str]] = frozenset({"narrowed"})
    source: ClassVar[str] = "arXiv 1710.03740"

    dtype: Literal["float16", "bfloat16"] = "float16"
    keep: tuple[str, ...] = ()
    margin: float = 4.0

    def __post_init__(self) -> None:
        if not self.margin >= 1.0:
            raise PassError(f"margin must be at least 1, got {self.margin:g}")

    def float_formats(self) -> tuple[str, ...]:
        return (self.dtype,)

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        half = halves.of(halves.TYPES[self.dtype])
        assert half is not None
        if half.dtype == ir.DataType.BFLOAT16:
            opset.raise_to(model, _BFLOAT16_OPSET, opset.NEWEST)
        kept = self._kept(model)
        measured = {}
        if ctx.calibration is not None:
            outputs = (v for node in model.graph for v in node.outputs)
            floats = [v.name or "" for v in (*model.graph.inputs, *outputs) if _wide(v) and v.name]
            measured = ctx.calibration.magnitudes(model, floats)
        reasons = guards.Guard(half, self.margin, measured).reasons(model)
        reasons |= dict.fromkeys(kept, f"{self}")
        places = _narrow(model, half, reasons)
        edit = _Edit(model, half, places)
        edit.run()
        for layer in graph.layers(model):
            if layer.node not in places and layer.node in reasons:
                layer.node.metadata_props[graph.REASON] = reasons[layer.node]
        graph.remove_dead(model)
        return {
            "nodes": len(places),
            "kept float32": len([node for node in reasons if any(map(_wide, node.outputs))]),
            "casts": edit.casts,
            "bounds clamped": edit.clamped,
            "weights too small": edit.lost,
        }

    def _kept(self, model: ir.Model) -> list[ir.Node]:
        nodes = list(model.graph)
        for glob in self.keep:
            if not any(graph.matches(node, glob) for node in nodes):
                names = [name for node in nodes for name in (node.name or "", node.op_type)]
                raise PassError(f"keep={glob} matches no node; {nearest(glob, names)}")
        return [node for node in nodes if any(graph.matches(node, g) for g in self.keep)]


def _wide(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.FLOAT


def _narrow(model: ir.Model, half: Half, reasons: dict[ir.Node, str]) -> dict[ir.Node, Places]:
    """The nodes that compute in half at the least price, and where they turn."""
    version = model.opset_imports.get("", 0)
    choice, spots, where = cut.Choice(), dict[ir.Node, int](), dict[ir.Node, Places]()
    for node in model.graph:
        found = _from_integers(node) or halves.places(node, version, half.dtype)
        if found is None or node in reasons:
            spots[node] = cut.SECOND
            continue
        where[node] = found
        weighty = graph.layer_of(node) is not None or node.op_type in graph.RECURRENT
        spots[node] = choice.place(_LAYER if weighty else _OPERATOR)
    for value in (*model.graph.inputs, *(v for node in model.graph for v in node.outputs)):
        if not _wide(value):
            continue
        writer = value.producer()
        spot = cut.SECOND if writer is None else spots[writer]
        if writer is not None and _casts(writer, half.dtype, ir.DataType.FLOAT):
            spot = cut.FIRST
        readers = {cut.SECOND} if value.is_graph_output() else set[int]()
        for node, index in value.uses():
            if node.graph is model.graph and node.op_type in _SHAPES:
                continue
            if _casts(node, ir.DataType.FLOAT, half.dtype):
                readers.add(cut.FIRST)
                continue
            turns = node in where and index in where[node].inputs
            readers.add(spots[node] if turns else cut.SECOND)
        choice.value(spot, sorted(readers), _CAST)
    wide = choice.second()
    return {node: found for node, found in where.items() if spots[node] not in wide}


def _casts(node: ir.Node, one: ir.DataType, other: ir.DataType) -> bool:
    """Whether ``node`` is a Cast between two types."""
    entered = node.inputs[0] if node.op_type == "Cast" and node.inputs else None
    return entered is not None and entered.dtype == one and node.outputs[0].dtype == other


def _from_integers(node: ir.Node) -> Places | None:
    """The output of a Cast of integers that a half float holds exactly."""
    entered = node.inputs[0] if node.op_type == "Cast" and node.inputs else None
    if entered is None or entered.dtype not in _SMALL_INTEGERS or not _wide(node.outputs[0]):
        return None
    return Places(frozenset(), frozenset({0}))


class _Edit:
    """The nodes of ``places`` turned to half, with a Cast wherever the types then differ."""

    def __init__(self, model: ir.Model, half: Half, places: dict[ir.Node, Places]) -> None:
        self.casts = self.clamped = self.lost = 0
        self._model, self._half, self._places = model, half, places
        self._narrow: dict[ir.Value, ir.Value] = {}  # the same numbers in half

    def run(self) -> None:
        for node in list(self._model.graph):
            if _casts(node, self._half.dtype, ir.DataType.FLOAT) and node.inputs[0] is not None:
                self._narrow[node.outputs[0]] = node.inputs[0]
        for node in list(self._model.graph):
            for index in sorted(self._places[node].inputs) if node in self._places else ():
                value = node.inputs[index]
                assert value is not None
                writer = value.producer()
                turns = writer in self._places and value in _turned(writer, self._places)
                if not turns:
                    node.replace_input_with(index, self._in_half(node, index, value))
        for node in list(self._model.graph):
            for value in _turned(node, self._places):
                self._turn(node, value)

    def _in_half(self, node: ir.Node, index: int, value: ir.Value) -> ir.Value:
        """``value``, which is written in float32, in half: converted, or through a Cast."""
        bounds = index in guards.BOUNDS.get(node.op_type, ())
        if value not in self._narrow:
            if value.is_initializer() and not value.is_graph_input():
                self._narrow[value] = self._constant(value, bounds)
            else:
                self._narrow[value] = self._cast(value, self._half.dtype, f"{value.name}/half")
        return self._narrow[value]

    def _constant(self, value: ir.Value, bounds: bool) -> ir.Value:
        tensor, kind = value.const_value, self._half.dtype.numpy()
        assert tensor is not None

        def narrow() -> ir.TensorProtocol:
            array = graph.read_tensor(tensor)
            if bounds:
                array = np.clip(array, -self._half.largest, self._half.largest)
            return ir.Tensor(array.astype(kind), dtype=self._half.dtype)

        if isinstance(tensor, ir.ExternalTensor):  # it may be larger than memory
            shape = ir.Shape(tensor.shape.numpy())
            packed: ir.TensorProtocol = ir.LazyTensor(narrow, self._half.dtype, shape)
        else:
            array = graph.read_tensor(tensor)
            self.clamped += bounds and bool((np.abs(array) > self._half.largest).any())
            self.lost += int(np.count_nonzero((array != 0) & (np.abs(array) < self._half.normal)))
            packed = narrow()
        return graph.add_constant(self._model, f"{value.name}/half", packed)

    def _turn(self, node: ir.Node, value: ir.Value) -> None:
        """Let ``node`` write ``value`` in half; who wants float32 reads it through a Cast."""
        if node in self._places and not self._places[node].inputs:
            node.attributes["to"] = ir.AttrInt64("to", int(self._half.dtype))
        uses = list(value.uses())
        value.type = ir.TensorType(self._half.dtype)
        wide: list[tuple[ir.Node, int]] = []
        inner = False
        for reader, index in uses:
            if reader in self._places and index in self._places[reader].inputs:
                continue
            if reader.graph is self._model.graph and reader.op_type in _SHAPES:
                continue
            if reader.op_type == "Cast" and reader.outputs[0].dtype == self._half.dtype:
                if not reader.outputs[0].is_graph_output():
                    graph.redirect(self._model, reader.outputs[0], value, keep=lambda _: False)
                continue
            wide.append((reader, index))
            inner = inner or reader.graph is not self._model.graph
        if not wide and not value.is_graph_output():
            return
        cast = self._cast(value, ir.DataType.FLOAT, f"{value.name}/float")
        for reader, index in wide:
            reader.replace_input_with(index, cast)
        if value.is_graph_output() or inner:  # these keep their name and their type
            name = value.name
            value.name, cast.name = graph.unique(self._model, f"{name}/half"), name
            for position, output in enumerate(self._model.graph.outputs):
                if output is value:
                    self._model.graph.outputs[position] = cast

    def _cast(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
        self.casts += 1
        made = halves.cast(self._model, value, dtype, name)
        if graph.RANGE in value.metadata_props:
            made.metadata_props[graph.RANGE] = value.metadata_props[graph.RANGE]
        return made


def _turned(node: ir.Node | None, places: dict[ir.Node, Places]) -> list[ir.Value]:
    """What ``node`` writes in half."""
    if node is None or node not in places:
        return []
    return [node.outputs[index] for index in sorted(places[node].outputs)]
