"""Every rule of the TensorRT dialect: what it changes, and when it leaves a graph alone."""

from __future__ import annotations

import pathlib

import graphs
import lowering
import numpy as np
import onnx_ir as ir
import pytest

from qcompile import execute, graph, simulate, spec, text, verify
from qcompile.backends import trt_rules
from qcompile.backends.lowering import Lowering
from qcompile.backends.tensorrt import TensorRtRtx

CONV = """(float[N,16,8,8] x) => (float[N,16,6,6] y) <float[16,16,3,3] w, float[16] b> {
    c = Conv(x, w, b)
    y = Relu(c)
}"""
GEMM = """(float[N,16] x) => (float[N,16] y) <float[16,16] w, float[16] b> {
    y = Gemm(x, w, b)
}"""
BLOCK = """(float[N,16,8,8] x) => (float[N,16,8,8] y)
<float[16,16,3,3] w, float[16,16,3,3] v, float[16] b> {
    c = Conv<pads=[1,1,1,1]>(x, w, b)
    r = Relu(c)
    d = Conv<pads=[1,1,1,1]>(r, v)
    s = Add(d, r)
    y = Relu(s)
}"""
PRODUCT = "(float[2,16,16] q, float[2,16,16] k) => (float[2,16,16] y) { y = MatMul(q, k) }"
BOTH = "simplify,calibrate,quantize{attention=int8}"


def conv(ins: int, outs: int, kernel: str, before: str = "h = Tanh(x)") -> str:
    height, width = (9 - int(k) for k in kernel.split(","))
    return f"""(float[N,{ins},8,8] x) => (float[N,{outs},{height},{width}] y)
    <float[{outs},{ins},{kernel}] w> {{
        {before}
        y = Conv(h, w)
    }}"""


def act(source: str, rule: str, passes: str = lowering.DECIDE) -> tuple[int, list[str], Lowering]:
    """How often ``rule`` acts on the decided ``source``, the lines it changes, and the lowering."""
    model = lowering.graph_of(source)
    lowering.decide(model, passes)
    low = Lowering(model)
    for step in trt_rules.DIALECT:
        before = text.render(model)
        count = step.apply(low)
        if step.name == rule:
            return count, text.changes(before, text.render(model)), low
    raise KeyError(rule)


def test_every_rule_has_a_test_here_and_a_reason() -> None:
    names = [rule.name for rule in trt_rules.DIALECT]
    assert names == [
        "keep-float", "centre", "attention-scale", "weights", "inputs", "residual",
    ]  # fmt: skip
    tests = "\n".join(globals())
    for rule in trt_rules.DIALECT:
        assert len(rule.why) > 40
        assert f"test_{rule.name.replace('-', '_')}_" in tests, rule.name


# -- keep-float ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "passes", "reason"),
    [
        (
            """(float[N,16,8,8] x) => (float[N,16,6,6] y) <float[16,1,3,3] w> {
                y = Conv<group=16>(x, w) }""",
            lowering.DECIDE,
            "depthwise",
        ),
        (
            """(float[N,16,5,5] x) => (float[N,16,6,6] y) <float[16,16,2,2] w> {
                y = ConvTranspose(x, w) }""",
            lowering.DECIDE,
            "ConvTranspose",
        ),
        (
            "(float[16,N] x) => (float[N,16] y) <float[16,16] w> { y = Gemm<transA=1>(x, w) }",
            lowering.DECIDE,
            "transposed input",
        ),
        (
            "(float[N,16] x) => (float[N,10] y) <float[16,10] w> { y = MatMul(x, w) }",
            lowering.DECIDE,
            "linear layer of 16 to 10",
        ),
        (
            "(float[N,8] x) => (float[N,16] y) <float[16,8] w> { y = Gemm<transB=1>(x, w) }",
            lowering.DECIDE,
            "linear layer of 8 to 16",
        ),
        (
            "(float[1,32] x) => (float[1,32] y) <float[32,32] w> { y = MatMul(x, w) }",
            lowering.DECIDE,
            "one row or column",
        ),
        (
            "(float[2,1,32] q, float[2,32,64] k) => (float[2,1,64] y) { y = MatMul(q, k) }",
            BOTH,
            "one row or column",
        ),
        (
            "(float[2,32,8] q, float[2,8,32] k) => (float[2,32,32] y) { y = MatMul(q, k) }",
            BOTH,
            "a product over or of 8",
        ),
        (
            "(float[1,16,32] q, float[1,32,513] k) => (float[1,16,513] y) { y = MatMul(q, k) }",
            BOTH,
            "up to 512 positions",
        ),
        (
            "(float[1,16,513] p, float[1,513,32] v) => (float[1,16,32] y) { y = MatMul(p, v) }",
            BOTH,
            "up to 512 positions",
        ),
        (conv(12, 16, "3,3"), lowering.DECIDE, "Conv with 12 to 16 channels"),
        (conv(16, 12, "3,3"), lowering.DECIDE, "Conv with 16 to 12 channels"),
        (conv(8, 16, "3,1"), lowering.DECIDE, "Conv with 8 to 16 channels"),
        (
            "(float[N,64] x) => (float[N,32] y) <float[64,32] w> { y = MatMul(x, w) }",
            "simplify,calibrate,quantize{granularity=block weight=int4}",
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
    model = lowering.graph_of(PRODUCT)
    lowering.decide(model, BOTH)
    low = Lowering(model)
    low.layers[0].weight.decide(None)
    assert trt_rules.keep_float(low) == 1


@pytest.mark.parametrize(
    "source",
    [
        CONV,
        GEMM,
        BLOCK,
        conv(8, 16, "3,3"),
        conv(16, 8, "3,3"),
        "(float[N,3,8,8] x) => (float[N,16,6,6] y) <float[16,3,3,3] w> { y = Conv(x, w) }",
        """(float[N,32,8,8] x) => (float[N,32,6,6] y) <float[32,4,3,3] w> {
            h = Tanh(x)
            y = Conv<group=8>(h, w)
        }""",
        "(float[1,1,32] x) => (float[1,1,32] y) <float[32,32] w> { y = MatMul(x, w) }",
    ],
)
def test_keep_float_leaves_what_is_faster_in_int8(source: str) -> None:
    assert act(source, "keep-float")[:2] == (0, [])


# -- centre -------------------------------------------------------------------------------------

POSITIVE = """(float[4,32] x) => (float[4,16] y) <float[32,32] w, float[32,16] v, float[16] b> {
    h = MatMul(x, w)
    r = Relu(h)
    m = MatMul(r, v)
    y = Add(m, b)
}"""


def test_centre_moves_a_lopsided_input_into_the_bias() -> None:
    count, changed, _ = act(POSITIVE, "centre")
    assert count == 1
    assert [line for line in changed if line[1] == "%"] == [
        "-%m: f32[4,16] = MatMul(%r{int8 asymmetric}, %v{int8 axis=1})",
        "-%y: f32[4,16] = Add(%m, %b)",
        "+%r/centred: f32[4,32] = Sub(%r, %r/middle)",
        "+%m: f32[4,16] = MatMul(%r/centred{int8 asymmetric}, %v{int8 axis=1})",
        "+%y: f32[4,16] = Add(%m, %b/moved)",
    ]


@pytest.mark.parametrize(
    "source",
    [
        POSITIVE,
        POSITIVE.replace("m = MatMul(r, v)\n    y = Add(m, b)", "y = MatMul(r, v)"),
        POSITIVE.replace("m = MatMul(r, v)\n    y = Add(m, b)", "y = Gemm(r, v, b)"),
        POSITIVE.replace("m = MatMul(r, v)\n    y = Add(m, b)", "y = Gemm(r, v)"),
    ],
)
def test_centre_lowers_the_error_with_any_bias(source: str) -> None:
    model = lowering.graph_of(source)
    reference = model.clone()
    calibration = lowering.decide(model)
    plain = model.clone()
    low, other = Lowering(model), Lowering(plain)
    for step in trt_rules.DIALECT:
        step.apply(low)
        if step.name != "centre":
            step.apply(other)
    judge = simulate.Judge(reference, calibration.judges)
    with_rule, without = (judge.worst(execute.Session(m)) for m in (model, plain))
    assert with_rule > without + 1


def test_centre_leaves_what_is_nearly_symmetric() -> None:
    count, changed, _ = act(graphs.LINEAR.replace("8", "32").replace("3", "16"), "centre")
    assert (count, changed) == (0, [])


# -- weights ------------------------------------------------------------------------------------


def test_weights_become_symmetric_codes_behind_a_dequantize() -> None:
    count, changed, low = act(CONV, "weights")
    assert count == 1
    assert changed == [
        "+w %w/codes: i8[16,16,3,3]",
        "+w %w/zero_point: i8[16]",
        "-%c: f32[N,16,6,6] = Conv(%x{int8 asymmetric}, %w{int8 axis=0}, %b)",
        "+%w/dequantized: f32[16,16,3,3] = DequantizeLinear(%w/codes, %w/scale, %w/zero_point)"
        " {axis=0}",
        "+%c: f32[N,16,6,6] = Conv(%x{int8 asymmetric}, %w/dequantized{int8 axis=0}, %b)",
    ]
    assert not graph.constant(low.model.graph.initializers["w/zero_point"]).any()


@pytest.mark.parametrize(
    ("options", "stored"),
    [
        ("weight=int4", ir.DataType.INT8),
        ("weight=int4 input=float", ir.DataType.INT4),
        ("weight=int8 input=float", ir.DataType.INT8),
    ],
)
def test_weights_are_packed_only_beside_a_float_input(options: str, stored: ir.DataType) -> None:
    _, _, low = act(GEMM, "weights", f"simplify,calibrate,quantize{{{options}}}")
    assert low.model.graph.initializers["w/codes"].dtype == stored


def test_weights_leave_products_of_activations() -> None:
    assert act(PRODUCT, "weights", BOTH)[:2] == (0, [])


# -- inputs -------------------------------------------------------------------------------------


def test_inputs_get_a_symmetric_grid_and_biases_stay_float() -> None:
    count, changed, low = act(GEMM, "inputs")
    assert count == 1
    assert changed == [
        "+w %x/scale: f32[]",
        "+w %x/zero_point: i8[]",
        "+%x/quantized: i8[N,16] = QuantizeLinear(%x, %x/scale, %x/zero_point)",
        "+%x/dequantized: f32[N,16] = DequantizeLinear(%x/quantized, %x/scale, %x/zero_point)",
        "-%y: f32[N,16] = Gemm(%x{int8 asymmetric}, %w/dequantized{int8 axis=1}, %b)",
        "+%y: f32[N,16] = Gemm(%x/dequantized{int8 asymmetric}, %w/dequantized{int8 axis=1}, %b)",
    ]
    arrays = {n: graph.constant(v) for n, v in low.model.graph.initializers.items()}
    assert not arrays["x/zero_point"].any()
    np.testing.assert_allclose(arrays["x/scale"], np.abs(arrays["x/range"]).max() / 127, rtol=1e-6)


def test_inputs_of_both_sides_of_a_product_are_quantized() -> None:
    count, changed, _ = act(PRODUCT, "inputs", BOTH)
    assert count == 2
    assert changed[-1] == (
        "+%y: f32[2,16,16] = "
        "MatMul(%q/dequantized{int8 asymmetric}, %k/dequantized{int8 asymmetric})"
    )


def test_inputs_leave_weight_only_layers() -> None:
    assert act(GEMM, "inputs", lowering.WEIGHT_ONLY)[:2] == (0, [])


def test_inputs_of_fewer_bits_are_int8_behind_a_clip_about_a_zero_of_code_zero() -> None:
    passes = "simplify,calibrate,quantize{input=int4}"
    model = lowering.graph_of(BLOCK)
    lowering.decide(model, passes)
    reference, target = model.clone(), TensorRtRtx()
    target.lower(model)
    verify.verify(model)
    kinds = lowering.operators(model)
    assert [kinds[i + 1] for i, kind in enumerate(kinds) if kind == "Clip"] == 2 * [
        "QuantizeLinear"
    ]
    for node in (n for n in model.graph if n.op_type == "QuantizeLinear"):
        codes = node.outputs[0]
        assert node.inputs[2] is not None and not graph.constant(node.inputs[2]).any()
        assert codes.dtype == ir.DataType.INT8
        model.graph.outputs.append(codes)
    feeds = graphs.samples(reference, 8)
    found = [execute.execute(model, sample) for sample in feeds]
    for node in (n for n in model.graph if n.op_type == "QuantizeLinear"):
        levels = np.unique([sample[node.outputs[0].name or ""] for sample in found]).astype(int)
        clipped = node.inputs[0] is not None and (node.inputs[0].name or "").endswith("/clipped")
        assert (np.ptp(levels) <= 15) == clipped
    assert "no kernel for 4-bit activations: 2 of them" in target.notes(model, pathlib.Path())[0]


CONCAT = """(float[N,16,8,8] x) => (float[N,16,8,8] y)
<float[16,16,3,3] w, float[16,32,3,3] v> {
    c = Conv<pads=[1,1,1,1]>(x, w)
    j = Concat<axis=1>(x, c)
    y = Conv<pads=[1,1,1,1]>(j, v)
}"""


def test_inputs_of_a_concat_share_the_scale_behind_it() -> None:
    _, changed, _ = act(CONCAT, "inputs")
    assert [line for line in changed if "Concat" in line] == []
    assert any(line.startswith("+%j/quantized: i8") for line in changed)


# -- attention-scale ----------------------------------------------------------------------------

SCORES = """(float[2,16,32] q, float[2,32,16] k) => (float[2,16,16] y) <float f = {0.125}> {
    s = MatMul(q, k)
    t = Mul(s, f)
    y = Softmax(t)
}"""


@pytest.mark.parametrize("scaling", ["Mul(s, f)", "Mul(f, s)", "Div(s, f)"])
def test_attention_scale_moves_onto_the_queries(scaling: str) -> None:
    source = SCORES.replace("Mul(s, f)", scaling)
    count, changed, low = act(source, "attention-scale", BOTH)
    assert count == 1
    assert changed[-3:] == [
        "+%q/scaled: f32[2,16,32] = Mul(%q, %q/factor)",
        "+%s: f32[2,16,16] = MatMul(%q/scaled{int8 asymmetric}, %k{int8 asymmetric})",
        "+%y: f32[2,16,16] = Softmax(%s)",
    ]
    factor = 8.0 if scaling.startswith("Div") else 0.125
    arrays = low.model.graph.initializers
    wanted = factor * graph.constant(arrays["q/range"])
    np.testing.assert_allclose(graph.constant(arrays["q/scaled/range"]), wanted, rtol=1e-6)


@pytest.mark.parametrize("sign", ["0.125", "-0.125"])
def test_attention_scale_keeps_the_function(sign: str) -> None:
    model = lowering.graph_of(SCORES.replace("0.125", sign))
    lowering.decide(model, BOTH)
    low = Lowering(model.clone())
    assert trt_rules.attention_scale(low) == 1
    graphs.assert_same_function(model, low.model)


@pytest.mark.parametrize(
    "source",
    [
        SCORES.replace("float f = {0.125}", "float[16] f"),
        SCORES.replace("Mul(s, f)", "Div(f, s)"),
        SCORES.replace("Softmax(t)", "Add(t, s)"),
        SCORES.replace("Mul(s, f)", "Tanh(s)"),
    ],
)
def test_attention_scale_leaves_what_is_no_scaling_of_scores_alone(source: str) -> None:
    assert act(source, "attention-scale", BOTH)[:2] == (0, [])


def test_attention_scale_leaves_float_scores() -> None:
    assert act(SCORES, "attention-scale")[:2] == (0, [])


# -- residual -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["d, r", "r, d"])
def test_residual_quantizes_the_identity_side_only(order: str) -> None:
    count, changed, _ = act(BLOCK.replace("Add(d, r)", f"Add({order})"), "residual")
    assert count == 1
    wanted = order.replace("d", "%d").replace("r", "%r/dequantized")
    before = order.replace("d", "%d").replace("r", "%r")
    assert changed == [
        f"-%s: f32[N,16,8,8] = Add({before})",
        f"+%s: f32[N,16,8,8] = Add({wanted})",
    ]


def test_residual_quantizes_an_identity_that_no_layer_reads() -> None:
    source = BLOCK.replace("s = Add(d, r)", "t = Tanh(x) s = Add(t, d)")
    count, changed, _ = act(source, "residual")
    assert count == 1
    assert changed[-1] == "+%s: f32[N,16,8,8] = Add(%t/dequantized, %d)"


@pytest.mark.parametrize(
    "source",
    [
        GEMM,
        BLOCK.replace("Add(d, r)", "Add(d, k)").replace("[16] b", "[16] b, float[16,1,1] k"),
        BLOCK.replace("d = Conv<pads=[1,1,1,1]>(r, v)", "d = Tanh(r)"),
    ],
)  # fmt: skip
def test_residual_leaves_constants_and_sums_of_floats(source: str) -> None:
    assert act(source, "residual")[:2] == (0, [])


def test_residual_leaves_weight_only_convs() -> None:
    assert act(BLOCK, "residual", lowering.WEIGHT_ONLY)[:2] == (0, [])


# -- the whole dialect --------------------------------------------------------------------------


@pytest.mark.parametrize("source", [CONV, GEMM, BLOCK])
def test_lowering_writes_nothing_that_the_parser_refuses(source: str) -> None:
    model = lowering.graph_of(source)
    lowering.decide(model)
    TensorRtRtx().lower(model)
    verify.verify(model)
    kinds = {v.dtype for v in model.graph.initializers.values()}
    assert not kinds & {ir.DataType.UINT8, ir.DataType.INT32}
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert node.inputs[2] is not None
            assert not graph.constant(node.inputs[2]).any()


def test_lowering_puts_no_pair_behind_a_layer() -> None:
    model = lowering.graph_of(CONV)
    lowering.decide(model)
    TensorRtRtx().lower(model)
    assert lowering.operators(model)[-2:] == ["Conv", "Relu"]
