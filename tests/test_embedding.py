"""Laws of embedding tables in few bits, on both targets: error, size, proof, and shared codes."""

from __future__ import annotations

import pathlib
import shutil
from typing import Any

import graphs
import lowering
import numpy as np
import pytest

import qcompile
from qcompile import execute, graph, pipeline, registry, simulate, spec
from qcompile.backends.onnxruntime import OrtCpu
from qcompile.backends.tensorrt import TensorRtRtx
from qcompile.pipeline import Context

TABLE = """(int64[N,T] ids) => (float[N,T,96] y) <float[300,96] w> { y = Gather(w, ids) }"""
# The table is the head as well, as in most language models.
TIED = """(int64[N,T] ids) => (float[N,T,300] y) <float[300,96] w> {
    e = Gather(w, ids) h = Transpose<perm=[1,0]>(w) y = MatMul(e, h) }"""
IDS = {"ids": np.array([[0, 5, 299, -1], [7, 7, 150, 2]])}


def only(embedding: str, more: str = "") -> str:
    return f"quantize{{weight=float input=float embedding={embedding}{more}}}"


def ratio(passes: str, source: str = TABLE, target: OrtCpu | TensorRtRtx | None = None) -> float:
    """SQNR in dB of ``source`` as lowered for ``target``, and optimized by ONNX Runtime."""
    model = graphs.graph(source)
    wanted = execute.execute(model, IDS)["y"]
    pipeline.run(model, pipeline.parse(passes, registry.passes()), Context())
    (target or OrtCpu()).lower(model)
    return simulate.sqnr(wanted, execute.Session(model).run(IDS)["y"])


@pytest.mark.parametrize("target", [OrtCpu(), TensorRtRtx()], ids=str)
def test_the_error_falls_by_six_decibels_a_bit(target: OrtCpu | TensorRtRtx) -> None:
    found = [ratio(only(f"int{bits}", " block=32"), target=target) for bits in (5, 6, 7, 8)]
    steps = np.diff(found)
    assert (steps > 5.5).all() and (steps < 7.0).all()
    assert found[-1] > 40.0  # normal numbers, the largest of 96 at 127


def test_smaller_blocks_are_nearer() -> None:
    found = [ratio(only("int4", f" block={block}")) for block in (16, 32)]
    assert found[0] > found[1] > 16.0


def test_both_targets_compute_the_same_rows() -> None:
    for embedding in ("int8", "int4"):
        passes = only(embedding, " block=32")
        one, other = ratio(passes), ratio(passes, target=TensorRtRtx())
        assert one == pytest.approx(other, abs=1e-4)


def test_a_set_of_one_table_by_name() -> None:
    model = graphs.graph(TABLE)
    passes = f"{only('int8')},set{{layer=Gather weight=int4 granularity=block block=16}}"
    pipeline.run(model, pipeline.parse(passes, registry.passes()), Context())
    [layer] = graph.layers(model)
    assert str(layer.weight.spec) == "int4 axis=1 block=16"


def test_float_is_the_default() -> None:
    model = graphs.graph(TABLE)
    pipeline.run(model, pipeline.parse("quantize{input=float}", registry.passes()), Context())
    assert not any(spec.all_specs(node) for node in model.graph)


@pytest.mark.parametrize(
    ("embedding", "bits", "stored"), [("int8", 8 + 32 / 96, 9600 * 3 + 1200), ("int4", 5.0, 18000)]
)
def test_the_report_says_what_runs_and_how_much_is_stored(
    embedding: str, bits: float, stored: int, tmp_path: pathlib.Path
) -> None:
    model = graphs.proto(TABLE)
    [done] = qcompile.compile(model, tmp_path / "out", passes=f"{only(embedding)},insert-qdq")
    [row] = done.report.layers
    assert (row.kind, row.runs) == ("embedding", f"{embedding} weights")
    assert row.kernel == "GatherBlockQuantized"
    assert row.effective_bits == pytest.approx(bits)
    assert row.stored_bytes == stored
    assert done.report.size.compiled_bytes < stored + 3000
    # The runtime keeps the table as it is: it makes no float one when it loads the file.
    shown = lowering.optimized(done.folder / "model.onnx", tmp_path)
    assert lowering.operators(shown) == ["GatherBlockQuantized"]


def test_one_copy_serves_the_table_and_the_head_if_their_codes_are_the_same() -> None:
    passes = "quantize{weight=int4 input=float granularity=block block=32 embedding=int4}"
    model = graphs.graph(TIED)
    wanted = execute.execute(model, IDS)["y"]
    pipeline.run(model, pipeline.parse(passes, registry.passes()), Context())
    OrtCpu().lower(model)
    packed = [v for v in model.graph.initializers.values() if v.dtype == graphs.ir.DataType.UINT8]
    assert [graph.shape_of(v) for v in packed] == [(300, 3, 16)]
    assert simulate.sqnr(wanted, execute.Session(model).run(IDS)["y"]) > 14.0


def test_a_table_and_a_head_of_different_codes_are_two_copies() -> None:
    passes = "quantize{weight=int4 input=float granularity=block block=32 embedding=int8}"
    model = graphs.graph(TIED)
    pipeline.run(model, pipeline.parse(passes, registry.passes()), Context())
    OrtCpu().lower(model)
    packed = [v for v in model.graph.initializers.values() if v.dtype == graphs.ir.DataType.UINT8]
    assert sorted(graph.shape_of(v) or () for v in packed) == [(300, 3, 16), (300, 96)]


def test_a_float_table_of_a_model_in_files_is_written_with_what_became_small(
    tmp_path: pathlib.Path,
) -> None:
    (tmp_path / "in").mkdir()
    library: Any = graphs.ir  # partly untyped
    library.save(graphs.graph(TABLE), tmp_path / "in" / "model.onnx", external_data="data")
    execute.save(execute.load(tmp_path / "in" / "model.onnx"), tmp_path / "model.onnx")
    shutil.rmtree(tmp_path / "in")
    assert execute.Session(tmp_path / "model.onnx").run(IDS)["y"].shape == (2, 4, 96)


def test_a_block_without_a_kernel_stays_float_and_says_so(tmp_path: pathlib.Path) -> None:
    passes = f"{only('int4', ' block=24')},insert-qdq"
    [done] = qcompile.compile(
        graphs.proto(TABLE), tmp_path / "out", passes=passes, allow_float=True
    )
    [row] = done.report.layers
    assert row.runs == "float"
    assert row.reason == "GatherBlockQuantized takes blocks of 16, 32, 64, ..., not of 24"


@pytest.mark.parametrize("embedding", ["int8", "int4"])
def test_the_engine_keeps_the_table_in_its_bits(embedding: str, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    model = graphs.proto(TABLE.replace("[N,T", "[2,8"))
    [done] = qcompile.compile(
        model, tmp_path / "out", passes=f"{only(embedding)},insert-qdq", targets=("tensorrt-rtx",)
    )
    [row] = done.report.layers
    assert row.runs == f"{embedding} weights"
    assert row.reason == "built, not run"


def test_rows_in_a_kernel_of_any_name_are_proved_by_the_bits_that_it_reads(
    tmp_path: pathlib.Path,
) -> None:
    model = graphs.graph(TABLE)
    pipeline.run(model, pipeline.parse(only("int8"), registry.passes()), Context())
    TensorRtRtx().lower(model)
    [gather] = [node for node in model.graph if node.op_type == "Gather"]
    program = f"""header {{
descriptors {{
  tensor={{ name="codes" dims={{ 300 96 }} type=int8 }}
  tensor={{ name="ids" dims={{ 2 8 }} type=int64 }}
main {{
  function={{ name=__myl_CastMulGath input_args={{ "codes" "ids" }} layers="[ONNX Layer: {gather.name}]" }}
"""  # noqa: E501
    (tmp_path / "model.engine").write_bytes(program.encode() + bytes(8))
    [ran] = TensorRtRtx().prove(model, tmp_path).values()
    assert ran.precision == "int8 weights"
