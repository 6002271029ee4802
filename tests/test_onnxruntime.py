"""What ONNX Runtime makes of a lowered model: integer kernels, the same numbers, the proof."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import graphs
import lowering
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering import Array, Lowered

import qcompile
from qcompile import compiler, execute, graph, numerics, simulate, spec
from qcompile.backends import ort_isa
from qcompile.backends.onnxruntime import OrtCpu, kernels
from qcompile.backends.ort_isa import Isa
from qcompile.errors import PassError, TargetError
from qcompile.models import fashion

CONV_RELU = """(float[N,8,8,8] x) => (float[N,16,8,8] y) <float[16,8,3,3] w, float[16] b> {
    c = Conv<pads=[1,1,1,1]>(x, w, b)
    y = Relu(c)
}"""
CONV_CLIP = CONV_RELU.replace("b>", "b, float low={0}, float high={6}>").replace(
    "Relu(c)", "Clip(c, low, high)"
)
CONV = (
    "(float[N,8,8,8] x) => (float[N,16,6,6] y) <float[16,8,3,3] w, float[16] b> { y = Conv(x,w,b) }"
)
STEM = "(float[N,3,8,8] x) => (float[N,16,6,6] y) <float[16,3,3,3] w> { y = Conv(x, w) }"
SEQUENCE = "(float[N,8,16] x) => (float[N,12,14] y) <float[12,8,3] w> { y = Conv(x, w) }"
DEPTHWISE = """(float[N,8,8,8] x) => (float[N,8,6,6] y) <float[8,1,3,3] w, float[8] b> {
    c = Conv<group=8>(x, w, b)
    y = Relu(c)
}"""
RESIDUAL = """(float[N,8,8,8] x) => (float[N,8,8,8] y)
<float[8,8,3,3] w, float[8,8,3,3] v, float[8] b> {
    c = Conv<pads=[1,1,1,1]>(x, w, b)
    r = Relu(c)
    d = Conv<pads=[1,1,1,1]>(r, v)
    s = Add(d, r)
    y = Relu(s)
}"""
POOLED = """(float[N,8,8,8] x) => (float[N,8,4,4] y) <float[8,8,3,3] w, float[8,8,3,3] v> {
    c = Conv<pads=[1,1,1,1]>(x, w)
    r = Relu(c)
    p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
    y = Conv<pads=[1,1,1,1]>(p, v)
}"""
GEMM = """(float[N,32] x) => (float[N,16] y) <float[16,32] w, float[16] b> {
    y = Gemm<transB=1>(x, w, b)
}"""
MATMUL = "(float[N,32] x) => (float[N,16] y) <float[32,16] w> { y = MatMul(x, w) }"
BIASED = """(float[{0},32] x) => (float[{0},16] y) <float[32,16] w, float[16] b> {{
    m = MatMul(x, w)
    y = Add(m, b)
}}"""
WIDE = "(float[N,64] x) => (float[N,48] y) <float[64,48] w> { y = MatMul(x, w) }"


def lower(source: str, folder: pathlib.Path, passes: str = lowering.DECIDE) -> Lowered:
    return lowering.lower(source, OrtCpu(), folder, passes)


def runs(result: Lowered) -> list[str]:
    """The operators of the graph as the runtime optimized it."""
    return lowering.operators(lowering.optimized(result.folder / "model.onnx", result.folder))


def precisions(result: Lowered) -> dict[str, str]:
    return {layer: ran.precision for layer, ran in result.proof.items()}


# -- what fuses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [CONV_RELU, CONV_CLIP, DEPTHWISE])
def test_a_conv_absorbs_its_activation(tmp_path: pathlib.Path, source: str) -> None:
    result = lower(source, tmp_path)
    assert precisions(result) == {"c": "int8"}
    operators = runs(result)
    assert "QLinearConv" in operators
    assert not {"Relu", "Clip", "Conv", "FusedConv"} & set(operators)


@pytest.mark.parametrize("source", [CONV, STEM, SEQUENCE])
def test_a_conv_without_an_activation_is_integer(tmp_path: pathlib.Path, source: str) -> None:
    result = lower(source, tmp_path)
    assert precisions(result) == {"y": "int8"}
    assert result.proof["y"].kernel == "QLinearConv"
    assert "Conv" not in runs(result)


def test_a_residual_block_is_integer_from_end_to_end(tmp_path: pathlib.Path) -> None:
    result = lower(RESIDUAL, tmp_path)
    assert precisions(result) == {"c": "int8", "d": "int8"}
    operators = runs(result)
    assert "QLinearAdd" in operators and not {"Add", "Relu"} & set(operators)
    assert operators.count("QuantizeLinear") == operators.count("DequantizeLinear") == 1


def test_a_pool_between_convs_moves_integers(tmp_path: pathlib.Path) -> None:
    result = lower(POOLED, tmp_path)
    assert precisions(result) == {"c": "int8", "y": "int8"}
    operators = runs(result)
    assert operators.count("QuantizeLinear") == operators.count("DequantizeLinear") == 1


@pytest.mark.parametrize("rows", ["4", "N", "2,5", "N,5", "2,3,5", "N,3,5", "N,M"])
def test_a_matmul_with_a_bias_never_becomes_a_float_gemm(tmp_path: pathlib.Path, rows: str) -> None:
    result = lower(BIASED.format(rows), tmp_path)
    assert precisions(result) == {"m": "int8"}
    assert not {"Gemm", "FusedGemm", "MatMul", "FusedMatMul"} & set(runs(result))


FLOATS = {"Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Conv", "FusedConv"}


@pytest.mark.parametrize("behind", ["Relu", "Tanh", "Gelu", "Identity"])
@pytest.mark.parametrize("rows", ["N", "N,5"])
def test_a_biased_matmul_is_integer_whatever_stands_behind(
    tmp_path: pathlib.Path, behind: str, rows: str
) -> None:
    source = BIASED.format(rows).replace("y = Add(m, b)", f"a = Add(m, b) y = {behind}(a)")
    model = lowering.graph_of(source, opset=21)
    result = lowering.lower(model, OrtCpu(), tmp_path)
    assert precisions(result) == {"m": "int8"}
    assert not FLOATS & set(runs(result))


@pytest.mark.parametrize(
    "source",
    [
        """(float[N,3,16] x) => (float[N,3,16] y) <float[16,16] w, float[16] b, float[16] c> {
            m = MatMul(x, w) a = Add(m, b) r = Relu(a) n = MatMul(r, w) y = Add(n, c) }""",
        """(float[N,16] x) => (float[N,8] y, float[N,8] z) <float[8,16] w, float[8] b, float[8] c> {
            y = Gemm<transB=1>(x, w, b) z = Gemm<transB=1>(x, w, c) }""",
        "(float[1,1] x) => (float[1,1] y) <float[1,1] w, float[1] b> { m=MatMul(x,w) y=Add(m,b) }",
        "(float[1,1] x) => (float[1,1] y) <float[1,1] w, float[1] b> { y = Gemm(x, w, b) }",
        """(float[N,1,4] x) => (float[N,1,1] y) <float[4,1] w, float[1] b> {
            m = MatMul(x, w) y = Add(m, b) }""",
        """(float[N,4,8] x) => (float[N,4,8] y) <float[8,8] w, float[8] b> {
            t = Transpose<perm=[1,0]>(w) m = MatMul(x, t) y = Add(b, m) }""",
    ],
)
def test_shared_turned_and_tiny_weights_with_a_bias_are_integer(
    tmp_path: pathlib.Path, source: str
) -> None:
    result = lower(source, tmp_path)
    assert set(precisions(result).values()) == {"int8"}
    assert not FLOATS & set(runs(result))


@pytest.mark.parametrize("rank", ["", "5,"])
def test_a_vector_keeps_its_float_kernel_and_a_row_does_not(
    tmp_path: pathlib.Path, rank: str
) -> None:
    source = f"""(float[{rank}32] x) => (float[{rank}16] y) <float[32,16] w, float[16] b> {{
        m = MatMul(x, w) y = Add(m, b) }}"""
    assert precisions(lower(source, tmp_path)) == {"m": "int8" if rank else "float"}


# -- activations that a Conv absorbs, or not ------------------------------------------------------

TWO_READERS = """(float[N,8,8,8] x) => (float[N,8,8,8] y, float[N,8,8,8] z)
<float[8,8,1,1] w, float[8,8,1,1] v> {{ c = Conv(x, w) {between} y = Conv(r, v) z = {read} }}"""


@pytest.mark.parametrize("read", ["Softplus(r)", "Add(r, r)", "Conv(r, w)"])
@pytest.mark.parametrize(
    "between",
    [
        "r = Relu(c)",
        "low = Constant<value_float=0.0>() high = Constant<value_float=6.0>()"
        " r = Clip(c, low, high)",
    ],
)
def test_an_absorbed_activation_may_have_other_readers(
    tmp_path: pathlib.Path, between: str, read: str
) -> None:
    result = lower(TWO_READERS.format(between=between, read=read), tmp_path)
    assert set(precisions(result).values()) == {"int8"}
    assert not (FLOATS | {"Relu", "Clip"}) & set(runs(result))


@pytest.mark.parametrize("activation", ["LeakyRelu", "Sigmoid", "HardSwish", "HardSigmoid", "Elu"])
def test_a_conv_is_integer_before_what_it_cannot_absorb(
    tmp_path: pathlib.Path, activation: str
) -> None:
    source = TWO_READERS.format(between=f"r = {activation}(c)", read="Softplus(r)")
    result = lower(source, tmp_path)
    assert set(precisions(result).values()) == {"int8"}
    assert not FLOATS & set(runs(result))


def test_a_conv_is_integer_where_its_output_is_one_of_the_graph(tmp_path: pathlib.Path) -> None:
    source = """(float[N,8,8,8] x) => (float[N,8,8,8] c, float[N,8,8,8] y)
    <float[8,8,1,1] w, float[8,8,1,1] v> { c = Conv(x, w) r = Relu(c) y = Conv(r, v) }"""
    result = lower(source, tmp_path)
    assert set(precisions(result).values()) == {"int8"}


# -- scales taken at run time ---------------------------------------------------------------------

DYNAMIC = "simplify,quantize{scale=dynamic}"


@pytest.mark.parametrize("source", [MATMUL, GEMM, BIASED.format("N"), BIASED.format("N,5")])
def test_a_scale_taken_at_run_time_is_one_kernel_and_needs_no_range(
    tmp_path: pathlib.Path, source: str
) -> None:
    result = lower(source, tmp_path, DYNAMIC)
    assert {ran.kernel for ran in result.proof.values()} == {"DynamicQuantizeMatMul"}
    assert runs(result) == ["DynamicQuantizeMatMul"]
    judge = simulate.Judge(result.reference, result.calibration.judges)
    assert judge.worst(execute.Session(result.folder / "model.onnx")) > 35


def test_without_convs_a_scale_taken_at_run_time_needs_no_data(tmp_path: pathlib.Path) -> None:
    [result] = qcompile.compile(
        lowering.graph_of(BIASED.format("N,5")), tmp_path / "out", passes="@int8-dynamic"
    )
    assert result.report.share["weights"] == {"int8": 1.0}


def test_a_conv_keeps_a_static_scale_or_is_refused(tmp_path: pathlib.Path) -> None:
    assert precisions(lower(CONV, tmp_path, "calibrate,quantize{scale=dynamic}")) == {"y": "int8"}
    with pytest.raises(PassError, match="a Conv takes no scale at run time"):
        lower(CONV, tmp_path, DYNAMIC)


def test_outliers_that_calibration_never_saw_cost_a_dynamic_scale_less(
    tmp_path: pathlib.Path,
) -> None:
    found: list[float] = []
    for number, passes in enumerate((DYNAMIC, "simplify,calibrate,quantize")):
        result = lower(BIASED.format("N,5"), tmp_path / str(number), passes)
        wide = {"x": 4 * result.calibration.judges[0]["x"]}
        wanted = execute.execute(result.reference, wide)["y"]
        found.append(simulate.sqnr(wanted, execute.execute(result.model, wide)["y"]))
    assert found[0] > found[1] + 10


# -- instruction sets, versions, 16 bits ----------------------------------------------------------


@pytest.mark.parametrize("isa", ["avx512-vnni", "avx-vnni", "avx2", "arm"])
@pytest.mark.parametrize(
    "source", [CONV_RELU, CONV_CLIP, RESIDUAL, POOLED, GEMM, MATMUL, BIASED.format("N,5")]
)
def test_every_instruction_set_has_integer_kernels(
    tmp_path: pathlib.Path, source: str, isa: Isa
) -> None:
    result = lowering.lower(source, OrtCpu(isa=isa), tmp_path)
    assert set(precisions(result).values()) == {"int8"}
    # 7 bits cost 6 dB of the 28 that the layers here keep.
    judge = simulate.Judge(result.reference, result.calibration.judges)
    assert judge.worst(execute.Session(result.folder / "model.onnx")) > 22


def test_the_text_of_the_target_says_what_a_file_was_made_for() -> None:
    here = str(OrtCpu())
    assert here == f"ort-cpu{{isa={ort_isa.machine()} version={ort_isa.installed()}}}"
    assert compiler.parse_target(here) == OrtCpu()


def test_untested_instruction_sets_and_other_versions_are_said(tmp_path: pathlib.Path) -> None:
    result = lowering.lower(MATMUL, OrtCpu(isa="arm", version="1.17"), tmp_path)
    notes = " ".join(OrtCpu(isa="arm", version="1.17").notes(result.model, pathlib.Path()))
    assert "untested" in notes and "made for arm and ONNX Runtime 1.17" in notes
    assert OrtCpu().notes(result.model, pathlib.Path()) == []


def test_an_older_version_gets_an_older_file_or_is_refused(tmp_path: pathlib.Path) -> None:
    result = lowering.lower(MATMUL, OrtCpu(version="1.17"), tmp_path)
    assert result.model.opset_imports[""] <= 20 and result.model.ir_version <= 9
    with pytest.raises(TargetError, match="formats need opset 21; this target reads up to 20"):
        lowering.lower(
            WIDE, OrtCpu(version="1.17"), tmp_path, "simplify,calibrate,quantize{input=int16}"
        )
    # Of weights of 4 bits there are no types, so that codes are held in 8.
    narrow = lowering.lower(
        WIDE, OrtCpu(version="1.17"), tmp_path, "simplify,quantize{weight=int4 input=float}"
    )
    assert narrow.model.opset_imports[""] <= 20
    small = {ir.DataType.INT4, ir.DataType.UINT4}
    assert not small & {v.dtype for v in narrow.model.graph.initializers.values()}


@pytest.mark.parametrize("version", ["1", "new", "1.16"])
def test_a_version_that_is_none_or_too_old_is_refused(version: str) -> None:
    with pytest.raises(TargetError, match=r"no version|not supported"):
        OrtCpu(version=version)


@pytest.mark.parametrize("source", [CONV_RELU, RESIDUAL, GEMM])
def test_16_bit_activations_run_in_float_and_say_so(tmp_path: pathlib.Path, source: str) -> None:
    result = lower(source, tmp_path, "simplify,calibrate,quantize{input=int16}")
    assert {ran.precision for ran in result.proof.values()} == {"float"}
    assert all("16-bit" in ran.reason for ran in result.proof.values())
    assert any(
        "for the accuracy alone" in note for note in OrtCpu().notes(result.model, pathlib.Path())
    )
    # What is left is the noise of 8-bit weights alone.
    judge = simulate.Judge(result.reference, result.calibration.judges)
    assert judge.worst(execute.Session(result.folder / "model.onnx")) > 40


@pytest.mark.parametrize("bias", ["1", "1,16", "1,1,16"])
def test_a_bias_of_any_shape_keeps_the_shape_of_the_output(
    tmp_path: pathlib.Path, bias: str
) -> None:
    shape = "1,4,16" if bias.count(",") == 2 else "4,16"
    source = f"""(float[4,32] x) => (float[{shape}] y) <float[32,16] w, float[{bias}] b> {{
        m = MatMul(x, w)
        y = Add(m, b)
    }}"""
    result = lower(source, tmp_path)
    assert precisions(result) == {"m": "int8"}
    sample = result.calibration.judges[0]
    wanted = execute.execute(result.reference, sample)["y"]
    actual = execute.Session(result.folder / "model.onnx").run(sample)["y"]
    assert actual.shape == wanted.shape
    assert simulate.sqnr(wanted, actual) > 30


@pytest.mark.parametrize("source", [GEMM, GEMM.replace(", b)", ")").replace(", float[16] b", "")])
def test_a_gemm_becomes_a_qgemm(tmp_path: pathlib.Path, source: str) -> None:
    result = lower(source, tmp_path)
    assert result.proof["y"].kernel == "QGemm"
    assert runs(result) == ["QuantizeLinear", "QGemm"]


def test_a_matmul_becomes_integer(tmp_path: pathlib.Path) -> None:
    assert runs(lower(MATMUL, tmp_path)) == ["QuantizeLinear", "MatMulIntegerToFloat"]


def test_a_product_of_activations_is_integer_when_asked_for(tmp_path: pathlib.Path) -> None:
    source = "(float[2,4,8,16] q, float[2,4,16,8] k) => (float[2,4,8,8] y) { y = MatMul(q, k) }"
    result = lower(source, tmp_path, "simplify,calibrate,quantize{attention=int8}")
    assert precisions(result) == {"y": "int8"}


def test_a_value_with_a_quantized_and_a_float_reader_is_read_by_both(
    tmp_path: pathlib.Path,
) -> None:
    source = """(float[N,8,8,8] x) => (float[N,8,6,6] y, float[N,8,8,8] z) <float[8,8,3,3] w> {
        h = Tanh(x)
        y = Conv(h, w)
        z = Softplus(h)
    }"""
    result = lower(source, tmp_path)
    assert precisions(result) == {"y": "int8"}
    sample = result.calibration.judges[0]
    actual = execute.Session(result.folder / "model.onnx").run(sample, ["z"])["z"]
    # The float reader sees no quantization.
    wanted = execute.execute(result.reference, sample, ["z"])["z"]
    np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-6)


def test_a_conv_read_by_a_conv_and_a_float_stays_integer(tmp_path: pathlib.Path) -> None:
    source = """(float[N,8,8,8] x) => (float[N,8,8,8] y, float[N,8,8,8] z)
    <float[8,8,1,1] w, float[8,8,1,1] v> {
        h = Conv(x, w)
        y = Conv(h, v)
        z = Softplus(h)
    }"""
    assert precisions(lower(source, tmp_path)) == {"h": "int8", "y": "int8"}


@pytest.mark.parametrize(
    "source",
    [CONV_RELU, CONV, RESIDUAL, GEMM, BIASED.format("N"), POOLED, STEM,
     """(float[N,8,8,8] x) => (float[N,8,8,8] c, float[N,8,8,8] y)
        <float[8,8,1,1] w, float[8,8,1,1] v> { c = Conv(x, w) y = Conv(c, v) }"""],
)  # fmt: skip
def test_inputs_and_outputs_keep_their_names_types_and_order(
    tmp_path: pathlib.Path, source: str
) -> None:
    result = lower(source, tmp_path)
    written = qcompile.load(result.folder / "model.onnx")

    def names(model: ir.Model) -> list[tuple[str | None, Any]]:
        return [(v.name, v.dtype) for v in (*model.graph.inputs, *model.graph.outputs)]

    assert names(written) == names(result.reference)


# -- weight formats -----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("source", [CONV_RELU, GEMM, MATMUL, BIASED.format("N,5")])
def test_narrow_weights_run_as_int8_beside_int8_inputs(
    tmp_path: pathlib.Path, source: str, bits: int
) -> None:
    passes = f"simplify,calibrate,quantize{{weight=int{bits}}}"
    result = lower(source, tmp_path, passes)
    assert set(precisions(result).values()) == {"int8"}
    codes = graphs.weight(result.model, "w/codes")
    assert codes.max() < 2 ** (bits - 1) and codes.min() >= -(2 ** (bits - 1))


@pytest.mark.parametrize(
    ("options", "precision"),
    [
        ("weight=int4 granularity=block", "int4 weights"),
        ("weight=int4 granularity=block block=16", "int4 weights"),
        ("weight=int4", "int4 weights"),
        ("weight=int3 granularity=block", "int4 weights"),
        ("weight=int8", "int8 weights"),
        ("weight=int8 granularity=block", "int8 weights"),
        ("weight=int6 granularity=block", "int8 weights"),
    ],
)
@pytest.mark.parametrize("source", [WIDE, WIDE.replace("N,", "N,5,"), BIASED.format("N")])
def test_weights_alone_become_matmul_nbits(
    tmp_path: pathlib.Path, source: str, options: str, precision: str
) -> None:
    result = lower(source, tmp_path, f"simplify,calibrate,quantize{{input=float {options}}}")
    [ran] = result.proof.values()
    assert (ran.precision, ran.kernel) == (precision, "MatMulNBits")
    assert not {"MatMul", "Gemm", "DequantizeLinear"} & set(runs(result))


def test_weights_alone_of_a_gemm_become_matmul_nbits(tmp_path: pathlib.Path) -> None:
    result = lower(GEMM, tmp_path, lowering.WEIGHT_ONLY)
    assert precisions(result) == {"y": "int8 weights"}
    wide = GEMM.replace("32]", "64]")
    result = lower(
        wide, tmp_path, "simplify,calibrate,quantize{weight=int4 input=float granularity=block}"
    )
    assert precisions(result) == {"y": "int4 weights"}
    feeds = result.calibration.judges[0]
    wanted = execute.execute(result.reference, feeds)["y"]
    assert simulate.sqnr(wanted, execute.execute(result.model, feeds)["y"]) > 18


def test_block_scales_beside_a_quantized_input_stay_float_and_say_why(
    tmp_path: pathlib.Path,
) -> None:
    result = lower(WIDE, tmp_path, "simplify,calibrate,quantize{granularity=block}")
    assert result.proof["y"].precision == "float"
    assert "a scale a block" in result.proof["y"].reason


def test_4_bit_codes_raise_the_opset_to_the_first_that_has_them(tmp_path: pathlib.Path) -> None:
    result = lower(WIDE, tmp_path, "simplify,calibrate,quantize{weight=int4 input=float}")
    assert result.reference.opset_imports[""] == 18
    assert result.model.opset_imports[""] == 21


NETWORK = """(float[N,8,8,8] x) => (float[N,4] y)
<float[16,8,3,3] w, float[16] b, float[16,16,3,3] v, float[16,4] u> {
    c = Conv<pads=[1,1,1,1]>(x, w, b)
    r = Relu(c)
    d = Conv<pads=[1,1,1,1]>(r, v)
    s = Add(d, r)
    p = GlobalAveragePool(s)
    f = Flatten(p)
    y = MatMul(f, u)
}"""


@pytest.mark.parametrize("isa", ["avx512-vnni", "arm"])
def test_fewer_bits_of_activations_run_as_int8_with_fewer_levels_and_say_so(
    tmp_path: pathlib.Path, isa: Isa
) -> None:
    target, ratios = OrtCpu(isa=isa), list[float]()
    pictures = np.random.default_rng(7).normal(size=(64, 8, 8, 8)).astype(np.float32)
    for bits in (8, 7, 6, 5, 4, 3, 2):
        folder = tmp_path / str(bits)
        passes = f"calibrate,quantize{{input=int{bits}}}"
        result = lowering.lower(NETWORK, target, folder, passes)
        assert {ran.precision for ran in result.proof.values()} == {"int8"}
        notes = " ".join(target.notes(result.model, folder))
        said = f"{1 << bits} levels (nominal {bits}, stored 8 bits), no speed claimed"
        assert (said in notes) == (bits < 8)
        wanted, simulated, ran = (
            execute.Session(model, optimize=optimize).run({"x": pictures})["y"]
            for model, optimize in (
                (result.reference, False), (result.model, False), (folder / "model.onnx", True)
            )
        )  # fmt: skip
        assert simulate.sqnr(simulated, ran) > 60, "the optimizer keeps the levels"
        ratios.append(simulate.sqnr(wanted, ran))
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] > ratios[-1] + 20


def test_the_levels_of_an_activation_are_as_many_as_its_bits_say(tmp_path: pathlib.Path) -> None:
    for bits, symmetric in ((2, "false"), (3, "true"), (4, "false"), (4, "true"), (7, "false")):
        passes = f"calibrate,quantize{{input=int{bits} symmetric={symmetric}}}"
        model = lower(MATMUL, tmp_path, passes).model
        [codes] = [v for n in model.graph if n.op_type == "Clip" for v in n.outputs]
        model.graph.outputs.append(codes)
        ramp = np.linspace(-9, 9, 4096, dtype=np.float32).reshape(-1, 32)
        levels = np.unique(execute.execute(model, {"x": ramp})[codes.name or ""]).astype(int)
        assert len(levels) == np.ptp(levels) + 1 == 1 << bits


def test_torch_rounds_fewer_bits_as_the_target_does(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("torch")
    from qcompile import blocks
    from qcompile.prefix import Prefix
    from qcompile.quantized import Quantized

    for options in ("input=int4", "input=int4 ends=int8", "input=int4 symmetric=true"):
        model = lowering.graph_of(NETWORK)
        data = lowering.decide(model, f"calibrate,quantize{{{options}}}")
        quantized = Quantized(model, OrtCpu())
        whole = blocks.whole(model)
        samples, _ = data.to_fit(4)
        prefix = Prefix(quantized, [whole], samples)
        prefix.leave(0, prefix.enter(0))
        rounded = prefix.rounded.value("y", 0)
        OrtCpu().lower(model)
        simulated = execute.Session(model, optimize=False).run(samples[0])["y"]
        assert simulate.sqnr(simulated, rounded) > 25, options


@pytest.mark.parametrize("options", ["weight=uint8", "input=uint4", "input=uint8"])
def test_formats_without_a_kernel_are_refused_before_the_data_is_read(
    tmp_path: pathlib.Path, options: str
) -> None:
    with pytest.raises(TargetError, match=r"ort-cpu holds no u?int"):
        qcompile.compile(
            lowering.graph_of(MATMUL),
            tmp_path / "out",
            passes=f"calibrate,quantize{{{options}}},insert-qdq",
            calib="no-such-file.npz",
        )


def test_a_model_of_float16_is_not_quantized_and_says_so(tmp_path: pathlib.Path) -> None:
    source = """(float[N,8] x) => (float[N,4] y) <float[8,4] w> {
        h = Cast<to=10>(x)
        v = Cast<to=10>(w)
        m = MatMul(h, v)
        y = Cast<to=1>(m)
    }"""
    model = lowering.graph_of(source)
    with pytest.raises(PassError, match="nothing is quantized"):
        qcompile.compile(model, tmp_path / "out", calib=graphs.samples(model, 5))


# -- the same numbers ---------------------------------------------------------------------------


def last_scale(model: ir.Model) -> float:
    """The scale of the grid that the output lies on, or 0 where it is float."""
    node = model.graph.outputs[0].producer()
    assert node is not None
    if node.op_type != "DequantizeLinear" or node.inputs[1] is None:
        return 0.0
    return float(graph.constant(node.inputs[1]))


def assert_one_step(source: str, folder: pathlib.Path, seed: int) -> None:
    model = lowering.graph_of(source)
    result = lowering.lower(model, OrtCpu(), folder, samples=graphs.samples(model, 5, seed=seed))
    assert set(precisions(result).values()) == {"int8"}
    plain = execute.Session(result.model, optimize=False)
    fused = execute.Session(result.folder / "model.onnx")
    step = last_scale(result.model)
    for sample in graphs.samples(result.reference, 3, seed=seed + 1):
        wanted, actual = plain.run(sample)["y"], fused.run(sample)["y"]
        # Integer sums are exact; the float32 sums of the plain run round at about 1e-6 each.
        room = step * 1.001 + 1e-5 * float(np.abs(wanted).max())
        assert np.abs(wanted - actual).max() <= room


shapes = st.integers(1, 20)


@settings(max_examples=40)
@given(ins=shapes, outs=shapes, size=st.integers(3, 9), kernel=st.integers(1, 3),
       relu=st.booleans(), seed=st.integers(0, 99))  # fmt: skip
def test_a_conv_fed_the_same_integers_differs_by_at_most_one_step(
    tmp_path_factory: pytest.TempPathFactory,
    ins: int, outs: int, size: int, kernel: int, relu: bool, seed: int,
) -> None:  # fmt: skip
    out = size - kernel + 1
    last = "y = Relu(c)" if relu else "y = Identity(c)"
    source = f"""(float[N,{ins},{size},{size}] x) => (float[N,{outs},{out},{out}] y)
    <float[{outs},{ins},{kernel},{kernel}] w, float[{outs}] b> {{ c = Conv(x, w, b) {last} }}"""
    assert_one_step(source, tmp_path_factory.mktemp("conv"), seed)


@settings(max_examples=40)
@given(ins=shapes, outs=shapes, rows=st.integers(1, 9), bias=st.booleans(),
       turned=st.booleans(), seed=st.integers(0, 99))  # fmt: skip
def test_a_gemm_fed_the_same_integers_differs_by_at_most_one_step(
    tmp_path_factory: pytest.TempPathFactory,
    ins: int, outs: int, rows: int, bias: bool, turned: bool, seed: int,
) -> None:  # fmt: skip
    shape = f"{outs},{ins}" if turned else f"{ins},{outs}"
    declared, read = (f", float[{outs}] b", ", b") if bias else ("", "")
    source = f"""(float[{rows},{ins}] x) => (float[{rows},{outs}] y) <float[{shape}] w{declared}> {{
        y = Gemm<transB={int(turned)}>(x, w{read})
    }}"""
    assert_one_step(source, tmp_path_factory.mktemp("gemm"), seed)


@settings(max_examples=40)
@given(ins=shapes, outs=shapes, rank=st.integers(2, 4), bias=st.booleans(),
       seed=st.integers(0, 99))  # fmt: skip
def test_a_matmul_fed_the_same_integers_differs_by_at_most_one_step(
    tmp_path_factory: pytest.TempPathFactory,
    ins: int, outs: int, rank: int, bias: bool, seed: int,
) -> None:  # fmt: skip
    rows = ",".join(["N", "3", "2"][: rank - 1])
    added = "y = Add(m, b)" if bias else "y = Identity(m)"
    source = f"""(float[{rows},{ins}] x) => (float[{rows},{outs}] y)
    <float[{ins},{outs}] w, float[{outs}] b> {{ m = MatMul(x, w) {added} }}"""
    assert_one_step(source, tmp_path_factory.mktemp("matmul"), seed)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("granularity", "entered"),
    [
        ("tensor", "int8"),
        ("channel", "int8"),
        ("tensor", "float"),
        ("channel", "float"),
    ],
)
def test_the_weight_in_the_file_is_what_numerics_dequantizes(
    tmp_path: pathlib.Path, bits: int, granularity: str, entered: str
) -> None:
    options = f"weight=int{bits} granularity={granularity} input={entered}"
    result = lower(WIDE, tmp_path, f"simplify,calibrate,quantize{{{options}}}")
    form = numerics.parse_format(f"int{bits}")
    weight: numerics.Floats = graphs.weight(result.reference, "w")
    grid = numerics.weight_grid(weight, form, 1 if granularity == "channel" else None)
    stored = execute.execute(result.model, result.calibration.judges[0], ["w/dequantized"])
    np.testing.assert_array_equal(stored["w/dequantized"], grid.round_trip(weight))
    np.testing.assert_array_equal(graphs.weight(result.model, "w/codes"), grid.quantize(weight))


@pytest.mark.parametrize("source", [CONV_RELU, GEMM, BIASED.format("N")])
@pytest.mark.parametrize("size", [1e4, 1e8])
def test_a_huge_bias_does_not_overflow(tmp_path: pathlib.Path, source: str, size: float) -> None:
    bias = np.zeros(16, np.float32)
    bias[3] = size
    result = lowering.lower(source, OrtCpu(), tmp_path, arrays={"b": bias})
    assert set(precisions(result).values()) == {"int8"}
    sample = result.calibration.judges[0]
    wanted = execute.execute(result.reference, sample)["y"]
    actual = execute.Session(result.folder / "model.onnx").run(sample)["y"]
    assert simulate.sqnr(wanted, actual) > 30


def test_a_channel_of_zeros_stays_zero(tmp_path: pathlib.Path) -> None:
    weight = np.ones((16, 32), np.float32)
    weight[5] = 0
    arrays = {"w": weight, "b": np.zeros(16, np.float32)}
    result = lowering.lower(GEMM, OrtCpu(), tmp_path, arrays=arrays)
    actual = execute.Session(result.folder / "model.onnx").run(result.calibration.judges[0])["y"]
    assert not actual[:, 5].any() and np.isfinite(actual).all()


@pytest.mark.parametrize("source", [CONV_RELU, RESIDUAL, POOLED, GEMM, BIASED.format("N,5")])
def test_a_lowered_model_is_close_to_float(tmp_path: pathlib.Path, source: str) -> None:
    result = lower(source, tmp_path)
    judge = simulate.Judge(result.reference, result.calibration.judges)
    # 8 bits on both sides cost about 35 to 40 dB for one layer of normal numbers.
    assert judge.worst(execute.Session(result.folder / "model.onnx")) > 28


# -- the proof ----------------------------------------------------------------------------------


def drop_pair(model: ir.Model, value: str) -> None:
    """Let the readers of the pair behind ``value`` read the value itself."""
    [dequantize] = [n for n in model.graph if n.outputs[0].name == value]
    quantize = dequantize.inputs[0]
    assert quantize is not None
    writer = quantize.producer()
    assert writer is not None and writer.op_type == "QuantizeLinear"
    source = writer.inputs[0]
    assert source is not None
    graph.redirect(model, dequantize.outputs[0], source, keep=lambda _: False)
    graph.remove_dead(model)


def prove(model: ir.Model, folder: pathlib.Path) -> dict[str, str]:
    execute.save(model, folder / "model.onnx")
    return {layer: ran.precision for layer, ran in OrtCpu().prove(model, folder).items()}


def test_a_conv_without_a_quantized_output_is_proved_float(tmp_path: pathlib.Path) -> None:
    result = lower(CONV_RELU, tmp_path)
    drop_pair(result.model, "y")
    assert prove(result.model, tmp_path) == {"c": "float"}


def test_only_the_broken_conv_is_proved_float(tmp_path: pathlib.Path) -> None:
    result = lower(POOLED, tmp_path)
    drop_pair(result.model, "y")
    assert prove(result.model, tmp_path) == {"c": "int8", "y": "float"}


def test_a_gemm_with_a_float_bias_is_proved_float(tmp_path: pathlib.Path) -> None:
    result = lower(GEMM, tmp_path)
    gemm = result.model.graph.outputs[0].producer()
    assert gemm is not None
    bias = graphs.weight(result.reference, "b")
    gemm.replace_input_with(2, graph.add_constant(result.model, "float_bias", bias))
    graph.remove_dead(result.model)
    assert prove(result.model, tmp_path) == {"y": "float"}


def test_a_kernel_that_is_missing_is_unknown(tmp_path: pathlib.Path) -> None:
    result = lower(CONV_RELU, tmp_path)
    optimized = lowering.optimized(result.folder / "model.onnx", tmp_path)
    for node in optimized.graph:
        if node.op_type == "QLinearConv":
            node.op_type = "NoSuchKernel"
    assert kernels(optimized, result.model)["c"].precision == "unknown"


def test_a_renamed_kernel_is_found_by_its_weight_or_unknown(tmp_path: pathlib.Path) -> None:
    result = lower(GEMM, tmp_path)
    optimized = lowering.optimized(result.folder / "model.onnx", tmp_path)
    [gemm] = [n for n in optimized.graph if n.op_type == "QGemm"]
    gemm.name = "something else"
    assert kernels(optimized, result.model)["y"].precision == "int8"
    for index, value in enumerate(gemm.inputs):
        if value is not None and value.name == "w/codes":
            gemm.replace_input_with(index, ir.Value(name="other"))
    assert kernels(optimized, result.model)["y"].precision == "unknown"


def test_a_layer_that_was_never_asked_for_is_float_and_says_so(tmp_path: pathlib.Path) -> None:
    result = lower(POOLED, tmp_path, "simplify,calibrate,quantize{exclude=y}")
    assert precisions(result) == {"c": "int8", "y": "float"}
    assert result.proof["y"].reason == "float was asked for"


def test_every_captured_layer_is_in_the_proof(tmp_path: pathlib.Path) -> None:
    for number, source in enumerate([CONV_RELU, RESIDUAL, POOLED, GEMM, MATMUL]):
        result = lower(source, tmp_path / str(number))
        assert set(result.proof) == {layer.name for layer in graph.layers(result.reference)}


def test_the_simulation_is_the_lowered_graph(tmp_path: pathlib.Path) -> None:
    model = lowering.graph_of(RESIDUAL)
    calibration = lowering.decide(model)
    assert any(spec.all_specs(node) for node in model.graph)
    simulated = simulate.simulate(model, OrtCpu())
    assert any(spec.all_specs(node) for node in model.graph)  # a clone was lowered
    OrtCpu().lower(model)
    sample = calibration.judges[0]
    wanted = execute.execute(model, sample)["y"]
    np.testing.assert_array_equal(simulated.run(sample)["y"], wanted)


# -- shipped models -----------------------------------------------------------------------------


def accuracy(session: execute.Session, pictures: Array, labels: Array) -> float:
    batches = np.split(pictures, len(pictures) // 100)
    logits = np.concatenate([session.run({"image": batch})["logits"] for batch in batches])
    right: npt.NDArray[np.bool_] = logits.argmax(axis=1) == labels
    return float(np.mean(right))


@pytest.mark.parametrize("name", [fashion.CNN, fashion.VIT])
def test_shipped_models_keep_their_accuracy_in_int8(tmp_path: pathlib.Path, name: str) -> None:
    path = fashion.path(name)
    calib = str(fashion.path(fashion.CALIBRATION))
    [result] = qcompile.compile(path, tmp_path / "out", calib=calib)
    pictures, labels = fashion.test()
    pictures, labels = pictures[:1000], labels[:1000]
    before = accuracy(execute.Session(path), pictures, labels)
    after = accuracy(execute.Session(result.folder / "model.onnx"), pictures, labels)
    assert after >= before - 0.01
    assert result.report.share_of_macs("int8") >= 0.95
    assert result.report.share_of_macs("unknown") == 0.0
    assert json.loads((result.folder / "report.json").read_text())["share"]["macs"]["int8"] >= 0.95


def test_a_recurrent_layer_is_left_in_float_and_counted(tmp_path: pathlib.Path) -> None:
    source = """(float[5,2,16] x) => (float[5,1,2,16] y, float[5,2,16] z)
    <float[1,64,16] w, float[1,64,16] r, float[16,16] v> {
        y = LSTM<hidden_size=16>(x, w, r)
        z = MatMul(x, v)
    }"""
    model = lowering.graph_of(source)
    [result] = qcompile.compile(model, tmp_path / "out", calib=graphs.samples(model, 10))
    assert {row.name: row.runs for row in result.report.layers} == {"y": "float", "z": "int8"}
    assert result.report.share["macs"]["float"] > 0.8
    [left] = result.report.left_alone
    assert (left.name, left.reason) == ("y", "a recurrent layer has no quantized form here yet")


def test_the_proof_says_where_the_runtime_rounds_a_float_weight_by_itself(
    tmp_path: pathlib.Path,
) -> None:
    """What the rule float-between keeps it from."""

    class Without(OrtCpu):
        dialect = tuple(rule for rule in OrtCpu.dialect if rule.name != "float-between")

    source = """(float[1,4,8,8] x) => (float[1,4,8,8] y)
        <float[4,4,1,1] u, float[4,4,1,1] w, float[4,4,1,1] v> {
        a = Conv(x, u) m = Conv(a, w) y = Conv(m, v) }"""
    passes = "simplify,calibrate,quantize{exclude=m}"
    for target, precision, reason in [
        (OrtCpu(), "float", "float was asked for"),
        (Without(), "int8", "the runtime rounds its weight, which the file has in float"),
    ]:
        done = lowering.lower(source, target, tmp_path / precision, passes)
        [ran] = [ran for ran in done.proof.values() if ran.reason]
        assert (ran.precision, ran.reason) == (precision, reason)
