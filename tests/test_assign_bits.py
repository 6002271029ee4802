"""Laws of assign-bits, of low-rank, and of the sensitivities behind them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import graphs
import numpy as np
import onnx_ir as ir
import pytest
from command import Command

from qcompile import (
    capture,
    compiler,
    execute,
    factors,
    graph,
    options,
    pipeline,
    registry,
    spec,
)
from qcompile import sensitivity as sensitivities
from qcompile.assignment import Assigner
from qcompile.backends.onnxruntime import OrtCpu
from qcompile.budget import Budget
from qcompile.calibrate import Calibration
from qcompile.candidates import Costs, Items, Pairs, losses_by_rank
from qcompile.deciding import Weights
from qcompile.errors import PassError, PipelineSyntaxError, QCompileError, TargetError
from qcompile.models import fashion
from qcompile.numerics import Grid, IntFormat
from qcompile.pipeline import Context
from qcompile.ports import inputs_of
from qcompile.sensitivity import Sensitivity
from qcompile.sources import Data, load
from qcompile.timing import FLOAT, Timing

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


def test_a_trial_reads_its_input_as_rounded() -> None:
    model, data = tiny()
    grid = Grid(IntFormat(8, signed=False), np.array(0.05, np.float32), np.array(100, np.int32))
    [first, *_] = graph.layers(model)
    metric = sensitivities.metric("nsr")
    measure = Sensitivity(model, data.samples, metric, {first.name: {"x": grid}})
    rounded = [{"x": grid.round_trip(sample["x"])} for sample in data.samples]
    trios = [
        (sample, execute.execute(model, sample), execute.execute(model, entered))
        for sample, entered in zip(data.samples, rounded, strict=True)
    ]
    weight = graph.constant(first.weight.value)
    np.testing.assert_allclose(measure.cost([first], weight), metric(trios), rtol=1e-4)


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
    chosen = f"samples=2 range=minmax method={method}"
    lazily, lazy = run(model, f"assign-bits{{{chosen}}}", Calibration(data.data))
    _, full = run(model, f"assign-bits{{{chosen} table=full}}", data)
    assert lazy["forward passes"] < 0.3 * full["of a whole table of"]
    assert lazy["cost"] <= 1.1 * full["cost"]
    assert lazy["bits a weight"] <= 4
    again, counters = run(model, f"assign-bits{{{chosen}}}", data)
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
        ("budget=bits=0.5x", "is no bits=4.5"),
        ("budget=latency=5", "no latency=0.6x, of float"),
        ("budget=latency=1x,latency=2x", "one budget of latency"),
        ("budget=latency=0.6x method=fmpq", "latency goes with method=mlorq"),
        ("budget=bops=1k", "no bops=20G"),
        ("budget=bops=10", "budget bops=10 is too small: the least possible is bops="),
        ("budget=bops=0.05x", "budget bops=0.05x is too small: the least possible is bops=0.0625x"),
        ("choices=float", "choices are widths of 2 to 8 bits, and float; got float"),
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


# -- float, bit operations, latency -------------------------------------------------------------

LAYERS_8 = "choices=8,float input=int8"


@dataclasses.dataclass(frozen=True)
class Clock(OrtCpu):
    """A machine on which a layer takes a microsecond a weight, and ``int8`` of that in integers.

    What stands between layers takes ``rest``, and whole models with integers take ``slower`` times
    what their layers do. A layer in float among integers takes its ``share`` of the weights more.
    """

    int8: float = 0.25
    rest: float = 0.0
    slower: float = 1.0
    share: tuple[tuple[int, float], ...] = ()

    def timing(self, decided: Mapping[str, ir.Model], calibration: Calibration) -> Timing:
        layers = {form: self._times(model) for form, model in decided.items()}
        whole = sum(layers[FLOAT].values()) + self.rest
        return Timing(layers, whole, self.rest)

    def ratio(self, decided: ir.Model, floats: ir.Model, calibration: Calibration) -> float:
        one, other = (sum(self._times(m).values()) + self.rest for m in (decided, floats))
        alone = [weights(layer) for layer in graph.layers(decided) if not layer.weight.spec]
        one += sum(size * dict(self.share).get(size, 0.0) for size in alone if widths(decided))
        return one / other * (self.slower if widths(decided) else 1.0)

    def _times(self, model: ir.Model) -> dict[str, float]:
        return {
            layer.name: (self.int8 if layer.weight.spec else 1.0) * weights(layer)
            for layer in graph.layers(model)
        }


def weights(layer: graph.Layer) -> int:
    return graph.constant(layer.weight.value).size


def test_with_room_for_all_every_layer_stays_float_and_costs_nothing() -> None:
    model, data = tiny()
    decided, counters = run(model, "assign-bits{choices=4,8,float budget=bits=32}", data)
    assert widths(decided) == [] and counters["cost"] == 0
    assert counters["bits a weight"] == 32 and counters["in float"] == 3
    assert counters["stored bytes"] == 4 * sum(map(weights, graph.layers(model)))


@pytest.mark.parametrize("method", ["mlorq", "fmpq", "greedy"])
def test_bit_operations_are_multiplications_times_bits(method: str) -> None:
    model, data = tiny()
    chosen = f"budget=bops=0.5x method={method} {LAYERS_8}"
    decided, counters = run(model, f"calibrate,assign-bits{{{chosen}}}", data)
    macs = {layer.name: 2 * weights(layer) for layer in graph.layers(decided)}
    inside = {layer.name for layer in graph.layers(decided) if layer.weight.spec}
    spent = sum(n * (64 if name in inside else 1024) for name, n in macs.items())
    share = spent / (1024 * sum(macs.values()))
    assert share <= 0.5 and counters["bit operations of float"] == pytest.approx(share, rel=1e-3)
    assert counters["in float"] == 3 - len(inside)
    for layer in graph.layers(decided):
        assert layer.input is not None
        assert (layer.input.spec is None) == (layer.weight.spec is None)
    same, _ = run(model, f"calibrate,assign-bits{{{chosen.replace('0.5x', f'{spent}')}}}", data)
    assert widths(same) == widths(decided)


def met(target: Clock, budget: str) -> dict[str, Any]:
    """What the pass counts on ``target``, which must hold the budget."""
    model, data = tiny()
    context = Context(calibration=data, target=target, reference=model)
    text = f"calibrate,assign-bits{{budget={budget} {LAYERS_8}}}"
    counters = pipeline.run(model, pipeline.parse(text, registry.passes()), context)[-1].counters
    plain = model.clone()
    for layer in graph.layers(plain):
        spec.clear(layer.node)
    limit = Budget.parse(budget.split(",")[0]).amount
    measured = target.ratio(model, plain, data)
    assert measured <= limit
    assert counters["measured latency"] == pytest.approx(measured, rel=1e-2)
    return counters


def test_a_budget_of_latency_is_met_by_measurement() -> None:
    # w1 has 384, w2 576, w3 96 weights: with w2 alone in integers 0.59 of float are left.
    exact = met(Clock(), "latency=0.61x")
    assert exact["in float"] == 2 and exact["models measured"] == 1
    assert exact["predicted latency"] == pytest.approx(0.591, abs=1e-3)
    # What is slower than predicted needs another layer, what is faster one less.
    slower = met(Clock(slower=1.2), "latency=0.61x")
    assert slower["in float"] == 1 and slower["measured latency"] > slower["predicted latency"]
    faster = met(Clock(slower=0.7), "latency=0.61x")
    assert faster["in float"] == 2 and faster["cost"] <= exact["cost"]


@pytest.mark.parametrize(("limit", "floats"), [(0.61, [96]), (0.75, [384]), (0.82, [384, 96])])
def test_what_a_layer_takes_among_integers_is_learned(limit: float, floats: list[int]) -> None:
    # What the profile says meets 0.61 with 384 and 96 in float; it takes 0.77.
    clock = Clock(share=((384, 0.5), (576, 0.5)))
    counters = met(clock, f"latency={limit}x")
    assert counters["in float"] == len(floats)
    took = 0.25 + sum(size * (0.75 + dict(clock.share).get(size, 0.0)) for size in floats) / 1056
    assert counters["measured latency"] == pytest.approx(took, rel=1e-2)


def test_other_budgets_hold_beside_one_of_latency() -> None:
    counters = met(Clock(), "latency=0.6x,bits=9")
    assert counters["bits a weight"] <= 9 and counters["measured latency"] < 0.6


@pytest.mark.parametrize(
    ("target", "least"), [(Clock(), "0.25"), (Clock(rest=352), "0.438"), (Clock(int8=2), "1")]
)
def test_a_latency_that_cannot_be_had_is_said_with_the_least(target: Clock, least: str) -> None:
    says = f"latency=0.2x is not met: the least that was measured is latency={least}x"
    with pytest.raises(PassError, match=says):
        met(target, "latency=0.2x")


def test_a_latency_is_for_targets_that_run_here() -> None:
    steps = pipeline.parse(
        f"calibrate,assign-bits{{budget=latency=0.6x {LAYERS_8}}},insert-qdq", registry.passes()
    )
    pipeline.check(steps, [OrtCpu()])
    with pytest.raises(TargetError, match="tensorrt-rtx does not run here"):
        pipeline.check(steps, [options.parse_target("tensorrt-rtx")])
    shared, forked = pipeline.fork(steps)
    assert [len(shared), len(forked)] == [1, 2]  # each target has its own choice


def test_a_measured_choice_is_made_again_by_its_text(tmp_path: pathlib.Path) -> None:
    path, data = str(fashion.path(fashion.CNN)), str(fashion.path(fashion.CALIBRATION))
    passes = f"simplify,fold-bn,calibrate,assign-bits{{budget=latency=2x,bops=0.5x {LAYERS_8}}}"
    text = f"{passes},bias-correct,insert-qdq"
    [result] = compiler.compile(path, tmp_path / "one", passes=text, calib=data)
    said = result.report.pipeline
    assert "assign-bits" not in said and "quantize{" in said and "set{" in said
    [again] = compiler.compile(path, tmp_path / "two", passes=said, calib=data)
    files = [(r.folder / "model.onnx").read_bytes() for r in (result, again)]
    assert files[0] == files[1]
    assert result.report.share == again.report.share


def test_latency_is_measured_on_the_runtime() -> None:
    path, data = fashion.path(fashion.CNN), fashion.path(fashion.CALIBRATION)
    model = capture.capture(str(path))
    calibration = Calibration(load(str(data), inputs_of(model)))
    # Twice float is met by whatever this machine finds.
    text = f"simplify,fold-bn,calibrate,assign-bits{{budget=latency=2x samples=2 {LAYERS_8}}}"
    decided, counters = run(model, text, calibration)
    assert 0 < counters["measured latency"] <= 2 and counters["models measured"] >= 1
    assert 0 < counters["predicted latency"] <= 2
    assert counters["in float"] == counters["layers"] - len(widths(decided))
    plain = run(model, "simplify,fold-bn,calibrate", calibration)[0]
    every, _ = run(plain, "quantize", calibration)
    timed = OrtCpu().timing({FLOAT: plain, "int8": every}, calibration)
    assert set(timed.layers) == {FLOAT, "int8"} and timed.rest >= 0
    for times in timed.layers.values():
        assert set(times) == {layer.name for layer in graph.layers(plain)}
        assert sum(times.values()) > 0 and min(times.values()) >= 0
    nodes = {name for edge in timed.borders for name in edge[:2]}
    assert set(timed.layers[FLOAT]) <= nodes


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
    found = losses_by_rank(weight, *small, left, right)
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
    for option, says in (("rank=-1", "rank starts at 1"), ("share=0", "must be above 0")):
        with pytest.raises(PipelineSyntaxError, match=says):
            run(model, f"low-rank{{{option}}}", data)


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


def test_a_front_of_latency_measures_every_point(qcompile: Command, tmp_path: pathlib.Path) -> None:
    model, data = str(fashion.path(fashion.CNN)), str(fashion.path(fashion.CALIBRATION))
    chosen = f"assign-bits{{samples=2 {LAYERS_8}}}"
    passes = f"simplify,fold-bn,calibrate,{chosen},insert-qdq"
    words = ["pareto", model, "--calib", data, "--budgets", "latency=2x", "--passes", passes]
    for name in ("front.json", "front.html"):
        assert qcompile(*words, "-o", tmp_path / name).code == 0
    points = json.loads((tmp_path / "front.json").read_text())["points"]
    assert [p["budget"] for p in points] == ["int8", "latency=2x"]
    assert all(p["latency"] > 0 for p in points)
    assert "latency, of float" in (tmp_path / "front.html").read_text()


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
