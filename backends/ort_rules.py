"""The dialect of ONNX Runtime on CPUs: the rules, in the order of the lowering.

The runtime runs an integer kernel only where it finds an exact pattern: uint8 activations (int8 on
ARM) with their own zero point, int8 weights (one scale a channel costs nothing), int32 biases with
the scale ``s_x * s_w``, a QuantizeLinear behind every Conv, and never a MatMul with a bias that it
could fuse into a float Gemm. Each rule says what it does and why. Those of weights alone are in
``ort_alone``, those of MatMul in ``ort_matmul``, that of float layers in ``ort_float``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from qcompile import decisions, graph, numerics
from qcompile.backends import ort_embedding
from qcompile.backends.lowering import MOVES, Lowering, activation_range, affine, rules
from qcompile.backends.ort_alone import gemm_alone, packed_weights
from qcompile.backends.ort_embedding import packed_embeddings
from qcompile.backends.ort_float import float_between
from qcompile.backends.ort_matmul import dynamic_inputs, flat_bias, plain_sum, to_kernel
from qcompile.graph import Layer, Use
from qcompile.numerics import Grid, IntFormat
from qcompile.spec import TensorSpec


def keep_float(low: Lowering) -> int:
    """Leave in float what has no integer kernel here: ConvTranspose beside a quantized input, Gemm
    with a transposed input, alpha, beta or a bias that differs from row to row, MatMul of a vector,
    block scales beside a quantized input, and what is not float32.
    """
    return low.exclude(lambda layer: _why_float(low, layer))


def _why_float(low: Lowering, layer: Layer) -> str:
    node = layer.node
    if layer.kind == "embedding":
        if not low.kernels.tables:
            return "no kernel of this version for packed tables: ONNX Runtime 1.23 has one"
        return ort_embedding.why_float(layer)
    entered = layer.input.spec if layer.input else None
    if layer.kind == "conv-transpose" and entered is not None:
        return "no int8 kernel for ConvTranspose"
    if node.op_type == "Gemm":
        scaled = any(graph.attribute(node, name, 1.0) != 1.0 for name in ("alpha", "beta"))
        if scaled or graph.attribute(node, "transA", 0):
            return "no int8 kernel for Gemm with transA, alpha or beta"
        if _by_row(layer):
            return "no int8 kernel for Gemm with a bias that differs by row"
    if node.op_type == "MatMul" and layer.input and graph.rank_of(layer.input.value) == 1:
        return "no int8 kernel for a vector times a matrix"
    decided = layer.weight.spec
    if decided is not None and layer.kind != "attention":
        form = numerics.parse_format(decided.format)
        if entered is not None and decided.codes and form.bits > low.kernels.widest:
            return f"fitted codes of {form.bits} bits overflow on this CPU: fit int7"
        if entered is None and form.stored.bits not in low.kernels.alone:
            return f"no kernel of this version for {form.stored.bits}-bit weights alone"
    if entered is not None and entered.scale_from != "static" and layer.kind != "linear":
        return "only a linear layer takes its scale at run time: ConvInteger is slow"
    if layer.kind in ("conv", "depthwise") and layer.input and layer.input.spec:
        value = graph.absorbed(layer.output)
        if activation_range(low.model, value) is None:
            return f"no range for its output {value.name!r}: calibrate it"
    return ""


def _by_row(layer: Layer) -> bool:
    """Whether the bias of a Gemm is more than one number a channel."""
    if layer.bias is None:
        return False
    shape = graph.shape_of(layer.bias.value)
    return shape is None or any(d != 1 for d in shape[:-1])


def seven_bits(low: Lowering) -> int:
    """On x86 without VNNI, narrow weights beside a quantized input to 7 bits: twice the scale.

    There ``pmaddubsw`` adds two products of uint8 and int8 in 16 bits, which 8-bit weights overflow
    (``2 * 255 * 127 > 2**15``) and 7-bit weights do not.
    """
    widest = numerics.IntFormat(low.kernels.widest, signed=True)
    made: dict[TensorSpec, TensorSpec] = {}
    count = 0
    for layer in low.decided():
        decided = layer.weight.spec
        if decided is None or layer.input is None or layer.input.spec is None:
            continue
        form = numerics.parse_format(decided.format)
        if layer.kind == "attention" or form.bits <= widest.bits:
            continue
        if decided not in made:
            scale = graph.constant(low.model.graph.initializers[decided.scale])
            narrow = (scale * (form.high / widest.high)).astype(np.float32)
            name = graph.add_constant(low.model, f"{decided.scale}/narrow", narrow).name or ""
            made[decided] = dataclasses.replace(decided, format=widest.name, scale=name)
        layer.weight.decide(_with_codes(low, layer, decided, made[decided]))
        count += 1
    return count


def bias_range(low: Lowering) -> int:
    """Widen the weight scale of a channel whose bias would overflow int32.

    A bias is stored as int32 with the scale ``s_x * s_w``. Where ``|b|`` is beyond 2**30 such
    steps, the weights of the channel are negligible beside it, so a wider weight scale costs
    nothing.
    """
    count = 0
    for layer in low.decided():
        decided = layer.weight.spec
        if layer.bias is None or decided is None or decided.block is not None:
            continue
        grid = _input_grid(low, layer.input) if layer.input else None
        if grid is None or not graph.is_constant(layer.bias.value):
            continue
        scale_value = low.model.graph.initializers[decided.scale]
        scale = graph.constant(scale_value).astype(np.float32)
        bias = np.abs(graph.constant(layer.bias.value).astype(np.float64)).reshape(-1)
        needed = bias / (float(grid.scale) * 2.0**30)
        wide = np.maximum(scale, needed if scale.ndim else needed.max(initial=0.0)).astype(
            np.float32
        )
        if (wide > scale).any():
            widened = graph.add_constant(low.model, decided.scale, wide)
            coarser = dataclasses.replace(decided, scale=widened.name or "")
            layer.weight.decide(_with_codes(low, layer, decided, coarser))
            count += 1
    return count


def _with_codes(
    low: Lowering, layer: Layer, decided: TensorSpec, coarser: TensorSpec
) -> TensorSpec:
    """``coarser`` with the codes that were fitted for ``decided`` rounded to its grid, if any."""
    if not decided.codes:
        return coarser
    fitted = decisions.rounded(low.model, layer.weight.value, decided)
    grid = low.weight_grid(coarser)
    packed = numerics.pack(grid.quantize(fitted), grid.format.stored, "")
    codes = graph.add_constant(low.model, f"{decided.codes}/coarser", packed)
    return dataclasses.replace(coarser, codes=codes.name or "")


def weights(low: Lowering) -> int:
    """Store weights as signed codes (uint8 ones are 2.5 times slower): int8 beside a quantized
    input, else in as few bits as there are.
    """
    return low.store_weights()


def inputs(low: Lowering) -> int:
    """Give each quantized input a uint8 grid (int8 on ARM) with its own zero point.

    Fewer bits are codes of 8 behind a Clip: of codes, since one of values in front of the
    QuantizeLinear would keep the layer before it in float.
    """
    return low.store_inputs(lambda decided, found: _grid(low, decided, found))


def _grid(low: Lowering, decided: TensorSpec, found: tuple[float, float]) -> Grid:
    """The grid of an activation: of as many bits as were asked for, signed as kernels take them."""
    bits = numerics.parse_format(decided.format).bits
    form = IntFormat(bits, low.kernels.activations.signed)
    # A uint8 grid with its own zero point costs nothing; symmetric is for those who ask for it.
    return affine(form, found, decided.symmetric)


def _written(low: Lowering, value: ir.Value, form: IntFormat, found: tuple[float, float]) -> Grid:
    """The grid of what an integer kernel writes: that of all its readers, or one of 8 bits or more.

    Where some readers take fewer bits, one of their steps is an odd number of its own. Of an even
    number the middle code would go to the same side each time, which moves the mean (the CNN with
    7-bit activations: 24 dB in place of 34).
    """
    asked = low.asked(value)
    if len(asked) == 1 and asked[0] is not None:
        return asked[0]
    stored = IntFormat(max(form.bits, 8), form.signed)
    narrow = [grid for grid in asked if grid is not None and grid.format.bits < stored.bits]
    if not narrow or stored.bits > 8:
        return affine(stored, found)
    other = max(narrow, key=lambda grid: grid.format.bits)
    steps = (stored.high - stored.low) // (other.format.high - other.format.low)
    steps -= 1 - steps % 2
    zero = stored.low + (other.zero_point - other.format.low) * steps
    return Grid(stored, other.scale / np.float32(steps), zero)


def channels_of_four(low: Lowering) -> int:
    """Pad the input channels of a Conv to a multiple of four: zeros to the weight, the zero point
    to the codes of the input.

    The fast kernel for symmetric weights wants that; the 3 channels of a picture would fall back to
    a matrix product that takes half as long again (0.33 against 0.23 ms for a 3x3 stem at 224).
    """
    count = 0
    for layer in low.layers:
        shape = graph.shape_of(layer.weight.value)
        if layer.kind != "conv" or layer.input is None or shape is None:
            continue
        if not _eight_bits(low, layer):
            continue
        missing = -shape[1] % 4
        one_group = graph.attribute(layer.node, "group", 1) == 1
        if missing and one_group and low.weight_grids[layer.node].axis in (0, None):
            _pad_channels(low, layer.weight, missing, len(shape))
            _pad_channels(low, layer.input, missing, len(shape))
            count += 1
    return count


def _pad_channels(low: Lowering, use: Use, missing: int, rank: int) -> None:
    """Add ``missing`` channels (axis 1) that stand for zero to the codes that ``use`` reads."""
    dequantize = use.value.producer()
    assert dequantize is not None
    codes, scale, zero = dequantize.inputs
    assert codes is not None and zero is not None
    name, grid = use.value.name or "value", low.grid_of(use.value)
    if codes.const_value is not None:
        array = codes.const_value.numpy()
        amounts = [(0, missing if axis == 1 else 0) for axis in range(array.ndim)]
        padded = graph.add_constant(low.model, f"{name}/padded", np.pad(array, amounts))
    else:
        amounts = np.zeros(2 * rank, np.int64)
        amounts[rank + 1] = missing
        constant = graph.add_constant(low.model, f"{name}/pads", amounts)
        padded = graph.insert(
            low.model, "Pad", [codes, constant, zero], output=f"{name}/padded", behind=codes
        )
        padded.type, padded.shape = codes.type, _wider(codes, missing)
    widened = graph.insert(
        low.model, "DequantizeLinear", [padded, scale, zero],
        {k: v.value for k, v in dequantize.attributes.items()},
        output=f"{name}/wide", before=use.node,
    )  # fmt: skip
    widened.type, widened.shape = use.value.type, padded.shape
    low.lies_on(widened, grid)
    use.read_from(widened)


def _wider(value: ir.Value, missing: int) -> ir.Shape | None:
    if value.shape is None:
        return None
    first, channels, *rest = value.shape
    # The name of a dimension would stand for two sizes.
    wider = channels + missing if isinstance(channels, int) else None
    return ir.Shape([first, wider, *rest])


def conv_output(low: Lowering) -> int:
    """Quantize the output of every quantized Conv, behind the ReLU or Clip(0, ...) that it absorbs.

    A Conv without a QuantizeLinear on its output stays a float Conv between dequantized tensors.
    """
    count = 0
    for layer in low.layers:
        if layer.kind not in ("conv", "depthwise") or layer.node not in low.input_grids:
            continue
        value = graph.absorbed(layer.output)
        found = activation_range(low.model, value)
        assert found is not None  # keep-float saw to it
        grid = _written(low, value, low.input_grids[layer.node].format, found)
        low.pair_for_all(value, grid)
        if grid.format.bits < 8 and _clips_no_more(value, grid):
            graph.redirect(low.model, value, layer.output, keep=lambda _: False)
        count += 1
    return count


def _clips_no_more(value: ir.Value, grid: Grid) -> bool:
    """Whether ``value`` is from a Clip that changes no code of ``grid``, whose codes are clipped.

    The runtime, which sees 8 bits, would keep such a Clip, and the Conv in front of it in float.
    """
    node = value.producer()
    if node is None or node.op_type != "Clip":
        return False
    known = [v for v in node.inputs[1:] if v is not None and graph.is_constant(v)]
    ends = [graph.constant(v).astype(np.float32).reshape(1) for v in known]
    codes = [int(grid.quantize(end)[0]) for end in ends]
    extremes = [grid.format.low, grid.format.high]
    return len(known) == len(node.inputs) - 1 and codes == extremes[: len(codes)]


def between(low: Lowering) -> int:
    """Quantize the output of Add, Concat and average pooling where all inputs are integers already.

    Then they run as QLinearAdd, QLinearConcat, ... and an island of integer layers stays whole.
    What only moves integers (MaxPool, Reshape, ...) towards a quantized reader keeps their grid.
    """
    count = 0
    for node in list(low.model.graph):
        if node.domain not in ("", "ai.onnx") or node.op_type not in (_BETWEEN | MOVES):
            continue
        read = [v for v in node.inputs if v is not None]
        if node.op_type in MOVES:
            grid = low.grid_of(read[0])
            readers = node.outputs[0].uses()
            if grid is not None and any(n.op_type == "QuantizeLinear" for n, _ in readers):
                low.pair_for_all(node.outputs[0], grid)
                count += 1
            continue
        if not read or any(low.grid_of(v) is None for v in read):
            continue
        value = graph.absorbed(node.outputs[0])
        found = activation_range(low.model, value)
        if found is None or low.grid_of(value) is not None:
            continue
        low.pair_for_all(value, _written(low, value, _widest(low, read), found))
        count += 1
    return count


def _widest(low: Lowering, values: Iterable[ir.Value]) -> IntFormat:
    """The format of the most bits among the grids of ``values``."""
    grids = [grid for value in values if (grid := low.grid_of(value)) is not None]
    return max((grid.format for grid in grids), key=lambda form: form.bits)


_BETWEEN = frozenset(("Add", "Concat", "AveragePool", "GlobalAveragePool"))


def int32_bias(low: Lowering) -> int:
    """Store the bias of Conv and Gemm as int32 with the scale ``s_x * s_w``.

    A Gemm with a float bias and no QuantizeLinear behind it would run in float, dequantizing its
    weights on every run.
    """
    count = 0
    for layer in low.layers:
        if layer.bias is None or layer.bias.node is not layer.node:
            continue
        if _eight_bits(low, layer) and graph.is_constant(layer.bias.value):
            _quantize_bias(low, layer, layer.bias)
            count += 1
    return count


def matmul_bias(low: Lowering) -> int:
    """Write MatMul and bias as one kernel, which the runtime would fuse into a float Gemm.

    Of rank 3 and above as MatMulIntegerToFloat; of rank 2 as a Gemm with an int32 bias. A bias of
    higher rank than the product is not fused in any case.
    """
    count = 0
    for layer in low.layers:
        bias = flat_bias(layer) if layer.node.op_type == "MatMul" else None
        if bias is None or not _eight_bits(low, layer):
            continue
        if graph.rank_of(layer.output) == 2:
            _to_gemm(low, layer, bias)
        else:
            assert layer.input is not None
            dequantize = layer.input.value.producer()
            assert dequantize is not None
            codes, scale, zero = dequantize.inputs
            assert codes is not None and scale is not None and zero is not None
            to_kernel(low, layer, codes, scale, zero)
        count += 1
    return count


def _eight_bits(low: Lowering, layer: Layer) -> bool:
    """Whether ``layer`` reads codes stored in 8 bits: with wider ones it stays a float layer."""
    grid = low.input_grids.get(layer.node)
    return grid is not None and grid.format.bits <= 8


def _to_gemm(low: Lowering, layer: Layer, bias: graph.Array) -> None:
    add = layer.biased_output.producer()
    assert add is not None and layer.bias is not None
    constant = graph.add_constant(low.model, f"{layer.bias.value.name}/flat", bias)
    output = graph.insert(
        low.model, "Gemm", [*layer.node.inputs, constant],
        output=f"{layer.output.name}/gemm", behind=layer.output, like=layer.biased_output,
    )  # fmt: skip
    gemm = output.producer()
    assert gemm is not None
    graph.redirect(low.model, add.outputs[0], output, keep=lambda _: False)
    graph.fuse(gemm, layer.node, add)
    _quantize_bias(low, layer, Use(gemm, 2))


def _quantize_bias(low: Lowering, layer: Layer, use: Use) -> None:
    weight = graph.shape_of(layer.weight.value)
    assert weight is not None
    channels = (weight[layer.channel_axis],)
    bias = np.broadcast_to(graph.constant(use.value).astype(np.float64).reshape(-1), channels)
    product = low.input_grids[layer.node].scale * low.weight_grids[layer.node].scale
    scale = np.broadcast_to(product, channels).astype(np.float32)
    codes = np.rint(bias / scale.astype(np.float64))
    limit = np.iinfo(np.int32).max
    low.bias(use, np.clip(codes, -limit, limit).astype(np.int32), np.ascontiguousarray(scale))


def _input_grid(low: Lowering, use: Use) -> Grid | None:
    """The grid for the range that the spec of ``use`` names; None without a static one."""
    if use.spec is None or not use.spec.range:
        return None
    found = activation_range(low.model, use.value)
    return None if found is None else _grid(low, use.spec, found)


DIALECT = rules(
    keep_float,
    seven_bits,
    bias_range,
    gemm_alone,
    packed_weights,
    packed_embeddings,
    weights,
    inputs,
    dynamic_inputs,
    channels_of_four,
    conv_output,
    between,
    int32_bias,
    matmul_bias,
    plain_sum,
    float_between,
)
