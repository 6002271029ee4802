"""Laws of assign-bits, of low-rank, and of the sensitivities behind them."""

from __future__ import annotations

import functools
import itertools
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import graphs
import numpy as np
import onnx_ir as ir
import pytest
from command import Command

from qcompile import assignment, capture, execute, factors, graph, pipeline, registry
from qcompile import sensitivity as sensitivities
from qcompile.assignment import Assigner, Budget, Costs, Items, Pairs
from qcompile.backends.onnxruntime import OrtCpu
from qcompile.calibrate import Calibration
from qcompile.deciding import Weights
from qcompile.errors import PassError, PipelineSyntaxError, QCompileError
from qcompile.models import fashion
from qcompile.pipeline import Context
from qcompile.ports import inputs_of
from qcompile.sensitivity import Sensitivity
from qcompile.sources import Data, load

DEEP = """(float[2,16] x) => (float[2,4] y)
    <float[16,24] w1, float[24] b1, float[24,24] w2, float[24,4] w3, float[4] b3> {
    h = MatMul(x, w1) s = Add(h, b1) r = Relu(s)
    k = MatMul(r, w2) j = Add(k, r) y = Gemm(j, w3, b3) }"""
SHARED = """(float[2,8] x, float[2,8] z) => (float[2,3] y) <float[8,3] w> {
    a = MatMul(x, w) b = MatMul(z, w) r = Relu(a) y = Add(r, b) }"""
STRIDED = """(float[1,6,9,9] x) => (float[1,4,5,5] y) <float[4,6,1,1] w, float[4] b> {
    y = Conv<strides=[2,2], kernel_shape=[1,1]>(x, w, b) }"""
PADDED = """(float[1,6,4,4] x) => (float[1,4,6,6] y) <float[4,6,1,1] w, float[4] b> {
    y = Conv<pads=[1,1,1,1]>(x, w, b) }"""
GROUPED = """(float[1,8,6,6] x) => (float[1,4,6,6] y) <float[4,4,1,1] w> {
    y = Conv<group=2>(x, w) }"""
TRANSPOSED = """(float[8,2] x) => (float[2,3] y) <float[8,3] w> { y = Gemm<transA=1>(x, w) }"""


@functools.cache
def vit() -> tuple[ir.Model, Calibration]:
    model = capture.capture(str(fashion.path(fashion.VIT)))
    return model, Calibration(load(str(fashion.path(fashion.CALIBRATION)), inputs_of(model)))


def tiny(text: str = DEEP, count: int = 12) -> tuple[ir.Model, Calibration]:
    model = graphs.graph(text)
    return model, Calibration(Data("test", graphs.samples(model, count)))


def run(model: ir.Model, passes: str, data: Calibration) -> tuple[ir.Model, dict[str, Any]]:
    """A clone of ``model`` behind ``passes``, and what the last pass counted."""
    done = model.clone()
    steps = pipeline.parse(passes, registry.passes())
    context = Context(calibration=data, target=OrtCpu(), reference=model)
    return done, pipeline.run(done, steps, context)[-1].counters


def widths(model: ir.Model) -> list[str]:
    return [layer.weight.spec.format for layer in graph.layers(model) if layer.weight.spec]


def assigner(budget: str, pairs: Pairs | None = None) -> Assigner:
    """Over all widths of the layers of the ViT, with a whole table."""
    model, data = vit()
    context = Context(calibration=data, target=OrtCpu())
    layers = [layer for layer in graph.layers(model) if layer.kind in ("conv", "linear")]

    def make() -> Costs:
        items = Items(model, layers, (2, 3, 4, 6, 8), Weights("int8"), context, pairs)
        return Costs(items, Sensitivity(model, data.samples.some(4), sensitivities.metric("nsr")))

    costs = data.once(f"test {pairs}", make)
    return Assigner(costs.anew(), [Budget.parse(budget)], full=True)


# -- sensitivities ------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [DEEP, SHARED, graphs.CONV, graphs.CHAIN])
@pytest.mark.parametrize("metric", ["nsr", "mse", "kl"])
def test_a_trial_costs_what_the_whole_model_with_that_weight_does(source: str, metric: str) -> None:
    model, data = tiny(source)
    measure = Sensitivity(model, data.samples, sensitivities.metric(metric))
    shared: dict[ir.Value, list[graph.Layer]] = {}
    for layer in graph.layers(model):
        shared.setdefault(layer.weight.value, []).append(layer)
    for value, layers in shared.items():
        changed = graph.constant(value) * np.float32(0.9)
        whole = model.clone()
        whole.graph.initializers[value.name or ""].const_value = ir.Tensor(changed)
        trios = [
            (sample, execute.execute(model, sample), execute.execute(whole, sample))
            for sample in data.samples
        ]
        wanted = sensitivities.metric(metric)(trios)
        np.testing.assert_allclose(measure.cost(layers, changed), wanted, rtol=1e-4)
        assert measure.cost(layers, graph.constant(value)) < 1e-10  # another order of sums


def test_a_trial_counts_by_the_macs_behind_its_layer() -> None:
    model, data = tiny()
    measure = Sensitivity(model, data.samples, sensitivities.metric("nsr"))
    macs = [16 * 24, 24 * 24, 24 * 4]
    spent = 0.0
    for number, layer in enumerate(graph.layers(model)):
        measure.cost([layer], graph.constant(layer.weight.value))
        spent += sum(macs[number:]) / sum(macs)
        np.testing.assert_allclose(measure.passes, 1 + spent)


def worse(runs: Iterable[tuple[Any, dict[str, Any]]]) -> float:
    """A metric of a user: the mean of the output."""
    return float(np.mean([np.abs(outputs["y"]).mean() for _, outputs in runs]))


def test_a_function_of_the_user_is_a_metric_and_its_errors_are_sentences() -> None:
    model, data = tiny()
    _, counters = run(model, "assign-bits{metric=test_assign_bits:worse}", data)
    assert counters["layers"] == 3
    with pytest.raises(QCompileError, match="metric"):
        run(model, "assign-bits{metric=test_assign_bits:missing}", data)


# -- choices ------------------------------------------------------------------------------------


def test_more_candidates_lose_no_more_and_no_choice_exceeds_its_budget() -> None:
    pairs = Pairs((4, 8), "input")
    for bits in (3, 4):
        plain, factored = assigner(f"bits={bits}"), assigner(f"bits={bits}", pairs)
        table = plain.costs.table()
        number = [c.bits for c in plain.items.choices[0]].index(bits)
        uniform = sum(row[number] for row in table)
        mixed, product = plain.mlorq(), factored.mlorq()
        assert product.cost <= mixed.cost * (1 + 1e-4) <= uniform * (1 + 2e-4)
        assert mixed.cost < 0.7 * uniform
        for found in (mixed, plain.fmpq(), plain.greedy()):
            assert plain.fits(found.numbers)
        assert factored.fits(product.numbers)


def test_the_knapsack_is_no_worse_than_the_others_and_all_fall_with_the_budget() -> None:
    last: dict[str, float] = {}
    for bits in (6, 4.5, 3.5, 2.5, 2):
        found = assigner(f"bits={bits}")
        costs = {name: getattr(found, name)().cost for name in ("mlorq", "fmpq", "greedy")}
        assert costs["mlorq"] <= min(costs.values()) * (1 + 1e-4)
        assert all(costs[name] >= last.get(name, 0.0) * (1 - 1e-4) for name in ("mlorq",))
        last = costs


def test_fmpq_equals_the_exhaustive_search_over_its_breakpoints() -> None:
    found = assigner("bits=4")
    table = found.costs.table()

    def levels_at(tolerance: float) -> list[int]:
        return [max(n for n in range(len(row)) if n == 0 or row[n] <= tolerance) for row in table]

    points = sorted({float(cost) for row in table for cost in row[1:]})
    expected = next(at for t in points if found.fits(at := levels_at(t)))
    assert list(found._tolerated().numbers) == expected  # pyright: ignore[reportPrivateUsage]
    filled = found.fmpq()
    assert found.fits(filled.numbers)
    assert all(a <= b for a, b in zip(filled.numbers, expected, strict=True))


@pytest.mark.parametrize("method", ["mlorq", "fmpq"])
def test_a_lazy_table_loses_little_for_a_part_of_the_passes(method: str) -> None:
    model, data = vit()
    options = f"samples=2 range=minmax method={method}"
    lazily, lazy = run(model, f"assign-bits{{{options}}}", Calibration(data.data))
    _, full = run(model, f"assign-bits{{{options} table=full}}", data)
    assert lazy["forward passes"] < 0.3 * full["of a whole table of"]
    assert lazy["cost"] <= 1.1 * full["cost"]
    assert lazy["bits a weight"] <= 4
    again, counters = run(model, f"assign-bits{{{options}}}", data)
    assert counters["forward passes"] == 0  # all is known,
    assert widths(lazily) == widths(again)  # and changes nothing


@pytest.mark.parametrize("method", ["mlorq", "fmpq", "greedy"])
@pytest.mark.parametrize("budget", ["bits=4.5", "size=800", "bits=6,size=900"])
def test_what_is_stored_is_within_the_budget(method: str, budget: str) -> None:
    model, data = tiny()
    decided, counters = run(model, f"assign-bits{{budget={budget} method={method}}}", data)
    for one in map(Budget.parse, budget.split(",")):
        spent = counters["bits a weight" if one.kind == "bits" else "stored bytes"]
        assert spent <= one.amount
    stored = 0
    lowered = decided.clone()
    OrtCpu().lower(lowered)
    for name, value in lowered.graph.initializers.items():
        if "w" in name and value.const_value is not None:
            stored += value.const_value.nbytes
    assert stored <= counters["stored bytes"]


def test_layers_that_share_a_weight_share_its_width_and_pay_for_it_once() -> None:
    model, data = tiny(SHARED)
    decided, counters = run(model, "assign-bits{budget=bits=6}", data)
    assert widths(decided) == ["int6", "int6"]
    assert counters["bits a weight"] == 6 and counters["layers"] == 2


def test_luck_below_zero_wins_no_layer_its_bits() -> None:
    model, data = tiny()
    context = Context(calibration=data, target=OrtCpu())
    items = Items(model, list(graph.layers(model)), (2, 4, 8), Weights("int8"), context)
    noise = iter(itertools.cycle([0.01, -0.02, 0.005, -0.001]))
    measure = Sensitivity(model, data.samples, lambda _: next(noise))
    table = Assigner(Costs(items, measure), [Budget("bits", 8)], full=True).costs.table()
    assert all((np.diff(row) > 0).all() for row in table)  # fewer bits always cost more


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("budget=bits=1", "budget bits=1 is too small: the least possible is bits=2"),
        ("budget=size=10", "budget size=10 is too small: the least possible is size="),
        ("budget=4MB", "is no bits=4.5 and no size=4MB"),
        ("budget=watts=3", "is no bits=4.5 and no size=4MB"),
        ("budget=", "needs a budget"),
        ("choices=1,4", "choices are widths of 2 to 8 bits"),
        ("factors=9", "factors are widths of 2 to 8 bits"),
        ("method=fmpq factors=4", "factors go with method=mlorq"),
        ("metric=sqnr", "metric 'sqnr' is none of nsr, mse, kl"),
        ("samples=0", "samples starts at 1"),
        ("exclude=nothing*", "exclude=nothing[*] matches no layer"),
    ],
)
def test_what_cannot_be_had_is_said(options: str, says: str) -> None:
    model, data = tiny()
    with pytest.raises((PassError, PipelineSyntaxError), match=says):
        run(model, f"assign-bits{{{options}}}", data)


# -- low rank -----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [DEEP, graphs.GEMM, graphs.CHAIN, STRIDED, PADDED])
@pytest.mark.parametrize("weigh", ["hessian", "input", "both", "none"])
def test_the_full_rank_keeps_the_function_and_origins(source: str, weigh: str) -> None:
    model, data = tiny(source)
    done, counters = run(model, f"low-rank{{rank=999 weigh={weigh}}}", data)
    assert counters["layers"] == sum(1 for _ in graph.layers(model))
    for sample in graphs.samples(model, 2, seed=9):
        want, got = execute.execute(model, sample)["y"], execute.execute(done, sample)["y"]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    before = {o for layer in graph.layers(model) for o in graph.origins(layer.node)}
    made = [graph.origins(layer.node) for layer in graph.layers(done)]
    assert len(made) == 2 * len(before) and {o for each in made for o in each} == before


@pytest.mark.parametrize("source", [GROUPED, TRANSPOSED, graphs.CONV, SHARED])
def test_groups_kernels_and_shared_weights_are_left_alone(source: str) -> None:
    model, data = tiny(source)
    done, counters = run(model, "low-rank{rank=1}", data)
    assert counters["layers"] == 0 and counters["left alone"] > 0
    assert done.graph.num_nodes() == model.graph.num_nodes()


def test_the_error_falls_with_the_rank_and_each_weighing_is_best_at_its_own() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((20, 30))
    left, right = rng.uniform(0.1, 3, 20), rng.uniform(0.1, 3, 30)
    weighed = factors.decompose(weight, left, right, rng)
    plain = factors.decompose(weight, np.ones(20), np.ones(30), rng)

    def loss(found: factors.Factors, rank: int) -> float:
        cut = found.cut(rank)
        return float(np.sum((left[:, None] * (weight - cut.a @ cut.b) * right) ** 2))

    losses = [loss(weighed, rank) for rank in range(1, 21)]
    assert (np.diff(losses) < 0).all() and losses[-1] < 1e-18
    assert all(loss(weighed, rank) < loss(plain, rank) for rank in range(1, 20))


def test_losses_of_all_ranks_are_those_of_each() -> None:
    rng = np.random.default_rng(1)
    weight, a, b = rng.standard_normal((9, 7)), rng.standard_normal((9, 5)), rng.random((5, 7))
    left, right = rng.random(9), rng.random(7)
    small = a.astype(np.float32), b.astype(np.float32)
    found = assignment.losses_by_rank(weight, *small, left, right)
    wanted = [
        np.mean((left[:, None] * (weight - a[:, :r] @ b[:r]) * right) ** 2) for r in range(1, 6)
    ]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_a_large_weight_has_nearly_the_first_factors_of_the_exact_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(2)
    left = np.linalg.qr(rng.standard_normal((120, 120)))[0]
    right = np.linalg.qr(rng.standard_normal((120, 120)))[0]
    weight = ((left * 0.9 ** np.arange(120)) @ right).astype(np.float64)
    ones = np.ones(120)
    exact = factors.decompose(weight, ones, ones, rng).cut(20)
    monkeypatch.setattr(factors, "_LARGE", 64)
    quick = factors.decompose(weight, ones, ones, rng, 20)
    losses = [float(np.sum((weight - f.a @ f.b) ** 2)) for f in (exact, quick)]
    assert losses[0] <= losses[1] < 1.02 * losses[0]


def test_a_decaying_spectrum_becomes_a_product_and_runs_quantized() -> None:
    model, data = tiny("(float[8,48] x) => (float[8,48] y) <float[48,48] w> { y = MatMul(x, w) }")
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((48, 48)))[0] for _ in range(2))
    steep = ((u * np.arange(1, 49) ** -1.5) @ v).astype(np.float32)
    model.graph.initializers["w"].const_value = ir.Tensor(steep)
    plain, _ = run(model, "assign-bits{budget=bits=3},insert-qdq", data)
    counted = run(model, "assign-bits{budget=bits=3 factors=4,6,8}", data)[1]
    product, _ = run(model, "assign-bits{budget=bits=3 factors=4,6,8},insert-qdq", data)
    assert counted["products"] == 1 and counted["bits a weight"] <= 3
    sample = data.samples[0]
    want = execute.execute(model, sample)["y"]
    errors = [np.sum((execute.execute(m, sample)["y"] - want) ** 2) for m in (plain, product)]
    assert errors[1] < 0.3 * errors[0]


def test_without_an_option_of_its_own_a_rank_is_a_share_of_the_multiplications() -> None:
    model, data = tiny()
    _, counters = run(model, "low-rank{share=0.5}", data)
    assert counters["weights"] <= 0.5 * counters["before"]
    for options, says in (("rank=-1", "rank starts at 1"), ("share=0", "must be above 0")):
        with pytest.raises(PipelineSyntaxError, match=says):
            run(model, f"low-rank{{{options}}}", data)


# -- qcompile pareto ----------------------------------------------------------------------------


def test_every_point_of_a_front_is_what_its_pipeline_makes(
    qcompile: Command, tmp_path: pathlib.Path
) -> None:
    model, data = str(fashion.path(fashion.CNN)), str(fashion.path(fashion.CALIBRATION))
    words = ["pareto", model, "--calib", data, "--budgets", "bits=3.5,5,size=60kB"]
    passes = ["--passes", "simplify,fold-bn,assign-bits{samples=4},insert-qdq"]
    for name in ("front.json", "front.png", "front.html"):
        assert qcompile(*words, *passes, "-o", tmp_path / name).code == 0
    front = json.loads((tmp_path / "front.json").read_text())
    assert "<svg" in (tmp_path / "front.html").read_text()
    points = [p for p in front["points"] if p["kind"] == "assigned"]
    assert [p["budget"] for p in points] == ["bits=3.5", "bits=5", "size=60000"]
    assert points[0]["bits"] <= 3.5 and points[1]["bits"] <= 5
    assert points[0]["sqnr"] < points[1]["sqnr"]
    by_width = {p["budget"]: p["sqnr"] for p in front["points"] if p["kind"] == "uniform"}
    assert by_width["int3"] < points[0]["sqnr"]
    done = qcompile(model, "--calib", data, "--passes", points[1]["passes"], "-o", tmp_path / "out")
    assert done.code == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    np.testing.assert_allclose(report["outputs"][0]["sqnr"], points[1]["sqnr"], atol=0.05)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-o", "front.pdf"], "must end in"),
        (["--budgets", ","], "names no budget"),
        (["--budgets", "bits=four"], "is no bits=4.5"),
        (["--passes", "calibrate,quantize,insert-qdq"], "needs one assign-bits"),
    ],
)
def test_a_wrong_front_is_said(qcompile: Command, words: list[str], says: str) -> None:
    model, data = str(fashion.path(fashion.CNN)), str(fashion.path(fashion.CALIBRATION))
    result = qcompile("pareto", model, "--calib", data, *words)
    assert result.code == 1 and says in " ".join(result.err.split())
