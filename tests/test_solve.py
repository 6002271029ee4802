"""Laws of the budgeted choice, against a dynamic program and enumeration."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile import solve
from qcompile.errors import PassError

Doubles = npt.NDArray[np.float64]
# Costs as far apart as noise of 2 and of 8 bits is; zero is one of them.
COST = st.one_of(st.just(0.0), st.floats(1e-7, 1.0))
ITEM = st.lists(st.tuples(COST, st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=4)
PROBLEM = st.tuples(
    st.lists(ITEM, min_size=1, max_size=4), st.integers(0, 120), st.integers(0, 120)
)
Problem = tuple[list[list[tuple[float, int, int]]], int, int]


def parts(problem: Problem, budgets: int) -> tuple[list[Doubles], list[Doubles], Doubles]:
    items, *limits = problem
    costs = [np.array([c for c, *_ in item]) for item in items]
    sizes = [np.array([row[1 : 1 + budgets] for row in item], float) for item in items]
    return costs, sizes, np.array(limits[:budgets], float)


def enumerated(costs: Sequence[Doubles], sizes: Sequence[Doubles], limits: Doubles) -> float:
    """The least cost of all choices that fit; infinite if none does."""
    choices = itertools.product(*(range(len(c)) for c in costs))
    fit = (c for c in choices if (sum(s[i] for s, i in zip(sizes, c, strict=True)) <= limits).all())
    return min((sum(c[i] for c, i in zip(costs, f, strict=True)) for f in fit), default=np.inf)


def dynamic(costs: Sequence[Doubles], sizes: Sequence[Doubles], limit: int) -> float:
    """The least cost with one budget, whole sizes: ``best[j]`` is that of exactly size ``j``."""
    best = np.where(np.arange(limit + 1) == 0, 0.0, np.inf)
    for cost, size in zip(costs, sizes, strict=True):
        behind = np.full(limit + 1, np.inf)
        for c, s in zip(cost, size[:, 0].astype(int), strict=True):
            if s <= limit:
                behind[s:] = np.minimum(behind[s:], best[: limit + 1 - s] + c)
        best = behind
    return float(best.min())


@given(PROBLEM)
def test_one_budget_equals_the_dynamic_program_and_enumeration(problem: Problem) -> None:
    costs, sizes, limits = parts(problem, 1)
    least = dynamic(costs, sizes, problem[1])
    np.testing.assert_allclose(least, enumerated(costs, sizes, limits), rtol=1e-12)
    check(costs, sizes, limits, least)


@given(PROBLEM)
def test_two_budgets_equal_enumeration(problem: Problem) -> None:
    costs, sizes, limits = parts(problem, 2)
    check(costs, sizes, limits, enumerated(costs, sizes, limits))


def check(costs: list[Doubles], sizes: list[Doubles], limits: Doubles, least: float) -> None:
    if np.isinf(least):
        with pytest.raises(PassError, match=r"least possible|fits all of the budgets"):
            solve.knapsack(costs, sizes, limits)
        return
    found = solve.knapsack(costs, sizes, limits)
    used = np.sum([s[i] for s, i in zip(sizes, found.choice, strict=True)], axis=0)
    assert (used <= limits).all()
    assert found.gap <= solve.GAP
    assert least * (1 - 1e-12) <= found.cost <= least * (1 + solve.GAP) + 1e-15


@given(PROBLEM)
def test_more_candidates_and_more_budget_are_never_worse(problem: Problem) -> None:
    costs, sizes, limits = parts(problem, 1)
    if np.isinf(dynamic([c[:1] for c in costs], [s[:1] for s in sizes], problem[1])):
        return
    few = solve.knapsack([c[:1] for c in costs], [s[:1] for s in sizes], limits).cost
    many = solve.knapsack(costs, sizes, limits).cost
    assert many <= few * (1 + solve.GAP)
    assert solve.knapsack(costs, sizes, limits + 7).cost <= many * (1 + solve.GAP)


def drawn(rng: np.random.Generator) -> tuple[list[Doubles], list[Doubles], solve.Network]:
    """Costs, sizes of two budgets, and a network of three items and two other nodes."""
    counts = [int(n) for n in rng.integers(1, 4, 3)]
    costs: list[Doubles] = [rng.uniform(0, 1, n) for n in counts]
    sizes: list[Doubles] = [rng.integers(0, 9, (n, 2)).astype(np.float64) for n in counts]
    first = [rng.random(n) < 0.5 for n in counts]
    nodes = [solve.FIRST, solve.OTHER, "a", "b", "c", "free", "freer"]
    edges: list[solve.Edge] = []
    for _ in range(12):
        start, end = (nodes[int(n)] for n in rng.choice(len(nodes), 2, replace=False))
        forbids = rng.random() < 0.15 and start.startswith("free")
        edges.append((start, end, np.inf if forbids else float(rng.integers(0, 9))))
    items = {"a": 0, "b": 1, "c": 2}
    return costs, sizes, solve.Network(1, edges, items, first)


def cut(network: solve.Network, choice: Sequence[int]) -> float:
    """The least load of all places of the nodes that are no item."""
    loads: list[float] = []
    for places in itertools.product((False, True), repeat=2):
        near = dict(zip(("free", "freer"), places, strict=True))
        near |= {solve.FIRST: True, solve.OTHER: False}
        near |= {n: bool(network.first[i][choice[i]]) for n, i in network.items.items()}
        loads.append(sum(load for u, v, load in network.edges if near[u] and not near[v]))
    return min(loads)


@pytest.mark.parametrize("seed", range(40))
def test_what_lies_between_neighbours_counts_as_enumeration_counts_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs, sizes, network = drawn(rng)
    limits = np.array([rng.integers(5, 25), rng.integers(10, 60)], float)
    loads: dict[tuple[int, ...], Doubles] = {}
    for choice in itertools.product(*(range(len(c)) for c in costs)):
        loads[choice] = np.sum([s[i] for s, i in zip(sizes, choice, strict=True)], axis=0)
        loads[choice][1] += cut(network, choice)
        assert network.load(choice) == pytest.approx(cut(network, choice))
    least, near = network.least([s[:, 1] for s in sizes])
    assert least == pytest.approx(min(load[1] for load in loads.values()))
    assert loads[tuple(near)][1] == pytest.approx(least)
    known = {c: sum(x[i] for x, i in zip(costs, c, strict=True)) for c in loads}
    fit = [cost for choice, cost in known.items() if (loads[choice] <= limits).all()]
    if not fit:
        with pytest.raises(PassError, match=r"least possible|fits all of the budgets"):
            solve.knapsack(costs, sizes, limits, network)
        return
    found = solve.knapsack(costs, sizes, limits, network)
    assert (loads[found.choice] <= limits).all()
    assert found.cost <= min(fit) * (1 + solve.GAP) + 1e-12


def test_forty_items_of_real_size_equal_the_dynamic_program() -> None:
    rng = np.random.default_rng(3)
    costs = [10.0 ** rng.uniform(-6, -1) * 4.0 ** -np.arange(2.0, 9) for _ in range(40)]
    weights = rng.integers(1, 60, 40)
    sizes = [w * np.arange(2.0, 9)[:, None] for w in weights]
    limit = int(4.3 * weights.sum())
    found = solve.knapsack(costs, sizes, [limit])
    least = dynamic(costs, sizes, limit)
    assert least <= found.cost <= least * (1 + solve.GAP) and found.gap <= solve.GAP


@given(ITEM)
def test_what_is_dropped_is_dominated_by_what_is_kept(item: list[tuple[float, int, int]]) -> None:
    rows = np.array(item, float)
    kept = solve.efficient(rows[:, 0], rows[:, 1:])
    for number in range(len(rows)):
        beaten = (rows[kept] <= rows[number]).all(axis=1).any()
        assert beaten and (number in kept or len(kept) < len(rows))
    for one, other in itertools.permutations(kept, 2):
        assert not (rows[one] <= rows[other]).all()


def test_a_budget_below_the_least_names_the_least() -> None:
    with pytest.raises(PassError, match="budget of 4 is too small: the least possible is 5"):
        solve.knapsack([[1.0, 2.0], [1.0]], [[3, 2], [3]], [4])


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=8))
def test_the_envelope_falls_and_lies_no_lower(cost: list[float]) -> None:
    raised = solve.envelope(cost)
    assert (np.diff(raised) <= 0).all() and (raised >= np.maximum(cost, 0.0)).all()
    assert solve.envelope(raised).tolist() == raised.tolist()


WALKS = st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=5), min_size=1, max_size=5)


@given(WALKS, st.integers(0, 40))
def test_the_tolerance_equals_that_of_a_search_over_all_breakpoints(
    walks: list[list[float]], budget: int
) -> None:
    sizes = [[(i + 1) * (len(w) - n) for n in range(len(w))] for i, w in enumerate(walks)]

    def levels_at(tolerance: float) -> list[int]:
        """FMPQ's walk: on to the next level while its cost is at most ``tolerance``."""
        found = [0] * len(walks)
        for item, walk in enumerate(walks):
            while found[item] + 1 < len(walk) and walk[found[item] + 1] <= tolerance:
                found[item] += 1
        return found

    def fits(levels: Sequence[int]) -> bool:
        return sum(s[n] for s, n in zip(sizes, levels, strict=True)) <= budget

    asked: set[tuple[int, int]] = set()

    def cost(item: int, level: int) -> float:
        assert (item, level) not in asked, "asked twice"
        asked.add((item, level))
        return walks[item][level]

    levels, _ = solve.descend([len(w) for w in walks], cost, fits)
    start = [0] * len(walks)
    points = sorted({c for walk in walks for c in walk[1:]})
    expected = next((at for t in points if fits(at := levels_at(t))), levels_at(np.inf))
    assert levels == (start if fits(start) else expected)
    assert all(level <= levels[item] + 1 for item, level in asked)
