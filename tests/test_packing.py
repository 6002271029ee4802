"""Packed codes: the runtime unpacks exactly what was written, runs as before, and files shrink."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import fits
import graphs
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile import compiler, execute, graph, numerics, packing, pareto, simulate
from qcompile.backends.onnxruntime import OrtCpu
from qcompile.backends.tensorrt import TensorRtRtx
from qcompile.capture import capture
from qcompile.models import fashion
from qcompile.numerics import IntFormat

CALIB = str(fashion.path(fashion.CALIBRATION))


def reading(shape: tuple[int, ...], bits: int, held: int, codes: numerics.Codes) -> ir.Model:
    """A model whose output is ``codes``, held in a type of ``held`` bits, dequantized."""
    text = f"""(float[1] x) => (float[{",".join(map(str, shape))}] y)
        <float one = {{1}}, int8[1] none = {{0}}> {{ y = DequantizeLinear(none, one) }}"""
    model = ir.from_proto(graphs.proto(text))
    node = model.graph[0]
    stored = numerics.pack(codes, IntFormat(held, True), "")
    node.replace_input_with(0, graph.add_constant(model, "codes", stored))
    node.metadata_props[packing.BITS] = str(bits)
    return model


@given(
    bits=st.integers(2, 7),
    held=st.sampled_from([4, 8]),
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple),
    seed=st.integers(0, 99),
)
def test_what_is_unpacked_are_the_codes(
    bits: int, held: int, shape: tuple[int, ...], seed: int
) -> None:
    bits = min(bits, held)
    rng = np.random.default_rng(seed)
    codes = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), shape).astype(np.int32)
    made = packing.packed(reading(shape, bits, held, codes))
    for optimize in (False, True):
        session = execute.Session(made, optimize=optimize)
        [found] = session.run({"x": np.zeros(1, np.float32)}).values()
        np.testing.assert_array_equal(found, codes)
    [planes] = [v for n, v in made.graph.initializers.items() if n.endswith("/packed")]
    assert planes.const_value is not None
    assert planes.const_value.nbytes == bits * math.ceil(codes.size / 8)


def compiled(name: str, weight: str, folder: pathlib.Path, entered: str = "int8") -> pathlib.Path:
    passes = f"simplify,fold-bn,calibrate,quantize{{weight={weight} input={entered}}},insert-qdq"
    [done] = compiler.compile(fashion.path(name), folder, calib=CALIB, passes=passes)
    return done.folder / "model.onnx"


@pytest.mark.parametrize("entered", ["int8", "float"])
@pytest.mark.parametrize("name", [fashion.CNN, fashion.VIT])
@pytest.mark.parametrize("weight", ["int2", "int3", "int4", "int6"])
def test_kernels_and_results_are_those_of_codes_that_are_not_packed(
    name: str, weight: str, entered: str, tmp_path: pathlib.Path
) -> None:
    model, data = fits.shipped(name), fits.calibration(16)
    passes = f"calibrate,quantize{{weight={weight} input={entered}}},insert-qdq"
    fits.run(model, passes, data)
    kinds: list[list[str]] = []
    results: list[execute.Array] = []
    sizes: list[int] = []
    for number, written in enumerate((model, OrtCpu().written(model))):
        path, optimized = (tmp_path / f"{what}{number}.onnx" for what in ("model", "optimized"))
        execute.save(written, path)
        execute.optimize(path, optimized, {})
        kinds.append(sorted(node.op_type for node in execute.load(optimized).graph))
        [output] = execute.Session(path).run(data.judges[0]).values()
        results.append(output)
        sizes.append(path.stat().st_size)
    assert kinds[0] == kinds[1]
    np.testing.assert_array_equal(results[0], results[1])
    held = weight == "int4" and entered == "float"  # in its own type already
    assert sizes[1] == sizes[0] if held else sizes[1] < sizes[0]


@pytest.mark.parametrize("name", [fashion.CNN, fashion.VIT])
def test_files_are_smaller_for_fewer_bits(name: str, tmp_path: pathlib.Path) -> None:
    formats = ("int8", "int6", "int5", "int4", "int3", "int2")
    sizes = [compiled(name, w, tmp_path / w).stat().st_size for w in formats]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    weights = sum(
        math.prod(graph.shape_of(layer.weight.value) or ())
        for layer in graph.layers(capture(fashion.path(name)))
        if graph.is_constant(layer.weight.value)
    )
    assert sizes[0] - sizes[3] > 0.4 * weights  # half a byte each, less what unpacks them


def test_the_report_counts_what_the_file_has(tmp_path: pathlib.Path) -> None:
    passes = "simplify,fold-bn,calibrate,quantize{weight=int3},insert-qdq"
    [done] = compiler.compile(
        fashion.path(fashion.CNN), tmp_path / "out", calib=CALIB, passes=passes
    )
    assert {row.runs for row in done.report.layers} == {"int8"}
    held = capture_weights(tmp_path / "out" / "model.onnx")
    for row in done.report.layers:
        count, channels = math.prod(row.weight_shape), row.weight_shape[0]
        packed = 3 * math.ceil(count / 8) if 5 * count / 8 > 2 * packing.NODES else count
        if row.name != "stem/Conv":  # to which a rule adds channels
            assert row.stored_bytes == packed + 5 * channels
            assert packed in held


def capture_weights(path: pathlib.Path) -> list[int]:
    """Bytes of each initializer of a file."""
    found = execute.load(path).graph.initializers.values()
    return [v.const_value.nbytes for v in found if v.const_value is not None]


def test_a_budget_of_size_counts_packed_codes_where_the_runtime_unpacks_them() -> None:
    for target, bytes_each in ((OrtCpu(), 3 / 8), (TensorRtRtx(), 4 / 8)):
        model = fits.shipped(fashion.VIT)
        fits.run(model, "quantize{weight=int3 input=float}", fits.calibration(4), target)
        weights = [
            graph.shape_of(layer.weight.value) or ()
            for layer in graph.layers(model)
            if layer.weight.spec is not None
        ]
        count = sum(map(math.prod, weights))
        stored = pareto.stored_of(model, target)
        scales = sum(4.5 * max(shape) for shape in weights)
        assert bytes_each * count < stored < bytes_each * count + 2 * scales + 2000


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_weights_of_a_transposed_conv_alone_are_stored_in_few_bits(
    bits: int, tmp_path: pathlib.Path
) -> None:
    model = graphs.graph("""(float[1,16,5,5] x) => (float[1,32,6,6] y) <float[16,32,4,4] w> {
        y = ConvTranspose<pads=[1,1,1,1]>(x, w) }""")
    reference, data = model.clone(), fits.correlated(model)
    fits.run(model, f"quantize{{weight=int{bits} input=float}},insert-qdq", data)
    path = tmp_path / "model.onnx"
    execute.save(OrtCpu().written(model), path)
    assert path.stat().st_size < 16 * 32 * 16 * bits / 8 + 2500
    judge = simulate.Judge(reference, data.judges)
    assert judge.worst(execute.Session(path)) == pytest.approx(6 * bits - 5, abs=4)


@pytest.mark.parametrize(("form", "count"), [("int8", 10**6), ("int7", 10**6), ("int4", 1000)])
def test_what_saves_little_is_not_packed(form: str, count: int) -> None:
    assert packing.bits_of(numerics.parse_format(form), 8, count) == 8


def test_weights_in_a_file_of_their_own_are_packed_when_they_are_written(
    tmp_path: pathlib.Path,
) -> None:
    folder = tmp_path / "float"
    folder.mkdir()
    model = capture(fashion.path(fashion.VIT))
    library: Any = ir  # partly untyped
    library.save(model, folder / "m.onnx", external_data="m.data")
    passes = "calibrate,quantize{weight=int3},insert-qdq"
    outputs: list[execute.Array] = []
    for number, source in enumerate((folder / "m.onnx", fashion.path(fashion.VIT))):
        [done] = compiler.compile(source, tmp_path / str(number), calib=CALIB, passes=passes)
        feeds = {"image": fashion.calibration()[:1]}
        [output] = execute.Session(done.folder / "model.onnx").run(feeds).values()
        outputs.append(output)
    np.testing.assert_array_equal(outputs[0], outputs[1])


@pytest.mark.parametrize("name", [fashion.CNN, fashion.VIT])
def test_a_packed_file_is_stripped_as_any_other(name: str, tmp_path: pathlib.Path) -> None:
    path = compiled(name, "int4", tmp_path / "out")
    stripped = capture(path, requantize=True)
    assert not any(n.op_type.endswith("Linear") for n in stripped.graph)
    feeds = {"image": fashion.calibration()[:32]}
    wanted, found = (
        next(iter(session.run(feeds).values()))
        for session in (execute.Session(path), execute.Session(stripped))
    )
    assert simulate.sqnr(wanted, found) > 30
