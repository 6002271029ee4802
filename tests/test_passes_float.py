"""Laws of the passes that rewrite in float: simplify, fold-bn, smooth-hadamard."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphs import (
    CHAIN,
    CONV,
    GEMM,
    LINEAR,
    Array,
    assert_same_function,
    graph,
    node,
    outputs,
    samples,
    weight,
)

from qcompile import execute, pipeline, registry, simulate, text
from qcompile import graph as graphs
from qcompile.calibrate import Calibration
from qcompile.capture import capture
from qcompile.errors import PassError
from qcompile.models import fashion
from qcompile.passes.fold_bn import FoldBn
from qcompile.passes.simplify import Simplify
from qcompile.passes.smooth_hadamard import SmoothHadamard
from qcompile.pipeline import Context, Pass, Stats
from qcompile.sources import Data

STATISTICS = """float[{c}] g, float[{c}] beta, float[{c}] mean, float[{c}] var = {{{values}}}"""


def statistics(channels: int) -> str:
    spread = ",".join(str(0.25 * (i + 1)) for i in range(channels))
    return STATISTICS.format(c=channels, values=spread)


CONV_BN = f"""(float[1,2,5,5] x) => (float[1,4,3,3] y)
    <float[4,2,3,3] w, float[4] b, {statistics(4)}> {{
    h = Conv(x, w, b) n = BatchNormalization<epsilon=0.01>(h, g, beta, mean, var) y = Relu(n) }}"""
CONV_BN_LAST = f"""(float[1,2,5,5] x) => (float[1,4,3,3] y) <float[4,2,3,3] w, {statistics(4)}> {{
    h = Conv(x, w) y = BatchNormalization(h, g, beta, mean, var) }}"""
DEPTHWISE_BN = f"""(float[1,4,5,5] x) => (float[1,4,3,3] y) <float[4,1,3,3] w, {statistics(4)}> {{
    h = Conv<group=4>(x, w) y = BatchNormalization(h, g, beta, mean, var) }}"""
TRANSPOSE_BN = f"""(float[1,2,3,3] x) => (float[1,5,5,5] y) <float[2,5,3,3] w, {statistics(5)}> {{
    h = ConvTranspose(x, w) y = BatchNormalization(h, g, beta, mean, var) }}"""
GROUPED_TRANSPOSE_BN = f"""(float[1,2,3,3] x) => (float[1,4,5,5] y)
    <float[2,2,3,3] w, {statistics(4)}> {{
    h = ConvTranspose<group=2>(x, w) y = BatchNormalization(h, g, beta, mean, var) }}"""
GEMM_BN = f"""(float[2,8] x) => (float[2,3] y) <float[3,8] w, float[3] b, {statistics(3)}> {{
    h = Gemm<transB=1, alpha=0.5, beta=2.0>(x, w, b) y = 
    BatchNormalization(h, g, beta, mean, var) }}"""
GEMM_BN_NO_BETA = f"""(float[2,8] x) => (float[2,3] y)
    <float[8,3] w, float[3] b, {statistics(3)}> {{
    h = Gemm<beta=0.0>(x, w, b) y = BatchNormalization(h, g, beta, mean, var) }}"""
GEMM_BN_NO_BIAS = f"""(float[2,8] x) => (float[2,3] y) <float[8,3] w, {statistics(3)}> {{
    h = Gemm<alpha=0.5>(x, w) y = BatchNormalization(h, g, beta, mean, var) }}"""
GEMM_BN_SCALAR_BIAS = f"""(float[2,8] x) => (float[2,3] y)
    <float[8,3] w, float[1] b, {statistics(3)}> {{
    h = Gemm(x, w, b) y = BatchNormalization(h, g, beta, mean, var) }}"""
GEMM_BN_ROW_BIAS = f"""(float[2,8] x) => (float[2,3] y)
    <float[8,3] w, float[2,1] b, {statistics(3)}> {{
    h = Gemm(x, w, b) y = BatchNormalization(h, g, beta, mean, var) }}"""
SHARED_WEIGHT_BN = f"""(float[1,2,5,5] x) => (float[1,4,3,3] y, float[1,4,3,3] z)
    <float[4,2,3,3] w, {statistics(4)}> {{
    h = Conv(x, w) y = BatchNormalization(h, g, beta, mean, var) z = Conv(x, w) }}"""
FOLDED = [
    CONV_BN, CONV_BN_LAST, DEPTHWISE_BN, TRANSPOSE_BN, GEMM_BN, GEMM_BN_NO_BETA, GEMM_BN_NO_BIAS,
    SHARED_WEIGHT_BN, GEMM_BN_SCALAR_BIAS, GEMM_BN_ROW_BIAS,
]  # fmt: skip
BN_TAIL = f"<float[4,2,3,3] w, {statistics(4)}>"
NOT_FOLDED = {
    "read twice": f"""(float[1,2,5,5] x) => (float[1,4,3,3] y) {BN_TAIL} {{
        h = Conv(x, w) n = BatchNormalization(h, g, beta, mean, var) y = Add(n, h) }}""",
    "an output": f"""(float[1,2,5,5] x) => (float[1,4,3,3] y, float[1,4,3,3] h) {BN_TAIL} {{
        h = Conv(x, w) y = BatchNormalization(h, g, beta, mean, var) }}""",
    "something between": f"""(float[1,2,5,5] x) => (float[1,4,3,3] y) {BN_TAIL} {{
        h = Conv(x, w) r = Relu(h) y = BatchNormalization(r, g, beta, mean, var) }}""",
    "statistics not constant": """(float[1,2,5,5] x, float[4] g) => (float[1,4,3,3] y)
        <float[4,2,3,3] w, float[4] beta, float[4] mean, float[4] var = {1,1,1,1}> {
        h = Conv(x, w) y = BatchNormalization(h, g, beta, mean, var) }""",
    "grouped transpose": GROUPED_TRANSPOSE_BN,
}


def run(model: ir.Model, *passes: Pass) -> list[Stats]:
    """Run with verification, as a user would."""
    return [step.counters for step in pipeline.run(model, passes, Context())]


def changed(model: ir.Model, step: Pass) -> list[str]:
    before = text.render(model)
    run(model, step)
    return text.changes(before, text.render(model))


ROTATED_CONV = """(float[1,8,3,3] x) => (float[1,5,3,3] y) <float[5,8,1,1] w, float[5] b> {
    y = Conv(x, w, b) }"""
MODELS = [LINEAR, GEMM, CONV, CHAIN, ROTATED_CONV, *FOLDED, *NOT_FOLDED.values()]
PASSES: list[Pass] = [Simplify(), FoldBn(), SmoothHadamard(block=4, place="everywhere")]


@pytest.mark.parametrize("step", PASSES, ids=str)
@pytest.mark.parametrize("source", MODELS)
def test_the_function_is_kept_and_a_second_run_changes_nothing(source: str, step: Pass) -> None:
    model = graph(source)
    reference = model.clone()
    run(model, step)
    assert_same_function(reference, model)
    if not isinstance(step, SmoothHadamard):
        assert changed(model, step) == []


@pytest.mark.parametrize("step", PASSES, ids=str)
def test_the_same_bytes_come_out(step: Pass) -> None:
    found: list[bytes] = []
    for _ in range(2):
        model = graph(CHAIN)
        run(model, step)
        found.append(ir.to_proto(model).SerializeToString())
    assert found[0] == found[1]


@pytest.mark.parametrize("name", [fashion.CNN, fashion.VIT])
def test_a_real_model_is_kept_by_all_of_them(name: str) -> None:
    model = capture(fashion.path(name))
    samples = [{"image": picture[None]} for picture in fashion.calibration()[:8]]
    judge = simulate.Judge(model, samples)
    run(model, Simplify(), FoldBn(), SmoothHadamard(block=16, place="everywhere"))
    assert judge.worst(execute.Session(model, optimize=False)) > pipeline.SAME_FUNCTION_DB


@pytest.mark.parametrize("name", ["simplify", "fold-bn", "smooth-hadamard"])
def test_the_text_round_trips(name: str) -> None:
    [step] = pipeline.parse(name, registry.passes())
    assert str(step) == name


# -- simplify -----------------------------------------------------------------------------------


def test_simplify_removes_identities_and_dead_nodes_only() -> None:
    model = graph("""(float[2,8] x) => (float[2,3] y) <float[8,3] w> {
        i = Identity(x) h = MatMul(i, w) o = Relu(h) y = Identity(o) }""")
    assert changed(model, Simplify()) == [
        "-%i: f32[2,8] = Identity(%x)",
        "-%h: f32[2,3] = MatMul(%i, %w)",
        "-%o: f32[2,3] = Relu(%h)",
        "-%y: f32[2,3] = Identity(%o)",
        "+%h: f32[2,3] = MatMul(%x, %w)",
        "+%y: f32[2,3] = Relu(%h)",
    ]


def test_simplify_makes_one_initializer_of_a_weight_behind_moves() -> None:
    model = graph("""(float[2,8] x) => (float[2,3] y) <float[3,8] w> {
        t = Transpose(w) y = MatMul(x, t) }""")
    transposed = weight(model, "w").T
    assert changed(model, Simplify()) == [
        "-w %w: f32[3,8]",
        "-%t: f32[8,3] = Transpose(%w)",
        "-%y: f32[2,3] = MatMul(%x, %t)",
        "+w %t/folded: f32[8,3]",
        "+%y: f32[2,3] = MatMul(%x, %t/folded)",
    ]
    np.testing.assert_array_equal(weight(model, "t/folded"), transposed)


def test_simplify_folds_a_shared_weight_once() -> None:
    model = graph("""(float[2,8] x) => (float[2,3] y, float[2,3] z) <float[3,8] w> {
        t = Transpose(w) y = MatMul(x, t) z = MatMul(x, t) }""")
    [counters] = run(model, Simplify())
    assert list(model.graph.initializers) == ["t/folded"]
    assert counters["weights"] == 2


def test_simplify_removes_a_bias_of_zeros() -> None:
    model = graph(CONV.replace("float[4] b", "float[4] b = {0,0,0,0}"))
    assert changed(model, Simplify()) == [
        "-w %b: f32[4]",
        "-%y: f32[1,4,5,5] = Conv(%x, %w, %b) {pads=[1,1,1,1]}",
        "+%y: f32[1,4,5,5] = Conv(%x, %w) {pads=[1,1,1,1]}",
    ]


def test_simplify_keeps_a_bias_that_is_not_zero() -> None:
    assert changed(graph(CONV), Simplify()) == []


PADDED = """(float[1,2,5,5] x) => (float[1,4,6,5] y) <float[4,2,3,3] w,
    int64[8] p = {amounts} {more}> {{ h = Pad{mode}(x, p{operand}) y = Conv<{conv}>(h, w) }}"""


def padded(
    amounts: str = "{0,0,1,0,0,0,2,2}",
    conv: str = "pads=[0,0,0,0]",
    mode: str = "",
    more: str = "",
    operand: str = "",
) -> ir.Model:
    source = PADDED.format(amounts=amounts, conv=conv, mode=mode, more=more, operand=operand)
    return graph(source.replace("float[1,4,6,5] y", "float[1,4,N,M] y"))


@pytest.mark.parametrize("conv", ["pads=[0,0,0,0]", "pads=[1,0,0,1]", "strides=[2,1]"])
def test_simplify_moves_a_pad_into_the_convolution(conv: str) -> None:
    model = padded(conv=conv)
    reference = model.clone()
    [counters] = run(model, Simplify())
    assert counters["pads"] == 1
    assert [n.op_type for n in model.graph] == ["Conv"]
    assert_same_function(reference, model)


def test_simplify_writes_the_amounts_as_pads() -> None:
    assert changed(padded(conv="pads=[1,0,0,1]"), Simplify()) == [
        "-w %p: i64[8]",
        "-%h: f32[1,2,8,7] = Pad(%x, %p)",
        "-%y: f32[1,4,7,6] = Conv(%h, %w) {pads=[1,0,0,1]}",
        "+%y: f32[1,4,7,6] = Conv(%x, %w) {pads=[2,0,2,3]}",
    ]


@pytest.mark.parametrize(
    "model",
    [
        padded(mode='<mode="reflect">'),
        padded(more=", float v = {1.5}", operand=", v"),
        padded(amounts="{0,1,1,0,0,-1,2,2}"),
        padded(amounts="{0,0,-1,0,0,0,2,2}"),
        padded(conv='auto_pad="SAME_UPPER"'),
    ],
    ids=["reflect", "not zero", "channels", "negative", "auto"],
)
def test_simplify_leaves_a_pad_that_is_no_padding(model: ir.Model) -> None:
    reference = model.clone()
    [counters] = run(model, Simplify())
    assert counters["pads"] == 0
    assert_same_function(reference, model)


def test_simplify_removes_a_pad_by_nothing() -> None:
    model = graph("""(float[1,4] x) => (float[1,4] y) <int64[4] p = {0,0,0,0}> {
        h = Pad(x, p) y = Relu(h) }""")
    assert changed(model, Simplify()) == [
        "-w %p: i64[4]",
        "-%h: f32[1,4] = Pad(%x, %p)",
        "-%y: f32[1,4] = Relu(%h)",
        "+%y: f32[1,4] = Relu(%x)",
    ]


@pytest.mark.parametrize("axes", ["{2,3}", "{3,2}", "{-2,-1}"])
def test_simplify_keeps_the_function_of_a_pad_with_axes(axes: str) -> None:
    model = graph(f"""(float[1,2,5,5] x) => (float[1,4,N,M] y) <float[4,2,3,3] w,
        int64[4] p = {{1,0,2,2}}, int64[2] a = {axes}> {{ h = Pad(x, p, , a) y = Conv(h, w) }}""")
    reference = model.clone()
    run(model, Simplify())
    assert_same_function(reference, model)


def test_simplify_fixes_a_shape_that_is_computed() -> None:
    model = graph("""(float[batch,2,4] x) => (float[batch,8] y)
        <int64[1] rest = {8}, int64[1] i = {0}> {
        s = Shape(x) b = Gather(s, i) t = Concat<axis=0>(b, rest) y = Reshape(x, t) }""")
    reference = model.clone()
    [counters] = run(model, Simplify())
    assert counters["reshapes"] == 1
    assert [n.op_type for n in model.graph] == ["Reshape"]
    assert weight(model, "y/shape").tolist() == [0, 8]
    assert_same_function(reference, model)


def test_simplify_leaves_a_shape_that_is_not_known() -> None:
    source = "(float[n,4] x, int64[2] s) => (float[a,b] y) { y = Reshape(x, s) }"
    assert changed(graph(source), Simplify()) == []


def test_simplify_does_not_read_weights_that_need_nothing() -> None:
    class Unread(ir.LazyTensor):
        pass

    def refuse() -> ir.TensorProtocol:
        raise AssertionError("a weight was read")

    model = graph(LINEAR)
    model.graph.initializers["w"].const_value = Unread(
        refuse, dtype=ir.DataType.FLOAT, shape=ir.Shape([8, 3]), name="w"
    )
    Simplify().run(model, Context())


# -- fold-bn ------------------------------------------------------------------------------------


def test_fold_bn_rewrites_the_convolution_only() -> None:
    assert changed(graph(CONV_BN), FoldBn()) == [
        "-w %b: f32[4]",
        "-w %beta: f32[4]",
        "-w %g: f32[4]",
        "-w %mean: f32[4]",
        "-w %var: f32[4]",
        "-w %w: f32[4,2,3,3]",
        "-%h: f32[1,4,3,3] = Conv(%x, %w, %b)",
        "-%n: f32[1,4,3,3] = BatchNormalization(%h, %g, %beta, %mean, %var) {epsilon=0.01}",
        "+w %h/bias: f32[4]",
        "+w %w/folded: f32[4,2,3,3]",
        "+%n: f32[1,4,3,3] = Conv(%x, %w/folded, %h/bias)",
    ]


@pytest.mark.parametrize("source", FOLDED)
def test_fold_bn_folds_every_kind(source: str) -> None:
    model = graph(source)
    assert run(model, FoldBn()) == [{"folded": 1, "affine": 0, "left alone": 0}]
    assert "BatchNormalization" not in [n.op_type for n in model.graph]


def test_fold_bn_follows_the_algebra() -> None:
    model = graph(CONV_BN)
    gain = weight(model, "g") / np.sqrt(weight(model, "var") + np.float32(0.01))
    wanted = weight(model, "w") * gain[:, None, None, None]
    bias = gain * (weight(model, "b") - weight(model, "mean")) + weight(model, "beta")
    run(model, FoldBn())
    # One rounding to float32 on each side.
    np.testing.assert_allclose(weight(model, "w/folded"), wanted, rtol=3e-7)
    np.testing.assert_allclose(weight(model, "h/bias"), bias, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("source", NOT_FOLDED.values(), ids=NOT_FOLDED)
def test_fold_bn_leaves_alone_what_it_cannot_fold(source: str) -> None:
    model = graph(source)
    before = text.render(model, weights=True)
    assert run(model, FoldBn()) == [{"folded": 0, "affine": 0, "left alone": 1}]
    assert text.render(model, weights=True) == before


def test_fold_bn_leaves_training_mode_alone() -> None:
    source = CONV_BN_LAST.replace(
        "y = BatchNormalization(", "y, m, v = BatchNormalization<training_mode=1>("
    )
    model = graph(source)
    assert run(model, FoldBn()) == [{"folded": 0, "affine": 0, "left alone": 1}]


def test_fold_bn_leaves_the_other_reader_of_a_weight_alone() -> None:
    model = graph(SHARED_WEIGHT_BN)
    run(model, FoldBn())
    assert node(model, "z").inputs[1] is model.graph.initializers["w"]


def test_fold_bn_keeps_the_origin_of_the_layer() -> None:
    model = graph(CONV_BN)
    run(model, FoldBn())
    assert [(layer.name, graphs.origins(layer.node)) for layer in graphs.layers(model)] == [
        ("h", ("h",))
    ]


AFFINE = {
    "a bias of a Conv": ("""(float[1,2,5,5] x)
        => (float[1,4,5,5] y) <float[4,2,3,3] w, float[1,4,1,1] b> {
        h = Conv<pads=[1,1,1,1]>(x, w) y = Add(h, b) }""", 1),
    "a chain of all four": ("""(float[1,2,5,5] x) => (float[1,4,5,5] y)
        <float[4,2,3,3] w, float[4] b, float[4,1,1] a, float[1] c, float d = {0.5},
         float[4,1,1] e> {
        h = Conv<pads=[1,1,1,1]>(x, w, b) i = Mul(a, h) j = Sub(c, i) k = Div(j, d)
        y = Add(k, e) }""", 4),
    "batch norm and affine": ("""(float[1,2,5,5] x) => (float[1,4,5,5] y)
        <float[4,2,3,3] w, float[4] g, float[4] b, float[4] m, float[4] v = {1, 2, 3, 4},
         float s> {
        h = Conv<pads=[1,1,1,1]>(x, w) i = BatchNormalization(h, g, b, m, v) y = Mul(i, s) }""", 1),
    "a Gemm": ("""(float[2,8] x) => (float[2,3] y) <float[3,8] w, float[3] b, float[1,3] a> {
        h = Gemm<transB=1, beta=0.5>(x, w, b) y = Div(h, a) }""", 1),
    "a Gemm with a bias of rows": ("""(float[2,8] x)
        => (float[2,3] y) <float[8,3] w, float[2,3] b, float[3] a> {
        h = Gemm(x, w, b) y = Add(h, a) }""", 1),
    "a gain of a MatMul": ("""(float[2,5,8] x) => (float[2,5,3] y) <float[8,3] w, float[3] a> {
        h = MatMul(x, w) y = Mul(h, a) }""", 1),
    "a shift of a grouped ConvTranspose": ("""(float[1,4,5,5] x) => (float[1,4,6,6] y)
        <float[4,2,2,2] w, float[1,4,1,1] b> {
        h = ConvTranspose<group=2>(x, w) y = Add(h, b) }""", 1),
}  # fmt: skip


@pytest.mark.parametrize("case", AFFINE)
def test_fold_bn_folds_what_batch_norm_decomposes_into(case: str) -> None:
    source, count = AFFINE[case]
    model = graph(source)
    before = model.clone()
    [found] = run(model, FoldBn())
    assert found["affine"] == count
    assert model.graph.num_nodes() == 1
    assert_same_function(before, model)


@pytest.mark.parametrize(
    "source",
    [
        # one number a pixel, not a channel
        """(float[1,2,5,5] x) => (float[1,4,5,5] y) <float[4,2,3,3] w, float[5] a> {
            h = Conv<pads=[1,1,1,1]>(x, w) y = Mul(h, a) }""",
        # more axes than the output
        """(float[2,8] x) => (float[1,2,3] y) <float[8,3] w, float[1,1,3] a> {
            h = MatMul(x, w) y = Mul(h, a) }""",
        # a numerator, a divisor of zero
        """(float[2,8] x) => (float[2,3] y) <float[8,3] w, float[3] a> {
            h = MatMul(x, w) y = Div(a, h) }""",
        """(float[2,8] x) => (float[2,3] y) <float[8,3] w, float[3] a = {1, 0, 1}> {
            h = MatMul(x, w) y = Div(h, a) }""",
        # another reader, an output
        """(float[2,8] x) => (float[2,3] y, float[2,3] z) <float[8,3] w, float[3] a> {
            h = MatMul(x, w) y = Mul(h, a) z = Neg(h) }""",
        # a gain on a grouped ConvTranspose
        """(float[1,4,5,5] x) => (float[1,4,6,6] y) <float[4,2,2,2] w, float[1,4,1,1] a> {
            h = ConvTranspose<group=2>(x, w) y = Mul(h, a) }""",
        # a channel of one, broadcast to more
        """(float[1,2,5,5] x) => (float[1,4,5,5] y) <float[1,2,3,3] w, float[1,4,1,1] a> {
            h = Conv<pads=[1,1,1,1]>(x, w) y = Add(h, a) }""",
    ],
)
def test_fold_bn_leaves_other_arithmetic_alone(source: str) -> None:
    assert changed(graph(source), FoldBn()) == []


def test_fold_bn_without_batch_norm_is_no_error() -> None:
    assert run(graph(CHAIN), FoldBn()) == [{"folded": 0, "affine": 0, "left alone": 0}]


# -- smooth-hadamard ----------------------------------------------------------------------------


def test_smooth_hadamard_rewrites_the_matmul_only() -> None:
    assert changed(graph(LINEAR), SmoothHadamard(block=4, place="everywhere")) == [
        "-w %w: f32[8,3]",
        "-%y: f32[2,3] = MatMul(%x, %w)",
        "+w %w/rotated: f32[8,3]",
        "+w %x/hadamard: f32[4,4]",
        "+w %x/split: i64[3]",
        "+w %x/whole: i64[2]",
        "+%x/blocks: f32[2,2,4] = Reshape(%x, %x/split)",
        "+%x/turned: f32[2,2,4] = MatMul(%x/blocks, %x/hadamard)",
        "+%x/rotated: f32[2,8] = Reshape(%x/turned, %x/whole)",
        "+%y: f32[2,3] = MatMul(%x/rotated, %w/rotated)",
    ]


def test_smooth_hadamard_rotates_channels_by_a_grouped_convolution() -> None:
    assert changed(graph(ROTATED_CONV), SmoothHadamard(block=4, place="everywhere")) == [
        "-w %w: f32[5,8,1,1]",
        "-%y: f32[1,5,3,3] = Conv(%x, %w, %b)",
        "+w %w/rotated: f32[5,8,1,1]",
        "+w %x/hadamard: f32[8,4,1,1]",
        "+%x/rotated: f32[1,8,3,3] = Conv(%x, %x/hadamard) {group=2}",
        "+%y: f32[1,5,3,3] = Conv(%x/rotated, %w/rotated, %b)",
    ]


@pytest.mark.parametrize("block", [2, 4, 8])
@pytest.mark.parametrize(
    "source",
    [
        LINEAR,
        GEMM,
        CHAIN,
        ROTATED_CONV,
        "(float[2,3,8] x) => (float[2,3,5] y) <float[8,5] w> { y = MatMul(x, w) }",
        "(float[8] x) => (float[5] y) <float[8,5] w> { y = MatMul(x, w) }",
        "(float[b,t,8] x) => (float[b,t,5] y) <float[8,5] w> { y = MatMul(x, w) }",
        "(float[2,8] x) => (float[2,3] y) <float[8,3] w> { y = Gemm<alpha=0.5>(x, w) }",
        "(float[1,8,3] x) => (float[1,5,3] y) <float[5,8,1] w> { y = Conv(x, w) }",
        """(float[1,8,4,4] x) => (float[1,5,2,2] y) <float[5,8,1,1] w> {
            y = Conv<strides=[2,2]>(x, w) }""",
        """(float[1,8,4,4] x) => (float[1,5,6,6] y) <float[5,8,1,1] w> {
            y = Conv<pads=[1,1,1,1]>(x, w) }""",
    ],
)
def test_smooth_hadamard_keeps_the_function_at_any_block(source: str, block: int) -> None:
    model = graph(source)
    reference = model.clone()
    [counters] = run(model, SmoothHadamard(block=block, place="everywhere"))
    assert counters["layers"] == len(list(graphs.layers(reference)))
    assert_same_function(reference, model)


def rotation(model: ir.Model) -> Array:
    return weight(model, "x/hadamard").astype(np.float64)


def test_the_rotation_is_orthonormal_with_entries_of_one_size() -> None:
    model = graph(LINEAR)
    run(model, SmoothHadamard(block=8, place="everywhere"))
    turn = rotation(model)
    np.testing.assert_allclose(turn @ turn.T, np.eye(8), atol=1e-6)
    np.testing.assert_allclose(np.abs(turn), 1 / np.sqrt(8), rtol=1e-6)


def test_an_outlier_is_spread_over_its_block() -> None:
    model = graph(LINEAR)
    run(model, SmoothHadamard(block=8, place="everywhere"))
    x = np.zeros((2, 8), np.float32)
    x[:, 3] = 8.0
    rotated = execute.execute(model, {"x": x}, ["x/rotated"])["x/rotated"]
    np.testing.assert_allclose(np.abs(rotated), 8 / np.sqrt(8), rtol=1e-6)


def test_readers_of_one_value_share_one_rotation() -> None:
    model = graph("""(float[2,8] x) => (float[2,3] y, float[2,4] z) <float[8,3] v, float[8,4] w> {
        y = MatMul(x, v) z = MatMul(x, w) }""")
    reference = model.clone()
    assert run(model, SmoothHadamard(block=8, place="everywhere")) == [
        {"layers": 2, "rotations": 1, "left alone": 0}
    ]
    assert_same_function(reference, model)


def test_a_shared_weight_is_folded_once() -> None:
    model = graph("""(float[2,8] x, float[2,8] u) => (float[2,3] y, float[2,3] z) <float[8,3] w> {
        y = MatMul(x, w) z = MatMul(u, w) }""")
    reference = model.clone()
    assert run(model, SmoothHadamard(block=8, place="everywhere")) == [
        {"layers": 2, "rotations": 2, "left alone": 0}
    ]
    assert sorted(n for n in model.graph.initializers if n.startswith("w")) == ["w/rotated"]
    assert_same_function(reference, model)


def test_a_rotation_is_no_layer() -> None:
    for source in (LINEAR, ROTATED_CONV):
        model = graph(source)
        run(model, SmoothHadamard(block=4, place="everywhere"))
        assert [layer.name for layer in graphs.layers(model)] == ["y"]


@pytest.mark.parametrize(
    "source",
    [
        "(float[2,6] x) => (float[2,3] y) <float[6,3] w> { y = MatMul(x, w) }",
        "(float[8,2] x) => (float[2,3] y) <float[8,3] w> { y = Gemm<transA=1>(x, w) }",
        CONV,
        "(float[1,8,3,3] x) => (float[1,4,3,3] y) <float[4,4,1,1] w> { y = Conv<group=2>(x, w) }",
        "(float[2,4,8] q, float[2,8,4] k) => (float[2,4,4] y) { y = MatMul(q, k) }",
    ],
    ids=["no multiple", "transposed input", "3x3", "grouped", "attention"],
)
def test_smooth_hadamard_leaves_alone_what_it_cannot_rotate(source: str) -> None:
    model = graph(source)
    before = text.render(model, weights=True)
    [counters] = run(model, SmoothHadamard(block=4, place="everywhere"))
    assert counters["layers"] == 0
    assert text.render(model, weights=True) == before


def test_smooth_hadamard_counts_what_it_leaves_alone() -> None:
    source = "(float[2,6] x) => (float[2,3] y) <float[6,3] w> { y = MatMul(x, w) }"
    assert run(graph(source), SmoothHadamard(block=4, place="everywhere")) == [
        {"layers": 0, "rotations": 0, "left alone": 1}
    ]


def test_excluded_layers_are_not_rotated() -> None:
    model = graph(CHAIN)
    assert run(model, SmoothHadamard(block=8, place="everywhere", exclude=("y",))) == [
        {"layers": 1, "rotations": 1, "left alone": 1}
    ]
    assert node(model, "y").inputs[1] is model.graph.initializers["w2"]


def test_an_exclude_that_matches_nothing_is_rejected() -> None:
    with pytest.raises(PassError, match=r"smooth-hadamard\{.*\}: exclude=nope matches no layer"):
        run(graph(CHAIN), SmoothHadamard(block=8, place="everywhere", exclude=("nope",)))


@pytest.mark.parametrize("block", [0, 1, 6, -4])
def test_a_block_that_is_no_power_of_two_is_rejected(block: int) -> None:
    with pytest.raises(PassError, match=rf"power of two from 2, got {block}"):
        SmoothHadamard(block=block, place="everywhere")


def test_outliers_cost_less_after_a_rotation() -> None:
    model = graph("(float[64,32] x) => (float[64,8] y) <float[32,8] w> { y = MatMul(x, w) }")
    [feeds] = samples(model)
    feeds["x"][:, 5] *= 50.0
    wanted = outputs(model, feeds)["y"]

    def error(value: str) -> float:
        x = execute.execute(model, feeds, [value])[value]
        scale = np.abs(x).max() / 127
        layer = next(iter(graphs.layers(model)))
        rounded: Array = (np.rint(x / scale) * scale) @ graphs.constant(layer.weight.value)
        return float(np.mean((rounded - wanted).astype(np.float64) ** 2))

    before = error("x")
    run(model, SmoothHadamard(block=32, place="everywhere"))
    assert error("x/rotated") < before / 4


OUTLIERS = """(float[64,32] x, float[64,32] z) => (float[64,8] y, float[64,8] v)
    <float[32,8] w, float[32,8] u> { y = MatMul(x, w) v = MatMul(z, u) }"""


def outlying(model: ir.Model, count: int = 6) -> Context:
    """Data in which ``x`` has one channel that is larger than all others, and ``z`` has none."""
    drawn = samples(model, count)
    for feeds in drawn:
        feeds["x"][:, 5] *= 50.0
        feeds["z"] = np.sign(feeds["z"])
    return Context(calibration=Calibration(Data("test", drawn)))


def rotated(model: ir.Model) -> list[str]:
    return sorted(v.name or "" for n in model.graph for v in n.outputs if "rotated" in str(v.name))


def test_a_rotation_pays_where_a_channel_is_an_outlier_and_its_worth_is_said() -> None:
    model = graph(OUTLIERS)
    reference, ctx = model.clone(), outlying(model)
    said: list[str] = []
    ctx.log = said.append
    step = SmoothHadamard(block=32, max_cost=1000.0)
    [done] = pipeline.run(model, [step], ctx)
    assert rotated(model) == ["x/rotated"]
    assert done.counters == {"layers": 1, "rotations": 1, "left alone": 1}
    # 64 x 32 elements by a block of 32, of two layers with 64 x 32 x 8 MACs each: twice as many.
    assert len(said) == 2 and all("dB for 200.00 % of the MACs" in line for line in said)
    assert "rotating 'x': +" in said[0] and "rotating 'z': -" in said[1]
    assert_same_function(reference, model)


@pytest.mark.parametrize(("gain", "layers"), [(-100.0, 1), (5.0, 1), (100.0, 0)])
def test_no_rotation_wins_less_than_was_asked(gain: float, layers: int) -> None:
    # What loses is not taken at any gain.
    model = graph(OUTLIERS)
    step = SmoothHadamard(block=32, min_gain=gain, max_cost=1000.0)
    [done] = pipeline.run(model, [step], outlying(model))
    assert done.counters["layers"] == layers


@pytest.mark.parametrize("most", [10.0, 100.0, 199.0, 201.0, 399.0, 401.0])
def test_rotations_never_cost_more_than_was_asked(most: float) -> None:
    model = graph(OUTLIERS)
    drawn = samples(model, 6)
    for feeds in drawn:
        feeds["x"][:, 5] *= 50.0
        feeds["z"][:, 7] *= 20.0
    ctx = Context(calibration=Calibration(Data("test", drawn)))
    [done] = pipeline.run(model, [SmoothHadamard(block=32, max_cost=most)], ctx)
    assert done.counters["rotations"] == len(rotated(model)) == int(most // 200.0)  # 200 % each


def test_only_rotations_that_must_pay_need_data() -> None:
    assert SmoothHadamard().needs_data()
    assert not SmoothHadamard(place="everywhere").needs_data()
    with pytest.raises(PassError, match="needs calibration data"):
        run(graph(LINEAR), SmoothHadamard(block=4))
    assert run(graph(LINEAR), SmoothHadamard(block=4, place="everywhere"))[0]["layers"] == 1


# -- simplify: pools ----------------------------------------------------------------------------

MEAN = """(float[N,3,4,5] x) => (float[N,3,1,1] y) <int64[2] axes = {2, -1}> {
    y = ReduceMean<keepdims=1>(x, axes)
}"""


def test_simplify_makes_a_mean_over_space_a_pool() -> None:
    before = graph(MEAN)
    model = before.clone()
    assert changed(model, Simplify()) == [
        "-w %axes: i64[2]",
        "-%y: f32[N,3,1,1] = ReduceMean(%x, %axes) {keepdims=1}",
        "+%y: f32[N,3,1,1] = GlobalAveragePool(%x)",
    ]
    assert_same_function(before, model)


def test_simplify_squeezes_behind_a_pool_without_kept_dimensions() -> None:
    before = graph(MEAN.replace("keepdims=1", "keepdims=0").replace("[N,3,1,1]", "[N,3]"))
    model = before.clone()
    assert changed(model, Simplify()) == [
        "-w %axes: i64[2]",
        "-%y: f32[N,3] = ReduceMean(%x, %axes) {keepdims=0}",
        "+w %y/axes: i64[2]",
        "+%y/pooled: f32[N,3,1,1] = GlobalAveragePool(%x)",
        "+%y: f32[N,3] = Squeeze(%y/pooled, %y/axes)",
    ]
    assert_same_function(before, model)


@pytest.mark.parametrize(
    "source",
    [
        MEAN.replace("{2, -1}", "{1, 2}").replace("[N,3,1,1]", "[N,1,1,5]"),
        MEAN.replace("{2, -1}", "{1, 2, 3}")
        .replace("int64[2]", "int64[3]")
        .replace("3,1,1", "1,1,1"),
    ],
)
def test_simplify_leaves_a_mean_over_other_axes(source: str) -> None:
    assert changed(graph(source), Simplify()) == []
