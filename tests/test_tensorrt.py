"""What the TensorRT-RTX builder makes of a lowered model. Built, never run: there is no GPU."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import graphs
import lowering
import numpy as np
import onnx_ir as ir
import pytest
from lowering import Lowered

import qcompile
from qcompile import compiler, ports
from qcompile.backends import trt_build, trt_plan
from qcompile.backends.onnxruntime import OrtCpu
from qcompile.backends.tensorrt import CAPABILITIES, TensorRtRtx, profile
from qcompile.calibrate import Calibration
from qcompile.errors import QCompileError, TargetError
from qcompile.models import fashion
from qcompile.sequences import Samples
from qcompile.sources import Data

pytest.importorskip("tensorrt_rtx")

CONV = """(float[N,16,8,8] x) => (float[N,16,8,8] y) <float[16,16,3,3] w, float[16] b> {
    c = Conv<pads=[1,1,1,1]>(x, w, b)
    y = Relu(c)
}"""
GEMM = """(float[N,32] x) => (float[N,16] y) <float[16,32] w, float[16] b> {
    y = Gemm<transB=1>(x, w, b)
}"""
MATMUL = """(float[N,5,32] x) => (float[N,5,16] y) <float[32,16] w, float[16] b> {
    m = MatMul(x, w)
    y = Add(m, b)
}"""
RESIDUAL = """(float[N,16,8,8] x) => (float[N,16,8,8] y)
<float[16,16,3,3] w, float[16,16,3,3] v, float[16] b> {
    c = Conv<pads=[1,1,1,1]>(x, w, b)
    r = Relu(c)
    d = Conv<pads=[1,1,1,1]>(r, v)
    s = Add(d, r)
    y = Relu(s)
}"""
DEPTHWISE = """(float[N,16,8,8] x) => (float[N,16,6,6] y) <float[16,1,3,3] w, float[16] b> {
    c = Conv<group=16>(x, w, b)
    y = Relu(c)
}"""
WIDE = "(float[N,64] x) => (float[N,48] y) <float[64,48] w> { y = MatMul(x, w) }"


def build(
    source: str, folder: pathlib.Path, passes: str = lowering.DECIDE, cc: tuple[int, ...] = ()
) -> Lowered:
    return lowering.lower(source, TensorRtRtx(cc=cc), folder, passes)


@pytest.mark.parametrize(
    ("source", "layers"),
    [(CONV, ["c"]), (GEMM, ["y"]), (MATMUL, ["m"]), (RESIDUAL, ["c", "d"])],
)
def test_layers_are_int8_in_the_plan(
    tmp_path: pathlib.Path, source: str, layers: list[str]
) -> None:
    result = build(source, tmp_path)
    assert list(result.proof) == layers
    assert {ran.precision for ran in result.proof.values()} == {"int8"}
    assert {ran.reason for ran in result.proof.values()} == {"built, not run"}
    assert (tmp_path / "model.engine").stat().st_size > 10_000


def test_a_depthwise_conv_stays_float_and_says_why(tmp_path: pathlib.Path) -> None:
    result = build(DEPTHWISE, tmp_path)
    assert result.proof["c"].precision == "float"
    assert "depthwise" in result.proof["c"].reason


@pytest.mark.parametrize(
    ("options", "precision"),
    [("weight=int4 granularity=block", "int4 weights"), ("weight=int8", "int8 weights")],
)
def test_weights_alone_are_proved_as_such(
    tmp_path: pathlib.Path, options: str, precision: str
) -> None:
    result = build(WIDE, tmp_path, f"simplify,calibrate,quantize{{input=float {options}}}")
    assert result.proof["y"].precision == precision


def test_narrow_weights_beside_int8_inputs_are_int8(tmp_path: pathlib.Path) -> None:
    result = build(WIDE, tmp_path, "simplify,calibrate,quantize{weight=int4}")
    assert result.proof["y"].precision == "int8"


def test_block_weights_beside_int8_inputs_are_never_emitted(tmp_path: pathlib.Path) -> None:
    # The builder is suspected to apply block scales behind the product (lowering reference, 2.2).
    result = build(WIDE, tmp_path, "simplify,calibrate,quantize{weight=int4 granularity=block}")
    assert result.proof["y"].precision == "float"
    assert lowering.operators(result.model) == ["MatMul"]


def test_an_engine_for_one_capability_names_it(tmp_path: pathlib.Path) -> None:
    result = build(CONV, tmp_path, cc=(89,))
    assert result.proof["c"].precision == "int8"
    program = trt_plan.program((tmp_path / "model.engine").read_bytes())
    assert "accelerators={sm89 }" in program


@pytest.mark.parametrize("text", ["tensorrt-rtx{cc=90}", "tensorrt-rtx{cc=89,100}"])
def test_an_unknown_capability_is_refused(text: str) -> None:
    with pytest.raises(QCompileError) as error:
        compiler.parse_target(text)
    message = str(error.value)
    assert "unknown compute capability" in message
    assert all(str(capability) in message for capability in CAPABILITIES)


def test_capabilities_round_trip_as_text() -> None:
    assert str(compiler.parse_target("tensorrt-rtx{cc=89,120}")) == "tensorrt-rtx{cc=89,120}"
    assert str(TensorRtRtx()) == "tensorrt-rtx"


@pytest.mark.parametrize(
    "options", ["weight=uint8", "input=uint8", "input=int16", "attention=uint8"]
)
def test_formats_that_it_does_not_hold_are_refused_before_the_data_is_read(
    tmp_path: pathlib.Path, options: str
) -> None:
    with pytest.raises(TargetError, match=r"tensorrt-rtx holds no u?int"):
        qcompile.compile(
            lowering.graph_of(CONV),
            tmp_path / "out",
            passes=f"calibrate,quantize{{{options}}},insert-qdq",
            targets=("tensorrt-rtx",),
            calib="no-such-file.npz",
        )
    assert not (tmp_path / "out").exists()


# -- profiles -----------------------------------------------------------------------------------


def test_a_profile_spans_the_shapes_of_the_data() -> None:
    model = graphs.graph(
        "(float[N,3,M] x, float[2,2] k) => (float[N,3,M] y) { y = Relu(x) z = Relu(k) }"
    )
    shapes = [(2, 3, 7), (1, 3, 9), (4, 3, 5)]
    samples = [
        {"x": np.zeros(shape, np.float32), "k": np.zeros((2, 2), np.float32)} for shape in shapes
    ]
    found = profile(model, Calibration(Data("test", samples)))
    assert found == {"x": [[1, 3, 5], [2, 3, 7], [4, 3, 9]]}


def test_a_shape_of_the_user_is_the_profile_with_data_and_without() -> None:
    model = graphs.graph("(float[N,3,M] x) => (float[N,3,M] y) { y = Relu(x) }")
    with pytest.raises(
        TargetError, match="is dynamic: give --calib, whose shapes bound it, or --sh"
    ):
        profile(model, None)
    ports.choose_shapes(model, ["x=4x3x7"])
    samples = [{"x": np.zeros((1, 3, 9), np.float32)}]
    for calibration in (None, Calibration(Data("test", samples))):
        assert profile(model, calibration) == {"x": [[4, 3, 7]] * 3}


def test_a_shape_that_spans_sizes_is_the_profile_tuned_for_the_data_if_it_fits() -> None:
    model = graphs.graph("(float[N,3,M] x) => (float[N,3,M] y) { y = Relu(x) }")
    ports.choose_shapes(model, ["x=1..4x3x0..9"])
    for first, tuned in (((2, 3, 5), [2, 3, 5]), ((2, 3, 10), [4, 3, 9])):
        samples = [{"x": np.zeros(first, np.float32)}]
        found = profile(model, Calibration(Data("test", samples)))
        assert found == {"x": [[1, 3, 0], tuned, [4, 3, 9]]}


def test_an_engine_for_a_cache_that_grows_is_built(tmp_path: pathlib.Path) -> None:
    cached = """(float[1,T,32] x, float[1,P,32] past) => (float[1,T,16] y, float[1,A,32] present)
        <float[32,16] w> { present = Concat<axis=1>(past, x) y = MatMul(x, w) }"""
    passes = "quantize{weight=int4 input=float granularity=block block=16},insert-qdq"
    said = list[str]()
    with pytest.raises(TargetError, match=r"past: .* is dynamic"):  # before any pass runs
        qcompile.compile(
            graphs.graph(cached), tmp_path / "none", passes=passes, targets=("tensorrt-rtx",),
            shape=("x=1x1..8x32",), log=said.append,
        )  # fmt: skip
    assert not said
    [done] = qcompile.compile(
        graphs.graph(cached), tmp_path / "out", passes=passes, targets=("tensorrt-rtx",),
        shape=("x=1x1..8x32", "past=1x0..64x32"),
    )  # fmt: skip
    assert (done.folder / "model.engine").stat().st_size > 1000


def test_a_state_is_as_large_as_where_it_starts() -> None:
    model = graphs.graph(
        "(float[N,3] x, float[N,4] h) => (float[N,4] y) { y = Relu(h) z = Relu(x) }"
    )
    state = np.zeros((2, 4), np.float32)
    frames = [{"x": np.zeros((2, 3), np.float32)} for _ in range(3)]
    found = Samples([{**frames[0], "h": state}, *frames[1:]], [0], {"h": "y"})
    assert profile(model, Calibration(Data("test", found)))["h"] == [[2, 4]] * 3


def test_a_model_without_dynamic_dimensions_has_no_profile() -> None:
    model = graphs.graph("(float[2,3] x) => (float[2,3] y) { y = Relu(x) }")
    assert profile(model, lowering.calibration_of(model)) == {}


def test_an_engine_with_a_profile_is_built(tmp_path: pathlib.Path) -> None:
    model = lowering.graph_of(CONV)
    samples = [{"x": np.ones((n, 16, 8, 8), np.float32)} for n in (2, 1, 8, 4, 4)]
    result = lowering.lower(model, TensorRtRtx(), tmp_path, samples=samples)
    assert result.proof["c"].precision == "int8"


# -- refusals -----------------------------------------------------------------------------------


def test_what_the_parser_refuses_is_told_in_its_words(tmp_path: pathlib.Path) -> None:
    model = lowering.graph_of(CONV)
    calibration = lowering.decide(model)
    OrtCpu().lower(model)
    with pytest.raises(TargetError, match=r"TensorRT-RTX refuses the model: b/dequantized .*int32"):
        TensorRtRtx().emit(model, tmp_path, calibration)
    assert not (tmp_path / "model.engine").exists()


def test_an_operator_that_it_does_not_know_is_named(tmp_path: pathlib.Path) -> None:
    model = graphs.graph("(float[2,4,4] x) => (float[2] y) { y = Det(x) }")
    with pytest.raises(TargetError, match=r"refuses the model: y \(Det\): not supported"):
        TensorRtRtx().emit(model, tmp_path, lowering.calibration_of(model))


@pytest.mark.parametrize("content", [b"", b"no model", None])
def test_the_child_answers_for_a_file_that_is_no_model(
    tmp_path: pathlib.Path, content: bytes | None
) -> None:
    path, engine = tmp_path / "model.onnx", tmp_path / "model.engine"
    if content is not None:
        path.write_bytes(content)
    request = trt_build.Request(
        module="tensorrt_rtx", model=str(path), engine=str(engine), cc=[], profile={}
    )
    command = [sys.executable, "-m", "qcompile.backends.trt_build"]
    done = subprocess.run(command, input=json.dumps(request), stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    assert json.loads(done.stdout)["error"]
    assert not engine.exists()


def test_a_child_that_dies_is_reported(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lowering.graph_of(GEMM)
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.setenv("PYTHONHOME", str(tmp_path))  # no Python starts from an empty home
    with pytest.raises(TargetError, match="the TensorRT-RTX builder crashed: "):
        TensorRtRtx().emit(model, folder, lowering.calibration_of(model))


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: pathlib.Path) -> None:
    model = lowering.graph_of(GEMM)
    (tmp_path / "model.engine").mkdir()
    with pytest.raises(TargetError, match=r"builder crashed: .*model\.engine"):
        TensorRtRtx().emit(model, tmp_path, lowering.calibration_of(model))


# -- the plan -----------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [b"", b"no program here", b"header {", b"\0" * 1000])
def test_a_plan_without_a_program_is_empty(plan: bytes) -> None:
    assert trt_plan.program(plan) == ""
    assert trt_plan.steps("") == []


def test_a_layer_without_a_kernel_in_the_plan_is_unknown(tmp_path: pathlib.Path) -> None:
    result = build(CONV, tmp_path)
    (tmp_path / "model.engine").write_bytes(b"another format")
    assert TensorRtRtx().prove(result.model, tmp_path)["c"].precision == "unknown"


def test_a_conv_whose_pair_is_gone_is_proved_float(tmp_path: pathlib.Path) -> None:
    result = build(CONV, tmp_path)
    model = result.reference
    for node in model.graph:
        if node.op_type == "Conv":
            node.name = "c#0"
    TensorRtRtx().emit(model, tmp_path, result.calibration)
    assert TensorRtRtx().prove(result.model, tmp_path)["c"].precision == "float"


PROGRAM = """header {
descriptors {
  tensor={ alignment=128 name="a" dims={ 4 } type=int8 }
  tensor={ alignment=128 name="b" const_payload_size=4 type=int8 }
  tensor={ alignment=128 name="h" type=half }
main {
  corrltn={ name="c#0" output={"h" } input={"a" "b" } layers="[ONNX Layer: c#0] [ONNX Layer: y]" }
  runtime_fusion={ name=__myl_Fc input_args={ "h" "b" } output_args={ "z" } }
  region={ name="r" input={"a" } }
"""


def test_steps_have_operation_types_and_nodes() -> None:
    found = trt_plan.steps(trt_plan.program(PROGRAM.encode() + bytes(8) + b"main { rubbish"))
    assert [(s.operation, s.name, s.reads, s.nodes) for s in found] == [
        ("corrltn", "c#0", ("int8", "int8"), ("c#0", "y")),
        ("runtime_fusion", "__myl_Fc", ("half", "int8"), ()),
    ]


# -- two targets --------------------------------------------------------------------------------


def test_two_targets_of_one_run_get_opposite_dialects(tmp_path: pathlib.Path) -> None:
    model = lowering.graph_of(RESIDUAL)
    out = tmp_path / "out"
    results = qcompile.compile(
        model, out, calib=graphs.samples(model, 10), targets=("ort-cpu", "tensorrt-rtx{cc=89}")
    )
    assert [r.folder for r in results] == [out / "ort-cpu", out / "tensorrt-rtx"]
    assert (out / "ort-cpu" / "model.onnx").exists()
    assert (out / "tensorrt-rtx" / "model.engine").exists()

    def kinds(result: qcompile.Compiled) -> set[ir.DataType | None]:
        return {v.dtype for v in result.model.graph.initializers.values()}

    ort, trt = results
    assert {ir.DataType.UINT8, ir.DataType.INT32} <= kinds(ort)
    assert not {ir.DataType.UINT8, ir.DataType.INT32} & kinds(trt)
    assert "b/codes" in ort.model.graph.initializers
    assert graphs.weight(trt.model, "b").dtype == np.float32
    zeros = [v for n, v in trt.model.graph.initializers.items() if "zero_point" in n]
    assert zeros and not any(graphs.weight(trt.model, v.name or "").any() for v in zeros)
    assert [r.report.share_of_macs("int8") for r in results] == [1.0, 1.0]


def test_a_shipped_model_builds_with_its_convs_in_int8(tmp_path: pathlib.Path) -> None:
    [result] = qcompile.compile(
        fashion.path(fashion.CNN),
        tmp_path / "out",
        calib=str(fashion.path(fashion.CALIBRATION)),
        targets=("tensorrt-rtx",),
    )
    assert result.report.share_of_macs("int8") > 0.5
    assert result.report.share_of_macs("unknown") == 0.0
