"""The dialect of ONNX Runtime on x86 CPUs with VNNI: the rules, in the order of the lowering.

The runtime runs an integer kernel only where it finds an exact pattern: uint8 activations with
their own zero point, int8 weights (one scale a channel costs nothing), int32 biases with the scale
``s_x * s_w``, a QuantizeLinear behind every Conv, and never a MatMul with a bias that it could fuse
into a float Gemm. Each rule says what it does and why.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from qcompile import decisions, graph, numerics, spec
from qcompile.backends import ort_embedding
from qcompile.backends.base import (
    MOVES,
    Lowering,
    absorbed,
    activation_range,
    rules,
)
from qcompile.backends.ort_embedding import packed_embeddings, stored_bits
from qcompile.graph import Layer, Use
from qcompile.numerics import Grid, IntFormat
from qcompile.spec import TensorSpec

UINT8 = IntFormat(8, signed=False)


def keep_float(low: Lowering) -> int:
    """Leave in float what has no integer kernel here: ConvTranspose, Gemm with a transposed input,
    alpha, beta or a bias that differs from row to row, MatMul of a vector, block scales beside a
    quantized input, and what is not float32.
    """
    return low.exclude(lambda layer: _why_float(low, layer))


def _why_float(low: Lowering, layer: Layer) -> str:
    node = layer.node
    if layer.kind == "embedding":
        return ort_embedding.why_float(layer)
    if layer.kind == "conv-transpose":
        return "no int8 kernel for ConvTranspose"
    if node.op_type == "Gemm":
        scaled = any(graph.attribute(node, name, 1.0) != 1.0 for name in ("alpha", "beta"))
        if scaled or graph.attribute(node, "transA", 0):
            return "no int8 kernel for Gemm with transA, alpha or beta"
        if _by_row(layer):
            return "no int8 kernel for Gemm with a bias that differs by row"
    if node.op_type == "MatMul" and layer.input and graph.rank_of(layer.input.value) == 1:
        return "no int8 kernel for a vector times a matrix"
    if layer.kind in ("conv", "depthwise") and layer.input and layer.input.spec:
        value = absorbed(layer.output)
        if activation_range(low.model, value) is None:
            return f"no range for its output {value.name!r}: calibrate it"
    return ""


def _by_row(layer: Layer) -> bool:
    """Whether the bias of a Gemm is more than one number a channel."""
    if layer.bias is None:
        return False
    shape = graph.shape_of(layer.bias.value)
    return shape is None or any(d != 1 for d in shape[:-1])


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
            coarser = dataclasses.replace(decided, scale=widened.name or "", codes="")
            if decided.codes:
                fitted = decisions.rounded(low.model, layer.weight.value, decided)
                grid = low.weight_grid(coarser)
                packed = numerics.pack(grid.quantize(fitted), grid.format.stored, "")
                codes = graph.add_constant(low.model, decided.codes, packed)
                coarser = dataclasses.replace(coarser, codes=codes.name or "")
            layer.weight.decide(coarser)
            count += 1
    return count


def gemm_alone(low: Lowering) -> int:
    """Write a Gemm whose weight alone is quantized as MatMul and Add, with the weight as [K, N].

    The runtime has a kernel for MatMul with packed weights; in front of a Gemm it would dequantize
    them on every run.
    """
    count = 0
    for layer in list(low.decided()):
        entered = layer.input.spec if layer.input else None
        if layer.node.op_type != "Gemm" or entered is not None or layer.weight.spec is None:
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
    Use(matmul, 1).decide(decided)
    layer.weight.decide(None)
    graph.remove_dead(low.model)


def _turned(model: ir.Model, value: ir.Value) -> ir.Value:
    """A matrix transposed, as a new constant; a scale a tensor or a channel has nothing to turn."""
    array = graph.constant(value)
    if array.ndim != 2:
        return value
    tensor = ir.Tensor(np.ascontiguousarray(array.T), dtype=value.dtype)
    return graph.add_constant(model, f"{value.name}/turned", tensor)


# Block sizes whose kernel is fast; level 4 multiplies in int8, a block of the activation at a time.
_NBITS_BLOCKS, _NBITS_LEVEL = (16, 32, 64, 128, 256), 4


def packed_weights(low: Lowering) -> int:
    """Write a MatMul whose weight alone is quantized, in blocks along K, as MatMulNBits.

    The runtime makes one of MatMul and DequantizeLinear itself, but not of one with a Relu behind
    it and another such MatMul behind that, and it keeps a second copy of the weights to do so.
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
        return ir.Tensor(ort_embedding.packed_rows(codes.T, bits).reshape(shape))

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
    for key, value in (wanted | {"accuracy_level": _NBITS_LEVEL}).items():
        node.attributes[key] = ir.AttrInt64(key, value or 0)
    spec.clear(node)


def weights(low: Lowering) -> int:
    """Store weights as signed codes (uint8 ones are 2.5 times slower): int8 beside a quantized
    input, else in as few bits as there are.
    """
    return low.store_weights()


def inputs(low: Lowering) -> int:
    """Give each quantized input a uint8 grid with its own zero point."""
    return low.store_inputs(lambda found: unsigned(*found))


def channels_of_four(low: Lowering) -> int:
    """Pad the input channels of a Conv to a multiple of four: zeros to the weight, the zero point
    to the codes of the input.

    The fast kernel for symmetric weights wants that; the 3 channels of a picture would fall back to
    a matrix product that takes half as long again (0.33 against 0.23 ms for a 3x3 stem at 224).
    """
    count = 0
    for layer in low.layers:
        shape = graph.shape_of(layer.weight.value)
        entered = low.input_grids.get(layer.node)
        if layer.kind != "conv" or layer.input is None or entered is None or shape is None:
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
        value = absorbed(layer.output)
        found = activation_range(low.model, value)
        assert found is not None  # keep-float saw to it
        low.pair_for_all(value, unsigned(*found))
        count += 1
    return count


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
        value = absorbed(node.outputs[0])
        found = activation_range(low.model, value)
        if found is None or low.grid_of(value) is not None:
            continue
        low.pair_for_all(value, unsigned(*found))
        count += 1
    return count


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
        if layer.node in low.input_grids and graph.is_constant(layer.bias.value):
            _quantize_bias(low, layer, layer.bias)
            count += 1
    return count


def matmul_bias(low: Lowering) -> int:
    """Keep the runtime from fusing MatMul and bias into a float Gemm.

    Behind a MatMul of rank 3 and above the bias becomes [1, ..., 1, N], which the fusion does not
    match; MatMul and Add of rank 2 become one Gemm with an int32 bias. A bias of higher rank than
    the product is not fused in any case.
    """
    count = 0
    for layer in low.layers:
        if layer.node.op_type != "MatMul" or layer.bias is None:
            continue
        if layer.node not in low.input_grids:
            continue
        rank = graph.rank_of(layer.output) or graph.rank_of(layer.biased_output)
        bias = graph.constant(layer.bias.value)
        if rank is None or bias.ndim > rank:
            continue
        if rank > 2:
            shaped = bias.reshape((1,) * (rank - 1) + (-1,))
            name = f"{layer.bias.value.name}/rank{rank}"
            layer.bias.read_from(graph.add_constant(low.model, name, shaped))
        else:
            _to_gemm(low, layer, bias.reshape(-1))
        count += 1
    return count


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
    """The grid for the range that the spec of ``use`` names."""
    if use.spec is None:
        return None
    found = activation_range(low.model, use.value)
    return None if found is None else unsigned(*found)


def unsigned(low: float, high: float) -> Grid:
    """The uint8 grid of a range; its zero point is 0 where nothing is negative."""
    scale, zero = numerics.affine(low, high, UINT8, symmetric=False)
    return Grid(UINT8, scale, zero)


DIALECT = rules(
    keep_float,
    bias_range,
    gemm_alone,
    packed_weights,
    packed_embeddings,
    weights,
    inputs,
    channels_of_four,
    conv_output,
    between,
    int32_bias,
    matmul_bias,
)
