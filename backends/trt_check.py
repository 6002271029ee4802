"""What no TensorRT engine can hold, said of the lowered graph before a parser or builder is called.

Measured with the parser and builder of TensorRT-RTX 1.7.1 but for the versions, which are from the
release notes of TensorRT. The parser says some of it in words of its own, some it lets pass and
computes wrongly, and on a static FP4 activation the builder dies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import onnx_ir as ir

from qcompile import graph
from qcompile.graph import Array

T = ir.DataType
# Formats and floats that need hardware: the least compute capability.
LEAST = {
    "fp8e4m3": 89, "mxfp8": 89, "fp4e2m1": 120, "nvfp4": 120, "bfloat16": 80,
}  # fmt: skip
_OF_TYPE = {T.FLOAT8E4M3FN: "fp8e4m3", T.FLOAT4E2M1: "fp4e2m1", T.BFLOAT16: "bfloat16"}
# The first version with dynamic FP4, which is what reaches an FP4 kernel.
FP4_VERSION = (11, 0)
_NO_CODES = {
    T.UINT8: "uint8", T.UINT4: "uint4", T.INT2: "int2", T.UINT2: "uint2",
    T.FLOAT8E5M2: "fp8e5m2", T.FLOAT8E8M0: "e8m0",
}  # fmt: skip
_NO_OPERATORS = frozenset(("MatMulNBits", "GatherBlockQuantized", "DynamicQuantizeLinear",
                           "QAttention", "QGemm"))  # fmt: skip
_SAME_TYPES = frozenset(("MatMul", "Gemm", "Conv", "Add", "Sub", "Mul", "Div", "Concat"))

Version = tuple[int, int]


def refusals(
    model: ir.Model, capabilities: Sequence[int] = (), version: Version | None = None
) -> list[str]:
    """Why the lowered ``model`` cannot be an engine, by node; empty if nothing is against it.

    ``capabilities`` are those of the engine, such as 89; none is that of each format. ``version``
    is that of TensorRT, None for TensorRT-RTX.
    """
    found: list[str] = []
    for node in model.graph:
        reasons = [reason for rule in _RULES if (reason := rule(node))]
        reasons += _by_hardware(node, capabilities, version)
        found += [f"{node.name} ({node.op_type}): {reason}" for reason in reasons[:1]]
    return found


def _operator(node: ir.Node) -> str:
    name = node.op_type
    if name in _NO_OPERATORS or name.startswith("QLinear") or name.endswith("Integer"):
        return "TensorRT takes integers as pairs of QuantizeLinear and DequantizeLinear only"
    return ""


def _codes(node: ir.Node) -> str:
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return ""
    codes = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    kind = codes.dtype if codes is not None else None
    if kind == T.INT32:
        return "int32 codes, as of a bias, are refused; a bias stays float"
    if kind is not None and kind in _NO_CODES:
        return f"{_NO_CODES[kind]} codes are refused or misread"
    scale = node.inputs[1].dtype if len(node.inputs) > 1 and node.inputs[1] else None
    if scale == T.FLOAT8E8M0:
        return "an e8m0 scale is refused"
    if node.op_type == "QuantizeLinear" and kind == T.FLOAT4E2M1:
        return "a static FP4 activation crashes the builder"
    return ""


def _zero_point(node: ir.Node) -> str:
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.inputs) < 3:
        return ""
    zero = node.inputs[2]
    if zero is None:
        return ""
    if not graph.is_constant(zero):
        return "a zero point that is computed is refused"
    codes: Array = graph.constant(zero)
    return "a zero point that is not 0 is refused" if codes.astype("float32").any() else ""


def _scale(node: ir.Node) -> str:
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return ""
    scale = node.inputs[1]
    if scale is None or not graph.is_constant(scale):
        return ""
    array: Array = graph.constant(scale)
    # The builder takes them, but its documentation wants them strictly positive.
    return "a scale that is not above 0 is undefined" if not (array > 0).all() else ""


def _block(node: ir.Node) -> str:
    if node.op_type != "DequantizeLinear" or "block_size" not in node.attributes:
        return ""
    rank = graph.rank_of(node.outputs[0])
    axis = int(graph.attribute(node, "axis", 1))
    if rank is not None and axis % rank < rank - 2:
        return "blocks must lie along one of the last two axes"
    return ""


def _blocks_beside_codes(node: ir.Node) -> str:
    writers = [w for v in node.inputs if v is not None and (w := v.producer()) is not None]
    pairs = [w for w in writers if w.op_type == "DequantizeLinear" and w.inputs[0] is not None]
    eights = [w for w in pairs if w.inputs[0].dtype == T.INT8 and not _stored(w)]  # type: ignore[union-attr]
    if eights and any("block_size" in w.attributes for w in pairs if _stored(w)):
        return "weights with a scale a block beside int8 activations are computed wrongly"
    return ""


def _stored(dequantize: ir.Node) -> bool:
    codes = dequantize.inputs[0]
    return codes is not None and codes.is_initializer()


def _mixed(node: ir.Node) -> str:
    kinds = {v.dtype for v in node.inputs if v is not None and graph.is_float(v)}
    if node.op_type in _SAME_TYPES and len(kinds) > 1:
        names = " and ".join(sorted(k.name.lower() for k in kinds if k))
        return f"inputs of {names} need a Cast"
    return ""


_RULES: tuple[Callable[[ir.Node], str], ...] = (
    _operator, _codes, _zero_point, _scale, _block, _blocks_beside_codes, _mixed
)  # fmt: skip


def _by_hardware(
    node: ir.Node, capabilities: Sequence[int], version: Version | None
) -> Iterator[str]:
    """What the hardware or the version lacks."""
    kinds = {v.dtype for v in (*node.inputs, *node.outputs) if v is not None and v.dtype}
    for kind in sorted(kinds):
        form = _OF_TYPE.get(kind)
        for capability in capabilities if form else ():
            if reason := lacks(form or "", capability):
                yield reason
        if kind == T.FLOAT4E2M1 and version is not None and version < FP4_VERSION:
            yield f"FP4 needs TensorRT {FP4_VERSION[0]}.{FP4_VERSION[1]}"
    if T.INT4 in kinds and T.FLOAT16 in kinds and 75 in capabilities:
        yield "compute capability 7.5 has no float16 kernel for int4 weights"


def lacks(form: str, capability: int) -> str:
    """Why hardware of ``capability`` does not hold ``form``; "" if it does."""
    least = LEAST.get(form, 0)
    if capability >= least:
        return ""
    return f"{form} needs compute capability {_dotted(least)}, not {_dotted(capability)}"


def _dotted(capability: int) -> str:
    return f"{capability // 10}.{capability % 10}"
