"""Every rule of the dialect of ONNX Runtime: what it changes, and when it leaves a graph alone."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping

import graphs
import lowering
import numpy as np
import onnx_ir as ir
import pytest
from lowering import Array

from qcompile import decisions, execute, graph, numerics, packing, spec, text, verify
from qcompile.backends import ort_isa, ort_rules
from qcompile.backends.lowering import Kernels, Lowering, affine
from qcompile.backends.onnxruntime import OrtCpu

CONV = """(float[N,4,8,8] x) => (float[N,8,6,6] y) <float[8,4,3,3] w, float[8] b> {
    c = Conv(x, w, b)
    y = Relu(c)
}"""
STEM = "(float[N,3,8,8] x) => (float[N,8,6,6] y) <float[8,3,3,3] w> { y = Conv(x, w) }"
GEMM = """(float[N,8] x) => (float[N,4] y) <float[4,8] w, float[4] b> {
    y = Gemm<transB=1>(x, w, b)
}"""
RESIDUAL = """(float[N,8,8,8] x) => (float[N,8,8,8] y) <float[8,8,1,1] w, float[8,8,1,1] v> {
    c = Conv(x, w)
    d = Conv(c, v)
    s = Add(d, c)
    y = Relu(s)
}"""


def act(
    source: str,
    rule: str,
    passes: str = lowering.DECIDE,
    arrays: Mapping[str, Array] | None = None,
    samples: list[dict[str, Array]] | None = None,
    kernels: Kernels | None = None,
) -> tuple[int, list[str], Lowering]:
    """How often ``rule`` acts on the decided ``source``, the lines it changes, and the lowering."""
    model = lowering.graph_of(source, arrays)
    lowering.decide(model, passes, samples)
    low = Lowering(model, kernels)
    for step in ort_rules.DIALECT:
        before = text.render(model, weights=True)
        count = step.apply(low)
        if step.name == rule:
            after = text.render(model, weights=True)
            changed = text.changes(before, after)
            return count, [line.partition(" #")[0] for line in changed], low
    raise KeyError(rule)


def nodes(changed: list[str]) -> list[str]:
    """The changed lines that are nodes."""
    return [line for line in changed if line[1] == "%"]


def test_every_rule_has_a_test_here_and_a_reason() -> None:
    names = [rule.name for rule in ort_rules.DIALECT]
    assert names == [
        "keep-float",
        "seven-bits",
        "bias-range",
        "gemm-alone",
        "packed-weights",
        "packed-embeddings",
        "weights",
        "inputs",
        "dynamic-inputs",
        "channels-of-four",
        "conv-output",
        "between",
        "int32-bias",
        "matmul-bias",
        "plain-sum",
        "float-between",
    ]
    tests = "\n".join(globals())
    for rule in ort_rules.DIALECT:
        assert len(rule.why) > 40
        assert f"test_{rule.name.replace('-', '_')}_" in tests, rule.name


# -- keep-float ---------------------------------------------------------------------------------

BLOCKS = "simplify,calibrate,quantize{granularity=block}"


@pytest.mark.parametrize(
    ("source", "passes", "reason"),
    [
        (
            "(float[N,4,5,5] x) => (float[N,4,6,6] y) <float[4,4,2,2] w> {y = ConvTranspose(x,w)}",
            lowering.DECIDE,
            "ConvTranspose",
        ),
        (
            "(float[8,N] x) => (float[N,4] y) <float[8,4] w> { y = Gemm<transA=1>(x, w) }",
            lowering.DECIDE,
            "transA",
        ),
        (
            "(float[N,8] x) => (float[N,4] y) <float[8,4] w> { y = Gemm<alpha=0.5>(x, w) }",
            lowering.DECIDE,
            "alpha",
        ),
        (
            """(float[N,8] x) => (float[N,4] y) <float[8,4] w, float[4] b> {
                y = Gemm<beta=2.0>(x, w, b) }""",
            lowering.DECIDE,
            "beta",
        ),
        (
            """(float[4,8] x) => (float[4,4] y) <float[8,4] w, float[4,1] b> {
                y = Gemm(x, w, b) }""",
            lowering.DECIDE,
            "bias that differs by row",
        ),
        (
            "(float[8] x) => (float[4] y) <float[8,4] w> { y = MatMul(x, w) }",
            lowering.DECIDE,
            "vector",
        ),
        (
            "(float[N,64] x) => (float[N,4] y) <float[64,4] w> { y = MatMul(x, w) }",
            BLOCKS,
            "a scale a block",
        ),
    ],
)
def test_keep_float_takes_back_the_decision_and_says_why(
    source: str, passes: str, reason: str
) -> None:
    count, _, low = act(source, "keep-float", passes)
    [layer] = low.layers
    assert count == 1
    assert not spec.all_specs(layer.node)
    assert reason in layer.node.metadata_props[graph.REASON]


def test_keep_float_leaves_half_a_product_of_activations_in_float() -> None:
    source = "(float[2,8,8] q, float[2,8,8] k) => (float[2,8,8] y) { y = MatMul(q, k) }"
    model = lowering.graph_of(source)
    lowering.decide(model, "simplify,calibrate,quantize{attention=int8}")
    low = Lowering(model)
    low.layers[0].weight.decide(None)
    assert ort_rules.keep_float(low) == 1
    assert not list(low.decided())


def test_keep_float_leaves_other_types_in_float() -> None:
    source = """(float[N,8] x) => (float[N,4] y) <float[8,4] w> {
        h = Cast<to=10>(x)
        v = Cast<to=10>(w)
        m = MatMul(h, v)
        y = Cast<to=1>(m)
    }"""
    count, _, low = act(source, "keep-float")
    assert count == 1
    assert "float16" in low.layers[0].node.metadata_props[graph.REASON]


@pytest.mark.parametrize("source", [CONV, GEMM, STEM, RESIDUAL])
def test_keep_float_leaves_what_has_a_kernel(source: str) -> None:
    count, changed, _ = act(source, "keep-float")
    assert (count, changed) == (0, [])


def test_keep_float_leaves_a_quantized_input_without_a_quantized_weight() -> None:
    model = graphs.graph(graphs.LINEAR)
    lowering.decide(model)
    [layer] = graph.layers(model)
    layer.weight.decide(None)
    ort_rules.keep_float(Lowering(model))
    assert layer.input is not None and layer.input.spec is None
    assert layer.node.metadata_props[graph.REASON] == "a quantized input needs a quantized weight"


# -- bias-range ---------------------------------------------------------------------------------


def test_bias_range_widens_the_scale_of_the_channel_that_would_overflow() -> None:
    bias = np.array([0.5, -1e9, 0, 2], np.float32)
    count, changed, low = act(GEMM, "bias-range", arrays={"b": bias})
    assert (count, changed) == (1, ["+w %w/scale.1: f32[4]"])
    [layer] = low.layers
    before = graph.constant(low.model.graph.initializers["w/scale"])
    after = graph.constant(low.model.graph.initializers["w/scale.1"])
    assert layer.weight.spec is not None and layer.weight.spec.scale == "w/scale.1"
    np.testing.assert_array_equal(after[[0, 2, 3]], before[[0, 2, 3]])
    assert layer.input is not None
    found = graph.range_of(low.model, layer.input.value)
    assert found is not None
    grid = affine(low.kernels.activations, found)
    steps = np.abs(bias) / (float(grid.scale) * after)
    assert steps.max() == pytest.approx(2.0**30, rel=1e-5)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_bias_range_leaves_a_bias_that_fits(granularity: str) -> None:
    passes = f"simplify,calibrate,quantize{{granularity={granularity}}}"
    assert act(GEMM, "bias-range", passes)[:2] == (0, [])


@pytest.mark.parametrize(
    ("rule", "kernels", "bias"), [("bias-range", None, 1e9), ("seven-bits", "avx2", 1.0)]
)
def test_fitted_codes_follow_a_coarser_grid(rule: str, kernels: str | None, bias: float) -> None:
    model = lowering.graph_of(GEMM, {"b": np.full(4, bias, np.float32)})
    lowering.decide(model, f"{lowering.DECIDE},gptq")
    low = Lowering(model, ort_isa.kernels(kernels, "1.32") if kernels else None)
    [layer] = low.layers
    before = layer.weight.spec
    assert before is not None and before.codes
    fitted = decisions.rounded(model, layer.weight.value, before)
    assert next(each for each in ort_rules.DIALECT if each.name == rule).apply(low) == 1
    after = layer.weight.spec
    assert after is not None and after.codes != before.codes
    scale = np.max(graph.constant(model.graph.initializers[after.scale]))
    error = np.abs(decisions.rounded(model, layer.weight.value, after) - fitted)
    assert error.max() <= scale / 2 * (1 + 1e-6)


# -- seven-bits ---------------------------------------------------------------------------------

AVX2 = ort_isa.kernels("avx2", "1.32")


def test_seven_bits_narrows_weights_beside_a_quantized_input_without_vnni() -> None:
    count, changed, low = act(GEMM, "seven-bits", kernels=AVX2)
    assert (count, changed[0]) == (1, "+w %w/scale/narrow: f32[4]")
    arrays = {n: graph.constant(v) for n, v in low.model.graph.initializers.items()}
    np.testing.assert_allclose(arrays["w/scale/narrow"], arrays["w/scale"] * (127 / 63), rtol=1e-6)
    [layer] = low.layers
    assert layer.weight.spec is not None and layer.weight.spec.format == "int7"


def test_seven_bits_keep_two_products_below_sixteen_bits() -> None:
    _, _, low = act(GEMM, "weights", kernels=AVX2)
    codes = np.abs(graph.constant(low.model.graph.initializers["w/codes"]).astype(np.int64))
    assert codes.max() > 60 and 2 * 255 * codes.max() < 2**15


@pytest.mark.parametrize(
    ("passes", "isa"),
    [
        (lowering.DECIDE, "avx512-vnni"),
        (lowering.DECIDE, "avx-vnni"),
        (lowering.DECIDE, "arm"),
        (lowering.WEIGHT_ONLY, "avx2"),
        ("simplify,calibrate,quantize{weight=int6}", "avx2"),
    ],
)
def test_seven_bits_leaves_vnni_arm_narrow_weights_and_weights_alone(passes: str, isa: str) -> None:
    kernels = ort_isa.kernels(isa, "1.32")
    assert act(GEMM, "seven-bits", passes, kernels=kernels)[:2] == (0, [])


def test_keep_float_leaves_fitted_8_bit_codes_without_vnni() -> None:
    model = lowering.graph_of(GEMM)
    lowering.decide(model)
    low = Lowering(model, AVX2)
    use = low.layers[0].weight
    assert use.spec is not None
    use.decide(dataclasses.replace(use.spec, codes=use.spec.scale))
    assert ort_rules.keep_float(low) == 1
    assert "fit int7" in low.layers[0].node.metadata_props[graph.REASON]


def test_keep_float_leaves_8_bit_weights_alone_before_1_22() -> None:
    kernels = ort_isa.kernels("avx2", "1.21")
    assert act(GEMM, "keep-float", lowering.WEIGHT_ONLY, kernels=kernels)[0] == 1
    assert act(GEMM, "keep-float", lowering.WEIGHT_ONLY, kernels=AVX2)[0] == 0


# -- dynamic-inputs -----------------------------------------------------------------------------

DYNAMIC = "simplify,quantize{scale=dynamic}"


def test_inputs_that_are_symmetric_have_zero_in_the_middle_even_behind_a_relu() -> None:
    for bits in (4, 8):
        passes = f"simplify,calibrate,quantize{{input=int{bits} symmetric=true}}"
        source = GEMM.replace("y = ", "r = Relu(x)\n y = ").replace("(x, w", "(r, w")
        _, _, low = act(source, "inputs", passes)
        [grid] = low.input_grids.values()
        [layer] = low.layers
        assert layer.input is not None
        high = max(graph.constant(low.model.graph.initializers["r/range"]))
        assert int(grid.zero_point) == 1 << (bits - 1)
        np.testing.assert_allclose(grid.scale, high / ((1 << (bits - 1)) - 1), rtol=1e-6)


def test_conv_output_that_narrow_inputs_alone_read_is_rounded_once() -> None:
    source = """(float[N,8,8,8] x) => (float[N,8,8,8] y) <float[8,8,1,1] w, float[8,8,1,1] v> {
        c = Conv(x, w)
        m = Relu(c)
        y = Conv(m, v)
    }"""
    _, _, low = act(source, "conv-output", "simplify,calibrate,quantize{input=int4}")
    rounded = [n.inputs[0] for n in low.model.graph if n.op_type == "QuantizeLinear"]
    assert sorted(str(value and value.name) for value in rounded) == ["m", "x", "y/inner"]
    assert sum(n.op_type == "Clip" for n in low.model.graph) == 2


def test_conv_output_of_few_bits_takes_the_place_of_a_clip() -> None:
    source = """(float[N,8,8,8] x) => (float[N,8,8,8] y) <float[8,8,1,1] w, float[8,8,1,1] v,
    float lowest = {0.0}, float highest = {1.0}> {
        c = Conv(x, w)
        m = Clip(c, lowest, highest)
        y = Conv(m, v)
    }"""
    for bits, kept in ((4, 0), (8, 1)):
        passes = f"simplify,calibrate,quantize{{input=int{bits}}}"
        _, _, low = act(source, "conv-output", passes)
        reads = [n for n in low.model.graph if n.op_type == "Clip" and n.inputs[0] is not None]
        reads = [n for n in reads if (n.inputs[0].name or "") == "c" and n.outputs[0].uses()]
        assert len(reads) == kept


@pytest.mark.parametrize("bits", [4, 5, 6, 7])
def test_conv_output_that_others_read_too_has_an_odd_number_of_steps(bits: int) -> None:
    passes = f"simplify,calibrate,quantize{{input=int{bits}}}"
    _, _, low = act(RESIDUAL, "conv-output", passes)
    fine, coarse = (
        next(
            grid
            for value in low.model.graph
            for grid in [low.grid_of(value.outputs[0])]
            if grid is not None and grid.format.bits == width and value.name
            and (value.outputs[0].name or "").startswith("c/")
        )
        for width in (8, bits)
    )  # fmt: skip
    steps = float(coarse.scale / fine.scale)
    assert steps % 2 == pytest.approx(1, abs=1e-4)
    lowest = (np.arange(1 << bits) - int(coarse.zero_point)) * coarse.scale
    np.testing.assert_allclose(fine.round_trip(lowest.astype(np.float32)), lowest, atol=1e-5)


def test_dynamic_inputs_take_their_scale_from_the_tensor() -> None:
    count, changed, low = act(RANK_3.format(bias=4), "dynamic-inputs", DYNAMIC)
    assert count == 1
    made = [line for line in nodes(changed) if line[0] == "+"]
    assert made[0] == (
        "+%x/dynamic: u8[N,3,8], %x/dynamic.1: f32[], %x/dynamic.2: u8[] ="
        " DynamicQuantizeLinear(%x)"
    )
    assert (
        "+%y: f32[N,3,4] = com.microsoft::MatMulIntegerToFloat(%x/dynamic, %w/codes,"
        " %x/dynamic.1, %w/scale, %x/dynamic.2, %w/zero_point, %b/flat)"
    ) in made
    assert not any(name.endswith("/range") for name in low.model.graph.initializers)


def test_dynamic_inputs_that_two_layers_read_are_quantized_once() -> None:
    source = """(float[N,8] x) => (float[N,4] y, float[N,4] z) <float[8,4] w, float[8,4] v> {
        y = MatMul(x, w)
        z = MatMul(x, v)
    }"""
    count, changed, _ = act(source, "dynamic-inputs", DYNAMIC)
    assert count == 2
    assert sum("DynamicQuantizeLinear" in line for line in changed) == 1


def test_dynamic_inputs_leave_static_ones() -> None:
    assert act(GEMM, "dynamic-inputs")[:2] == (0, [])


# -- plain-sum ----------------------------------------------------------------------------------


def test_plain_sum_stands_before_a_layer_normalization() -> None:
    source = """(float[N,3,8] x, float[N,3,8] r) => (float[N,3,8] y) <float[8] g, float[8,8] w> {
        s = Add(x, r)
        n = LayerNormalization(s, g)
        y = MatMul(n, w)
    }"""
    count, changed, _ = act(source, "plain-sum")
    assert count == 1
    assert changed == ["-%s: f32[N,3,8] = Add(%x, %r)", "+%s: f32[N,3,8] = Sum(%x, %r)"]


def test_plain_sum_leaves_other_additions() -> None:
    assert act(RESIDUAL, "plain-sum")[:2] == (0, [])


# -- channels-of-four ---------------------------------------------------------------------------


def test_channels_of_four_pads_a_stem_with_zeros() -> None:
    count, changed, low = act(STEM, "channels-of-four")
    assert count == 1
    assert nodes(changed) == [
        "+%x/dequantized/padded: u8[N,4,8,8] = "
        "Pad(%x/quantized, %x/dequantized/pads, %x/zero_point)",
        "-%y: f32[N,8,6,6] = Conv(%x/dequantized{int8 asymmetric}, %w/dequantized{int8 axis=0})",
        "+%w/dequantized/wide: f32[8,4,3,3] = "
        "DequantizeLinear(%w/dequantized/padded, %w/scale, %w/zero_point) {axis=0}",
        "+%x/dequantized/wide: f32[N,4,8,8] = "
        "DequantizeLinear(%x/dequantized/padded, %x/scale, %x/zero_point)",
        "+%y: f32[N,8,6,6] = "
        "Conv(%x/dequantized/wide{int8 asymmetric}, %w/dequantized/wide{int8 axis=0})",
    ]
    arrays = low.model.graph.initializers
    padded = graph.constant(arrays["w/dequantized/padded"])
    np.testing.assert_array_equal(padded[:, :3], graph.constant(arrays["w/codes"]))
    assert not padded[:, 3:].any()


@pytest.mark.parametrize(
    ("source", "passes"),
    [
        (CONV, lowering.DECIDE),
        (STEM, lowering.WEIGHT_ONLY),
        (
            """(float[N,6,8,8] x) => (float[N,8,6,6] y) <float[8,3,3,3] w> {
                y = Conv<group=2>(x, w) }""",
            lowering.DECIDE,
        ),
    ],
)
def test_channels_of_four_leaves_what_fits_groups_and_float_inputs(
    source: str, passes: str
) -> None:
    assert act(source, "channels-of-four", passes)[:2] == (0, [])


# -- gemm-alone ----------------------------------------------------------------------------------

GEMM_ALONE = """(float[2,8] x) => (float[2,4] y) <float[4,8] w, float[4] b> {
    y = Gemm<transB=1>(x, w, b) }"""


def test_gemm_alone_writes_matmul_and_add_with_the_weight_turned() -> None:
    count, changed, low = act(GEMM_ALONE, "gemm-alone", lowering.WEIGHT_ONLY)
    assert count == 1
    assert changed == [
        "-w %w: f32[4,8]",
        "+w %w/turned: f32[8,4]",
        "-w %y/range: f32[2]",
        "-%y: f32[2,4] = Gemm(%x, %w{int8 axis=0}, %b) {transB=1}",
        "+%y/product: f32[2,4] = MatMul(%x, %w/turned{int8 axis=1})",
        "+%y: f32[2,4] = Add(%y/product, %b)",
    ]
    assert [layer.node.op_type for layer in low.layers] == ["MatMul"]


def test_gemm_alone_leaves_a_gemm_with_a_quantized_input() -> None:
    count, changed, _ = act(GEMM_ALONE, "gemm-alone")
    assert (count, changed) == (0, [])


# -- packed-weights -----------------------------------------------------------------------------

PACKED = "simplify,calibrate,quantize{weight=int4 input=float granularity=block block=16}"
TWO_BLOCKS = "(float[N,32] x) => (float[N,4] y) <float[32,4] w> { y = MatMul(x, w) }"


def test_packed_weights_writes_the_operator_that_the_runtime_would_make() -> None:
    count, changed, _ = act(TWO_BLOCKS, "packed-weights", PACKED)
    assert count == 1
    assert changed == [
        "-opset onnx 18",
        "+opset onnx 18, com.microsoft 1",
        "+w %w/packed: u8[4,2,8]",
        "+w %w/scales: f32[4,2]",
        "-%y: f32[N,4] = MatMul(%x, %w{int4 axis=0 block=16})",
        "+%y: f32[N,4] = com.microsoft::MatMulNBits(%x, %w/packed, %w/scales)"
        " {K=32, N=4, accuracy_level=0, bits=4, block_size=16}",
    ]


@pytest.mark.parametrize(("form", "last"), [("int3", "0"), ("int4", "0"), ("int8", "4")])
def test_what_writes_an_output_does_not_round_what_it_reads(form: str, last: str) -> None:
    source = """(float[N,32] x) => (float[N,4] y) <float[32,32] v, float[32,4] w, float[4] b> {
        h = MatMul(x, v) r = Relu(h) p = MatMul(r, w) y = Add(p, b) }"""
    _, _, low = act(source, "packed-weights", PACKED.replace("int4", form))
    nodes = [node for node in low.model.graph if node.op_type == "MatMulNBits"]
    levels = [str(node.attributes["accuracy_level"].value) for node in nodes]
    assert levels == ["4", last]


@pytest.mark.parametrize("form", ["int3", "int4", "int8"])
def test_packed_weights_are_the_codes(form: str, tmp_path: pathlib.Path) -> None:
    passes = PACKED.replace("int4", form) + ",insert-qdq"
    result = lowering.lower(TWO_BLOCKS, OrtCpu(), tmp_path, passes.removesuffix(",insert-qdq"))
    weight = graphs.weight(result.reference, "w")
    grid = numerics.weight_grid(weight, numerics.parse_format(form), 0, 16)
    [node] = [n for n in result.model.graph if n.op_type == "MatMulNBits"]
    node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)  # floats all the way
    x = np.eye(32, dtype=np.float32)
    read = execute.Session(result.model).run({"x": x})["y"]
    np.testing.assert_allclose(read, grid.round_trip(weight), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "passes",
    [
        PACKED.replace("granularity=block block=16", "granularity=channel"),
        PACKED.replace("block=16", "block=8"),
        "simplify,calibrate,quantize",
    ],
)
def test_packed_weights_leaves_what_has_no_such_kernel(passes: str) -> None:
    assert act(TWO_BLOCKS, "packed-weights", passes)[:2] == (0, [])


def test_packed_weights_are_stored_once_for_two_readers() -> None:
    text = """(float[N,32] x) => (float[N,32] y) <float[32,32] w> {
        h = MatMul(x, w) r = Tanh(h) y = MatMul(r, w) }"""
    count, changed, _ = act(text, "packed-weights", PACKED)
    assert count == 2
    assert [line for line in changed if line.startswith("+w")] == [
        "+w %w/packed: u8[32,2,8]",
        "+w %w/scales: f32[32,2]",
    ]


def test_packed_weights_survive_a_relu_between(tmp_path: pathlib.Path) -> None:
    text = """(float[N,32] x) => (float[N,32] y) <float[32,32] w, float[32,32] v> {
        h = MatMul(x, w) r = Relu(h) y = MatMul(r, v) }"""
    result = lowering.lower(text, OrtCpu(), tmp_path, PACKED)
    assert {ran.kernel for ran in result.proof.values()} == {"MatMulNBits"}


# -- weights ------------------------------------------------------------------------------------


TABLE = """(int64[N,T] ids) => (float[N,T,32] y) <float[20,32] w> { y = Gather(w, ids) }"""


def test_packed_embeddings_stay_packed_in_the_file() -> None:
    table = "quantize{weight=float input=float embedding=int8}"
    count, changed, low = act(TABLE, "packed-embeddings", table)
    assert count == 1
    assert nodes(changed) == [
        "-%y: f32[N,T,32] = Gather(%w{int8 axis=0}, %ids)",
        "+%y: f32[N,T,32] = com.microsoft::GatherBlockQuantized(%w/packed, %ids, %w/scales) "
        "{bits=8, block_size=32, gather_axis=0, quantize_axis=1}",
    ]
    assert graphs.weight(low.model, "w/packed").shape == (20, 32)
    assert graphs.weight(low.model, "w/scales").shape == (20, 1)


def test_weights_become_signed_codes_behind_a_dequantize() -> None:
    count, changed, _ = act(CONV, "weights")
    assert count == 1
    assert changed == [
        "+w %w/codes: i8[8,4,3,3]",
        "+w %w/zero_point: i8[8]",
        "-%c: f32[N,8,6,6] = Conv(%x{int8 asymmetric}, %w{int8 axis=0}, %b)",
        "+%w/dequantized: f32[8,4,3,3] = DequantizeLinear(%w/codes, %w/scale, %w/zero_point)"
        " {axis=0}",
        "+%c: f32[N,8,6,6] = Conv(%x{int8 asymmetric}, %w/dequantized{int8 axis=0}, %b)",
    ]


@pytest.mark.parametrize(
    ("form", "entered", "stored"),
    [
        ("int8", "int8", ir.DataType.INT8),
        ("int4", "int8", ir.DataType.INT8),
        ("int2", "int8", ir.DataType.INT8),
        ("int8", "float", ir.DataType.INT8),
        ("int5", "float", ir.DataType.INT8),
        ("int4", "float", ir.DataType.INT4),
        ("int3", "float", ir.DataType.INT4),
    ],
)
def test_weights_are_packed_only_beside_a_float_input(
    form: str, entered: str, stored: ir.DataType
) -> None:
    source = "(float[N,8] x) => (float[N,4] y) <float[8,4] w> { y = MatMul(x, w) }"
    passes = f"simplify,calibrate,quantize{{weight={form} input={entered}}}"
    _, _, low = act(source, "weights", passes)
    initializers = low.model.graph.initializers
    assert initializers["w/codes"].dtype == initializers["w/zero_point"].dtype == stored


@pytest.mark.parametrize(("version", "stored"), [("1.18", "INT8"), ("1.19", "INT4")])
def test_releases_without_types_of_4_bits_hold_codes_in_8(version: str, stored: str) -> None:
    source = "(float[N,64] x) => (float[N,64] y) <float[64,64] w> { y = MatMul(x, w) }"
    kernels = ort_isa.kernels("avx2", version)
    passes = "simplify,quantize{weight=int4 input=float}"
    _, _, low = act(source, "weights", passes, kernels=kernels)
    assert low.model.graph.initializers["w/codes"].dtype == ir.DataType[stored]
    [node] = [n for n in low.model.graph if n.op_type == "DequantizeLinear"]
    assert node.metadata_props.get(packing.BITS) == ("4" if stored == "INT8" else None)


@pytest.mark.parametrize(("version", "why"), [("1.22", "packed tables"), ("1.23", "")])
def test_releases_that_gather_no_packed_rows_have_tables_in_float(version: str, why: str) -> None:
    source = """(int64[N,4] x) => (float[N,4,8] y) <float[32,16] t, float[16,8] w> {
        g = Gather(t, x) y = MatMul(g, w) }"""
    kernels = ort_isa.kernels("avx2", version)
    passes = "simplify,quantize{input=float embedding=int8}"
    _, _, low = act(source, "keep-float", passes, kernels=kernels)
    [node] = [n for n in low.model.graph if n.op_type == "Gather"]
    assert why in node.metadata_props.get(graph.REASON, "")
    assert bool(node.metadata_props.get(graph.REASON)) == bool(why)


def test_weights_that_two_layers_share_are_stored_once() -> None:
    source = """(float[N,8] x) => (float[N,8] y) <float[8,8] w> {
        h = MatMul(x, w)
        y = MatMul(h, w)
    }"""
    count, changed, _ = act(source, "weights")
    assert count == 2
    assert sum("DequantizeLinear" in line for line in changed) == 1


def test_weights_leave_products_of_activations() -> None:
    source = "(float[2,8,8] q, float[2,8,8] k) => (float[2,8,8] y) { y = MatMul(q, k) }"
    passes = "simplify,calibrate,quantize{attention=int8}"
    assert act(source, "weights", passes)[:2] == (0, [])


# -- inputs -------------------------------------------------------------------------------------


def test_inputs_get_an_unsigned_grid() -> None:
    count, changed, low = act(CONV, "inputs")
    assert count == 1
    assert changed == [
        "+w %x/scale: f32[]",
        "+w %x/zero_point: u8[]",
        "+%x/quantized: u8[N,4,8,8] = QuantizeLinear(%x, %x/scale, %x/zero_point)",
        "+%x/dequantized: f32[N,4,8,8] = DequantizeLinear(%x/quantized, %x/scale, %x/zero_point)",
        "-%c: f32[N,8,6,6] = Conv(%x{int8 asymmetric}, %w/dequantized{int8 axis=0}, %b)",
        "+%c: f32[N,8,6,6] = Conv(%x/dequantized{int8 asymmetric}, %w/dequantized{int8 axis=0},"
        " %b)",
    ]
    assert 0 < int(graph.constant(low.model.graph.initializers["x/zero_point"])) < 255


def test_inputs_behind_a_relu_have_zero_point_zero() -> None:
    source = """(float[N,8] x) => (float[N,4] y) <float[8,4] w> {
        r = Relu(x)
        y = MatMul(r, w)
    }"""
    _, _, low = act(source, "inputs")
    assert int(graph.constant(low.model.graph.initializers["r/zero_point"])) == 0


def test_inputs_that_two_layers_read_are_quantized_once() -> None:
    source = """(float[N,8] x) => (float[N,4] y, float[N,4] z) <float[8,4] w, float[8,4] v> {
        y = MatMul(x, w)
        z = MatMul(x, v)
    }"""
    count, changed, _ = act(source, "inputs")
    assert count == 2
    assert sum("QuantizeLinear" in line.partition("=")[2][:20] for line in changed) == 1


def test_inputs_of_both_sides_of_a_product_are_quantized() -> None:
    source = "(float[2,8,8] q, float[2,8,8] k) => (float[2,8,8] y) { y = MatMul(q, k) }"
    count, changed, _ = act(source, "inputs", "simplify,calibrate,quantize{attention=int8}")
    assert count == 2
    assert nodes(changed)[-1] == (
        "+%y: f32[2,8,8] = MatMul(%q/dequantized{int8 asymmetric}, %k/dequantized{int8 asymmetric})"
    )


def test_inputs_leave_float_readers_of_the_same_value() -> None:
    source = """(float[N,8] x) => (float[N,4] y, float[N,8] z) <float[8,4] w> {
        h = Tanh(x)
        y = MatMul(h, w)
        z = Softplus(h)
    }"""
    _, changed, low = act(source, "inputs")
    assert not any("Softplus" in line for line in changed)
    assert "Softplus(%h)" in text.render(low.model)


def test_inputs_leave_weight_only_layers() -> None:
    assert act(GEMM, "inputs", lowering.WEIGHT_ONLY)[:2] == (0, [])


def test_inputs_on_arm_are_signed_and_behind_a_relu_have_the_lowest_zero_point() -> None:
    source = """(float[N,8] x) => (float[N,4] y) <float[8,4] w> {
        r = Relu(x)
        y = MatMul(r, w)
    }"""
    _, _, low = act(source, "inputs", kernels=ort_isa.kernels("arm", "1.32"))
    zero = low.model.graph.initializers["r/zero_point"]
    assert (zero.dtype, int(graph.constant(zero))) == (ir.DataType.INT8, -128)


def test_inputs_of_16_bits_and_what_is_between_keep_16_bits() -> None:
    _, _, low = act(RESIDUAL, "between", "simplify,calibrate,quantize{input=int16}")
    found = {n: v.dtype for n, v in low.model.graph.initializers.items() if "zero_point" in n}
    activations = [kind for name, kind in found.items() if name[0] in "xcsy"]
    assert set(activations) == {ir.DataType.UINT16}


# -- conv-output --------------------------------------------------------------------------------


def test_conv_output_stands_behind_the_relu_and_keeps_the_name_of_the_output() -> None:
    count, changed, low = act(CONV, "conv-output")
    assert count == 1
    assert nodes(changed) == [
        "-%y: f32[N,8,6,6] = Relu(%c)",
        "+%y/inner: f32[N,8,6,6] = Relu(%c)",
        "+%y/quantized: u8[N,8,6,6] = QuantizeLinear(%y/inner, %y/scale, %y/zero_point)",
        "+%y: f32[N,8,6,6] = DequantizeLinear(%y/quantized, %y/scale, %y/zero_point)",
    ]
    assert int(graph.constant(low.model.graph.initializers["y/zero_point"])) == 0


def test_conv_output_stands_behind_a_clip_from_zero() -> None:
    source = CONV.replace("float[8] b>", "float[8] b, float low={0}, float high={6}>")
    _, changed, _ = act(source.replace("Relu(c)", "Clip(c, low, high)"), "conv-output")
    assert "+%y/inner: f32[N,8,6,6] = Clip(%c, %low, %high)" in changed


@pytest.mark.parametrize(
    "second",
    ["Clip(c, low)", "Tanh(c)", "LeakyRelu(c)", "Sigmoid(c)"],
)
def test_conv_output_stands_before_what_the_conv_cannot_absorb(second: str) -> None:
    source = CONV.replace("float[8] b>", "float[8] b, float low={-1}>").replace("Relu(c)", second)
    _, changed, _ = act(source, "conv-output")
    assert any(line.startswith("+%c/quantized") for line in changed)


def test_conv_output_with_two_readers_is_quantized_before_the_relu() -> None:
    source = CONV.replace("float[N,8,6,6] y)", "float[N,8,6,6] y, float[N,8,6,6] z)")
    _, changed, _ = act(source.replace("y = Relu", "z = Tanh(c) y = Relu"), "conv-output")
    assert nodes(changed)[-2:] == [
        "+%z: f32[N,8,6,6] = Tanh(%c/dequantized)",
        "+%y: f32[N,8,6,6] = Relu(%c/dequantized)",
    ]


@pytest.mark.parametrize(
    ("source", "passes"), [(CONV, lowering.WEIGHT_ONLY), (GEMM, lowering.DECIDE)]
)
def test_conv_output_leaves_float_convs_and_linear_layers(source: str, passes: str) -> None:
    assert act(source, "conv-output", passes)[:2] == (0, [])


# -- between ------------------------------------------------------------------------------------


def test_between_quantizes_the_sum_of_two_integers_behind_its_relu() -> None:
    count, changed, _ = act(RESIDUAL, "between")
    assert count == 1
    assert nodes(changed) == [
        "-%y: f32[N,8,8,8] = Relu(%s)",
        "+%y/inner: f32[N,8,8,8] = Relu(%s)",
        "+%y/quantized: u8[N,8,8,8] = QuantizeLinear(%y/inner, %y/scale, %y/zero_point)",
        "+%y: f32[N,8,8,8] = DequantizeLinear(%y/quantized, %y/scale, %y/zero_point)",
    ]


def test_between_leaves_a_sum_with_a_float() -> None:
    source = RESIDUAL.replace("d = Conv(c, v)", "d = Tanh(c)").replace(", float[8,8,1,1] v", "")
    assert act(source, "between")[:2] == (0, [])


def test_between_quantizes_a_concatenation_and_a_pool() -> None:
    source = """(float[N,8,4,4] x) => (float[N,16,1,1] y) <float[8,8,1,1] w, float[8,8,1,1] v> {
        c = Conv(x, w)
        d = Conv(x, v)
        e = Concat<axis=1>(c, d)
        y = GlobalAveragePool(e)
    }"""
    count, changed, _ = act(source, "between")
    assert count == 2
    assert any(line.startswith("+%e/quantized") for line in changed)
    assert any(line.startswith("+%y/quantized") for line in changed)


def test_between_gives_what_only_moves_integers_their_grid() -> None:
    source = """(float[N,8,8,8] x) => (float[N,8,4,4] y) <float[8,8,1,1] w, float[8,8,1,1] v> {
        c = Conv(x, w)
        p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(c)
        y = Conv(p, v)
    }"""
    model = lowering.graph_of(source)
    lowering.decide(model)
    counts = lowering.apply(model, ort_rules.DIALECT, "between")
    assert counts["between"] == 1
    arrays = {n: graph.constant(v) for n, v in model.graph.initializers.items()}
    assert arrays["p/scale"] == arrays["c/scale"]
    assert arrays["p/zero_point"] == arrays["c/zero_point"]


# -- int32-bias ---------------------------------------------------------------------------------


def test_int32_bias_has_the_scale_of_the_products() -> None:
    count, changed, low = act(CONV, "int32-bias")
    assert count == 1
    assert nodes(changed) == [
        "+%b/dequantized: f32[8] = DequantizeLinear(%b/codes, %b/scale, %b/zero_point) {axis=0}",
        "-%c: f32[N,8,6,6] = Conv(%x/dequantized{int8 asymmetric}, %w/dequantized{int8 axis=0},"
        " %b)",
        "+%c: f32[N,8,6,6] = Conv(%x/dequantized{int8 asymmetric}, %w/dequantized{int8 axis=0},"
        " %b/dequantized)",
    ]
    arrays = {n: graph.constant(v) for n, v in low.model.graph.initializers.items()}
    np.testing.assert_array_equal(arrays["b/scale"], arrays["x/scale"] * arrays["w/scale"])
    # Rounded to the nearest whole step.
    stored = arrays["b/codes"] * arrays["b/scale"].astype(np.float64)
    assert (np.abs(stored - arrays["b"]) <= 0.5001 * arrays["b/scale"]).all()
    assert not arrays["b/zero_point"].any()


@pytest.mark.parametrize("shape", ["1", "1,4", "1,1"])
def test_int32_bias_has_one_code_a_channel(shape: str) -> None:
    source = f"""(float[3,8] x) => (float[3,4] y) <float[8,4] w, float[{shape}] b> {{
        y = Gemm(x, w, b)
    }}"""
    count, _, low = act(source, "int32-bias")
    assert count == 1
    assert graph.constant(low.model.graph.initializers["b/codes"]).shape == (4,)


def test_int32_bias_leaves_weight_only_layers() -> None:
    assert act(GEMM, "int32-bias", lowering.WEIGHT_ONLY)[:2] == (0, [])


# -- matmul-bias --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["m, b", "b, m"])
def test_matmul_bias_of_rank_2_becomes_a_gemm(order: str) -> None:
    source = f"""(float[N,8] x) => (float[N,4] y) <float[8,4] w, float[4] b> {{
        m = MatMul(x, w)
        y = Add({order})
    }}"""
    count, changed, low = act(source, "matmul-bias")
    assert count == 1
    assert "+%y: f32[N,4] = Gemm(%x/dequantized, %w/dequantized, %b/flat/dequantized)" in changed
    gemm = low.model.graph.outputs[0].producer()
    assert gemm is not None and graph.origins(gemm) == ("m",)


RANK_3 = """(float[N,3,8] x) => (float[N,3,4] y) <float[8,4] w, float[{bias}] b> {{
    m = MatMul(x, w)
    y = Add(m, b)
}}"""


def test_matmul_bias_of_rank_3_becomes_one_kernel() -> None:
    count, changed, low = act(RANK_3.format(bias=4), "matmul-bias")
    assert count == 1
    assert (
        "+%y: f32[N,3,4] = com.microsoft::MatMulIntegerToFloat(%x/quantized, %w/codes, %x/scale,"
        " %w/scale, %x/zero_point, %w/zero_point, %b/flat)"
    ) in changed
    kernel = low.model.graph.outputs[0].producer()
    assert kernel is not None and graph.origins(kernel) == ("m",)


@pytest.mark.parametrize("bias", ["1", "1,4", "1,1,4", "1,1,1"])
def test_matmul_bias_has_one_number_a_channel(bias: str) -> None:
    count, _, low = act(RANK_3.format(bias=bias), "matmul-bias")
    assert count == 1
    assert graph.constant(low.model.graph.initializers["b/flat"]).shape == (4,)


def test_matmul_bias_beside_16_bit_inputs_stays_an_add() -> None:
    passes = "simplify,calibrate,quantize{input=int16}"
    assert act(RANK_3.format(bias=4), "matmul-bias", passes)[:2] == (0, [])


def test_matmul_bias_of_higher_rank_than_the_product_is_left() -> None:
    source = """(float[3,8] x) => (float[1,3,4] y) <float[8,4] w, float[1,1,4] b> {
        m = MatMul(x, w)
        y = Add(m, b)
    }"""
    assert act(source, "matmul-bias")[1] == []


def test_matmul_bias_leaves_weight_only_layers() -> None:
    source = """(float[N,8] x) => (float[N,4] y) <float[8,4] w, float[4] b> {
        m = MatMul(x, w)
        y = Add(m, b)
    }"""
    assert act(source, "matmul-bias", lowering.WEIGHT_ONLY)[:2] == (0, [])


# -- the whole dialect --------------------------------------------------------------------------


@pytest.mark.parametrize("source", [CONV, STEM, GEMM, RESIDUAL])
def test_lowering_leaves_no_decision_and_no_range(source: str) -> None:
    model = lowering.graph_of(source)
    lowering.decide(model)
    OrtCpu().lower(model)
    assert not any(spec.all_specs(node) for node in model.graph)
    assert not any(name.endswith("/range") for name in model.graph.initializers)
    verify.verify(model)


# -- float-between ------------------------------------------------------------------------------

# A layer ``m`` that stays in float between two in integers.
BETWEEN = {
    "Conv": """(float[1,4,8,8] x) => (float[1,4,8,8] y)
        <float[4,4,1,1] u, float[4,4,1,1] w, float[4] b, float[4,4,1,1] v> {
        a = Conv(x, u) m = Conv(a, w, b) y = Conv(m, v) }""",
    "Conv without a bias": """(float[1,4,8,8] x) => (float[1,4,8,8] y)
        <float[4,4,1,1] u, float[4,2,1,1] w, float[4,4,1,1] v> {
        a = Conv(x, u) m = Conv<group=2>(a, w) r = Relu(m) y = Conv(r, v) }""",
    "ConvTranspose": """(float[1,4,8,8] x) => (float[1,4,8,8] y)
        <float[4,4,1,1] u, float[4,4,1,1] w, float[4,4,1,1] v> {
        a = Conv(x, u) m = ConvTranspose(a, w) y = Conv(m, v) }""",
    "Gemm": """(float[1,4,2,2] x) => (float[1,16] y)
        <float[4,4,1,1] u, int64[2] s = {1,16}, float[16,16] w, float[16] b, float[16,16] v> {
        a = Conv(x, u) f = Reshape(a, s) m = Gemm(f, w, b) y = MatMul(m, v) }""",
    "Gemm without a bias": """(float[1,4,2,2] x) => (float[1,16] y)
        <float[4,4,1,1] u, int64[2] s = {1,16}, float[16,16] w, float[16,16] v> {
        a = Conv(x, u) f = Reshape(a, s) m = Gemm<transB=1>(f, w) y = MatMul(m, v) }""",
    "MatMul": """(float[1,4,2,2] x) => (float[1,16] y)
        <float[4,4,1,1] u, int64[2] s = {1,16}, float[16,16] w, float[16] b, float[16,16] v> {
        a = Conv(x, u) f = Reshape(a, s) m = MatMul(f, w) c = Add(m, b) y = MatMul(c, v) }""",
}


@pytest.mark.parametrize("name", BETWEEN)
def test_float_between_keeps_the_runtime_from_rounding_a_float_weight(
    name: str, tmp_path: pathlib.Path
) -> None:
    weight = lowering.graph_of(BETWEEN[name]).graph.initializers["w"]
    before = graph.constant(weight)
    passes = "simplify,calibrate,quantize,set{layer=m weight=float input=float}"
    count, changed, low = act(BETWEEN[name], "float-between", passes)
    assert count == 1 and len(nodes(changed)) >= 2
    integer = low.model.clone()
    shown = lowering.optimized(low.model, tmp_path)
    [layer] = [node for node in shown.graph if node.op_type in ("Conv", "ConvTranspose", "Gemm")]
    kept = layer.inputs[1]
    assert kept is not None and graph.constant(kept).dtype == np.float32
    assert np.array_equal(np.sort(graph.constant(kept), None), np.sort(before, None))
    sample = graphs.samples(integer, 1)[0]
    one, other = (
        execute.Session(integer, optimize=optimize).run(sample)["y"] for optimize in (False, True)
    )
    assert np.abs(one - other).max() < 0.02 * np.abs(one).max()


def test_float_between_leaves_alone_what_is_read_in_float() -> None:
    source = BETWEEN["Conv"].replace("y = Conv(m, v)", "s = Sigmoid(m) y = Conv(s, v)")
    passes = "simplify,calibrate,quantize,set{layer=m weight=float input=float}"
    count, changed, _ = act(source, "float-between", passes)
    assert count == 0 and not changed
