"""Fold BatchNormalization, and the Mul, Add, Sub and Div by constants that it decomposes into.

Common knowledge (Jacob et al., arXiv 1712.05877, section 3.2); the algebra is below.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile import graph
from qcompile.graph import Layer
from qcompile.pipeline import Context, Pass, Stats

Doubles = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class FoldBn(Pass):
    """``g (W x + b) + s`` becomes ``(g W) x + (g b + s)``, gain ``g`` and shift ``s`` [O].

    Of a BatchNormalization ``g = gamma / sqrt(var + eps)`` and ``s = beta - g mean``; of a Mul,
    Div, Add or Sub they are its constant, if that has one number a channel, or one. ``W`` is
    [O, I, kh, kw] of a Conv, [I, O / groups, kh, kw] of a ConvTranspose, or the weight of a Gemm,
    or of a MatMul if there is no shift. The fold is done in float64, again and again until nothing
    more stands behind the layer. Left alone, and counted: a BatchNormalization in training mode,
    with statistics that are not constant or not finite, or behind anything but a layer whose only
    reader it is.
    """

    name: ClassVar[str] = "fold-bn"
    invalidates: ClassVar[frozenset[str]] = frozenset({"ranges", "specs"})
    keeps_float: ClassVar[bool] = True

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        folded = affine = 0
        for layer in list(graph.layers(model)):
            while (behind := _only_reader(layer)) is not None:
                found = _affine(layer, behind)
                if found is None or not _takes(layer, *found):
                    break
                _fold(model, layer, behind, *found)
                folded += behind.op_type == "BatchNormalization"
                affine += behind.op_type != "BatchNormalization"
        graph.remove_dead(model)
        left = sum(node.op_type == "BatchNormalization" for node in model.graph)
        return {"folded": folded, "affine": affine, "left alone": left}


def _only_reader(layer: Layer) -> ir.Node | None:
    """The node behind ``layer`` that alone reads it; None if it may be read elsewhere."""
    read = graph.readers(layer.output)
    foldable = layer.node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")
    weighted = layer.kind not in ("attention", "embedding") and graph.is_constant(
        layer.weight.value
    )
    if not foldable or not weighted or len(read) != 1 or layer.output.is_graph_output():
        return None
    node = read[0].node
    return node if node.graph is layer.node.graph and node.domain in ("", "ai.onnx") else None


def _affine(layer: Layer, node: ir.Node) -> tuple[Doubles, Doubles] | None:
    """Gain and shift, [O] or one number, of ``node`` as a function of what ``layer`` writes."""
    one, none = np.ones(1), np.zeros(1)
    if node.op_type == "BatchNormalization":
        return _batch_norm(layer, node)
    if node.op_type not in ("Mul", "Div", "Add", "Sub") or len(node.inputs) != 2:
        return None
    first = node.inputs[0] is layer.output
    other = node.inputs[1] if first else node.inputs[0]
    constant = _per_channel(layer, other) if other is not None else None
    if constant is None:
        return None
    if node.op_type == "Add":
        return one, constant
    if node.op_type == "Sub":
        return (one, -constant) if first else (-one, constant)
    if node.op_type == "Mul":
        return constant, none
    return (1 / constant, none) if first and constant.all() else None


def _batch_norm(layer: Layer, node: ir.Node) -> tuple[Doubles, Doubles] | None:
    statistics = [v for v in node.inputs[1:5] if v is not None and graph.is_constant(v)]
    unused = not any(v.uses() or v.is_graph_output() for v in node.outputs[1:])
    first = node.inputs[0] is layer.output
    if len(statistics) < 4 or not first or not unused or graph.attribute(node, "training_mode", 0):
        return None
    gamma, beta, mean, variance = (graph.constant(v).astype(np.float64) for v in statistics)
    with np.errstate(invalid="ignore", divide="ignore"):  # a gain that is not finite is not taken
        gain = gamma / np.sqrt(variance + graph.attribute(node, "epsilon", 1e-5))
    return gain, beta - gain * mean


def _per_channel(layer: Layer, value: ir.Value) -> Doubles | None:
    """A constant that has one number a channel of what ``layer`` writes, or one for all."""
    shape = graph.shape_of(value) if graph.is_constant(value) else None
    weight = graph.shape_of(layer.weight.value)
    if shape is None or weight is None:
        return None
    if layer.node.op_type == "MatMul":
        rank, behind = graph.rank_of(layer.output), 0
    else:
        # Gemm writes [M, O]; Conv as many axes as its weight has, the channel second.
        rank, behind = len(weight), len(weight) - 2
    if rank is None or len(shape) > rank:
        return None
    axis = len(shape) - 1 - behind
    flat = all(d == 1 for i, d in enumerate(shape) if i != axis)
    return graph.constant(value).astype(np.float64).reshape(-1) if flat else None


def _takes(layer: Layer, gain: Doubles, shift: Doubles) -> bool:
    """Whether the weight of ``layer`` takes the gain, and its bias the shift."""
    channels = (graph.shape_of(layer.weight.value) or ())[layer.channel_axis]
    grouped = graph.attribute(layer.node, "group", 1) if layer.kind == "conv-transpose" else 1
    if layer.bias is not None and not graph.is_constant(layer.bias.value):
        return False
    if not (np.isfinite(gain).all() and np.isfinite(shift).all()):
        return False
    if not {gain.size, shift.size} <= {1, channels * grouped}:
        return False  # broadcast to more channels than the layer has
    if layer.node.op_type == "MatMul":
        return not shift.any()
    return grouped == 1 or bool(np.all(gain == 1))


def _fold(model: ir.Model, layer: Layer, node: ir.Node, gain: Doubles, shift: Doubles) -> None:
    weight = graph.constant(layer.weight.value)
    if not np.all(gain == 1):
        shape = [1] * weight.ndim
        shape[layer.channel_axis] = -1
        folded = (weight.astype(np.float64) * gain.reshape(shape)).astype(weight.dtype)
        name = f"{layer.weight.value.name}/folded".replace("/folded/folded", "/folded")
        layer.weight.read_from(graph.add_constant(model, name, folded))
    if layer.node.op_type != "MatMul":
        _fold_bias(model, layer, gain, shift, weight.dtype)
    # What the layer writes has changed, so it takes the name of the value that it now computes.
    graph.replace(model, node.outputs[0], layer.output)
    graph.fuse(layer.node, node)
    model.graph.remove(node, safe=True)


def _fold_bias(
    model: ir.Model, layer: Layer, gain: Doubles, shift: Doubles, dtype: np.dtype[np.generic]
) -> None:
    node = layer.node
    bias = np.zeros(1)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = graph.constant(node.inputs[2]).astype(np.float64)
    if node.op_type == "Gemm":
        # y = alpha x W + beta b: the gain goes onto both terms alike.
        bias = graph.attribute(node, "beta", 1.0) * bias
        node.attributes.pop("beta", None)
    whole = gain * bias + shift
    if whole.ndim < 2:  # a Gemm may have a bias [M, O]
        weight = graph.shape_of(layer.weight.value) or ()
        groups = graph.attribute(node, "group", 1) if layer.kind == "conv-transpose" else 1
        whole = np.broadcast_to(whole, (weight[layer.channel_axis] * groups,))
    added = graph.add_constant(model, f"{layer.name}/bias", whole.astype(dtype))
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, added)
