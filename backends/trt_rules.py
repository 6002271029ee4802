"""The dialect of TensorRT and TensorRT-RTX: the rules, in the order of the lowering.

Symmetric int8 everywhere (the parser refuses any other zero point), float biases (it refuses int32
ones), Q/DQ on inputs and weights only: the builder fuses ReLU and the quantization of outputs
itself. What the hardware has no fast int8 kernel for stays float, and says why.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile import graph, numerics
from qcompile.backends.base import Lowering, activation_range, rules
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
    return low.exclude(_why_float)


def _why_float(layer: Layer) -> str:
    if layer.kind == "depthwise":
        return "TensorRT has no fast int8 kernel for a depthwise Conv"
    if layer.kind == "conv-transpose":
        return "TensorRT runs ConvTranspose in float"
    if graph.attribute(layer.node, "transA", 0):
        return "a Gemm with a transposed input stays float"
    shape = graph.shape_of(layer.weight.value)
    if layer.kind == "attention" or shape is None or layer.input is None:
        return ""
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


def centre(low: Lowering) -> int:
    """Move a lopsided input of a linear layer to the middle of its range, exactly.

    ``W x + b = W (x - c) + (b + c sum(W))``, with ``c`` the middle of the range and the sum over
    the inputs of each output. A symmetric grid on ``x - c`` has no unused half: behind a GELU
    nearly one bit is won. ``W`` is the rounded weight, so that the two constant parts cancel, as
    with the zero point that this runtime refuses. The subtraction is fused with the quantization;
    the rest is folded into the bias.
    """
    count = 0
    moved: dict[ir.Value, tuple[ir.Value, float]] = {}
    for layer in list(low.decided()):
        entered = layer.input
        if layer.kind != "linear" or entered is None or entered.spec is None:
            continue
        found = activation_range(low.model, entered.value)
        if found is None or not _lopsided(*found) or not _bias_can_move(layer):
            continue
        x = entered.value
        if x not in moved:
            middle = float(np.float32((found[0] + found[1]) / 2))
            constant = graph.add_constant(
                low.model, f"{x.name}/middle", np.array(middle, np.float32)
            )
            centred = graph.insert(
                low.model, "Sub", [x, constant], output=f"{x.name}/centred", behind=x, like=x
            )
            graph.set_range(low.model, centred, found[0] - middle, found[1] - middle)
            moved[x] = centred, middle
        _add_to_bias(low, layer, moved[x][1])
        entered.read_from(moved[x][0])
        count += 1
    return count


def _lopsided(low: float, high: float) -> bool:
    """Whether a symmetric grid would leave more than an eighth of its codes unused."""
    return high - low < 0.875 * 2 * max(abs(low), abs(high))


def _bias_can_move(layer: Layer) -> bool:
    """Whether a constant can be added to what the layer writes without touching its scaling."""
    scaled = any(graph.attribute(layer.node, name, 1.0) != 1.0 for name in ("alpha", "beta"))
    return not scaled and (layer.bias is None or graph.is_constant(layer.bias.value))


def _add_to_bias(low: Lowering, layer: Layer, middle: float) -> None:
    assert layer.weight.spec is not None
    grid = low.weight_grid(layer.weight.spec)
    codes = low.codes(layer.weight.value, layer.weight.spec)
    weight = grid.dequantize(codes)
    moved = middle * weight.astype(np.float64).sum(axis=layer.reduce_axis)
    if layer.bias is not None:
        bias = graph.constant(layer.bias.value)
        array = (bias + moved).astype(bias.dtype)
        name = f"{layer.bias.value.name}/moved"
        layer.bias.read_from(graph.add_constant(low.model, name, array))
        return
    constant = graph.add_constant(low.model, f"{layer.name}/bias", moved.astype(weight.dtype))
    if layer.node.op_type == "Gemm":
        if len(layer.node.inputs) < 3:
            layer.node.resize_inputs(3)
        layer.node.replace_input_with(2, constant)
        return
    biased = graph.insert(
        low.model, "Add", [layer.output, constant],
        output=f"{layer.output.name}/biased", behind=layer.output, like=layer.output,
    )  # fmt: skip
    add = biased.producer()
    graph.redirect(low.model, layer.output, biased, keep=lambda use: use.node is add)


def weights(low: Lowering) -> int:
    """Store weights as symmetric int8 beside a quantized input; alone in 4 bits if they fit."""
    return low.store_weights()


def inputs(low: Lowering) -> int:
    """Give each quantized input a symmetric int8 grid: the larger end of its range over 127."""
    return low.store_inputs(lambda _, found: symmetric(*found))


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
        found = activation_range(low.model, identity.value)
        if found is not None and low.grid_of(identity.value) is None:
            identity.read_from(low.pair(identity.value, symmetric(*found)))
            count += 1
    return count


def symmetric(low: float, high: float) -> Grid:
    """The int8 grid of a range with zero point 0."""
    scale, zero = numerics.affine(low, high, INT8, symmetric=True)
    return Grid(INT8, scale, zero)


DIALECT = rules(keep_float, centre, weights, inputs, residual)
