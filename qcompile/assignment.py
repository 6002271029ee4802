"""A choice of what each layer becomes, under budgets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from qcompile import solve
from qcompile.budget import Budget
from qcompile.candidates import FLOAT_BITS, Choice, Costs, evenly
from qcompile.errors import PassError
from qcompile.solve import Network
from qcompile.timing import Timing

# Ranks of each pair of widths that a full table measures; the others are guessed (the paper's 5).
MEASURED = 5

Places = list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Assigned:
    """The number of the choice of each item, their summed cost, and the gap of the solver."""

    numbers: tuple[int, ...]
    cost: float
    gap: float = 0.0


# Whole models that are measured at most; the aim is as far below the budget as noise goes, and what
# comes as near to it as CLOSE ends the search.
ROUNDS, WITHIN, CLOSE = 10, 0.98, 0.97
# Shares of the latency of float: by how much measurements are off, and by how much what a layer in
# float takes among integers differs from layer to layer.
_NOISE, _SPREAD = 0.01, 0.02


@dataclasses.dataclass(frozen=True)
class Met:
    """A choice that meets a budget of latency, what was predicted and what was measured of it.

    ``count`` choices were measured.
    """

    assigned: Assigned
    predicted: float
    measured: float
    count: int


class Assigner:
    """Chooses for ``items`` under ``budgets``, with costs that are measured where it matters.

    Each round chooses with what is known and guessed, and measures what the choice rests on, until
    nothing is left to measure. ``full`` measures all first.
    """

    def __init__(
        self,
        costs: Costs,
        budgets: Sequence[Budget],
        full: bool = False,
        timed: Timing | None = None,
    ) -> None:
        self.costs, self.items = costs, costs.items
        self.budgets, self._timed = budgets, timed
        self.sizes = [
            np.array([[self._size(item, c, b.kind) for b in budgets] for c in choices])
            for item, choices in enumerate(self.items.choices)
        ]
        self.network = self._network()
        # A load is the amount of a budget in units, less what is spent whatever is chosen.
        self._units, self._spent = np.ones(len(budgets)), np.zeros(len(budgets))
        for number, budget in enumerate(budgets):
            self._units[number], self._spent[number] = self._unit(number, budget)
        self.limits = np.array([b.amount for b in budgets]) * self._units - self._spent
        every = [pair for item in range(len(self.items)) for pair in self._all(item)]
        # One for each is needed for a guess: the middle, since guesses are worse further away.
        middles = [(item, self.items.widths // 2) for item in range(len(self.items))]
        costs.measure(every if full else middles)

    def _size(self, item: int, choice: Choice, kind: str) -> float:
        if kind == "latency":
            assert self._timed is not None
            times = self._timed.layers[str(choice)]
            return sum(times[layer.name] for layer in self.items.readers[item])
        if kind == "bops":
            return self.items.operations(item, choice)
        return self.items.size(item, choice).of(kind)

    def _network(self) -> Network | None:
        """The borders between integers and floats, if one of the budgets is of latency."""
        place = next((n for n, b in enumerate(self.budgets) if b.kind == "latency"), None)
        if place is None or self._timed is None or not self._timed.borders:
            return None
        items = {layer.name: n for n, readers in enumerate(self.items.readers) for layer in readers}
        first = [np.array([not c.is_float for c in choices]) for choices in self.items.choices]
        return Network(place, self._timed.borders, items, first)

    def _unit(self, number: int, budget: Budget) -> tuple[float, float]:
        """The load that one of the budget is, and what of it is spent whatever is chosen."""
        if budget.kind == "bits":
            return float(sum(math.prod(self.items.shape(n)) for n in range(len(self.items)))), 0.0
        if not budget.relative:
            return 1.0, 0.0
        if budget.kind == "bops":
            whole = Choice(FLOAT_BITS)
            return sum(self.items.operations(n, whole) for n in range(len(self.items))), 0.0
        assert self._timed is not None
        return self._timed.whole, self._timed.rest

    def amount(self, numbers: Sequence[int], budget: int) -> float:
        """What the choice spends of budget number ``budget``, in its unit."""
        used = self._used(numbers)[budget] + self._spent[budget]
        return float(used / self._units[budget])

    def aim(self, budget: int, amount: float) -> None:
        """Take ``amount``, or the least there is, for that of budget number ``budget``."""
        limit = amount * self._units[budget] - self._spent[budget]
        self.limits[budget] = max(limit, self._least()[budget] * (1 + 1e-9))

    def _least(self) -> npt.NDArray[np.float64]:
        """The least load of each budget, whatever the others say."""
        least = np.sum([s.min(axis=0) for s in self.sizes], axis=0)
        if self.network is not None:
            place = self.network.budget
            least[place] = self.network.least([s[:, place] for s in self.sizes])[0]
        return least

    def _all(self, item: int) -> Places:
        """The widths, and of each pair of widths MEASURED ranks."""
        choices, widths = self.items.choices[item], self.items.widths
        chosen = list(range(widths))
        kinds: dict[tuple[int, int], list[int]] = {}
        for number in range(widths, len(choices)):
            kinds.setdefault((choices[number].bits, choices[number].inner), []).append(number)
        for numbers in kinds.values():
            chosen += evenly(numbers, MEASURED)
        return [(item, number) for number in chosen]

    def mlorq(self) -> Assigned:
        """The least summed cost, by the knapsack."""
        return self._settled(self._knapsack, lambda found: list(enumerate(found.numbers)))

    def meet(self, measure: Callable[[Assigned], float]) -> Met:
        """The least summed cost that meets the budget of latency, as ``measure`` says.

        Raises PassError, naming the least that was measured, if no choice does.
        """
        number = next(n for n, budget in enumerate(self.budgets) if budget.kind == "latency")
        budget = self.budgets[number]
        aim = WITHIN * budget.amount
        tried: dict[tuple[int, ...], Met] = {}
        profiled = [amounts[:, number].copy() for amounts in self.sizes]
        for left in reversed(range(ROUNDS)):
            met = any(one.measured <= budget.amount for one in tried.values())
            self.aim(number, aim if met or left else 0.0)
            found = self.mlorq()
            one = tried.get(found.numbers)
            if one is None:
                predicted, measured = self.amount(found.numbers, number), measure(found)
                one = tried[found.numbers] = Met(found, predicted, measured, len(tried) + 1)
                if CLOSE * budget.amount <= measured <= budget.amount:
                    break
                self._correct(number, profiled, tried)
            elif one.measured <= budget.amount:
                break
            else:
                aim *= WITHIN
        kept = [one for one in tried.values() if one.measured <= budget.amount]
        if not kept:
            least = min(one.measured for one in tried.values())
            raise PassError(
                f"budget {budget} is not met: the least that was measured is latency={least:.3g}x"
            )
        best = min(kept, key=lambda one: one.assigned.cost)
        return dataclasses.replace(best, count=len(tried))

    def _correct(
        self,
        number: int,
        profiled: Sequence[npt.NDArray[np.float64]],
        tried: Mapping[tuple[int, ...], Met],
    ) -> None:
        """Let a layer in float take what ``tried`` models say, beside its ``profiled`` time.

        A layer among integers may take more than in the float model that was profiled. With
        ``A[m, l]`` 1 for the layers in float of model ``m``, and ``r[m]`` what that took above the
        sum of its profiled times: ``r = A e`` and noise, the ``e`` about their mean (a ridge).
        """
        for amounts, times in zip(self.sizes, profiled, strict=True):
            amounts[:, number] = times
        floats = [np.array([c.is_float for c in choices]) for choices in self.items.choices]
        rows = [[f[n] for f, n in zip(floats, numbers, strict=True)] for numbers in tried]
        present: npt.NDArray[np.float64] = np.array(rows, np.float64)
        count: npt.NDArray[np.float64] = present.sum(axis=1)
        rest = np.array([m.measured - self.amount(n, number) for n, m in tried.items()])
        mean = float(rest.sum()) / max(float(count.sum()), 1.0)
        covariance = _SPREAD**2 * present @ present.T + _NOISE**2 * np.eye(len(tried))
        solved = np.asarray(np.linalg.solve(covariance, rest - mean * count), np.float64)
        extra = (mean + _SPREAD**2 * present.T @ solved) * self._units[number]
        for item, (amounts, times) in enumerate(zip(self.sizes, profiled, strict=True)):
            # No layer takes less than nothing.
            more = np.maximum(times + float(extra[item]), 0.0)
            amounts[:, number] = np.where(floats[item], more, times)

    def fmpq(self) -> Assigned:
        """The smallest tolerance of any layer that fits, then what is left for the best."""
        # What is left to spend rests on guesses: the criterion is met whatever they are.
        return self._filled(self._settled(self._tolerated, self._bounds))

    def greedy(self) -> Assigned:
        """From the widest down, each time where least is lost for what is saved."""
        return self._settled(self._lowered, lambda found: list(enumerate(found.numbers)))

    def _settled(
        self, choose: Callable[[], Assigned], rests_on: Callable[[Assigned], Places]
    ) -> Assigned:
        while True:
            found = choose()
            left = [pair for pair in rests_on(found) if not self.costs.known(*pair)]
            if not left:
                return found
            self.costs.measure(left)

    def fits(self, numbers: Sequence[int]) -> bool:
        """Whether the choice stays within all budgets."""
        return bool((self._used(numbers) <= self.limits).all())

    def _used(self, numbers: Sequence[int]) -> npt.NDArray[np.float64]:
        used = np.sum([s[n] for s, n in zip(self.sizes, numbers, strict=True)], axis=0)
        if self.network is not None:
            used[self.network.budget] += self.network.load(numbers)
        return used

    def _cost(self, numbers: Sequence[int]) -> float:
        return float(sum(c[n] for c, n in zip(self.costs.table(), numbers, strict=True)))

    def _knapsack(self) -> Assigned:
        try:
            found = solve.knapsack(self.costs.table(), self.sizes, self.limits, self.network)
        except PassError:
            self._refuse()
            raise
        return Assigned(found.choice, found.cost, found.gap)

    def _refuse(self) -> None:
        """Raise PassError, in the words of the budgets, if one alone is too small."""
        least = self._least()
        amounts = (least + self._spent) / self._units
        for budget, limit, bound, amount in zip(
            self.budgets, self.limits, least, amounts, strict=True
        ):
            if bound > limit:
                possible = dataclasses.replace(budget, amount=float(amount))
                raise PassError(f"budget {budget} is too small: the least possible is {possible}")

    def _tolerated(self) -> Assigned:
        self._refuse()
        table = self.costs.table()
        levels, _ = solve.descend(
            [self.items.widths] * len(table),
            lambda item, level: float(table[item][level]),
            self.fits,
        )
        if not self.fits(levels):
            raise PassError("no choice fits all of the budgets together; raise one of them")
        return Assigned(tuple(levels), self._cost(levels))

    def _bounds(self, found: Assigned) -> Places:
        """What was accepted last and what was refused first, of each item."""
        pairs: Places = []
        for item, number in enumerate(found.numbers):
            pairs += [(item, number)] if number else []  # the widest is not measured
            if number + 1 < self.items.widths:
                pairs.append((item, number + 1))
        return pairs

    def _filled(self, start: Assigned) -> Assigned:
        """``start`` with what is left of the budgets spent where it wins most for its size."""
        table, numbers = self.costs.table(), list(start.numbers)
        while True:
            best, step = 0.0, (-1, -1)
            room = self.limits - self._used(numbers)
            for item, now in enumerate(numbers):
                for finer in range(now):
                    more = self.sizes[item][finer] - self.sizes[item][now]
                    won = table[item][now] - table[item][finer]
                    rate = won / max(float((more / self.limits).max()), 1e-12)
                    if (more <= room).all() and rate > best:
                        best, step = rate, (item, finer)
            if step[0] < 0:
                return Assigned(tuple(numbers), self._cost(numbers))
            numbers[step[0]] = step[1]

    def _lowered(self) -> Assigned:
        self._refuse()
        table, numbers = self.costs.table(), [0] * len(self.items)
        while not self.fits(numbers):
            over = self._used(numbers) > self.limits
            best, step = np.inf, -1
            for item, now in enumerate(numbers):
                if now + 1 == self.items.widths:
                    continue
                saved = (self.sizes[item][now] - self.sizes[item][now + 1]) / self.limits
                lost = table[item][now + 1] - table[item][now]
                rate = lost / max(float(saved[over].sum()), 1e-12)
                if rate < best:
                    best, step = rate, item
            if step < 0:
                raise PassError("no choice fits all of the budgets together; raise one of them")
            numbers[step] += 1
        return Assigned(tuple(numbers), self._cost(numbers))
