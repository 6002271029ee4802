"""The dialect of ONNX Runtime on CPUs: float layers between integers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile import graph
from qcompile.backends.lowering import MOVES, Lowering
from qcompile.graph import Use


def float_between(low: Lowering) -> int:
    """Keep a Conv, ConvTranspose or Gemm between integers in float where that was asked for.

    From a DequantizeLinear in front and a QuantizeLinear behind the runtime concludes that all is
    to be integer: it rounds the weight to int8, with one scale, and the bias to int32. It does so
    where the bias is a constant of rank 1, or there is none. Of a Conv the bias gets int32 codes of
    31 bits, whatever the grid of its input; of a Gemm, and a MatMul that becomes one, rank 2.
    """
    count = 0
    for node in list(low.model.graph):
        if node.domain not in ("", "ai.onnx") or node.op_type not in _KINDS:
            continue
        data, weight = node.inputs[0], node.inputs[1]
        if data is None or weight is None or not graph.is_constant(weight):
            continue
        place = _bias_of(node)
        if place is None or weight.dtype != ir.DataType.FLOAT:
            continue
        if _from_integers(data) and _to_integers(place.node):
            count += _written_otherwise(low, place, _channels(node, weight))
    return count


_KINDS = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))


def _bias_of(node: ir.Node) -> Use | None:
    """Where the bias of ``node`` stands or could: of a MatMul at the Add that it is fused with."""
    if node.op_type != "MatMul":
        return Use(node, 2)
    read = graph.readers(node.outputs[0])
    added = len(read) == 1 and read[0].node.op_type == "Add"
    return Use(read[0].node, 1 - read[0].index) if added else None


def _from_integers(value: ir.Value) -> bool:
    """Whether ``value`` comes from a DequantizeLinear, which the runtime moves behind moves."""
    before = value.producer()
    while before is not None and before.op_type in MOVES and before.inputs[0] is not None:
        before = before.inputs[0].producer()
    return before is not None and before.op_type == "DequantizeLinear"


def _to_integers(node: ir.Node) -> bool:
    """Whether a QuantizeLinear alone reads the output, behind any number of Relu and Clip."""
    read = graph.readers(node.outputs[0])
    while len(read) == 1 and read[0].node.op_type in ("Relu", "Clip"):
        read = graph.readers(read[0].node.outputs[0])
    return len(read) == 1 and read[0].node.op_type == "QuantizeLinear"


def _channels(node: ir.Node, weight: ir.Value) -> int:
    shape = graph.constant(weight).shape
    if node.op_type == "Conv":
        return shape[0]
    if node.op_type == "ConvTranspose":
        return shape[1] * graph.attribute(node, "group", 1)
    return shape[0] if graph.attribute(node, "transB", 0) else shape[-1]


def _written_otherwise(low: Lowering, use: Use, channels: int) -> bool:
    """Whether the bias, zeros if there is none, was a constant of rank 1, and is not any more."""
    node = use.node
    if len(node.inputs) <= use.index or node.inputs[use.index] is None:
        node.resize_inputs(use.index + 1)
        name = f"{node.inputs[1].name}/zeros" if node.inputs[1] is not None else "zeros"
        use.read_from(graph.add_constant(low.model, name, np.zeros(channels, np.float32)))
    value = use.value
    if not graph.is_constant(value) or graph.rank_of(value) != 1:
        return False
    bias = graph.constant(value)
    if node.op_type in ("Conv", "ConvTranspose"):
        largest = np.abs(bias)
        scale = np.where(largest > 0, largest, np.float32(1)) / np.float32(2**30)
        codes = np.rint(bias.astype(np.float64) / scale.astype(np.float64))
        low.bias(use, codes.astype(np.int32), scale.astype(np.float32))
    else:
        use.read_from(graph.add_constant(low.model, f"{value.name}/row", bias.reshape(1, -1)))
    return True
