"""The decision model: specs on uses, origins through edits, one decision for every target."""

from __future__ import annotations

import pathlib

import graphs
import numpy as np
import onnx_ir as ir
import pytest

import qcompile
from qcompile import execute, graph, pipeline, registry, simulate, spec, verify
from qcompile.backends.onnxruntime import OrtCpu
from qcompile.calibrate import Calibration
from qcompile.errors import PassError
from qcompile.graph import Use
from qcompile.sources import Data
from qcompile.spec import TensorSpec

SHARED = """(float[2,32] x, float[2,32] z) => (float[2,16] a, float[2,16] b) <float[32,16] w> {
    a = MatMul(x, w) b = MatMul(z, w) }"""
RESIDUAL = """(float[2,32] x) => (float[2,32] y, float[2,8] t) <float[32,32] w, float[32,8] v> {
    h = MatMul(x, w) r = Relu(h) t = MatMul(r, v) y = Mul(r, x) }"""
TIED = """(int64[2,3] ids) => (float[2,3,16] y) <float[16,32] table> {
    e = Gather(table, ids) h = Tanh(e) t = Transpose<perm=[1,0]>(table) y = MatMul(h, t) }"""
TARGET = OrtCpu()


def decided(text: str, passes: str = "calibrate,quantize") -> tuple[ir.Model, Calibration]:
    """``text`` with decisions, and the data that calibrated it."""
    model = graphs.graph(text)
    calibration = Calibration(Data("test", graphs.samples(model, 10)))
    context = pipeline.Context(calibration=calibration, target=TARGET, reference=model.clone())
    pipeline.run(model, pipeline.parse(passes, registry.passes()), context)
    return model, calibration


def weights_of(model: ir.Model) -> list[str]:
    """What feeds each DequantizeLinear of a weight."""
    found: list[str] = []
    for node in model.graph:
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if codes is not None and codes.is_initializer():
            found.append(codes.name or "")
    return found


def test_equal_decisions_on_a_weight_read_twice_share_its_codes() -> None:
    model, _ = decided(SHARED)
    TARGET.lower(model)
    assert weights_of(model) == ["w/codes"]


def test_different_decisions_on_a_weight_read_twice_make_two_copies_whose_bytes_count() -> None:
    model, _ = decided(SHARED, "calibrate,quantize,set{layer=b weight=int4 granularity=tensor}")
    specs = [layer.weight.spec for layer in graph.layers(model)]
    assert [str(s) for s in specs] == ["int8 axis=1", "int4"]
    TARGET.lower(model)
    assert len(weights_of(model)) == 2
    stored = sum(model.graph.initializers[name].const_value.nbytes for name in weights_of(model))  # type: ignore[union-attr]
    assert stored == 2 * 32 * 16  # beside an int8 input, 4-bit codes are stored in 8 bits


def test_a_value_is_integer_for_one_reader_and_float_for_another() -> None:
    model, calibration = decided(RESIDUAL)
    reference = model.clone()
    for node in reference.graph:
        spec.clear(node)
    TARGET.lower(model)
    relu = next(n for n in model.graph if n.op_type == "Relu").outputs[0]
    assert sorted(n.op_type for n, _ in relu.uses()) == ["Mul", "QuantizeLinear"]
    feeds = calibration.judges[0]
    wanted = execute.execute(reference, feeds)
    actual = execute.execute(model, feeds)
    assert simulate.sqnr(wanted["y"], actual["y"]) > 30


def test_a_tied_embedding_carries_two_decisions() -> None:
    model = graphs.graph(TIED)
    calibration = Calibration(Data("test", graphs.samples(model, 10)))
    context = pipeline.Context(calibration=calibration, target=TARGET)
    passes = pipeline.parse(
        "calibrate,quantize{weight=int4 input=float granularity=block}", registry.passes()
    )
    pipeline.run(model, passes, context)
    gather, head = (layer for layer in graph.layers(model))
    scale = graph.add_constant(model, "table/row_scale", np.full(16, 0.01, np.float32))
    gather.weight.decide(TensorSpec("int8", axis=0, scale=scale.name or ""))
    assert (gather.kind, head.kind) == ("embedding", "linear")
    # The head reads the table through a Transpose, and is decided on what it reads.
    assert (str(gather.weight.spec), str(head.weight.spec)) == (
        "int8 axis=0",
        "int4 axis=0 block=32",
    )
    verify.verify(model)
    TARGET.lower(model)
    # Rows of 32 bytes for the one, blocks of 16 bytes for the other.
    tables = {n: v.shape for n, v in model.graph.initializers.items() if n.endswith("/packed")}
    assert tables == {"table/packed": (16, 32), "t/packed": (16, 1, 16)}
    wanted = ["GatherBlockQuantized", "MatMulNBits"]
    assert [node.op_type for node in model.graph if node.domain] == wanted
    assert "table" not in model.graph.initializers


def test_a_layer_split_in_two_keeps_its_origin_and_runs_as_its_worst_part(
    tmp_path: pathlib.Path,
) -> None:
    model = graphs.graph("(float[2,32] x) => (float[2,16] y) <float[32,16] w> { y = MatMul(x, w) }")
    [layer] = graph.layers(model)
    left = graph.add_constant(model, "w/left", np.eye(32, 8, dtype=np.float32))
    right = graph.add_constant(model, "w/right", np.eye(8, 16, dtype=np.float32))
    inner = graph.insert(
        model, "MatMul", [layer.input.value if layer.input else None, left],
        output="x/left", before=layer.node,
    )  # fmt: skip
    inner.type, inner.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([2, 8])
    part = inner.producer()
    assert part is not None
    graph.set_origins(part, graph.origins(layer.node))
    Use(layer.node, 0).read_from(inner)
    layer.weight.read_from(right)
    verify.verify(model, origin_ids=["y"])
    calibration = Calibration(Data("test", graphs.samples(model, 10)))
    context = pipeline.Context(calibration=calibration, target=TARGET)
    text = f"calibrate,quantize{{exclude={part.name}}},insert-qdq"
    pipeline.run(model, pipeline.parse(text, registry.passes()), context)
    assert [graph.origins(n) for n in model.graph if n.op_type == "MatMul"] == [("y",), ("y",)]
    TARGET.emit(model, tmp_path, calibration)
    assert TARGET.prove(model, tmp_path)["y"].precision == "float"


def test_a_fused_pair_stands_for_both_layers(tmp_path: pathlib.Path) -> None:
    model = graphs.graph(graphs.CHAIN.replace("r = Relu(s) y = MatMul(r, w2)", "y = MatMul(s, w2)"))
    first, second = graph.layers(model)
    assert first.bias is not None and second.input is not None
    product = graph.constant(first.weight.value) @ graph.constant(second.weight.value)
    shift = graph.constant(first.bias.value) @ graph.constant(second.weight.value)
    x = first.input.value if first.input else None
    constants = [graph.add_constant(model, n, a) for n, a in (("w", product), ("b", shift))]
    output = graph.insert(model, "Gemm", [x, *constants], output="fused", behind=x)
    output.type, output.shape = second.output.type, second.output.shape
    fused = output.producer()
    assert fused is not None
    graph.redirect(model, second.output, output, keep=lambda _: False)
    graph.fuse(fused, first.node, second.node)
    graph.remove_dead(model)
    verify.verify(model, origin_ids=[first.name, second.name])
    calibration = Calibration(Data("test", graphs.samples(model, 10)))
    context = pipeline.Context(calibration=calibration, target=TARGET)
    pipeline.run(model, pipeline.parse("calibrate,quantize,insert-qdq", registry.passes()), context)
    TARGET.emit(model, tmp_path, calibration)
    proof = TARGET.prove(model, tmp_path)
    assert {name: ran.precision for name, ran in proof.items()} == {
        first.name: "int8",
        second.name: "int8",
    }


def test_a_lost_layer_is_noticed() -> None:
    model = graphs.graph(graphs.LINEAR)
    with pytest.raises(Exception, match="the captured layer 'gone' is lost"):
        verify.verify(model, origin_ids=["gone"])


def test_an_impossible_order_names_the_pair_and_one_that_works() -> None:
    passes = pipeline.parse("calibrate,smooth-hadamard,quantize", registry.passes())
    with pytest.raises(PassError) as error:
        pipeline.check(passes, [TARGET])
    message = str(error.value)
    assert "smooth-hadamard invalidates the 'ranges' that quantize requires" in message
    assert "smooth-hadamard,calibrate,quantize" in message


def test_decisions_survive_clone_save_and_load(tmp_path: pathlib.Path) -> None:
    model, _ = decided(SHARED)
    execute.save(model, tmp_path / "m.onnx")
    loaded = execute.load(tmp_path / "m.onnx")
    for other in (model.clone(), loaded):
        assert [la.weight.spec for la in graph.layers(other)] == [
            la.weight.spec for la in graph.layers(model)
        ]
        verify.verify(other)


def test_dead_code_removal_keeps_what_a_spec_names() -> None:
    model, _ = decided(SHARED)
    scale = next(la.weight.spec.scale for la in graph.layers(model) if la.weight.spec)
    graph.remove_dead(model)
    assert scale in model.graph.initializers
    del model.graph.initializers[scale]
    with pytest.raises(Exception, match="which is lost"):
        verify.verify(model)


def test_two_targets_from_one_run_get_opposite_dialects(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    text = """(float[1,16,8,8] x) => (float[1,16,8,8] y) <float[16,16,3,3] w, float[16] b> {
        c = Conv<pads=[1,1,1,1]>(x, w, b) y = Relu(c) }"""
    model = graphs.graph(text)
    results = qcompile.compile(
        model,
        tmp_path / "out",
        calib=graphs.samples(model, 10),
        targets=("ort-cpu", "tensorrt-rtx"),
        snapshots=tmp_path / "snapshots",
    )
    kinds = [
        {v.dtype.name for v in r.model.graph.initializers.values() if v.dtype} for r in results
    ]
    assert kinds == [{"FLOAT", "UINT8", "INT8", "INT32"}, {"FLOAT", "INT8"}]
    assert [r.report.fused() for r in results] == [1.0, 1.0]
    assert (tmp_path / "out" / "tensorrt-rtx" / "model.engine").stat().st_size > 0
    texts = sorted(path.name for path in (tmp_path / "snapshots").glob("*.txt"))
    assert texts[-2:] == ["07-insert-qdq-ort-cpu.txt", "07-insert-qdq-tensorrt-rtx.txt"]
