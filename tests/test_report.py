"""The report: valid by its schema, shares by proof that add up, and the same figures for people."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import pathlib
from typing import Any

import graphs
import jsonschema
import lowering
import pytest
from rich.console import Console

import qcompile
from qcompile import execute, graph, report
from qcompile.models import fashion
from qcompile.report import LayerReport, Report

NET = """(float[N,8,8,8] x) => (float[N,4] y) <float[16,8,3,3] w, float[16,4] v, float[4] b> {
    c = Conv(x, w)
    r = Relu(c)
    p = GlobalAveragePool(r)
    f = Flatten(p)
    y = Gemm(f, v, b)
}"""


def compiled(folder: pathlib.Path, source: str = NET, count: int = 20, **options: Any) -> Report:
    model = lowering.graph_of(source)
    calib = graphs.samples(model, count)
    [result] = qcompile.compile(model, folder / "out", **{"calib": calib, **options})
    return result.report


def valid(found: Report) -> dict[str, Any]:
    """The report as JSON, checked against the schema."""
    read = json.loads(found.to_json())
    jsonschema.Draft202012Validator.check_schema(report.schema())
    jsonschema.validate(read, report.schema())
    return read


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"latency": True},
        {"passes": "calibrate,quantize{exclude=c},insert-qdq"},
        {"passes": "calibrate,quantize{weight=int4 input=float},insert-qdq"},
        {"passes": "simplify", "calib": None, "allow_float": True},
        {"calib": "random"},
        {"targets": ("tensorrt-rtx",)},
        {"eval": "random", "metric": "cosine"},
        {
            "eval": "random",
            "metric": "sqnr",
            "max_drop": "1%",
            "passes": "calibrate,quantize{weight=int2},insert-qdq",
        },
    ],
)
def test_every_report_is_valid(tmp_path: pathlib.Path, options: dict[str, Any]) -> None:
    if "tensorrt-rtx" in options.get("targets", ()):
        pytest.importorskip("tensorrt_rtx")
    found = compiled(tmp_path, **options)
    read = valid(found)
    assert read == json.loads((tmp_path / "out" / "report.json").read_text())


@pytest.mark.parametrize("name", [fashion.CNN, fashion.VIT])
def test_the_report_of_a_shipped_model_is_valid(tmp_path: pathlib.Path, name: str) -> None:
    calib = str(fashion.path(fashion.CALIBRATION))
    [result] = qcompile.compile(fashion.path(name), tmp_path / "out", calib=calib)
    read = valid(result.report)
    assert read["data"]["samples"] == 112 and read["data"]["judged"] == 16
    assert read["data"]["judged_apart"] and not read["data"]["random"]
    assert all(layer["macs"] > 0 for layer in read["layers"])
    assert result.report.size.compiled_bytes < result.report.size.float_bytes
    assert not result.report.warnings


def test_what_was_added_and_multiplies_is_told_beside_the_shares(tmp_path: pathlib.Path) -> None:
    source = "(float[4,64] x) => (float[4,6] y) <float[64,6] w> { y = MatMul(x, w) }"
    execute.save(graphs.graph(source), tmp_path / "m.onnx")
    data = graphs.samples(graphs.graph(source), 20)
    for passes, added in [
        ("calibrate,quantize,insert-qdq", {}),
        # x B^T and z A^T of rank 2: 2 (64 + 6) for 64 x 6 multiplications a row.
        ("low-rank{form=branch rank=2},calibrate,quantize,insert-qdq", {"branch": 140 / 384}),
        (
            "smooth-hadamard{place=everywhere block=32},calibrate,quantize,insert-qdq",
            {"rotation": 32 / 6},
        ),
    ]:
        [result] = qcompile.compile(
            tmp_path / "m.onnx", tmp_path / "out", passes=passes, calib=data
        )
        assert valid(result.report)["added"] == pytest.approx(added)


@pytest.mark.parametrize("passes", ["@int8", "calibrate,quantize{exclude=c},insert-qdq"])
def test_shares_add_up_to_one(tmp_path: pathlib.Path, passes: str) -> None:
    found = compiled(tmp_path, passes=passes)
    for what in ("macs", "weights"):
        assert sum(found.share[what].values()) == pytest.approx(1.0)
    assert found.share_of_macs("int8", "float", "unknown") == pytest.approx(1.0)


def row(runs: str, macs: int, asked: str = "int8", size: int = 4) -> LayerReport:
    return LayerReport(
        name=f"{runs}{macs}", op="Conv", kind="conv", weight_shape=(1,), macs=macs, weight=asked,
        input=asked, nominal_bits=8.0, effective_bits=8.5, stored_bytes=1, float_bytes=size,
        sqnr=None, runs=runs, kernel="", reason="",
    )  # fmt: skip


def test_shares_weigh_macs_and_float_bytes_by_what_runs() -> None:
    found = report.shares([row("int8", 30, size=1), row("float", 10, size=2), row("unknown", 60)])
    assert found["macs"] == pytest.approx({"int8": 0.3, "float": 0.1, "unknown": 0.6})
    assert found["weights"] == pytest.approx({"int8": 1 / 7, "float": 2 / 7, "unknown": 4 / 7})
    assert report.shares([]) == {"macs": {}, "weights": {}}


def test_fused_is_by_proof_and_not_by_what_was_asked(tmp_path: pathlib.Path) -> None:
    found = compiled(tmp_path)
    assert found.fused() == 1.0
    rows = [row("int8", 25), row("int4 weights", 25), row("float", 25), row("unknown", 25)]
    claimed = dataclasses.replace(found, share=report.shares(rows))
    assert claimed.fused() == 0.5


def test_an_excluded_layer_is_left_alone_with_a_reason(tmp_path: pathlib.Path) -> None:
    found = compiled(tmp_path, passes="calibrate,quantize{exclude=c},insert-qdq")
    conv, gemm = found.layers
    assert (conv.weight, conv.input, conv.runs) == ("float", "float", "float")
    assert (gemm.weight, gemm.runs) == ("int8 axis=1", "int8")
    [left] = found.left_alone
    assert (left.name, left.op, left.macs) == ("c", "Conv", conv.macs)
    assert left.reason


def test_a_layer_that_the_target_takes_back_was_asked_and_does_not_run(
    tmp_path: pathlib.Path,
) -> None:
    source = NET.replace("Gemm(f", "Gemm<alpha=0.5>(f")
    gemm = compiled(tmp_path, source).layers[1]
    assert gemm.weight == "int8 axis=1 fitted" and gemm.runs == "float"
    assert "alpha" in gemm.reason


def test_layers_have_their_multiplications_bits_and_bytes(tmp_path: pathlib.Path) -> None:
    conv, gemm = compiled(tmp_path, passes="calibrate,quantize{weight=int4},insert-qdq").layers
    # Samples have two pictures; 6x6 outputs of 16 channels from 8 channels of 3x3.
    assert conv.macs == 2 * 16 * 36 * 8 * 9
    assert gemm.macs == 2 * 16 * 4
    assert (conv.weight_shape, gemm.weight_shape) == ((16, 8, 3, 3), (16, 4))
    assert conv.float_bytes == 4 * 16 * 8 * 9 and gemm.float_bytes == 4 * 64
    assert conv.nominal_bits == gemm.nominal_bits == 4
    assert conv.effective_bits == pytest.approx(4 + 32 * 16 / (16 * 8 * 9))
    # Beside an int8 input, codes of 4 bits take a byte each; scales 4 bytes, zero points 1.
    assert conv.stored_bytes == 16 * 8 * 9 + 16 * 5


def test_packed_weights_take_half_a_byte(tmp_path: pathlib.Path) -> None:
    source = "(float[N,64] x) => (float[N,32] y) <float[64,32] w> { y = MatMul(x, w) }"
    passes = "calibrate,quantize{weight=int4 input=float granularity=block},insert-qdq"
    [layer] = compiled(tmp_path, source, passes=passes).layers
    assert layer.stored_bytes == 64 * 32 // 2 + 2 * 32 * 4  # codes and scales; no zero points
    assert layer.effective_bits == 5.0
    assert layer.runs == "int4 weights"


def test_what_multiplies_but_is_no_layer_is_named(tmp_path: pathlib.Path) -> None:
    source = """(float[8,16] x) => (float[4,16] y, float[8,8] z) <float[4,8] w, float[16,8] v> {
        y = MatMul(w, x)
        z = MatMul(x, v)
    }"""
    [left] = compiled(tmp_path, source).left_alone
    assert (left.name, left.op) == ("y", "MatMul")
    assert left.reason == "no constant weight where a layer of this kind has it"


def test_operators_that_are_not_entered_are_named(tmp_path: pathlib.Path) -> None:
    source = """(float[N,8] x, float[2,8,16] h) => (float[N,8] y, float[1,2,16] z)
    <float[8,8] w, float[1,64,16] a, float[1,64,16] r> {
        y = MatMul(x, w)
        s, z, c = LSTM<hidden_size=16>(h, a, r)
    }"""
    found = compiled(tmp_path, source)
    assert [(item.op, item.reason) for item in found.left_alone] == [
        ("LSTM", "a recurrent layer has no quantized form here yet")
    ]


# -- JSON ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_figures_that_are_not_finite_become_null(tmp_path: pathlib.Path, value: float) -> None:
    found = compiled(tmp_path)
    odd = dataclasses.replace(
        found,
        simulated_against_run=value,
        outputs=(dataclasses.replace(found.outputs[0], sqnr=value),),
    )
    read = valid(odd)
    assert read["simulated_against_run"] is None and read["outputs"][0]["sqnr"] is None


@pytest.mark.parametrize("key", ["share", "layers", "target", "schema"])
def test_a_report_that_lacks_a_key_is_invalid(tmp_path: pathlib.Path, key: str) -> None:
    read = valid(compiled(tmp_path))
    del read[key]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(read, report.schema())


def test_the_versions_of_the_runtimes_are_named() -> None:
    found = report.versions()
    assert {"qcompile", "onnx", "onnxruntime", "numpy"} <= set(found)


# -- warnings -----------------------------------------------------------------------------------


def test_random_calibration_is_a_warning(tmp_path: pathlib.Path) -> None:
    found = compiled(tmp_path, calib="random")
    assert found.data is not None and found.data.random
    assert any("random noise" in warning for warning in found.warnings)


def test_too_few_samples_are_a_warning(tmp_path: pathlib.Path) -> None:
    found = compiled(tmp_path, count=3)
    assert found.data is not None and not found.data.judged_apart
    assert any("too few samples" in warning for warning in found.warnings)


def test_a_poor_result_is_a_warning(tmp_path: pathlib.Path) -> None:
    passes = "calibrate,quantize{weight=int2 granularity=tensor},insert-qdq"
    found = compiled(tmp_path, passes=passes)
    assert any("dB of SQNR" in warning for warning in found.warnings)


# -- for people ---------------------------------------------------------------------------------


def shown(found: Report, verbose: bool = False) -> str:
    stream = io.StringIO()
    report.show(found, Console(file=stream, width=200), verbose)
    return stream.getvalue()


def test_the_terminal_says_what_runs_and_what_stays_float(tmp_path: pathlib.Path) -> None:
    found = compiled(tmp_path, passes="calibrate,quantize{exclude=y},insert-qdq")
    text = shown(found)
    assert "ort-cpu" in text and "int8" in text and "SQNR" in text
    assert f"{found.share_of_macs('int8'):.1%} int8" in text
    assert "y" in text and found.layers[1].reason in text


def test_the_terminal_shows_every_layer_when_asked(tmp_path: pathlib.Path) -> None:
    found = compiled(tmp_path)
    text = shown(found, verbose=True)
    assert all(layer.name in text and layer.kernel in text for layer in found.layers)


def test_the_terminal_shows_warnings(tmp_path: pathlib.Path) -> None:
    assert "warning:" in shown(compiled(tmp_path, calib="random"))


@pytest.mark.parametrize("verbose", [False, True])
def test_names_with_brackets_are_shown_as_they_are(tmp_path: pathlib.Path, verbose: bool) -> None:
    name = "nets[bold]/a[0][/]"
    found = compiled(tmp_path)
    found = dataclasses.replace(
        found,
        model=name,
        layers=tuple(dataclasses.replace(layer, name=name, runs="float") for layer in found.layers),
        left_alone=(report.LeftAlone("b" + name, "If", 0, name),),
        added={name: 0.1},
        outputs=(dataclasses.replace(found.outputs[0], name=name),),
        warnings=(name,),
    )
    # Title, output, both layers, the operator and its reason, the warning.
    assert shown(found, verbose).count(name) == 8


def test_every_layer_of_the_model_has_a_row(tmp_path: pathlib.Path) -> None:
    model = lowering.graph_of(NET)
    names = [layer.name for layer in graph.layers(model)]
    assert [layer.name for layer in compiled(tmp_path).layers] == names
