"""The dialect of TensorRT and TensorRT-RTX: the rules, in the order of the lowering.

Symmetric int8 everywhere (the parser refuses any other zero point), float biases (it refuses int32
ones), Q/DQ on inputs and weights only: the builder fuses ReLU and the quantization of outputs
itself. What the hardware has no fast int8 kernel for stays float, and says why.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile import decisions, graph, numerics
from qcompile.backends.lowering import Lowering, activation_range, affine, rules
from qcompile.graph import Layer, Use
from qcompile.numerics import Grid, IntFormat
from qcompile.spec import TensorSpec

TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
INT8 = IntFormat(8, signed=True)
# Below these, NVIDIA's own exclusions leave a layer in float.
MIN_CHANNELS = 16
# Above this, its fused int8 attention is left for float.
MAX_POSITIONS = 512


def keep_float(low: Lowering) -> int:
    """Leave in float what int8 makes slower: depthwise Conv and ConvTranspose (weights are blown
    up, or run in float all the same), products with a single row or column, Conv and products with
    fewer than 16 channels in or out (a first Conv, channels of a multiple of 8 under a square
    kernel, and grouped Convs of 3x3 and above excepted), attention over more than 512 positions,
    Gemm with a transposed input, block scales beside a quantized input (the builder is suspected to
    apply them once a channel), and what is not float32 or half.
    """
    return low.exclude(_why_float, TYPES)


def _why_float(layer: Layer) -> str:
    if layer.kind == "depthwise":
        return "TensorRT has no fast int8 kernel for a depthwise Conv"
    if layer.kind == "conv-transpose":
        return "TensorRT runs ConvTranspose in float"
    if graph.attribute(layer.node, "transA", 0):
        return "a Gemm with a transposed input stays float"
    if layer.input is None or layer.input.spec is None:
        return "" if layer.kind == "attention" else _why_small(layer)
    if layer.kind != "conv" and _one_row(layer):
        return "a product with one row or column is faster in float"
    if layer.kind == "attention":
        return _why_attention(layer)
    return _why_small(layer)


def _why_small(layer: Layer) -> str:
    shape = graph.shape_of(layer.weight.value)
    if shape is None or layer.input is None:
        return ""
    outs, ins = shape[layer.channel_axis], shape[layer.reduce_axis]
    if layer.kind != "conv":
        small = min(ins, outs) < MIN_CHANNELS
        return f"a linear layer of {ins} to {outs} is faster in float" if small else ""
    first = layer.input.value.is_graph_input()
    square = len(set(shape[2:])) == 1 and ins % 8 == 0 and outs % 8 == 0
    fast = (ins >= MIN_CHANNELS or first or square) and (outs >= MIN_CHANNELS or square)
    if graph.attribute(layer.node, "group", 1) > 1:
        fast = fast or (outs % 8 == 0 and min(shape[2:]) >= 3)
    return "" if fast else f"a Conv with {ins} to {outs} channels is faster in float"


def _why_attention(layer: Layer) -> str:
    assert layer.input is not None
    widths = [_last_dims(v)[-1:] for v in (layer.input.value, layer.weight.value)]
    for width in (w for dims in widths for w in dims if w is not None):
        if width < MIN_CHANNELS:
            return f"a product over or of {width} is faster in float"
    if any(d is not None and d > MAX_POSITIONS for d in _last_dims(layer.input.value)):
        return f"int8 attention is fast up to {MAX_POSITIONS} positions"
    if any(d is not None and d > MAX_POSITIONS for d in _last_dims(layer.output)):
        return f"int8 attention is fast up to {MAX_POSITIONS} positions"
    return ""


def _one_row(layer: Layer) -> bool:
    """Whether the product is known to have one row or one column."""
    dims = _last_dims(layer.output)
    # More than two dimensions with a weight are rows of a batch, which the builder folds.
    flat = layer.kind == "attention" or graph.rank_of(layer.output) == 2
    return flat and 1 in dims


def _last_dims(value: ir.Value) -> list[int | None]:
    """The last two dimensions of ``value``, None where unknown."""
    dims = [] if value.shape is None else list(value.shape)[-2:]
    return [d if isinstance(d, int) else None for d in dims]


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
        narrow = numerics.parse_format(entered.spec.format).bits < INT8.bits
        if narrow or entered.spec.symmetric:  # one has no unused half, the other asks for it
            continue
        if found is None or not _lopsided(*found) or not _bias_can_move(layer):
            continue
        x = entered.value
        if x not in moved:
            kind = (x.dtype or ir.DataType.FLOAT).numpy()
            array = np.array((found[0] + found[1]) / 2, kind)
            middle = float(array)
            constant = graph.add_constant(low.model, f"{x.name}/middle", array)
            centred = graph.insert(
                low.model, "Sub", [x, constant], output=f"{x.name}/centred", behind=x, like=x
            )
            graph.set_range(low.model, centred, found[0] - middle, found[1] - middle)
            low.stands_for(centred, x, middle)
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
    kind = layer.weight.value.dtype or ir.DataType.FLOAT
    weight = decisions.rounded(low.model, layer.weight.value, layer.weight.spec)
    moved = middle * weight.astype(np.float64).sum(axis=layer.reduce_axis)
    if layer.bias is not None:
        bias = graph.constant(layer.bias.value)
        array = (bias + moved).astype(bias.dtype)
        name = f"{layer.bias.value.name}/moved"
        layer.bias.read_from(graph.add_constant(low.model, name, array))
        return
    constant = graph.add_constant(low.model, f"{layer.name}/bias", moved.astype(kind.numpy()))
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


def attention_scale(low: Lowering) -> int:
    """Move the scale of quantized attention scores in front of the product, onto the queries.

    ``c (Q K) = (c Q) K``: then nothing stands between the int8 product and Softmax, which the
    builder fuses with each other, and queries are fewer than scores.
    """
    count = 0
    for layer in list(low.decided()):
        scaling = _scaling(layer)
        if scaling is None or layer.input is None or layer.input.spec is None:
            continue
        node, factor = scaling
        queries, scores = layer.input.value, layer.output
        kind = (queries.dtype or ir.DataType.FLOAT).numpy()
        constant = graph.add_constant(low.model, f"{queries.name}/factor", np.array(factor, kind))
        scaled = graph.insert(
            low.model, "Mul", [queries, constant],
            output=f"{queries.name}/scaled", behind=queries, like=queries,
        )  # fmt: skip
        found = activation_range(low.model, queries)
        assert found is not None  # keep-float saw to it
        graph.set_range(low.model, scaled, *sorted(end * factor for end in found))
        low.stands_for(scaled, queries, factor=factor)
        layer.input.read_from(scaled)
        graph.redirect(low.model, node.outputs[0], scores, keep=lambda _: False)
        low.model.graph.remove(node, safe=True)
        count += 1
    return count


def _scaling(layer: Layer) -> tuple[ir.Node, float] | None:
    """The Mul or Div by a number that alone reads a product of two activations, and its factor."""
    read = graph.readers(layer.output)
    if layer.kind != "attention" or len(read) != 1 or layer.output.is_graph_output():
        return None
    node, index = read[0].node, read[0].index
    plain = node.graph is layer.node.graph and node.domain in ("", "ai.onnx")
    if not plain or node.op_type not in ("Mul", "Div") or (node.op_type == "Div" and index):
        return None
    other = node.inputs[1 - index]
    if other is None or not graph.is_constant(other) or graph.constant(other).size != 1:
        return None
    number = float(graph.constant(other).reshape(-1)[0])
    factor = number if node.op_type == "Mul" else 1.0 / number if number else 0.0
    return (node, factor) if np.isfinite(factor) and factor else None


def weights(low: Lowering) -> int:
    """Store weights as symmetric int8 beside a quantized input; alone in 4 bits if they fit."""
    return low.store_weights()


def inputs(low: Lowering) -> int:
    """Give each quantized input a symmetric int8 grid: the larger end of its range over 127.

    Fewer bits are int8 behind a Clip of the values; so few levels lie anywhere about zero without a
    zero point. A Concat is quantized behind, so that what it joins has one scale; the builder moves
    it up.
    """
    return low.store_inputs(_grid)


def _grid(decided: TensorSpec, found: tuple[float, float]) -> Grid:
    """The grid of an activation."""
    form = numerics.parse_format(decided.format)
    if form.bits == INT8.bits:
        return symmetric(*found)
    return affine(IntFormat(form.bits, signed=False), found, decided.symmetric)


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
            low.pair_for(identity, symmetric(*found))
            count += 1
    return count


def symmetric(low: float, high: float) -> Grid:
    """The int8 grid of a range with zero point 0."""
    scale, zero = numerics.affine(low, high, INT8, symmetric=True)
    return Grid(INT8, scale, zero)


DIALECT = rules(keep_float, centre, attention_scale, weights, inputs, residual)
