"""Laws of gptq."""

from __future__ import annotations

import dataclasses
import importlib
import os
import pathlib
import subprocess
import sys
from typing import Any, ClassVar

import graphs
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import threadpoolctl
from lowering import calibration_of

from qcompile import decisions, graph, patches, pipeline, registry, simulate, text, threads
from qcompile.backends.onnxruntime import OrtCpu
from qcompile.calibrate import Calibration
from qcompile.errors import PassError
from qcompile.passes import gptq
from qcompile.passes.gptq import Gptq
from qcompile.pipeline import Context
from qcompile.sources import Data, Sample

GROUPED = """(float[1,8,6,6] x) => (float[1,4,6,6] y) <float[4,4,3,3] w> {
    y = Conv<pads=[1,1,1,1], group=2>(x, w) }"""
DEPTHWISE = """(float[1,4,6,6] x) => (float[1,4,4,4] y) <float[4,1,3,3] w, float[4] b> {
    y = Conv<group=4>(x, w, b) }"""
SHARED = """(float[2,8] x, float[2,8] z) => (float[2,3] y) <float[8,3] w> {
    a = MatMul(x, w) b = MatMul(z, w) y = Add(a, b) }"""
PRODUCT = "(float[2,8] x, float[8,3] z) => (float[2,3] y) { y = MatMul(x, z) }"
WIDE = "(float[4,32] x) => (float[4,6] y) <float[32,6] w> { y = MatMul(x, w) }"
EVERY = [graphs.LINEAR, graphs.GEMM, graphs.CONV, graphs.CHAIN, GROUPED, DEPTHWISE, SHARED, WIDE]


def correlated(model: ir.Model, count: int = 40) -> Calibration:
    """Samples whose columns hang together, as those of a network do."""
    rng = np.random.default_rng(5)
    found: list[Sample] = []
    for sample in graphs.samples(model, count):
        common = {name: rng.standard_normal((*a.shape[:-1], 1)) for name, a in sample.items()}
        found.append({n: (0.3 * a + common[n]).astype(np.float32) for n, a in sample.items()})
    return Calibration(Data("test", found))


def run(model: ir.Model, passes: str, calibration: Calibration) -> list[pipeline.Step]:
    steps = pipeline.parse(passes, registry.passes())
    return pipeline.run(model, steps, Context(calibration=calibration, target=OrtCpu()))


def errors(model: ir.Model, calibration: Calibration) -> npt.NDArray[np.float64]:
    """The squared error of the outputs of every layer, row by row, on the calibration samples."""
    found: list[npt.NDArray[np.float64]] = []
    for name, gram in calibration.grams(model, list(graph.layers(model))).items():
        layer = next(one for one in graph.layers(model) if one.name == name)
        assert layer.weight.spec is not None
        weight = graph.constant(layer.weight.value)
        error = decisions.rounded(model, layer.weight.value, layer.weight.spec) - weight
        rows = patches.to_matrix(layer, error).astype(np.float64)
        matrix = gram.matrix.reshape(-1, *gram.matrix.shape[-2:])
        found.append(np.einsum("gnk,gkl,gnl->gn", rows, matrix, rows).ravel())
    return np.concatenate(found)


@pytest.mark.parametrize("source", EVERY)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_no_row_is_worse_than_rounded_to_the_nearest(source: str, bits: int) -> None:
    decide = f"calibrate,quantize{{weight=int{bits}}}"
    plain, fitted = graphs.graph(source), graphs.graph(source)
    calibration = correlated(plain)
    run(plain, decide, calibration)
    run(fitted, f"{decide},gptq", calibration)
    one, other = errors(plain, calibration), errors(fitted, calibration)
    assert len(other) and (other <= one * (1 + 1e-5) + 1e-9).all()


# Of a weight that layers share, it is the sum over them that falls.
@pytest.mark.parametrize("source", [source for source in EVERY if source != SHARED])
@pytest.mark.parametrize("granularity", ["channel", "block block=8"])
@pytest.mark.parametrize("bits", [3, 4])
def test_no_row_is_worse_for_scales_that_are_searched(
    source: str, granularity: str, bits: int
) -> None:
    decide = f"quantize{{weight=int{bits} input=float granularity={granularity}}}"
    found: list[npt.NDArray[np.float64]] = []
    for option in ("", "{rescale=true}"):
        model = graphs.graph(source)
        calibration = correlated(model)
        run(model, f"{decide},gptq{option}", calibration)
        found.append(errors(model, calibration))
    one, other = found
    assert (other <= one * (1 + 1e-5) + 1e-9).all() and other.sum() < one.sum()


def test_a_scale_for_all_is_not_searched() -> None:
    found: list[str] = []
    for option in ("", "{rescale=true}"):
        model = graphs.graph(WIDE)
        decide = "quantize{weight=int4 input=float granularity=tensor}"
        run(model, f"{decide},gptq{option}", correlated(model))
        found.append(text.render(model, weights=True))
    assert found[0] == found[1]


@pytest.mark.parametrize("block", [4, 8, 32])
def test_the_scales_are_those_of_least_squares(block: int) -> None:
    rng = np.random.default_rng(block)
    codes = rng.integers(-8, 8, (1, 5, 32)).astype(np.int32)
    scale = np.repeat(rng.uniform(0.5, 1.5, (1, 5, 32 // block)), block, axis=2)
    rows = rng.standard_normal((200, 32))
    weight = (codes * scale).astype(np.float32)
    # From another start the scales of the weight come back, but for the ridge.
    start = np.ones_like(weight)
    job = gptq.Job(weight, start, (rows.T @ rows / 200)[None], -8, 7, block)
    found = gptq.projected(job, codes)
    np.testing.assert_allclose(found, scale, rtol=0.02)
    step = found[:, :, ::block] - found[:, :, block - 1 :: block]
    assert (step == 0).all()


def test_a_scale_below_zero_reaches_one_further_above() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(-8, 8, (1, 6, 32))
    codes[:, :, ::8] = -8  # each block uses all of one side
    weight = (-0.1 * codes).astype(np.float32)
    rows = rng.standard_normal((200, 32))
    job = gptq.Job(weight, np.full_like(weight, 0.1), (rows.T @ rows / 200)[None], -8, 7, block=8)
    one, other = (
        gptq.fitted(dataclasses.replace(job, signed=signed), 0.01, rescale=True)
        for signed in (False, True)
    )
    assert one.scale is not None and (one.scale > 0).all()
    assert other.scale is not None and (other.scale < 0).all()
    errors = [
        gptq.power(weight - found.codes * found.scale.astype(np.float64), job.gram).sum()
        for found in (one, other)
        if found.scale is not None
    ]
    assert errors[1] < 0.01 * errors[0]


@pytest.mark.parametrize("granularity", ["channel", "tensor", "block block=8"])
def test_where_columns_hang_together_the_error_is_much_less(granularity: str) -> None:
    decide = f"quantize{{weight=int4 input=float granularity={granularity}}}"
    plain, fitted = graphs.graph(WIDE), graphs.graph(WIDE)
    calibration = correlated(plain)
    run(plain, decide, calibration)
    run(fitted, f"{decide},gptq", calibration)
    assert errors(fitted, calibration).sum() < errors(plain, calibration).sum() / 2


def test_without_correlation_it_rounds_to_the_nearest() -> None:
    # X^T X is a multiple of the identity: no column can make good for another.
    model = graphs.graph(WIDE)
    eye = np.eye(32, dtype=np.float32).reshape(8, 4, 32)
    calibration = Calibration(Data("test", [{"x": rows} for rows in [*eye, *eye]]))
    calibration.samples = calibration.data.samples  # all of them: every column once
    run(model, "quantize{weight=int4 input=float},gptq", calibration)
    [layer] = graph.layers(model)
    decided = layer.weight.spec
    assert decided is not None and decided.codes
    grid = decisions.grid(model, decided)
    nearest = grid.quantize(graph.constant(layer.weight.value))
    codes = decisions.codes(model, layer.weight.value, decided)
    np.testing.assert_array_equal(codes, nearest)


def test_codes_lie_on_the_grid_and_the_file_holds_them() -> None:
    model = graphs.graph(WIDE)
    calibration = correlated(model)
    run(model, "quantize{weight=int3 input=float granularity=block block=16},gptq", calibration)
    [layer] = graph.layers(model)
    decided = layer.weight.spec
    assert decided is not None
    codes = decisions.codes(model, layer.weight.value, decided)
    assert codes.min() >= -4 and codes.max() <= 3
    wanted = decisions.rounded(model, layer.weight.value, decided)
    feeds = graphs.samples(model)[0]
    lowered = simulate.simulate(model, OrtCpu())
    # MatMulNBits multiplies in int8 at its accuracy level: half a step of 127 each.
    actual = lowered.run(feeds)["y"]
    np.testing.assert_allclose(actual, feeds["x"] @ wanted, atol=0.05)


def test_only_codes_are_added() -> None:
    model = graphs.graph(graphs.LINEAR)
    calibration = calibration_of(model)
    run(model, "calibrate,quantize", calibration)
    before = text.render(model)
    run(model, "gptq", calibration)
    assert text.changes(before, text.render(model)) == [
        "+w %w/fitted: i8[8,3]",
        "-%y: f32[2,3] = MatMul(%x{int8 asymmetric}, %w{int8 axis=1})",
        "+%y: f32[2,3] = MatMul(%x{int8 asymmetric}, %w{int8 axis=1 fitted})",
    ]


def test_scales_that_are_searched_are_written_beside_the_codes() -> None:
    model = graphs.graph(graphs.LINEAR)
    calibration = correlated(model)
    run(model, "quantize{weight=int3 input=float}", calibration)
    before = text.render(model)
    run(model, "gptq{rescale=true}", calibration)
    assert text.changes(before, text.render(model)) == [
        "-w %w/scale: f32[3]",
        "-%y: f32[2,3] = MatMul(%x, %w{int3 axis=1})",
        "+w %w/fitted: i4[8,3]",
        "+w %w/scale.1: f32[3]",
        "+%y: f32[2,3] = MatMul(%x, %w{int3 axis=1 fitted})",
    ]
    [layer] = graph.layers(model)
    decided = layer.weight.spec
    assert decided is not None
    feeds = graphs.samples(model)[0]
    wanted = feeds["x"] @ decisions.rounded(model, layer.weight.value, decided)
    np.testing.assert_allclose(
        simulate.simulate(model, OrtCpu()).run(feeds)["y"], wanted, rtol=1e-4, atol=1e-5
    )


def test_what_is_not_decided_or_has_no_matrix_is_left_alone() -> None:
    for source, passes, left in (
        (PRODUCT, "calibrate,quantize{attention=int8},gptq", 1),
        (graphs.CHAIN, "quantize{input=float},gptq{exclude=*}", 2),
        (graphs.CHAIN, "quantize{weight=float input=float},gptq", 0),
    ):
        model = graphs.graph(source)
        counters = run(model, passes, calibration_of(model))[-1].counters
        assert counters["layers"] == 0 and counters["left alone"] == left


def test_a_dead_input_keeps_the_nearest() -> None:
    model = graphs.graph(graphs.LINEAR)
    zeros: list[Sample] = [{"x": np.zeros((2, 8), np.float32)} for _ in range(6)]
    step = run(model, "quantize{input=float},gptq", Calibration(Data("test", zeros)))[-1]
    assert step.counters["rows kept nearest"] == step.counters["rows"] == 3


def test_the_same_run_makes_the_same_codes() -> None:
    found: list[str] = []
    for _ in range(2):
        model = graphs.graph(graphs.CONV)
        run(model, "calibrate,quantize{weight=int4},gptq{rows=7 samples=3}", correlated(model))
        found.append(text.render(model, weights=True))
    assert found[0] == found[1]


def test_the_number_of_jobs_changes_nothing() -> None:
    found: list[str] = []
    for jobs in (1, 2):
        model = graphs.graph(graphs.CHAIN)
        context = Context(calibration=correlated(model), target=OrtCpu(), jobs=jobs)
        steps = pipeline.parse("calibrate,quantize{weight=int4},gptq", registry.passes())
        pipeline.run(model, steps, context)
        found.append(text.render(model, weights=True))
    assert found[0] == found[1]


DETERMINED = """
import hashlib
import graphs
from test_gptq import correlated, run
from qcompile import text
wide = "(float[64,384] x) => (float[64,8] y) <float[384,8] w> { y = MatMul(x, w) }"
model = graphs.graph(wide)
run(model, "quantize{weight=int4 input=float},gptq{damping=0.001}", correlated(model, 12))
print(hashlib.sha256(text.render(model, weights=True).encode()).hexdigest())
"""


def test_the_number_of_threads_changes_nothing() -> None:
    # 384 columns: from some 100 on, the library factorizes in parts by the number of its threads.
    found: set[str] = set()
    for count in ("1", "2"):
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": count, "OMP_NUM_THREADS": count}
        done = subprocess.run(
            [sys.executable, "-c", DETERMINED],
            env=environment, cwd=pathlib.Path(__file__).parent,
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        found.add(done.stdout)
    assert len(found) == 1


def test_linear_algebra_has_one_thread_in_every_pass() -> None:
    library: Any = threadpoolctl  # untyped

    @dataclasses.dataclass(frozen=True)
    class Counts(pipeline.Pass):
        name: ClassVar[str] = "counts"

        def run(self, model: ir.Model, ctx: Context) -> pipeline.Stats:
            pools = [p for p in library.threadpool_info() if p["user_api"] == "blas"]
            assert pools
            return {"threads": max(int(pool["num_threads"]) for pool in pools)}

    with threads.one():  # what is loaded after this is limited as well
        importlib.import_module("cv2")  # has a pool of its own
    with library.threadpool_limits(2, user_api="blas"):
        [step] = pipeline.run(graphs.graph(graphs.LINEAR), [Counts()], Context())
    assert step.counters == {"threads": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0.0}, "damping must be above 0, got 0"),
        ({"rows": 0}, "rows starts at 1, got 0"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        Gptq(**options)


def test_its_text_reads_back() -> None:
    step = Gptq(damping=0.1, samples=8, exclude=("a", "*/b"))
    assert str(step) == "gptq{damping=0.1 samples=8 exclude=a,*/b}"
    assert pipeline.parse(str(step), registry.passes()) == [step]
