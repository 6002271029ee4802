"""Rules of the dialect of ONNX Runtime for MatMul: biases, scales taken at run time, residuals.

``MatMulIntegerToFloat`` multiplies codes and scales the sums, ``s_x s_w (x_q - z_x)(w_q - z_w) +
b``. The runtime makes it of a MatMul between Q/DQ pairs, but never with the bias, which would then
be one more pass over the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qcompile import graph, packing, spec
from qcompile.backends.lowering import Lowering
from qcompile.graph import Layer

KERNEL = "MatMulIntegerToFloat"


def dynamic_inputs(low: Lowering) -> int:
    """Write a linear layer that takes the scale of its input from the tensor at run time as
    DynamicQuantizeLinear and MatMulIntegerToFloat, the bias included.

    The runtime makes one kernel of them; layers that read one value share its codes.
    """
    made: dict[ir.Value, Sequence[ir.Value]] = {}
    count = 0
    for layer in low.decided():
        entered = layer.input.spec if layer.input else None
        if layer.input is None or entered is None or entered.scale_from == "static":
            continue
        value = layer.input.value
        if value not in made:
            made[value] = _quantized(low.model, value)
        to_kernel(low, layer, *made[value])
        count += 1
    return count


def _quantized(model: ir.Model, value: ir.Value) -> Sequence[ir.Value]:
    """Codes (uint8), scale and zero point of ``value``, of one tensor at a time."""
    codes = graph.insert(
        model, "DynamicQuantizeLinear", [value], output=f"{value.name}/dynamic", behind=value,
        outputs=3,
    )  # fmt: skip
    node = codes.producer()
    assert node is not None
    kinds = (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8)
    for output, kind in zip(node.outputs, kinds, strict=True):
        output.type, output.shape = ir.TensorType(kind), ir.Shape([])
    codes.shape = value.shape
    return node.outputs


def flat_bias(layer: Layer) -> graph.Array | None:
    """The constant bias [N] behind a MatMul if it does not raise the rank of the product."""
    rank = graph.rank_of(layer.output) or graph.rank_of(layer.biased_output)
    if layer.bias is None or layer.bias.node is layer.node or rank is None:
        return None
    bias = graph.constant(layer.bias.value)
    return None if bias.ndim > rank else bias.reshape(-1)


def to_kernel(
    low: Lowering, layer: Layer, codes: ir.Value, scale: ir.Value, zero: ir.Value
) -> None:
    """Make a MatMul, with its bias if it has one, the kernel that reads ``codes``."""
    dequantize = layer.weight.value.producer()
    assert dequantize is not None
    weight, weight_scale, weight_zero = dequantize.inputs
    inputs = [codes, weight, scale, weight_scale, zero, weight_zero]
    gone, last = [layer.node], layer.output
    bias = flat_bias(layer)
    if bias is not None and layer.bias is not None:
        channels = (graph.shape_of(layer.weight.value) or (0,))[-1]
        name = f"{layer.bias.value.name}/flat"
        inputs.append(graph.add_constant(low.model, name, _spread(bias, channels)))
        gone, last = [layer.node, layer.bias.node], layer.biased_output
    product = graph.insert(
        low.model, KERNEL, inputs, output=f"{layer.output.name}/scaled", before=layer.node,
        like=last, domain="com.microsoft",
    )  # fmt: skip
    kernel = product.producer()
    assert kernel is not None
    graph.fuse(kernel, *gone)
    packing.follow(dequantize, kernel)
    for node in gone:
        spec.clear(node)
    graph.replace(low.model, last, product)
    low.model.opset_imports.setdefault("com.microsoft", 1)


def _spread(bias: graph.Array, channels: int) -> graph.Array:
    return bias if len(bias) == channels else bias.repeat(channels)


def plain_sum(low: Lowering) -> int:
    """Write the Add in front of a LayerNormalization as Sum, which computes the same.

    The runtime makes SkipLayerNormalization of Add and LayerNormalization, which takes four times
    as long as the two (124 against 30 us for [64, 384], 745 against 140 us for [197, 768]).
    """
    count = 0
    for node in low.model.graph:
        entered = node.inputs[0] if node.op_type == "LayerNormalization" else None
        add = entered.producer() if entered is not None else None
        if add is not None and add.op_type == "Add" and add.domain in ("", "ai.onnx"):
            add.op_type = "Sum"
            count += 1
    return count
