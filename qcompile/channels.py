"""Which values carry the same channels: what may be scaled at one end and scaled back at the other.

A *channel* is a number that a scale belongs to. Layers and normalisations write channels of their
own; operators that only move elements, or that a positive factor passes through (Relu, pooling, a
product with attention weights), hand them on; an Add joins those of its sides. Every element of a
value gets the id of its channel, by running the graph on arrays of ids in the shapes of one sample,
so heads of attention, groups and broadcasts need no rules of their own. A channel that anything
else reads is *pinned*: its scale must stay.

Our own reconstruction of what cross-layer equalization (Nagel et al., arXiv 1906.04721) and
SmoothQuant (Xiao et al., arXiv 2211.10438) ask of a graph.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import scipy.sparse as sparse
from scipy.sparse import csgraph

from qcompile import graph
from qcompile.graph import Layer, Shapes, Use

Ids = npt.NDArray[np.intp]


@dataclasses.dataclass(frozen=True)
class Fold:
    """A constant that is divided by the scales of the channels ``ids``, which broadcast to it."""

    use: Use
    ids: Ids


@dataclasses.dataclass(frozen=True)
class Reader:
    """A layer whose input channels are ``ids`` [K]: its weight takes the scales back."""

    layer: Layer
    ids: Ids


@dataclasses.dataclass(frozen=True)
class Channels:
    """The channels of a graph.

    * ``count``: ids are 0 to ``count - 1``; ``free`` [count]: whether one may be scaled.
    * ``folds``: the constants that write them; ``readers``: the layers that read them.
    * ``carried``: the ids of the elements of each value that carries channels.
    """

    count: int
    free: npt.NDArray[np.bool_]
    folds: tuple[Fold, ...]
    readers: tuple[Reader, ...]
    carried: Mapping[ir.Value, Ids]


def trace(model: ir.Model, shapes: Shapes) -> Channels:
    """The channels of the main graph of ``model`` for values of ``shapes`` (names to shapes)."""
    return _Trace(model, shapes).channels()


class _Trace:
    def __init__(self, model: ir.Model, shapes: Shapes) -> None:
        self.model, self.shapes = model, shapes
        self.count = 0
        self.carried: dict[ir.Value, Ids] = {}
        self.folds: list[Fold] = []
        self.readers: list[Reader] = []
        self.pinned: list[Ids] = []
        self.same: list[Ids] = []  # pairs [2, n] of ids that are one channel

    def channels(self) -> Channels:
        for node in self.model.graph:
            self._visit(node)
        for value, ids in self.carried.items():
            outside = any(node.graph is not self.model.graph for node, _ in value.uses())
            if value.is_graph_output() or outside:
                self.pinned.append(ids.ravel())
        one, other = np.concatenate([np.zeros((2, 0), np.intp), *self.same], axis=1)
        arrays: Any = sparse  # partly untyped
        graphs: Any = csgraph
        edges = arrays.coo_array((np.ones(len(one)), (one, other)), (self.count, self.count))
        count, label = graphs.connected_components(edges, directed=False)
        free = np.ones(count, np.bool_)
        for ids in self.pinned:
            free[label[ids]] = False
        return Channels(
            count, free,
            tuple(Fold(fold.use, label[fold.ids]) for fold in self.folds),
            tuple(Reader(reader.layer, label[reader.ids]) for reader in self.readers),
            {value: label[ids] for value, ids in self.carried.items()},
        )  # fmt: skip

    def _visit(self, node: ir.Node) -> None:
        layer = graph.layer_of(node)
        # A weight that others read as well would need a copy.
        own = layer is not None and len(layer.weight.value.uses()) == 1
        weighted = layer is not None and own and graph.is_constant(layer.weight.value)
        if layer is not None and weighted and layer.kind in ("conv", "depthwise", "linear"):
            self._read(layer)
            self._write(layer)
            return
        known = [v for v in node.inputs if v is not None and v in self.carried]
        written = node.outputs[0]
        shape = self.shapes.get(written.name or "")
        standard = node.domain in ("", "ai.onnx")
        if shape is not None and node.op_type in _NORMS:
            self._normalise(node, shape)
        elif shape is not None and standard and not known and node.op_type == "Mul":
            self._scaled_by_constant(node, shape)
        elif shape is not None and standard and known:
            handed = _HANDED_ON.get(node.op_type)
            ids = handed(self, node, shape) if handed else None
            if ids is not None:
                self.carried[written] = np.broadcast_to(ids, shape)
                return
        for value in known:
            self.pinned.append(self.carried[value].ravel())

    def new(self, count: int) -> Ids:
        """Ids of ``count`` new channels."""
        self.count += count
        return np.arange(self.count - count, self.count)

    def _read(self, layer: Layer) -> None:
        assert layer.input is not None
        ids = self.carried.get(layer.input.value)
        if ids is None:
            return
        axis = ids.ndim - 1 if layer.kind == "linear" else 1
        turned = graph.attribute(layer.node, "transA", 0)
        if layer.kind == "linear" and turned:
            axis = 0
        rows = np.moveaxis(ids, axis, -1).reshape(-1, ids.shape[axis])
        if (rows == rows[0]).all():
            self.readers.append(Reader(layer, rows[0]))
        else:
            self.pinned.append(ids.ravel())

    def _write(self, layer: Layer) -> None:
        shape = self.shapes.get(layer.output.name or "")
        weight = graph.shape_of(layer.weight.value)
        constant = len(layer.node.inputs) < 3 or layer.node.inputs[2] is None
        bias = None if constant else layer.bias
        if shape is None or weight is None or not (constant or bias):
            return
        if bias is not None and not graph.is_constant(bias.value):
            return
        ids = self.new(weight[layer.channel_axis])
        along = [1] * len(weight)
        along[layer.channel_axis] = -1
        self.folds.append(Fold(layer.weight, ids.reshape(along)))
        if bias is not None:
            self.folds.append(Fold(bias, ids))
        behind = 0 if layer.kind == "linear" else len(shape) - 2
        self.carried[layer.output] = np.broadcast_to(ids.reshape(-1, *[1] * behind), shape)

    def _normalise(self, node: ir.Node, shape: tuple[int, ...]) -> None:
        """A normalisation writes channels of its own, if its gain (and shift) are constant."""
        constants = [v for v in node.inputs[1:] if v is not None]
        flat = all(graph.is_constant(v) and graph.shape_of(v) == shape[-1:] for v in constants)
        if flat and constants and len(node.outputs) == 1:
            ids = self.new(shape[-1])
            for index in range(1, 1 + len(constants)):
                self.folds.append(Fold(Use(node, index), ids))
            self.carried[node.outputs[0]] = np.broadcast_to(ids, shape)

    def _scaled_by_constant(self, node: ir.Node, shape: tuple[int, ...]) -> None:
        """A product with one constant a channel of the last axis writes channels of its own."""
        for index, value in enumerate(node.inputs):
            if value is None or not graph.is_constant(value) or not graph.is_float(value):
                continue
            sizes = graph.shape_of(value)
            if sizes and sizes[-1] == math.prod(sizes) == shape[-1] > 1:
                ids = self.new(shape[-1])
                self.folds.append(Fold(Use(node, index), ids))
                self.carried[node.outputs[0]] = np.broadcast_to(ids, shape)
            return


# -- operators that hand channels on: ids of the output, or None to pin those of the inputs --------


def _same(trace: _Trace, node: ir.Node, shape: tuple[int, ...]) -> Ids | None:
    return trace.carried.get(node.inputs[0]) if node.inputs[0] is not None else None


def _moved(trace: _Trace, node: ir.Node, shape: tuple[int, ...]) -> Ids | None:
    ids = _same(trace, node, shape)
    return None if ids is None or ids.size != math.prod(shape) else ids.reshape(shape)


def _transposed(trace: _Trace, node: ir.Node, shape: tuple[int, ...]) -> Ids | None:
    ids = _same(trace, node, shape)
    return None if ids is None else ids.transpose(graph.attribute(node, "perm", None))


def _gathered_space(trace: _Trace, node: ir.Node, shape: tuple[int, ...]) -> Ids | None:
    """Pooling, padding and resizing: what is mixed or made lies in one channel."""
    ids = _same(trace, node, shape)
    if ids is None or ids.ndim < 3 or len(shape) != ids.ndim or shape[:2] != ids.shape[:2]:
        return None
    first = ids[(slice(None), slice(None), *[slice(0, 1)] * (ids.ndim - 2))]
    if node.op_type == "Pad" and len(node.inputs) > 2 and node.inputs[2] is not None:
        filler = node.inputs[2]
        if not graph.is_constant(filler) or graph.constant(filler).any():
            return None
    return first if (ids == first).all() else None


def _added(trace: _Trace, node: ir.Node, shape: tuple[int, ...]) -> Ids | None:
    sides = [v for v in node.inputs if v is not None]
    ids = [trace.carried[v] for v in sides if v in trace.carried]
    if len(ids) == 2:
        one, other = (np.broadcast_to(side, shape).ravel() for side in ids)
        trace.same.append(np.unique(np.stack([one, other]), axis=1))
        return ids[0] if ids[0].shape == shape else np.broadcast_to(ids[0], shape)
    index = 0 if sides[1] in trace.carried else 1
    constant = sides[index]
    size = graph.shape_of(constant) if graph.is_constant(constant) else None
    whole = np.broadcast_to(ids[0], shape)
    if size is None or ids[0].shape != shape:
        return None
    # The constant must have a number of its own for each channel.
    sizes = (1,) * (whole.ndim - len(size)) + size
    cut = tuple(slice(0, 1) if dim == 1 else slice(None) for dim in sizes)
    if not (whole == whole[cut]).all():
        return None
    trace.folds.append(Fold(Use(node, index), whole[cut].reshape(size)))
    return whole


def _multiplied(trace: _Trace, node: ir.Node, shape: tuple[int, ...]) -> Ids | None:
    ids = [trace.carried[v] for v in node.inputs if v is not None and v in trace.carried]
    if len(ids) != 1 or (node.op_type == "Div" and node.inputs[0] not in trace.carried):
        return None
    return np.broadcast_to(ids[0], shape)


def _mixed(trace: _Trace, node: ir.Node, shape: tuple[int, ...]) -> Ids | None:
    """A product of two activations: what is summed over on the right lies in one channel."""
    first, second = node.inputs[0], node.inputs[1]
    ids = trace.carried.get(second) if second is not None else None
    if ids is None or first in trace.carried or ids.ndim < 2:
        return None
    one = ids[..., :1, :]
    return np.broadcast_to(one, shape) if (ids == one).all() else None


def _joined(trace: _Trace, node: ir.Node, shape: tuple[int, ...]) -> Ids | None:
    parts = [trace.carried[v] for v in node.inputs if v is not None and v in trace.carried]
    if len(parts) < len(node.inputs):
        return None
    joined = np.concatenate(parts, axis=graph.attribute(node, "axis", 0))
    return joined if joined.shape == shape else None


def _repeated(trace: _Trace, node: ir.Node, shape: tuple[int, ...]) -> Ids | None:
    ids = _same(trace, node, shape)
    return None if ids is None else np.broadcast_to(ids, shape)


_HANDED_ON: dict[str, Callable[[_Trace, ir.Node, tuple[int, ...]], Ids | None]] = {
    **dict.fromkeys(("Identity", "Relu", "LeakyRelu", "Dropout"), _same),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _moved),
    **dict.fromkeys(
        ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Pad"), _gathered_space
    ),
    "Transpose": _transposed,
    **dict.fromkeys(("Add", "Sub"), _added),
    **dict.fromkeys(("Mul", "Div"), _multiplied),
    "MatMul": _mixed,
    "Concat": _joined,
    "Expand": _repeated,
}
_NORMS = frozenset(("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"))
