"""Take Q/DQ out of a model that was quantized before, so that it can be quantized anew.

A QuantizeLinear with a DequantizeLinear behind it goes, and a constant behind a DequantizeLinear
becomes the float that it stands for, also one that nodes unpack of constants: the function is that
of the model before, up to the rounding of activations, which is gone, and of weights, which stays.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile import execute, graph
from qcompile.numerics import Grid, IntFormat

# Operators that only move elements, so that they do to floats what they do to codes.
_MOVES = frozenset(
    ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Slice",
     "Gather", "DepthToSpace", "SpaceToDepth", "Expand", "Tile")
)  # fmt: skip


def strip(model: ir.Model) -> int:
    """Remove every Q/DQ pair and dequantize every constant of the main graph, in place; how many.

    Operators between the two of a pair that only move elements then move floats. Of the integer
    operators MatMulIntegerToFloat, which ``ort-cpu`` writes, is taken apart first; others
    (QLinearConv, MatMulInteger, ...) stay, and the caller refuses what is left.
    """
    for node in list(model.graph):
        if node.op_type == "MatMulIntegerToFloat":
            _unfold(model, node)
    _unpack(model)  # behind it, since those kernels read codes as well
    count = 0
    for node in list(model.graph):
        if node.op_type != "DequantizeLinear" or node.inputs[0] is None:
            continue
        codes, written = node.inputs[0], node.outputs[0]
        chain, quantize = _back(codes)
        if quantize is not None and quantize.inputs[0] is not None:
            source = quantize.inputs[0]
            for moved in chain:
                moved.outputs[0].type = written.type
                if moved.op_type == "Pad":
                    moved.replace_input_with(2, None)  # the zero point, which stands for 0
            (chain[-1] if chain else node).replace_input_with(0, source)
            graph.redirect(model, written, codes if chain else source, keep=lambda _: False)
            count += 1
        elif all(v is None or graph.is_constant(v) for v in node.inputs):
            name = (codes.name or "weight").removesuffix("_quantized")
            value = graph.add_constant(model, f"{name}/float", _dequantized(node))
            graph.redirect(model, written, value, keep=lambda _: False)
            count += 1
    graph.remove_dead(model)
    return count


def _unpack(model: ir.Model) -> None:
    """Compute the codes that nodes make of constants, such as packed ones, and remove these."""
    known: set[ir.Value] = set()
    for node in model.graph:
        read = [v for v in node.inputs if v is not None]
        if read and all(v in known or graph.is_constant(v) for v in read):
            known |= set(node.outputs)
    codes = [n.inputs[0] for n in model.graph if n.op_type == "DequantizeLinear"]
    packed = {v.name or "": v for v in codes if v is not None and v in known}
    if not packed:
        return
    asked = execute.fetch(model, list(packed))
    graph.remove_dead(asked)
    asked.graph.inputs.clear()
    for name, array in execute.execute(asked, {}).items():
        unpacked = graph.add_constant(model, f"{name}/unpacked", array)
        graph.redirect(model, packed[name], unpacked, keep=lambda _: False)
    graph.remove_dead(model)


def _unfold(model: ir.Model, node: ir.Node) -> None:
    """Write MatMulIntegerToFloat as DequantizeLinear of both sides, MatMul and Add."""
    codes, weight, scale, weight_scale, zero, weight_zero, bias, *_ = [*node.inputs, *[None] * 3]
    last = node.outputs[0]
    name = last.name or "product"
    dynamic = codes.producer() if codes is not None else None
    if dynamic is not None and dynamic.op_type == "DynamicQuantizeLinear":
        entered = dynamic.inputs[0]
    else:
        entered = graph.insert(
            model, "DequantizeLinear", [codes, scale, zero], output=f"{name}/input", before=node
        )
    held = graph.insert(
        model, "DequantizeLinear", [weight, weight_scale, weight_zero], {"axis": 1},
        output=f"{name}/weight", before=node,
    )  # fmt: skip
    product = graph.insert(
        model, "MatMul", [entered, held], output=f"{name}/matmul", before=node, like=last
    )
    if bias is not None:
        product = graph.insert(
            model, "Add", [product, bias], output=f"{name}/biased", before=node, like=last
        )
    for value in (entered, held):
        if value is not None and value.type is None:
            value.type = last.type
    graph.redirect(model, last, product, keep=lambda _: False)


def _back(codes: ir.Value) -> tuple[list[ir.Node], ir.Node | None]:
    """What moves ``codes``, last first, and the QuantizeLinear that wrote them; or None."""
    chain: list[ir.Node] = []
    node = codes.producer()
    while node is not None and node.op_type in (*_MOVES, "Pad") and node.inputs[0] is not None:
        if len(node.outputs[0].uses()) > 1:
            return chain, None
        chain.append(node)
        node = node.inputs[0].producer()
    if node is None or node.op_type != "QuantizeLinear":
        return chain, None
    pads = [moved for moved in chain if moved.op_type == "Pad"]
    return chain, node if all(_pads_zeros(pad, node) for pad in pads) else None


def _pads_zeros(pad: ir.Node, quantize: ir.Node) -> bool:
    """Whether ``pad`` fills with what ``quantize`` makes of 0."""
    filler = pad.inputs[2] if len(pad.inputs) > 2 else None
    zero = quantize.inputs[2] if len(quantize.inputs) > 2 else None
    if filler is None or zero is None or not graph.is_constant(filler):
        return filler is None and zero is None
    return graph.is_constant(zero) and np.array_equal(graph.constant(filler), graph.constant(zero))


def _dequantized(node: ir.Node) -> npt.NDArray[np.generic]:
    """What a DequantizeLinear of constants computes."""
    codes, scale, *zero = [graph.constant(v) for v in node.inputs if v is not None]
    axis: int | None = graph.attribute(node, "axis", 1)
    block: int | None = graph.attribute(node, "block_size", 0) or None
    if scale.size == 1:
        scale, axis, block = scale.reshape(()), None, None
    points = zero[0].astype(np.int32).reshape(scale.shape) if zero else np.int32(0)
    grid = Grid(
        IntFormat(8, True), scale.astype(np.float32),
        np.broadcast_to(points, scale.shape), axis, block,
    )  # fmt: skip
    return grid.dequantize(codes.astype(np.int32)).astype(scale.dtype)
