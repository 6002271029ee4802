"""Rules of the dialect of ONNX Runtime for layers whose weight alone is quantized."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from qcompile import graph, numerics, spec
from qcompile.backends.lowering import Lowering
from qcompile.backends.ort_embedding import packed_rows, stored_bits
from qcompile.graph import Layer, Use
from qcompile.spec import TensorSpec


def gemm_alone(low: Lowering) -> int:
    """Write a Gemm whose input has no static scale as MatMul and Add, with the weight as [K, N].

    The runtime has kernels for MatMul with packed weights, and for MatMul with scales taken at run
    time; in front of a Gemm it would dequantize the weights on every run.
    """
    count = 0
    for layer in list(low.decided()):
        entered = layer.input.spec if layer.input else None
        static = entered is not None and entered.scale_from == "static"
        if layer.node.op_type != "Gemm" or static or layer.weight.spec is None:
            continue
        _to_matmul(low, layer, layer.weight.spec)
        count += 1
    if count:
        low.layers = list(graph.layers(low.model))
    return count


def _to_matmul(low: Lowering, layer: Layer, decided: TensorSpec) -> None:
    weight = layer.weight.value
    if graph.attribute(layer.node, "transB", 0):
        weight = _turned(low.model, weight)
        arrays = {"scale": decided.scale, "zero_point": decided.zero_point, "codes": decided.codes}
        known = low.model.graph.initializers
        decided = dataclasses.replace(
            decided,
            axis=None if decided.axis is None else 1 - decided.axis,
            **{k: _turned(low.model, known[n]).name or "" for k, n in arrays.items() if n},
        )
    product = graph.insert(
        low.model, "MatMul", [layer.node.inputs[0], weight],
        output=f"{layer.output.name}/product", before=layer.node, like=layer.output,
    )  # fmt: skip
    matmul = product.producer()
    assert matmul is not None
    result = product
    if layer.bias is not None:
        result = graph.insert(
            low.model, "Add", [product, layer.bias.value],
            output=f"{layer.output.name}/biased", behind=product, like=layer.output,
        )  # fmt: skip
    graph.redirect(low.model, layer.output, result, keep=lambda _: False)
    graph.fuse(matmul, layer.node)
    Use(matmul, 0).decide(spec.read(layer.node, 0))
    Use(matmul, 1).decide(decided)
    spec.clear(layer.node)
    graph.remove_dead(low.model)


def _turned(model: ir.Model, value: ir.Value) -> ir.Value:
    """A matrix transposed, as a new constant; a scale a tensor or a channel has nothing to turn."""
    array = graph.constant(value)
    if array.ndim != 2:
        return value
    tensor = ir.Tensor(np.ascontiguousarray(array.T), dtype=value.dtype)
    return graph.add_constant(model, f"{value.name}/turned", tensor)


# Block sizes whose kernel is fast.
_NBITS_BLOCKS = (16, 32, 64, 128, 256)
# How a kernel multiplies: in int8, a block of the activation at a time, or in float, which takes
# two to three times as long, and which no kernel of 8 bits does fast.
_IN_INT8, _IN_FLOAT = 4, 0


def packed_weights(low: Lowering) -> int:
    """Write a MatMul whose weight alone is quantized, in blocks along K, as MatMulNBits.

    The runtime makes one of MatMul and DequantizeLinear itself, but not of one with a Relu behind
    it and another such MatMul behind that, and it keeps a second copy of the weights to do so.

    Its kernel rounds the activation to int8, but not where the layer writes an output of the model:
    no layer makes that error smaller. (SmolLM2, of which the head is a fifth of the weights: a
    third of a percent of the perplexity, for 7 % of the tokens a second.)
    """
    made: dict[tuple[ir.Value, TensorSpec], tuple[ir.Value, ir.Value]] = {}
    count = 0
    for layer in low.layers:
        decided = layer.weight.spec
        beside = layer.input is not None and layer.input.spec is not None
        if layer.node.op_type != "MatMul" or decided is None or beside:
            continue
        blocks = decided.block in _NBITS_BLOCKS and decided.axis in (0, -2)
        if not blocks or decided.zero_point or layer.kind != "linear":
            continue
        key = (layer.weight.value, decided)
        if key not in made:
            made[key] = _packed(low, *key)
        _to_nbits(layer, decided, *made[key])
        count += 1
    if count:
        low.model.opset_imports.setdefault("com.microsoft", 1)
    return count


def _packed(low: Lowering, weight: ir.Value, decided: TensorSpec) -> tuple[ir.Value, ir.Value]:
    """Codes [K, N] as bytes [N, K / block, block * bits / 8], first code lowest; and the scales."""
    assert decided.block is not None
    bits, block = stored_bits(decided), decided.block
    rows, columns = graph.shape_of(weight) or (0, 0)
    shape = (columns, rows // block, block * bits // 8)

    def pack(codes: numerics.Codes) -> ir.TensorProtocol:
        return ir.Tensor(packed_rows(codes.T, bits).reshape(shape))

    name = weight.name or "weight"
    packed = low.written(weight, decided, ir.DataType.UINT8, shape, pack)
    scale = np.ascontiguousarray(low.weight_grid(decided).scale.T)
    return (
        graph.add_constant(low.model, f"{name}/packed", packed),
        graph.add_constant(low.model, f"{name}/scales", scale),
    )


def _to_nbits(layer: Layer, decided: TensorSpec, packed: ir.Value, scales: ir.Value) -> None:
    node = layer.node
    rows, columns = graph.shape_of(layer.weight.value) or (0, 0)
    node.op_type, node.domain = "MatMulNBits", "com.microsoft"
    node.resize_inputs(3)
    node.replace_input_with(1, packed)
    node.replace_input_with(2, scales)
    wanted = {"K": rows, "N": columns, "bits": stored_bits(decided), "block_size": decided.block}
    last = layer.biased_output.is_graph_output() and stored_bits(decided) == 4
    for key, value in (wanted | {"accuracy_level": _IN_FLOAT if last else _IN_INT8}).items():
        node.attributes[key] = ir.AttrInt64(key, value or 0)
    spec.clear(node)
