"""Laws of cast-half: what becomes half, what stays float32, and that nothing overflows."""

from __future__ import annotations

import pathlib

import graphs
import lowering
import numpy as np
import onnx.defs
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import pytest

import qcompile
from qcompile import execute, graph, guards, halves, pipeline, registry, simulate, text, verify
from qcompile.backends.base import Ran
from qcompile.backends.onnxruntime import OrtCpu
from qcompile.backends.tensorrt import TensorRtRtx
from qcompile.capture import capture
from qcompile.errors import PassError, QCompileError
from qcompile.models import fashion
from qcompile.passes.cast_half import CastHalf
from qcompile.pipeline import Context
from qcompile.sources import Sample

F16, F32 = ir.DataType.FLOAT16, ir.DataType.FLOAT
NORM = """(float[2,16] x) => (float[2,16] y)
<float[16,16] w, float[16,16] v, float[16] g, float[16] b> {
    a = MatMul(x, w)
    l = LayerNormalization(a, g, b)
    y = MatMul(l, v)
}"""
# The row 1 of the mask lets nothing through.
MASKED = """(float[2,4,16] q, float[2,16,4] k, float[2,4,4] m) => (float[2,4,4] y)
<float one = {1}, float low = {-1000000000.0}, float f = {0.25}> {
    s = MatMul(q, k)
    t = Mul(s, f)
    n = Sub(one, m)
    a = Mul(n, low)
    z = Add(t, a)
    y = Softmax(z)
}"""
BRANCH = """(float[2,8] x, bool c) => (float[2,8] y) <float[8,8] w> {
    h = MatMul(x, w)
    z = If(c) <then_branch = a () => (float[2,8] t) { t = Neg(h) },
               else_branch = b () => (float[2,8] e) { e = Abs(h) }>
    y = MatMul(z, w)
}"""


def narrow(
    source: str | ir.Model,
    step: CastHalf | None = None,
    data: list[Sample] | bool | None = True,
    opset: int = 18,
) -> tuple[ir.Model, ir.Model, pipeline.Step]:
    """The float model, the same behind cast-half, and what the pass said."""
    model = lowering.graph_of(source, opset=opset) if isinstance(source, str) else source
    reference = model.clone()
    samples = None if isinstance(data, bool) else data
    calibration = lowering.calibration_of(model, samples) if data else None
    [done] = pipeline.run(model, [step or CastHalf()], Context(calibration=calibration))
    verify.verify(model)
    return reference, model, done


def gpu(model: ir.Model, feeds: Sample) -> dict[str, np.ndarray]:
    """What half-float kernels compute: every result rounded, sums in float32."""
    return execute.execute(halves.rounded(model), feeds)


def worst(reference: ir.Model, model: ir.Model) -> float:
    """The lowest SQNR in dB of any output on the GPU, over three samples."""
    return min(
        simulate.sqnr(wanted, gpu(model, feeds)[name])
        for feeds in graphs.samples(reference, 3)
        for name, wanted in graphs.outputs(reference, feeds).items()
    )


def types(model: ir.Model) -> dict[str, ir.DataType | None]:
    return {v.name or "": v.dtype for node in model.graph for v in node.outputs}


# -- the function -------------------------------------------------------------------------------


# A rounding changes a number by at most u of itself (2^-11 and 2^-8), and six of them, independent
# of each other, stand between what goes into two products and what comes out: 1 / (u sqrt(6)).
@pytest.mark.parametrize("source", [graphs.LINEAR, graphs.GEMM, graphs.CONV, graphs.CHAIN, NORM])
@pytest.mark.parametrize(("dtype", "least"), [("float16", 58.4), ("bfloat16", 40.4)])
def test_the_function_is_kept_within_the_rounding(source: str, dtype: str, least: float) -> None:
    reference, model, done = narrow(source, CastHalf(dtype=dtype))  # type: ignore[arg-type]
    assert int(done.counters["nodes"]) >= 1
    assert worst(reference, model) > least


def test_weights_have_half_the_bytes() -> None:
    reference, model, _ = narrow(graphs.CHAIN)
    assert execute.weight_bytes(model) * 2 == execute.weight_bytes(reference)


def test_a_chain_is_cast_once_on_either_side() -> None:
    _, model, done = narrow(graphs.CHAIN)
    assert done.counters["casts"] == 2
    nodes = [line for line in text.render(model).splitlines() if line.startswith("%")]
    assert nodes == [
        "%x/half: f16[2,8] = Cast(%x) {to=10}",
        "%h: f16[2,8] = MatMul(%x/half, %w1/half)",
        "%s: f16[2,8] = Add(%h, %b1/half)",
        "%r: f16[2,8] = Relu(%s)",
        "%y/half: f16[2,4] = MatMul(%r, %w2/half)",
        "%y: f32[2,4] = Cast(%y/half) {to=1}",
    ]


@pytest.mark.parametrize("source", [graphs.CHAIN, NORM, MASKED, BRANCH, graphs.CONV])
def test_inputs_and_outputs_keep_their_names_and_types(source: str) -> None:
    reference, model, _ = narrow(source)
    for one, other in ((reference.graph.inputs, model.graph.inputs),
                       (reference.graph.outputs, model.graph.outputs)):  # fmt: skip
        assert [(v.name, v.dtype) for v in one] == [(v.name, v.dtype) for v in other]


@pytest.mark.parametrize("source", [graphs.CHAIN, NORM, MASKED, BRANCH])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_second_time_changes_nothing(source: str, dtype: str) -> None:
    step = CastHalf(dtype=dtype)  # type: ignore[arg-type]
    _, model, _ = narrow(source, step, data=False)
    before = text.render(model)
    _, model, done = narrow(model, step, data=False)
    assert text.changes(before, text.render(model)) == []
    assert done.counters["casts"] == 0


def test_it_runs_in_the_runtime_as_written() -> None:
    reference, model, _ = narrow(NORM)
    for feeds in graphs.samples(reference, 2):
        assert (
            simulate.sqnr(graphs.outputs(reference, feeds)["y"], graphs.outputs(model, feeds)["y"])
            > 60
        )


# -- guards -------------------------------------------------------------------------------------


def test_a_norm_survives_what_overflows_in_half() -> None:
    model = lowering.graph_of(NORM)
    loud = [{"x": 100 * s["x"]} for s in graphs.samples(model, 8)]
    for data in (loud, None):  # with and without proof
        reference, cast, _ = narrow(NORM, data=data)
        assert types(cast)["l"] == F32
        for feeds in loud:
            wanted, actual = graphs.outputs(reference, feeds)["y"], gpu(cast, feeds)["y"]
            assert simulate.sqnr(wanted, actual) > 60


def test_a_norm_that_data_proves_small_is_half() -> None:
    reference, model, _ = narrow(NORM)
    assert types(model)["l"] == F16
    assert worst(reference, model) > 55


@pytest.mark.parametrize("data", [True, False])
def test_a_mask_of_minus_a_billion_survives(data: bool) -> None:
    reference, model, _ = narrow(MASKED, data=data)
    [feeds] = graphs.samples(reference)
    feeds["m"] = np.ones((2, 4, 4), np.float32)
    feeds["m"][:, 1] = 0
    feeds["m"][:, 2, :2] = 0
    wanted, actual = graphs.outputs(reference, feeds)["y"], gpu(model, feeds)["y"]
    assert np.isfinite(wanted).all()
    np.testing.assert_allclose(actual, wanted, atol=2e-3)  # a score of 4 is rounded by 2^-9
    assert types(model)["a"] == types(model)["z"] == F32


def test_infinities_of_a_mask_are_held() -> None:
    source = """(float[2,8] x, bool[2,8] c) => (float[2,8] y) <float[8,8] w> {
        i = Constant<value_float = -inf>()
        h = MatMul(x, w)
        z = Where(c, h, i)
        y = Relu(z)
    }""".replace("<value_float = -inf>", "<value = float {-1.0}>")
    model = lowering.graph_of(source)
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.size == 1:
            value.const_value = ir.Tensor(np.array(-np.inf, np.float32), name=value.name)
    reference, cast, _ = narrow(model)
    assert types(cast)["z"] == F16
    assert worst(reference, cast) > 60


def test_weights_beyond_half_stay() -> None:
    model = lowering.graph_of(graphs.CHAIN, {"w1": np.full((8, 8), 7e4, np.float32)})
    _, cast, _ = narrow(model)
    assert types(cast)["h"] == F32


def test_what_is_measured_beyond_half_stays_on_both_sides() -> None:
    model = lowering.graph_of(graphs.CHAIN)
    loud = [{"x": 1e5 * s["x"]} for s in graphs.samples(model, 6)]
    _, cast, _ = narrow(graphs.CHAIN, data=loud)
    assert {types(cast)[name] for name in ("h", "s", "r", "y")} == {F32}


def test_a_small_epsilon_is_not_lost() -> None:
    source = """(float[2,8] x) => (float[2,8] y) <float e = {0.000000000001}> {
        a = Mul(x, x)
        v = Add(a, e)
        r = Sqrt(v)
        y = Div(x, r)
    }"""
    reference, model, _ = narrow(source)
    zero = {"x": np.zeros((2, 8), np.float32)}
    assert np.isfinite(gpu(model, zero)["y"]).all()
    assert worst(reference, model) > 60


def test_bounds_are_clamped_where_nothing_changes() -> None:
    source = """(float[2,8] x) => (float[2,3] y)
    <float[8,3] w, float l = {0}, float u = {340000000000000000000000000000000000000}> {
        c = Clip(x, l, u)
        y = MatMul(c, w)
    }"""
    reference, model, done = narrow(source)
    assert done.counters["bounds clamped"] == 1
    assert types(model)["c"] == F16
    assert worst(reference, model) > 60


def test_weights_too_small_are_counted() -> None:
    weight = np.full((8, 8), 0.1, np.float32)
    weight[0, :3] = 1e-6
    _, _, done = narrow(lowering.graph_of(graphs.CHAIN, {"w1": weight}))
    assert done.counters["weights too small"] == 3


@pytest.mark.parametrize("operator", ["Floor", "Round", "Sign"])
def test_steps_stay(operator: str) -> None:
    source = (
        f"(float[2,8] x) => (float[2,8] y) <float[8,8] w> {{ h = MatMul(x, w) y = {operator}(h) }}"
    )
    _, model, _ = narrow(source)
    assert types(model)["y"] == F32


def test_sums_in_bfloat16_stay_whatever_data_says() -> None:
    _, model, _ = narrow(NORM, CastHalf(dtype="bfloat16"))
    assert types(model)["l"] == F32


def test_a_margin_widens_what_stays() -> None:
    model = lowering.graph_of(graphs.CHAIN)
    data = [{"x": 1e3 * s["x"]} for s in graphs.samples(model, 6)]
    assert types(narrow(graphs.CHAIN, CastHalf(margin=1.0), data)[1])["h"] == F16
    assert types(narrow(graphs.CHAIN, CastHalf(margin=1e3), data)[1])["h"] == F32


# -- what is left alone -------------------------------------------------------------------------


def test_bodies_read_what_they_read() -> None:
    reference, model, _ = narrow(BRANCH)
    assert types(model)["h"] == F32
    before, after = (text.render(m).splitlines() for m in (reference, model))
    bodies = [[line for line in lines if "_branch" in line] for lines in (before, after)]
    assert bodies[0] == bodies[1]
    assert worst(reference, model) > 60


def test_custom_operators_and_shapes_are_left_alone() -> None:
    source = """(float[2,8] x) => (float[2,8] y, int64[2] n) <float[8,8] w> {
        h = MatMul(x, w)
        n = Shape(h)
        y = com.microsoft.FastGelu(h)
    }"""
    source = f'<ir_version: 10, opset_import: ["": 18, "com.microsoft": 1]> t {source}'
    proto = onnx.parser.parse_model(source)
    weight = np.full((8, 8), 0.1, np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    del proto.graph.value_info[:]
    model = capture(proto)
    execute.complete_types(model, graphs.samples(model)[0])
    _, cast, done = narrow(model)
    assert types(cast)["y"] == F32
    assert done.counters["casts"] == 2


def test_small_integers_become_half_and_large_ones_do_not() -> None:
    source = """(uint8[2,8] x, int64[2,8] i) => (float[2,3] y, float[2,3] z) <float[8,3] w> {
        a = Cast<to=1>(x)
        y = MatMul(a, w)
        b = Cast<to=1>(i)
        z = MatMul(b, w)
    }"""
    _, model, _ = narrow(source)
    assert (types(model)["a"], types(model)["b"]) == (F16, F32)


@pytest.mark.parametrize("glob", ["MatMul", "h"])
def test_what_keep_names_stays(glob: str) -> None:
    _, model, _ = narrow(graphs.CHAIN, CastHalf(keep=(glob,)))
    assert types(model)["h"] == F32


def test_what_cannot_be_had_is_refused() -> None:
    with pytest.raises(PassError, match="keep=nowhere matches no node"):
        narrow(graphs.CHAIN, CastHalf(keep=("nowhere",)))
    with pytest.raises(PassError, match=r"margin must be at least 1, got 0\.5"):
        CastHalf(margin=0.5)
    with pytest.raises(QCompileError, match="ort-cpu holds no bfloat16 floats"):
        qcompile.compile("no.onnx", "out", passes="cast-half{dtype=bfloat16}")


def test_its_text_reads_back() -> None:
    step = CastHalf(dtype="bfloat16", keep=("a", "*/b"), margin=2.5)
    assert str(step) == "cast-half{dtype=bfloat16 keep=a,*/b margin=2.5}"
    assert pipeline.parse(str(step), registry.passes()) == [step]


def test_every_guarded_operator_is_one_of_onnx() -> None:
    named = {*guards._SUMS, *guards._POWERS, *guards._STEEP, *guards._STEPS, *guards._BOUNDED}  # pyright: ignore[reportPrivateUsage]
    assert not [name for name in named if not onnx.defs.has(name)]


# -- with decisions -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("decide", "form"),
    [("quantize", ir.DataType.INT8),
     ("quantize{input=float weight=int4 granularity=block}", ir.DataType.INT4)],
)  # fmt: skip
def test_scales_are_of_the_type_of_their_layer(dtype: str, decide: str, form: ir.DataType) -> None:
    source = "(float[4,64] x) => (float[4,48] y) <float[64,48] w> { y = MatMul(x, w) }"
    model = lowering.graph_of(source)
    reference, plain = model.clone(), model.clone()
    lowering.decide(plain, f"simplify,calibrate,{decide}")
    lowering.decide(model, f"simplify,calibrate,{decide},cast-half{{dtype={dtype}}}")
    TensorRtRtx().lower(plain)
    TensorRtRtx().lower(model)
    verify.verify(model)
    assert model.opset_imports[""] >= 19
    pairs = [n for n in model.graph if n.op_type == "DequantizeLinear"]
    for node in pairs:
        assert node.inputs[1] is not None
        assert node.inputs[1].dtype == node.outputs[0].dtype == halves.TYPES[dtype]
        assert not [
            u.node.op_type for u in graph.readers(node.outputs[0]) if u.node.op_type == "Cast"
        ]
    assert form in {v.dtype for v in model.graph.initializers.values()}
    assert worst(reference, model) > worst(reference, plain) - 2  # bfloat16 beside 8 bits


def test_codes_are_of_the_scale_as_it_is_stored() -> None:
    tiny = np.full((64, 48), 1e-5, np.float32)  # its scale is far below the normal numbers
    source = "(float[4,64] x) => (float[4,48] y) <float[64,48] w> { y = MatMul(x, w) }"
    model = lowering.graph_of(source, {"w": tiny})
    lowering.decide(model, "simplify,quantize{input=float},cast-half")
    assert types(model)["y"] == F32  # all of it is below float16
    model = lowering.graph_of(source, {"w": np.concatenate([tiny[:32], 1e4 * tiny[32:]])})
    lowering.decide(model, "simplify,quantize{input=float granularity=block},cast-half")
    TensorRtRtx().lower(model)
    stored = next(n for n in model.graph if n.op_type == "DequantizeLinear")
    codes, scale = (graph.constant(stored.inputs[i]).astype(np.float32) for i in (0, 1))  # type: ignore[arg-type]
    assert np.isfinite(scale).all() and (scale > 0).all()
    again = codes[:32] * np.repeat(scale[:1], 32, axis=0)
    np.testing.assert_allclose(again, tiny[:32], atol=2.0**-24)  # half a step of the next scale


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_is_calibrated_behind_it_is_as_before(dtype: str) -> None:
    model = lowering.graph_of(graphs.CHAIN.replace("8", "16"))
    reference, other = model.clone(), model.clone()
    lowering.decide(model, f"simplify,cast-half{{dtype={dtype}}},calibrate,quantize")
    lowering.decide(other, f"simplify,calibrate,quantize,cast-half{{dtype={dtype}}}")
    for each in (model, other):
        TensorRtRtx().lower(each)
        verify.verify(each)
    assert abs(worst(reference, model) - worst(reference, other)) < 2.0  # of a bfloat16 with 8 bits


# -- the recipe ---------------------------------------------------------------------------------


def test_the_recipe_says_the_truth_about_this_runtime(tmp_path: pathlib.Path) -> None:
    [done] = qcompile.compile(
        fashion.path(fashion.CNN), tmp_path / "out",
        calib=str(fashion.path(fashion.CALIBRATION)), passes="@fp16",
    )  # fmt: skip
    assert {row.runs for row in done.report.layers} == {"float"}
    assert {"casts it back to float32" in row.reason for row in done.report.layers} == {True}
    assert {(row.weight, row.nominal_bits) for row in done.report.layers} == {("float16", 16.0)}
    assert done.report.size.compiled_bytes < 0.55 * done.report.size.float_bytes
    assert done.report.fused() == 0.0


def test_the_recipe_needs_no_data(tmp_path: pathlib.Path) -> None:
    model = lowering.graph_of(graphs.CHAIN)
    [done] = qcompile.compile(model, tmp_path / "out", passes="@fp16")
    assert done.report.size.compiled_bytes > 0


def test_a_model_of_which_nothing_can_be_half_is_said_so(tmp_path: pathlib.Path) -> None:
    model = lowering.graph_of("(float[2,8] x) => (float[2,8] y) { y = Exp(x) }")
    with pytest.raises(PassError, match="nothing is a half float"):
        qcompile.compile(model, tmp_path / "out", passes="@fp16")


def test_the_runtime_without_integers_for_half_says_so() -> None:
    model = lowering.graph_of(graphs.LINEAR)
    lowering.decide(model, f"{lowering.DECIDE},cast-half")
    OrtCpu().lower(model)
    assert "float32 only" in model.graph[1].metadata_props[graph.REASON]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_builder_runs_it_in_half(tmp_path: pathlib.Path, dtype: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    source = (
        NORM.replace("16", "64")
        .replace("float[2,64] y)", "float[2,32] y)")
        .replace("float[64,64] v", "float[64,32] v")
    )
    model = lowering.graph_of(source)
    calibration = lowering.decide(model, f"simplify,cast-half{{dtype={dtype}}}")
    target = TensorRtRtx(cc=(89,))
    target.emit(model, tmp_path, calibration)
    found: dict[str, Ran] = target.prove(model, tmp_path)
    assert {name: ran.precision for name, ran in found.items()} == {"a": dtype, "y": dtype}


def test_the_builder_looks_rows_up_in_half(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    source = """(int64[2,5] i) => (float[2,5,64] y) <float[32,64] t, float[64,64] w> {
        e = Gather(t, i)
        y = MatMul(e, w)
    }"""
    model = lowering.graph_of(source)
    calibration = lowering.decide(model, "simplify,cast-half")
    target = TensorRtRtx(cc=(89,))
    target.emit(model, tmp_path, calibration)
    found = target.prove(model, tmp_path)
    assert {name: ran.precision for name, ran in found.items()} == {"e": "float16", "y": "float16"}
