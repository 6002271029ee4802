"""The dialect of TensorRT and TensorRT-RTX: the rules, in the order of the lowering.

Symmetric int8 everywhere (the parser refuses any other zero point), float biases (it refuses int32
ones), Q/DQ on inputs and weights only: the builder fuses ReLU and the quantization of outputs
itself. What the hardware has no fast int8 kernel for stays float, and says why.
"""

from __future__ import annotations

from qcompile import graph, numerics
from qcompile.backends.base import Lowering, activation_range, no_dialect_holds, rules
from qcompile.graph import Layer, Use
from qcompile.numerics import Grid, IntFormat

INT8 = IntFormat(8, signed=True)
# Below these, NVIDIA's own exclusions leave a layer in float.
MIN_CHANNELS = 16


def keep_float(low: Lowering) -> int:
    """Leave in float what int8 makes slower: depthwise Conv and ConvTranspose (weights are blown
    up, or run in float all the same), Conv and linear layers with fewer than 16 channels in or out
    (a first Conv excepted), Gemm with a transposed input, block scales beside a quantized input
    (the builder is suspected to apply them once a channel), and what is not float32.
    """
    count = 0
    for layer in list(low.decided()):
        reason = _why_float(low, layer)
        if reason:
            low.keep_float(layer, reason)
            count += 1
    return count


def _why_float(low: Lowering, layer: Layer) -> str:
    unheld = no_dialect_holds(layer)
    if unheld:
        return unheld
    if layer.kind == "depthwise":
        return "TensorRT has no fast int8 kernel for a depthwise Conv"
    if layer.kind == "conv-transpose":
        return "TensorRT runs ConvTranspose in float"
    if graph.attribute(layer.node, "transA", 0):
        return "a Gemm with a transposed input stays float"
    if layer.kind != "attention" and layer.weight.spec is None:
        return "a quantized input needs a quantized weight"
    if layer.kind == "attention":
        both = layer.input is not None and layer.input.spec and layer.weight.spec
        return "" if both else "a product of two activations needs both of them quantized"
    shape = graph.shape_of(layer.weight.value)
    if shape is None or layer.input is None:
        return "the shape of the weight is not known"
    first = layer.input.value.is_graph_input()
    outs, ins = shape[layer.channel_axis], shape[layer.reduce_axis]
    if layer.kind == "conv":
        square = len(set(shape[2:])) == 1 and ins % 8 == 0 and outs % 8 == 0
        if (ins >= MIN_CHANNELS or first or square) and (outs >= MIN_CHANNELS or square):
            return ""
        return f"a Conv with {ins} to {outs} channels is faster in float"
    if min(ins, outs) < MIN_CHANNELS:
        return f"a linear layer of {ins} to {outs} is faster in float"
    return ""


def weights(low: Lowering) -> int:
    """Store weights as symmetric int8 (int4 where only the weight is quantized, and the format has
    at most 4 bits), dequantized in place.
    """
    count = 0
    for layer in low.decided():
        if layer.kind != "attention" and layer.weight.spec is not None:
            beside = layer.input is not None and layer.input.spec is not None
            low.weight(layer.weight, layer.weight.spec, wide=beside)
            count += 1
    return count


def inputs(low: Lowering) -> int:
    """Give each quantized input a symmetric int8 grid: the larger end of its range over 127."""
    count = 0
    for layer in low.decided():
        uses = [layer.input, layer.weight] if layer.kind == "attention" else [layer.input]
        for use in uses:
            if use is None or use.spec is None or low.grid_of(use.value) is not None:
                continue
            count += _quantize(low, use)
            low.input_grids[layer.node] = INPUT
    return count


def residual(low: Lowering) -> int:
    """Quantize the identity side of an Add behind a quantized Conv.

    Then the Conv emits int8 and the Add is fused into it; with a float identity the output of the
    fused Conv is limited to high precision.
    """
    convs = {
        layer.output
        for layer in low.layers
        if layer.kind == "conv" and layer.node in low.input_grids
    }
    count = 0
    for node in list(low.model.graph):
        if node.op_type != "Add" or node.domain not in ("", "ai.onnx") or len(node.inputs) != 2:
            continue
        sides = [Use(node, 0), Use(node, 1)]
        behind = [side for side in sides if side.value in convs]
        if not behind or any(graph.is_constant(side.value) for side in sides):
            continue
        identity = sides[0] if behind[-1].index == 1 else sides[1]
        if low.grid_of(identity.value) is None:
            count += _quantize(low, identity)
    return count


def _quantize(low: Lowering, use: Use) -> int:
    found = activation_range(low.model, use.value)
    if found is None:
        return 0
    scale, zero = numerics.affine(*found, INT8, symmetric=True)
    use.read_from(low.pair(use.value, Grid(INT8, scale, zero)))
    return 1


# Marks a layer as quantized; the rules of this dialect need no scale of it later.
INPUT = Grid(INT8, *numerics.affine(-1.0, 1.0, INT8, symmetric=True))

DIALECT = rules(keep_float, weights, inputs, residual)
