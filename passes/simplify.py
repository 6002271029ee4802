"""Remove what computes nothing: identities, constant weights behind moves, zero biases, dead nodes.

Our own housekeeping, no paper. It runs first in every recipe, so that later passes see a weight as
one initializer.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile import graph
from qcompile.pipeline import Context, Pass, Stats


@dataclasses.dataclass(frozen=True)
class Simplify(Pass):
    """Keep the function; only the order in which a mean is summed may change.

    * Identity nodes go (names of graph inputs and outputs stay).
    * A weight or bias of a layer that stands behind Transpose, Reshape, Cast, ... becomes one
      initializer. Large weights of layers that need nothing are not read.
    * A bias of a Conv that is all zeros goes.
    * A ReduceMean over all spatial axes becomes a GlobalAveragePool, which has an integer form.
    * A Reshape whose computed shape is known, up to dimensions that it keeps, gets a constant
      shape.
    * A Pad with zeros, whose only reader is a Conv, becomes the padding of that Conv; a Pad by
      nothing goes.
    """

    name: ClassVar[str] = "simplify"
    keeps_float: ClassVar[bool] = True

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        identities = sum(
            _bypass(model, node) for node in list(model.graph) if node.op_type == "Identity"
        )
        folded = biases = 0
        made: dict[ir.Value, ir.Value] = {}
        for layer in list(graph.layers(model)):
            for use in (layer.weight, layer.bias):
                if use is None or use.value.producer() is None or not graph.is_constant(use.value):
                    continue
                value = use.value
                if value not in made:
                    made[value] = graph.add_constant(
                        model, f"{value.name}/folded", np.ascontiguousarray(graph.constant(value))
                    )
                use.read_from(made[value])
                folded += 1
            bias = layer.bias
            constant = bias is not None and graph.is_constant(bias.value)
            if bias is None or not constant or layer.node.op_type != "Conv":
                continue
            if not graph.constant(bias.value).any():
                layer.node.resize_inputs(2)
                biases += 1
        pools = sum(_to_pool(model, node) for node in list(model.graph))
        reshapes = sum(_fix_shape(model, node) for node in list(model.graph))
        pads = sum(_absorb_pad(model, node) for node in list(model.graph) if node.op_type == "Pad")
        graph.remove_dead(model)
        return {
            "identities": identities,
            "weights": folded,
            "zero biases": biases,
            "pools": pools,
            "reshapes": reshapes,
            "pads": pads,
        }


def _bypass(model: ir.Model, identity: ir.Node) -> bool:
    """Let the readers of an Identity read what it reads; those in bodies stay as they are."""
    entered, written = identity.inputs[0], identity.outputs[0]
    if entered is None or identity.domain not in ("", "ai.onnx"):
        return False
    if written.is_graph_output():
        # An output is written by a node, and by that once.
        writer = entered.producer()
        if writer is None or writer.graph is not model.graph or entered.is_graph_output():
            return False
        graph.replace(model, written, entered)
    else:
        graph.redirect(model, written, entered, keep=lambda _: False)
    model.graph.remove(identity, safe=True)
    return True


def _to_pool(model: ir.Model, node: ir.Node) -> bool:
    """Make a ReduceMean over the spatial axes of [N, C, H, W, ...] a GlobalAveragePool.

    Not of [N, T, C]: there it is part of a normalisation.
    """
    entered = node.inputs[0] if node.op_type == "ReduceMean" and node.inputs else None
    rank = graph.rank_of(entered) if entered is not None else None
    if entered is None or rank is None or rank < 4:
        return False
    axes = graph.attribute(node, "axes", None)
    if axes is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        axes = graph.constant(node.inputs[1]) if graph.is_constant(node.inputs[1]) else None
    if axes is None or sorted(int(a) % rank for a in axes) != list(range(2, rank)):
        return False
    keeps = graph.attribute(node, "keepdims", 1) == 1
    node.attributes.clear()
    node.resize_inputs(1)
    node.op_type = "GlobalAveragePool"
    if keeps:
        return True
    name = node.outputs[0].name
    pooled = graph.insert(
        model, "GlobalAveragePool", [entered], output=f"{name}/pooled", behind=entered
    )
    pooled.type = entered.type
    if entered.shape is not None:
        pooled.shape = ir.Shape([*list(entered.shape)[:2], *(1,) * (rank - 2)])
    spatial = graph.add_constant(model, f"{name}/axes", np.arange(2, rank, dtype=np.int64))
    node.op_type = "Squeeze"
    node.resize_inputs(2)
    node.replace_input_with(0, pooled)
    node.replace_input_with(1, spatial)
    return True


def _fix_shape(model: ir.Model, node: ir.Node) -> bool:
    """Give a Reshape with a computed shape a constant one; whether that was possible."""
    if node.op_type != "Reshape" or node.inputs[0] is None or node.inputs[1] is None:
        return False
    entered, reshaped = node.inputs[0].shape, node.outputs[0].shape
    if graph.is_constant(node.inputs[1]) or entered is None or reshaped is None:
        return False
    dims: list[int] = []
    for axis, dim in enumerate(reshaped):
        if isinstance(dim, int):
            if dim == 0:
                return False
            dims.append(dim)
        elif axis < len(entered) and dim.value is not None and entered[axis] == dim:
            dims.append(0)  # the operator's word for "as it came in"
        else:
            return False
    constant = graph.add_constant(model, f"{node.outputs[0].name}/shape", np.array(dims, np.int64))
    node.replace_input_with(1, constant)
    node.attributes.pop("allowzero", None)
    return True


def _absorb_pad(model: ir.Model, pad: ir.Node) -> bool:
    """Move the amounts of ``pad`` into the Conv behind it; whether that was possible."""
    entered, padded = pad.inputs[0], pad.outputs[0]
    amounts = _amounts(pad)
    if amounts is None or entered is None or padded.is_graph_output():
        return False
    if not amounts.any():
        graph.redirect(model, padded, entered, keep=lambda _: False)
        return True
    read = graph.readers(padded)
    conv = read[0].node if len(read) == 1 and read[0].index == 0 else None
    if conv is None or conv.op_type != "Conv" or conv.graph is not model.graph:
        return False
    plain = graph.attribute(conv, "auto_pad", "NOTSET") in ("NOTSET", "VALID")
    spatial = amounts[:, 2:]
    if not plain or amounts[:, :2].any() or (amounts < 0).any():
        return False
    own = np.array(graph.attribute(conv, "pads", [0] * spatial.size)).reshape(2, -1)
    conv.attributes["pads"] = ir.AttrInt64s("pads", [int(p) for p in (own + spatial).ravel()])
    conv.attributes.pop("auto_pad", None)
    conv.replace_input_with(0, entered)
    return True


def _amounts(pad: ir.Node) -> npt.NDArray[np.int64] | None:
    """What ``pad`` adds, [begin and end, axes], if that is constant and adds zeros; else None."""
    values = list(pad.inputs) + [None] * (4 - len(pad.inputs))
    if graph.attribute(pad, "mode", "constant") != "constant" or values[3] is not None:
        return None
    if values[1] is None or not graph.is_constant(values[1]):
        return None
    filler = values[2]
    if filler is not None and (not graph.is_constant(filler) or graph.constant(filler).any()):
        return None
    return graph.constant(values[1]).astype(np.int64).reshape(2, -1)
