"""Choose one candidate for each item so that summed cost is least and no budget is exceeded.

The multiple-choice knapsack, one or several budgets, as a mixed-integer program of scipy's HiGHS:

    minimise    sum_l sum_c z[l, c] cost[l, c]
    subject to  sum_c z[l, c] = 1                          for every item l
                sum_l sum_c z[l, c] size[l, c, k] <= budget[k]    for every budget k
                z[l, c] in {0, 1}

What neighbours cost that lie on different sides of a border is the cut of a network, which adds

    sum_(u, v) load[u, v] max(p[u] - p[v], 0)

to what is held against one of the budgets, with ``p[l] = sum_c z[l, c]`` over the candidates of the
first side, and 0 <= p <= 1 for nodes of the network that are no item.

Costs are noise, so that they add up (see ``sensitivity``). To maximise summed SQNR instead,
as the figure of MLoRQ has it, is another problem, which gives all to a few items.
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import importlib
import os
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import networkx as nx
import numpy as np
import numpy.typing as npt
import scipy.sparse

from qcompile.errors import PassError

Doubles = npt.NDArray[np.float64]

# The relative gap between the cost found and the proven bound below which the solver stops.
GAP = 1e-4
# What summed costs are scaled to: the solver stops at an absolute gap of 1e-6 as well.
_SCALE = 1e3
# Seconds after which the best so far is taken, with the gap that it has.
_PATIENCE = 60.0


@dataclasses.dataclass(frozen=True)
class Solution:
    """``choice`` of each item, its summed ``cost``, and the proven relative ``gap`` to the least.

    ``candidates`` counts those that were left to the solver when dominated ones were gone.
    """

    choice: tuple[int, ...]
    cost: float
    gap: float
    candidates: int


Edge = tuple[str, str, float]
# The ends of a network: the nodes that always lie on the first side and on the other.
FIRST, OTHER = "first side", "other side"


@dataclasses.dataclass(frozen=True)
class Network:
    """What neighbours on different sides add to the load of budget number ``budget``.

    ``edges`` are (from, to, load): the load is added where ``from`` lies on the first side and
    ``to`` on the other; an infinite one forbids that. A node of ``items`` lies where the candidate
    of that item does: on the first side if ``first[item]`` [candidates] says so. The other nodes,
    but for FIRST and OTHER, lie where the load is least.
    """

    budget: int
    edges: Sequence[Edge]
    items: Mapping[str, int]
    first: Sequence[npt.NDArray[np.bool_]]

    def load(self, choice: Sequence[int]) -> float:
        """What the network adds to the sizes of ``choice``."""
        alone = [np.full(len(first), np.inf) for first in self.first]
        for size, number in zip(alone, choice, strict=True):
            size[number] = 0.0
        return self.least(alone)[0]

    def least(self, sizes: Sequence[Doubles]) -> tuple[float, list[int]]:
        """The least load, with ``sizes`` [candidates] of the items, and the choice that has it.

        A minimum cut; an infinite size rules a candidate out.
        """
        network: nx.DiGraph[str] = nx.DiGraph()
        network.add_nodes_from((FIRST, OTHER))
        names = [f"item {number}" for number in range(len(sizes))]
        for name, size, first in zip(names, sizes, self.first, strict=True):
            network.add_edge(FIRST, name, capacity=float(size[~first].min(initial=np.inf)))
            network.add_edge(name, OTHER, capacity=float(size[first].min(initial=np.inf)))
        for start, end, load in self.edges:
            ends = [names[self.items[n]] if n in self.items else n for n in (start, end)]
            if ends[0] != ends[1]:  # readers of one weight lie together
                before = network.get_edge_data(*ends, default={"capacity": 0.0})["capacity"]
                network.add_edge(*ends, capacity=before + load)
        library: Any = nx  # partly untyped
        load, (near, _) = library.minimum_cut(network, FIRST, OTHER)
        choice = [
            int(np.argmin(np.where(first == (name in near), size, np.inf)))
            for name, size, first in zip(names, sizes, self.first, strict=True)
        ]
        return float(load), choice


def knapsack(
    costs: Sequence[npt.ArrayLike],
    sizes: Sequence[npt.ArrayLike],
    budgets: npt.ArrayLike,
    network: Network | None = None,
) -> Solution:
    """The choice of least cost for ``costs`` [candidates] and ``sizes`` [candidates, budgets].

    ``sizes`` of one budget may be [candidates]. Sizes and budgets are not negative; costs may be.
    ``network`` adds to what one budget has to hold. Deterministic. Raises PassError, naming the
    least that is possible, if nothing fits a budget.
    """
    limits = np.atleast_1d(np.asarray(budgets, np.float64))
    cost = [np.asarray(c, np.float64) for c in costs]
    size = [
        np.asarray(s, np.float64).reshape(len(c), len(limits))
        for c, s in zip(cost, sizes, strict=True)
    ]
    if not cost:
        return Solution((), 0.0, 0.0, 0)
    least = np.sum([s.min(axis=0) for s in size], axis=0)
    if network is not None:
        least[network.budget] = network.least([s[:, network.budget] for s in size])[0]
    for number in np.flatnonzero(least > limits):
        raise PassError(
            f"a budget of {limits[number]:.10g} is too small: the least possible is "
            f"{least[number]:.10g}"
        )
    # Beside neighbours the slower and worse candidate may be the better one.
    kept = [
        efficient(c, s) if network is None else np.arange(len(c))
        for c, s in zip(cost, size, strict=True)
    ]
    found, gap = _solved(
        [c[k] for c, k in zip(cost, kept, strict=True)],
        [s[k] for s, k in zip(size, kept, strict=True)],
        limits,
        network,
    )
    choice = tuple(int(k[i]) for k, i in zip(kept, found, strict=True))
    total = float(sum(c[i] for c, i in zip(cost, choice, strict=True)))
    return Solution(choice, total, gap, sum(map(len, kept)))


def efficient(cost: Doubles, size: Doubles) -> npt.NDArray[np.intp]:
    """The candidates that no other one beats, in ascending order.

    One beats another if it is nowhere worse, in ``cost`` [n] or ``size`` [n, budgets], and better
    somewhere or earlier in the list.
    """
    all_of = np.column_stack([cost, size])
    order = np.lexsort((np.arange(len(cost)), *all_of.T[::-1]))
    kept: list[int] = []
    front = np.empty((len(order), all_of.shape[1]))
    for number in order:
        if not (front[: len(kept)] <= all_of[number]).all(axis=1).any():
            front[len(kept)] = all_of[number]
            kept.append(int(number))
    return np.sort(np.array(kept, np.intp))


def envelope(cost: npt.ArrayLike, floor: float = 0.0) -> Doubles:
    """``cost`` [n] of ever finer candidates, so that no coarser one costs less than a finer one.

    What is measured has noise, and may even be negative: a solver would take the luckiest.
    ``cost'[i] = max(cost[i], cost[i + 1], ..., floor)``.
    """
    raised = np.maximum(np.asarray(cost, np.float64), floor)
    return np.maximum.accumulate(raised[::-1])[::-1]


def descend(
    items: Sequence[int],
    cost: Callable[[int, int], float],
    fits: Callable[[Sequence[int]], bool],
) -> tuple[list[int], float]:
    """The levels of the smallest tolerance that fits, by FMPQ's criterion, without a table.

    Item ``l`` has levels 0 (finest) to ``items[l] - 1``. With tolerance ``t`` it takes the last
    level before the first whose ``cost(l, level)`` is not below ``t``. Costs along a walk are made
    to rise (the envelope); then the levels at all tolerances are one merge of sorted walks, and
    only the costs up to the answer, and one beyond for each item, are asked for. Returns the levels
    and the tolerance: the largest cost that was accepted. If not even the last levels fit, those
    are returned.
    """
    levels = [0] * len(items)
    waiting: list[tuple[float, int]] = []
    tolerance = 0.0

    def wait(item: int, least: float) -> None:
        if levels[item] + 1 < items[item]:
            heapq.heappush(waiting, (max(least, cost(item, levels[item] + 1)), item))

    if fits(levels):
        return levels, tolerance
    for item in range(len(items)):
        wait(item, 0.0)
    while waiting:
        tolerance = waiting[0][0]
        while waiting and waiting[0][0] <= tolerance:  # all of one breakpoint together
            reached, item = heapq.heappop(waiting)
            levels[item] += 1
            wait(item, reached)
        if fits(levels):
            break
    return levels, tolerance


def _solved(
    cost: Sequence[Doubles], size: Sequence[Doubles], limits: Doubles, network: Network | None
) -> tuple[list[int], float]:
    """The choices among candidates, and the gap."""
    # Shifted by each item's least, which changes no choice, so that the gap is that of what can be
    # chosen; and without what alone costs more than a choice that fits.
    base = [c.min() for c in cost]
    cost = [c - b for c, b in zip(cost, base, strict=True)]
    known = _descended(cost, size, limits) if network is None else None
    most = sum(c[i] for c, i in zip(cost, known, strict=True)) if known is not None else np.inf
    if most == 0.0 and known is not None:
        return known, 0.0
    kept = [np.flatnonzero(c <= most) for c in cost]
    weights = np.concatenate([c[k] for c, k in zip(cost, kept, strict=True)])
    loads = np.concatenate([s[k] for s, k in zip(size, kept, strict=True)]).T
    scale = _SCALE / (most if np.isfinite(most) else max(float(weights.max()), 1e-300))
    counts = [len(k) for k in kept]
    ends = np.cumsum(counts)
    owner = np.repeat(np.arange(len(counts)), counts)
    # Imported where it is used: it takes 18 MB, and most runs solve nothing.
    library: Any = importlib.import_module("scipy.optimize")
    borders = _Borders.of(network, counts) if network else None
    more = 0 if borders is None else len(borders.loads)
    shape = len(counts), len(owner) + more
    one = scipy.sparse.csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))), shape)
    # In units of the budget: a zero budget holds nothing but what is free.
    unit = np.where(limits > 0, limits, 1.0)
    allowed = limits / unit
    loads = np.pad(loads, ((0, 0), (0, more)))
    fixed = [library.LinearConstraint(one, 1, 1)]
    if network is not None and borders is not None:
        loads[network.budget, len(owner) :] = borders.loads
        fixed.append(library.LinearConstraint(borders.rows, -np.inf, borders.upper))
    for _ in range(8):
        with _quiet():
            result = library.milp(
                np.pad(weights * scale, (0, more)),
                constraints=[
                    *fixed,
                    library.LinearConstraint(loads / unit[:, None], -np.inf, allowed),
                ],
                integrality=np.pad(np.ones(len(weights)), (0, more)),
                bounds=library.Bounds(0, 1),
                options={"mip_rel_gap": GAP / 10, "time_limit": _PATIENCE},
            )
        if result.x is None:
            break
        parts = np.split(np.asarray(result.x)[: len(owner)], ends[:-1])
        choice = [int(k[int(np.argmax(x))]) for k, x in zip(kept, parts, strict=True)]
        used = np.sum([s[i] for s, i in zip(size, choice, strict=True)], axis=0)
        if network is not None:
            used[network.budget] += network.load(choice)
        # The solver allows itself a millionth; a budget does not.
        if (used <= limits).all():
            return choice, _gap(cost, choice, result.mip_dual_bound / scale)
        allowed = np.minimum(allowed, allowed - 1.5 * (used - limits) / unit)
    if known is not None:
        return known, float("inf")
    raise PassError("no choice fits all of the budgets together; raise one of them")


@dataclasses.dataclass(frozen=True)
class _Borders:
    """A network as rows of the program: ``rows @ x <= upper``.

    Behind the candidates of ``x`` stand the sides of the free nodes and, for each edge with a
    finite load, how far it is cut; ``loads`` are those of both.
    """

    rows: Any
    upper: Doubles
    loads: Doubles

    @staticmethod
    def of(network: Network, counts: Sequence[int]) -> _Borders:
        """For items of ``counts`` candidates."""
        candidates = sum(counts)
        starts = [sum(counts[:item]) for item in range(len(counts))]
        named = (name for start, end, _ in network.edges for name in (start, end))
        fixed = {*network.items, FIRST, OTHER}
        nodes = [name for name in dict.fromkeys(named) if name not in fixed]
        free = {name: candidates + number for number, name in enumerate(nodes)}
        last = candidates + len(free)
        loads = [load for _, _, load in network.edges if np.isfinite(load)]
        entries: list[tuple[int, int, float]] = []
        upper = np.zeros(len(network.edges))

        def side(row: int, name: str, sign: float) -> None:
            if name in network.items:
                item = network.items[name]
                columns = starts[item] + np.flatnonzero(network.first[item])
                entries.extend((row, int(column), sign) for column in columns)
            elif name in free:
                entries.append((row, free[name], sign))
            elif name == FIRST:
                upper[row] -= sign

        cut = 0
        for row, (start, end, load) in enumerate(network.edges):
            side(row, start, 1.0)
            side(row, end, -1.0)
            if np.isfinite(load):
                entries.append((row, last + cut, -1.0))
                cut += 1
        rows, columns, values = zip(*entries, strict=True)
        shape = len(network.edges), last + cut
        matrix = scipy.sparse.csr_array(
            (values, (rows, columns)), shape
        )  # adds what is named twice
        return _Borders(matrix, upper, np.array([0.0] * len(free) + loads))


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Drop what is written to the standard output of the process.

    The solver writes lines for its developers there, past all options and past Python.
    """
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _gap(cost: Sequence[Doubles], choice: Sequence[int], bound: float) -> float:
    total = float(sum(c[i] for c, i in zip(cost, choice, strict=True)))
    return max(total - float(bound), 0.0) / total if total > 0 else 0.0


def _descended(
    cost: Sequence[Doubles], size: Sequence[Doubles], limits: Doubles
) -> list[int] | None:
    """A choice that fits, found greedily from the least cost down; None if that finds none."""
    unit = np.where(limits > 0, limits, 1.0)
    choice = [int(np.argmin(c)) for c in cost]
    used = np.sum([s[i] for s, i in zip(size, choice, strict=True)], axis=0)

    def excess(load: Doubles) -> Doubles:
        return (np.maximum(load - limits, 0.0) / unit).sum(axis=-1)

    while (used > limits).any():
        best, step = np.inf, (-1, -1)
        for item, (c, s) in enumerate(zip(cost, size, strict=True)):
            saved = excess(used) - excess(used + s - s[choice[item]])
            smaller = np.flatnonzero(saved > 1e-12)  # or it could go in circles
            if smaller.size:
                rates = (c[smaller] - c[choice[item]]) / saved[smaller]
                pick = int(np.argmin(rates))
                if rates[pick] < best:
                    best, step = float(rates[pick]), (item, int(smaller[pick]))
        if step[0] < 0:
            return None
        used = used + size[step[0]][step[1]] - size[step[0]][choice[step[0]]]
        choice[step[0]] = step[1]
    return choice
