"""Embedding tables of few bits on ONNX Runtime: GatherBlockQuantized.

The rows are dequantized as they are gathered, and the table stays packed in memory. Of a Gather
behind a DequantizeLinear the runtime would make a float table when it loads the file, or dequantize
the whole table on every run. Measured with ONNX Runtime 1.32: 6 microseconds for three rows of 576,
in 8 bits or in 4.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile import graph, numerics, spec
from qcompile.backends.lowering import Lowering
from qcompile.graph import Layer
from qcompile.spec import TensorSpec

Bytes = npt.NDArray[np.uint8]


def stored_bits(decided: TensorSpec) -> int:
    """4 or 8: the bits that hold a code of ``decided``."""
    return 4 if numerics.parse_format(decided.format).bits <= 4 else 8


def packed_rows(codes: numerics.Codes, bits: int) -> Bytes:
    """``codes`` [rows, columns] of 4 or 8 bits as bytes, with the middle of the grid added.

    The first of two codes of 4 bits is the lower half of a byte.
    """
    shifted: Bytes = (codes + (1 << bits - 1)).astype(np.uint8)
    if bits == 4:
        shifted = shifted[:, 0::2] | shifted[:, 1::2] << np.uint8(4)
    return np.ascontiguousarray(shifted)


def why_float(layer: Layer) -> str:
    """Why the table of ``layer`` has no packed form; "" if it has one."""
    decided, shape = layer.weight.spec, graph.shape_of(layer.weight.value)
    if decided is None or shape is None:
        return ""
    if decided.zero_point or decided.axis not in (None, 0, 1):
        return "no packed form of a table with zero points"
    if decided.block is not None and (decided.axis != 1 or not _power(decided.block)):
        return f"GatherBlockQuantized takes blocks of 16, 32, 64, ..., not of {decided.block}"
    if decided.axis == 1 and decided.block is None:
        return "no packed form of a table with a scale a column"
    return "" if shape[1] % 2 == 0 else "no packed form of rows of an odd width"


def _power(block: int) -> bool:
    return block >= 16 and block & (block - 1) == 0


def packed_embeddings(low: Lowering) -> int:
    """Write a Gather of rows of a quantized table as GatherBlockQuantized.

    Of a table that is the weight of a packed MatMul as well, with the same codes and scales, one
    copy serves both. Behind DequantizeLinear the table would be float in memory.
    """
    count = 0
    for layer in low.layers:
        decided = layer.weight.spec
        if layer.kind != "embedding" or decided is None:
            continue
        _to_packed(low, layer, decided)
        count += 1
    if count:
        low.model.opset_imports.setdefault("com.microsoft", 1)
    return count


def _to_packed(low: Lowering, layer: Layer, decided: TensorSpec) -> None:
    node, table = layer.node, layer.weight.value
    rows, columns = graph.shape_of(table) or (0, 0)
    bits, grid = stored_bits(decided), low.weight_grid(decided)
    # A block above the width of a row is the whole row.
    block = decided.block or max(16, 1 << (columns - 1).bit_length())
    scale = grid.scale if grid.axis == 1 else np.broadcast_to(grid.scale.reshape(-1, 1), (rows, 1))
    scale = np.ascontiguousarray(scale)
    shape = (rows, columns * bits // 8)
    packed = low.written(
        table, decided, ir.DataType.UINT8, shape, lambda codes: ir.Tensor(packed_rows(codes, bits))
    )
    shared = _shared(low.model, packed, scale) if decided.block else None
    name = table.name or "table"
    indices = node.inputs[1]
    if shared is not None:
        axes = graph.add_constant(low.model, f"{name}/axes", np.array([-1], np.int64))
        data, scales = shared[0], graph.insert(
            low.model, "Unsqueeze", [shared[1], axes], output=f"{name}/scales", before=node
        )  # fmt: skip
        _in_blocks(low, layer, columns)
    else:
        data = graph.add_constant(low.model, f"{name}/packed", packed)
        scales = graph.add_constant(low.model, f"{name}/scales", scale)
    node.op_type, node.domain = "GatherBlockQuantized", "com.microsoft"
    node.attributes.clear()
    node.resize_inputs(3)
    for index, value in enumerate((data, indices, scales)):
        node.replace_input_with(index, value)
    axis = 1 if shared is None else 2
    wanted = {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": axis}
    for key, number in wanted.items():
        node.attributes[key] = ir.AttrInt64(key, number)
    spec.clear(node)


def _shared(
    model: ir.Model, packed: ir.TensorProtocol, scale: numerics.Floats
) -> tuple[ir.Value, ir.Value] | None:
    """Codes [rows, blocks, bytes] and scales of a MatMulNBits that are those of a table."""
    for node in model.graph:
        if node.op_type != "MatMulNBits" or node.inputs[1] is None or node.inputs[2] is None:
            continue
        codes, scales = node.inputs[1], node.inputs[2]
        if codes.const_value is None or codes.const_value.nbytes != packed.nbytes:
            continue
        if np.array_equal(graph.constant(scales), scale) and (
            codes.const_value.tobytes() == packed.tobytes()
        ):
            return codes, scales
    return None


def _in_blocks(low: Lowering, layer: Layer, columns: int) -> None:
    """Join the blocks [..., blocks, block] that ``layer`` gathers to rows [..., columns]."""
    rank = graph.rank_of(layer.node.inputs[1]) if layer.node.inputs[1] is not None else None
    name, gathered = layer.output.name, layer.output
    sizes = np.array([0] * (rank or 0) + [columns], np.int64)
    shape = graph.add_constant(low.model, f"{name}/sizes", sizes)
    joined = graph.insert(
        low.model, "Reshape", [gathered, shape],
        output=f"{name}/rows", behind=gathered, like=gathered,
    )  # fmt: skip
    reshape = joined.producer()
    graph.redirect(low.model, gathered, joined, keep=lambda use: use.node is reshape)
    gathered.shape = None
