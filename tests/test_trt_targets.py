"""The target tensorrt: what it takes, the file and the command it leaves, what its proof says."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess

import graphs
import lowering
import numpy as np
import pytest

import qcompile
from qcompile import compiler
from qcompile.backends import trt_plan
from qcompile.backends.tensorrt import TensorRt, TensorRtRtx
from qcompile.errors import QCompileError, TargetError

ORIN = "tensorrt{version=10.3 arch=orin}"
TWO = """(float[N,32] x) => (float[N,10] y) <float[32,32] w, float[32,10] v> {
    h = MatMul(x, w)
    y = MatMul(h, v)
}"""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tensorrt", r"needs both, as in tensorrt\{version=10.3 arch=orin\}"),
        ("tensorrt{version=10.3}", "needs both"),
        ("tensorrt{arch=orin}", "needs both"),
        ("tensorrt{version=8.5 arch=orin}", "version=8.5 is not a TensorRT 10 or 11"),
        ("tensorrt{version=10 arch=orin}", "version=10 is not a TensorRT 10 or 11"),
        ("tensorrt{version=10.3.0 arch=orin}", "version=10.3.0 is not"),
        ("tensorrt{version=10.3 arch=oring}", "unknown architecture 'oring'; did you mean 'orin'"),
        ("tensorrt{version=10.3 arch=12}", "unknown architecture '12'"),
        ("tensorrt{version=10.3 arch=xavier}", "Xavier ends with TensorRT 8"),
        ("tensorrt{version=11.0 arch=orin}", "TensorRT 11 has no JetPack: orin stays with"),
    ],
)
def test_what_there_is_not_is_refused_at_once(text: str, said: str) -> None:
    with pytest.raises(QCompileError, match=said):
        compiler.parse_target(text)


def test_its_text_reads_back() -> None:
    target = compiler.parse_target(ORIN)
    assert str(target) == ORIN
    assert isinstance(target, TensorRt) and target.capabilities == (87,)
    assert TensorRt("11.4", "120").capabilities == (120,)


@pytest.mark.parametrize(
    ("version", "limit"), [("10.0", 21), ("10.5", 21), ("10.6", 22), ("10.13", 22), ("11.4", 25)]
)
def test_each_version_opset_limits_up_to_its_own(version: str, limit: int) -> None:
    assert TensorRt(version, "ada").opset_limit() == limit


def test_an_opset_above_the_version_is_refused(tmp_path: pathlib.Path) -> None:
    for opset, message in ((21, ""), (23, "reads up to 21")):
        model = lowering.graph_of(TWO, opset=opset)
        lowering.decide(model)
        if message:
            with pytest.raises(TargetError, match=message):
                TensorRt("10.3", "orin").lower(model)
        else:
            TensorRt("10.3", "orin").lower(model)
    model = lowering.graph_of(TWO, opset=23)  # without a lowering, what is written is checked
    with pytest.raises(TargetError, match="reads opsets up to 21"):
        TensorRt("10.3", "orin").emit(model, tmp_path, lowering.calibration_of(model))


def test_bfloat16_needs_ampere() -> None:
    for text, said in (
        ("tensorrt{version=10.3 arch=turing}", "needs compute capability 8.0, not 7.5"),
        ("tensorrt-rtx{cc=75,89}", "needs compute capability 8.0, not 7.5"),
    ):
        with pytest.raises(TargetError, match=said):
            qcompile.compile("m.onnx", "out", passes="cast-half{dtype=bfloat16}", targets=(text,))


def run_script(folder: pathlib.Path, tools: pathlib.Path) -> list[str]:
    """The arguments that ``build.sh`` gives a trtexec that only says them."""
    tools.mkdir()
    tool = tools / "trtexec"
    tool.write_text('#!/bin/sh\npwd\nfor word in "$@"; do echo "$word"; done\n')
    tool.chmod(0o755)
    done = subprocess.run(
        [str(folder / "build.sh"), "--verbose"],
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"},
        cwd="/", capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()


def test_the_command_stands_in_a_script_that_runs(tmp_path: pathlib.Path) -> None:
    model = lowering.graph_of(TWO)
    samples = [{"x": np.ones((n, 32), np.float32)} for n in (2, 1, 8, 4, 4)]
    out = tmp_path / "out"
    [done] = qcompile.compile(model, out, calib=samples, targets=(ORIN,))
    assert sorted(p.name for p in out.iterdir()) == [
        "build.sh", "check", "model.onnx", "pipeline.txt", "report.html", "report.json",
    ]  # fmt: skip
    assert run_script(out, tmp_path / "bin") == [
        str(out), "--onnx=model.onnx", "--saveEngine=model.engine", "--stronglyTyped",
        "--minShapes=x:1x32", "--optShapes=x:2x32", "--maxShapes=x:8x32",
        "--profilingVerbosity=detailed", "--exportLayerInfo=layers.json", "--verbose",
    ]  # fmt: skip
    assert any("--minShapes=x:1x32" in line for line in done.report.warnings)


def test_what_is_not_built_is_unknown_and_never_quantized(tmp_path: pathlib.Path) -> None:
    model = lowering.graph_of(TWO)
    data = graphs.samples(model, 20)
    [done] = qcompile.compile(model, tmp_path / "out", calib=data, targets=(ORIN,))
    rows = {row.name: row for row in done.report.layers}
    assert rows["h"].runs == "unknown" and rows["h"].weight.startswith("int8")
    assert rows["h"].reason.startswith("not built here (")
    assert rows["h"].reason.endswith("): run build.sh on the device")
    assert rows["y"].runs == "float" and "32 to 10" in rows["y"].reason
    assert done.report.fused() == 0.0
    with pytest.raises(QCompileError, match="are required"):
        qcompile.compile(model, tmp_path / "more", calib=data, targets=(ORIN,), require_fused=50.0)


def test_version_11_is_typed_without_being_asked() -> None:
    assert "--stronglyTyped" in TensorRt("10.13", "ada").command({})
    assert "--stronglyTyped" not in TensorRt("11.4", "ada").command({})
    assert "Shapes" not in TensorRt("11.4", "ada").command({})


@pytest.mark.parametrize("passes", ["@int8", "@fp16", "@int8-fp16"])
def test_both_targets_write_the_same_file(tmp_path: pathlib.Path, passes: str) -> None:
    """So what the parser and builder of TensorRT-RTX take is what is left for the device."""
    pytest.importorskip("tensorrt_rtx")
    model = lowering.graph_of(TWO)
    qcompile.compile(
        model, tmp_path / "out", passes=passes, calib=graphs.samples(model, 20),
        targets=("tensorrt-rtx{cc=89}", "tensorrt{version=10.3 arch=ada}"),
    )  # fmt: skip
    one, other = (
        compiler.load(tmp_path / "out" / name / "model.onnx")
        for name in ("tensorrt-rtx", "tensorrt")
    )
    one.metadata_props.clear()
    other.metadata_props.clear()
    files = [tmp_path / "one.onnx", tmp_path / "other.onnx"]
    for model, file in zip((one, other), files, strict=True):
        compiler.execute.save(model, file)
    assert files[0].read_bytes() == files[1].read_bytes()


# -- what a device would say --------------------------------------------------------------------

# In the form of the documentation; no engine was inspected by us.
INSPECTED = {
    "Layers": [
        {"Name": "h#0", "LayerType": "gemm", "Metadata": "[ONNX Layer: h#0]",
         "Inputs": [{"Name": "x", "Format/Datatype": "Row major Int8 format"}],
         "Weights": {"Type": "Int8", "Count": 1024}},
        {"Name": "y#0", "LayerType": "gemm", "Metadata": "[ONNX Layer: y#0]",
         "Inputs": [{"Name": "h", "Format/Datatype": "Row major linear FP32"}]},
        "a name alone",
    ]
}  # fmt: skip


def test_what_the_inspector_says_counts(tmp_path: pathlib.Path) -> None:
    steps = trt_plan.inspected(json.dumps(INSPECTED))
    assert [(s.reads, s.nodes) for s in steps] == [(("int8", "int8"), ("h#0",)),
                                                   (("float",), ("y#0",))]  # fmt: skip
    model = lowering.graph_of(TWO)
    lowering.decide(model)
    target = TensorRtRtx()
    target.lower(model)
    (tmp_path / "model.engine").write_bytes(b"")
    (tmp_path / "layers.json").write_text(json.dumps(INSPECTED))
    for said, reason in (
        ('{"error": "", "sqnr": [50.0, 41.26]}', "built and run here: 41.3 dB to the simulation"),
        ('{"error": "no torch", "sqnr": []}', "built and inspected here; no torch"),
    ):
        (tmp_path / "device.json").write_text(said)
        found = target.prove(model, tmp_path)
        assert (found["h"].precision, found["h"].reason) == ("int8", reason)
        assert found["y"].precision == "float"
