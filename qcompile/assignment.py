"""What each layer of a model may become, what that costs and takes, and a choice under budgets."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile import decisions, factors, graph, numerics, patches, solve, timing
from qcompile.budget import Budget
from qcompile.deciding import Weights, decide_weights, powers
from qcompile.errors import PassError
from qcompile.factors import Factors
from qcompile.graph import Layer
from qcompile.numerics import Floats, Grid
from qcompile.pipeline import Context, Pass
from qcompile.sensitivity import Sensitivity
from qcompile.solve import Network
from qcompile.spec import TensorSpec
from qcompile.timing import Timing

# The bits of a float: as a scale is stored, and as bit operations count it.
SCALE_BITS = FLOAT_BITS = 32
# Ranks of each pair of widths that a full table measures; the others are guessed (the paper's 5).
MEASURED = 5


@dataclasses.dataclass(frozen=True)
class Size:
    """What a weight takes: ``bits`` of codes, ``stored`` bytes as written, bit operations."""

    bits: float
    stored: float
    bops: float = 0.0

    def of(self, kind: str) -> float:
        """The number that a budget of ``kind`` adds up."""
        return {"bits": self.bits, "size": self.stored, "bops": self.bops}[kind]


def size_of(shape: Sequence[int], decided: TensorSpec) -> Size:
    """The size of a weight of ``shape`` as ``decided``."""
    form, count = numerics.parse_format(decided.format), math.prod(shape)
    groups = 1
    if decided.axis is not None:
        groups = shape[decided.axis] if decided.block is None else count // decided.block
    held = form.stored.bits
    codes, zeros = math.ceil(count * held / 8), math.ceil(groups * held / 8)
    return Size(form.bits * count, codes + groups * SCALE_BITS / 8 + zeros)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One thing that a weight may become: codes of ``bits``, float, or a product of low ``rank``.

    Of a product ``bits`` are those of the outer factor ``A``, and ``inner`` those of ``B``.
    """

    bits: int
    rank: int = 0
    inner: int = 0

    @property
    def is_float(self) -> bool:
        """Whether the layer stays as it is."""
        return self.bits == FLOAT_BITS

    def __str__(self) -> str:
        if self.is_float:
            return timing.FLOAT
        return f"int{self.bits}" + (f" x int{self.inner}, rank {self.rank}" if self.rank else "")


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Products of low rank among the choices: ``bits`` of either factor, and what weighs errors.

    At most ``most`` ranks of each pair of widths are kept.
    """

    bits: tuple[int, ...]
    weigh: factors.Weigh
    most: int = 12


class Items:
    """The weights of ``layers``, those that layers share once, and what each may become.

    ``model`` must stay as it is. ``how`` decides ranges and granularity; ``bits`` are the widths,
    which come first among the choices of an item, falling; FLOAT_BITS leaves a layer in float. Then
    come the products of ``pairs``, those that no other choice beats in local loss and size; a
    weight that several layers read has none. ``fit`` rounds weights of one width in place of to the
    nearest. ``entered``: the bits of what layers that are not float read.
    """

    def __init__(
        self,
        model: ir.Model,
        layers: Sequence[Layer],
        bits: Sequence[int],
        how: Weights,
        ctx: Context,
        pairs: Pairs | None = None,
        fit: Pass | None = None,
        entered: int = FLOAT_BITS,
    ) -> None:
        shared: dict[ir.Value, list[Layer]] = {}
        for layer in layers:
            shared.setdefault(layer.weight.value, []).append(layer)
        self.model, self.how, self.ctx, self.fit = model, how, ctx, fit
        self.entered = entered
        self._macs: dict[str, int] = {}
        self.readers = list(shared.values())
        widths = [Choice(width) for width in sorted(set(bits), reverse=True)]
        self.widths = len(widths)
        self.choices: list[list[Choice]] = [list(widths) for _ in self.readers]
        self._decided: dict[int, tuple[ir.Model, dict[str, Layer]]] = {}
        self._powers: dict[str, Floats] | None = None
        self.factors: dict[int, Factors] = {}
        self._losses: dict[tuple[int, Choice], float] = {}
        if pairs is not None and pairs.bits:
            self._factorize(pairs)

    def __len__(self) -> int:
        return len(self.readers)

    def name(self, item: int) -> str:
        """The name of the first layer that reads the weight."""
        return self.readers[item][0].name

    def shape(self, item: int) -> tuple[int, ...]:
        """The shape of the weight."""
        return graph.shape_of(self.readers[item][0].weight.value) or ()

    def rounded(self, item: int, choice: Choice) -> Floats:
        """What is multiplied with in place of the weight."""
        if choice.is_float:
            return graph.finite_weight(self.readers[item][0])
        if choice.rank:
            cut = self.factors[item].cut(choice.rank)
            a = self._grid(cut.a, choice.bits).round_trip(cut.a.astype(np.float32))
            b = self._grid(cut.b, choice.inner).round_trip(cut.b.astype(np.float32))
            return patches.from_matrix(self.readers[item][0], (a @ b)[None])
        model, layers = self._with(choice.bits)
        layer = layers[self.name(item)]
        decided = layer.weight.spec
        assert decided is not None
        return decisions.rounded(model, layer.weight.value, decided)

    def size(self, item: int, choice: Choice) -> Size:
        """What the weight takes."""
        if choice.rank:
            cut = self.factors[item].cut(choice.rank)
            a = size_of(cut.a.shape, TensorSpec(f"int{choice.bits}", 0))
            b = size_of(cut.b.shape, TensorSpec(f"int{choice.inner}", 0))
            return Size(a.bits + b.bits, a.stored + b.stored)
        if choice.is_float:
            bits = FLOAT_BITS * math.prod(self.shape(item))
            return Size(bits, bits / 8)
        decided = self._with(choice.bits)[1][self.name(item)].weight.spec
        assert decided is not None
        return size_of(self.shape(item), decided)

    def operations(self, item: int, choice: Choice) -> float:
        """Bit operations of a run, of all layers that read the weight."""
        if not self._macs:
            shapes = self.ctx.data().shapes(self.model)
            self._macs = {layer.name: layer.macs(shapes) for r in self.readers for layer in r}
        # Each weight, or factor, is used equally often: its bits stand for its multiplications.
        each = self.size(item, choice).bits / math.prod(self.shape(item))
        entered = FLOAT_BITS if choice.is_float else self.entered
        return each * entered * sum(self._macs[layer.name] for layer in self.readers[item])

    def loss(self, item: int, choice: Choice) -> float:
        """The mean squared error of the weight, weighed by what its elements count for.

        That is the power of what they are multiplied with; for a layer that has products of low
        rank, the weights of its factors.
        """
        layer = self.readers[item][0]
        if choice.is_float:
            return 0.0
        if item in self.factors:
            return self._losses[item, choice] if choice.rank else self._loss(item, choice)
        if self._powers is None:
            firsts = [readers[0] for readers in self.readers]
            self._powers = powers(self.model, firsts, self.ctx)
        error = graph.finite_weight(layer).astype(np.float64) - self.rounded(item, choice)
        return float(np.mean(error**2 * self._powers.get(layer.name, np.float32(1))))

    def _grid(self, factor: npt.NDArray[np.float64], bits: int) -> Grid:
        """The grid of a factor: a scale for each row, as that of the layer that it becomes."""
        form = numerics.parse_format(f"int{bits}")
        method = "mse" if self.how.method == "output" else self.how.method
        return numerics.weight_grid(factor.astype(np.float32), form, 0, method=method)

    def _with(self, bits: int) -> tuple[ir.Model, dict[str, Layer]]:
        """A model in which all weights are decided in ``bits``, and its layers by name."""
        if bits not in self._decided:
            model = self.model.clone()
            names = {layer.name for readers in self.readers for layer in readers}
            layers = [layer for layer in graph.layers(model) if layer.name in names]
            how = dataclasses.replace(self.how, format=f"int{bits}")
            decide_weights(model, layers, how, self.ctx)
            if self.fit is not None:
                self.fit.run(model, self.ctx)
            self._decided[bits] = model, {layer.name: layer for layer in layers}
        return self._decided[bits]

    def _factorize(self, pairs: Pairs) -> None:
        """Add the products of low rank."""
        fit = [
            item
            for item, readers in enumerate(self.readers)
            if len(graph.readers(readers[0].weight.value)) == 1 and factors.factorable(readers[0])
        ]
        firsts = [self.readers[item][0] for item in fit]
        weights = factors.weights(self.model, firsts, pairs.weigh, self.ctx)
        for item, layer in zip(fit, firsts, strict=True):
            matrix = factors.matrix(layer)
            rng = self.ctx.rng(layer.name)
            self.factors[item] = factors.decompose(matrix, *weights[layer.name], rng)
            self.choices[item] += self._front(item, matrix, pairs)

    def _front(self, item: int, matrix: npt.NDArray[np.float64], pairs: Pairs) -> list[Choice]:
        """The products that no width and no other product beats; a front for each pair."""
        whole, found = self.factors[item], list[Choice]()
        widths = self.choices[item][: self.widths]
        plain = [self._loss(item, choice) for choice in widths]
        sizes = [self.size(item, choice).bits for choice in widths]
        for bits, inner in itertools.product(sorted(pairs.bits), repeat=2):
            a = self._grid(whole.a, bits).round_trip(whole.a.astype(np.float32))
            b = self._grid(whole.b, inner).round_trip(whole.b.astype(np.float32))
            losses: npt.NDArray[np.float64] = losses_by_rank(matrix, a, b, whole.left, whole.right)
            taken = np.arange(1, len(losses) + 1) * (
                matrix.shape[0] * bits + matrix.shape[1] * inner
            )
            kept: list[int] = []
            for rank in range(2, len(losses) + 1):  # not 1, as the paper
                loss, size = losses[rank - 1], taken[rank - 1]
                beaten = any(p <= loss and s <= size for p, s in zip(plain, sizes, strict=True))
                if size < 8 * matrix.size and not beaten:
                    kept.append(rank)
            for chosen in evenly(kept, pairs.most):
                found.append(Choice(bits, chosen, inner))
                self._losses[item, found[-1]] = float(losses[chosen - 1])
        return found

    def _loss(self, item: int, choice: Choice) -> float:
        layer, whole = self.readers[item][0], self.factors[item]
        rounded: Floats = patches.to_matrix(layer, self.rounded(item, choice))[0]
        error: npt.NDArray[np.float64] = factors.matrix(layer) - rounded
        return float(np.mean((whole.left[:, None] * error * whole.right) ** 2))


def evenly(numbers: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of ``numbers``, evenly apart, the first and the last among them."""
    count = min(most, len(numbers))
    return [numbers[place * (len(numbers) - 1) // max(count - 1, 1)] for place in range(count)]


def losses_by_rank(
    weight: npt.NDArray[np.float64],
    a: Floats,
    b: Floats,
    left: npt.NDArray[np.float64],
    right: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """``mean((L (W - A[:, :r] B[:r]) R)^2)`` for each rank ``r``, [ranks].

    ``|X - Y|^2 = |X|^2 - 2 <X, Y> + |Y|^2``, the latter two as running sums over the ranks.
    """
    scaled = left[:, None] * weight * right
    outer, inner = left[:, None] * a.astype(np.float64), b.astype(np.float64) * right
    shared = np.einsum("nr,nr->r", outer, scaled @ inner.T)
    gram = (outer.T @ outer) * (inner @ inner.T)
    squares = np.diagonal(gram.cumsum(axis=0).cumsum(axis=1))
    lost = (scaled**2).sum() - 2 * shared.cumsum() + squares
    return np.maximum(lost, 0.0) / weight.size


class Costs:
    """The cost of each choice of each item: measured where asked for, guessed elsewhere.

    A guess is linear in the local loss between the nearest that are measured, on a double
    logarithmic scale, and proportional to it beyond them: noise at the output is to first order
    proportional to noise in the layer. Guesses rest on what was asked for here, so that a choice
    does not depend on what others have measured before; no cost is measured twice.
    """

    def __init__(self, items: Items, sensitivity: Sensitivity) -> None:
        self.items, self.sensitivity = items, sensitivity
        self._measured: dict[tuple[int, int], float] = {}
        self._known: dict[int, dict[int, float]] = {}
        self._losses: dict[tuple[int, int], float] = {}

    def measure(self, item: int, number: int) -> float:
        """The cost of choice ``number`` of ``item``."""
        choice = self.items.choices[item][number]
        if choice.is_float:
            self._measured[item, number] = 0.0
        if (item, number) not in self._measured:
            weight = self.items.rounded(item, choice)
            cost = self.sensitivity.cost(self.items.readers[item], weight)
            self._measured[item, number] = cost
        self._known.setdefault(item, {})[number] = self._measured[item, number]
        return self._measured[item, number]

    def anew(self) -> Costs:
        """These costs, with nothing asked for yet."""
        made = Costs(self.items, self.sensitivity)
        made._measured, made._losses = self._measured, self._losses
        return made

    def known(self, item: int, number: int) -> bool:
        """Whether the cost of choice ``number`` of ``item`` is measured."""
        return number in self._known.get(item, {})

    def loss(self, item: int, number: int) -> float:
        """The local loss of choice ``number`` of ``item``."""
        key = item, number
        if key not in self._losses:
            self._losses[key] = self.items.loss(item, self.items.choices[item][number])
        return self._losses[key]

    def guess(self, item: int, number: int) -> float:
        """The cost of choice ``number`` of ``item``, of which one choice at least is measured.

        Of a product from products of the same two widths, as soon as one is measured.
        """
        known, choices = self._known[item], self.items.choices[item]
        if number in known:
            return known[number]

        def kind(number: int) -> tuple[int, int]:
            return (choices[number].bits, choices[number].inner) if choices[number].rank else (0, 0)

        alike = {n: cost for n, cost in known.items() if kind(n) == kind(number)} or known
        points = sorted((self.loss(item, n), cost) for n, cost in alike.items() if cost > 0)
        loss = self.loss(item, number)
        if not points or loss == 0.0:
            return 0.0
        below = max((p for p in points if p[0] <= loss), default=points[0])
        above = min((p for p in points if p[0] > loss), default=below)
        if below == above or below[0] <= 0.0 or below[0] > loss:
            return below[1] * loss / max(below[0], 1e-300)
        share = math.log(loss / below[0]) / math.log(above[0] / below[0])
        return below[1] * (above[1] / below[1]) ** share

    def table(self) -> list[npt.NDArray[np.float64]]:
        """All costs, measured or guessed, made to fall with the width (see ``solve.envelope``).

        Costs below zero say how large noise is: those within it are told apart by the law of
        rounding noise alone, a factor of 4 a bit, or a solver would take the fewest bits of the
        luckiest.
        """
        rows = [
            np.array([self.guess(item, number) for number in range(len(choices))])
            for item, choices in enumerate(self.items.choices)
        ]
        noise = max((float(-row.min()) for row in rows), default=0.0)
        found: list[npt.NDArray[np.float64]] = []
        widths = self.items.widths
        for choices, row in zip(self.items.choices, rows, strict=True):
            bits = np.array([choice.bits for choice in choices], np.float64)
            law = noise * 4.0 ** (bits.min() - bits)
            row = np.where(row <= noise, law, row) if noise > 0 else row
            plain = solve.envelope(row[:widths][::-1])[::-1]
            found.append(np.concatenate([plain, row[widths:]]))
        return found


Places = list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Assigned:
    """The number of the choice of each item, their summed cost, and the gap of the solver."""

    numbers: tuple[int, ...]
    cost: float
    gap: float = 0.0


# Whole models that are measured; the aim is as far below the budget as noise goes, and below the
# last of these something more exact may fit.
ROUNDS, WITHIN, CLOSE = 6, 0.98, 0.95


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
        self._measure(every if full else middles)

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
        target = aim = WITHIN * budget.amount
        tried: dict[tuple[int, ...], Met] = {}
        # Predicted and measured, of what meets the budget and what does not; float is both.
        met, over = list[tuple[float, float]](), [(1.0, 1.0)]
        for left in reversed(range(ROUNDS)):
            self.aim(number, aim)
            found = self.mlorq()
            if found.numbers in tried:
                break
            predicted, measured = self.amount(found.numbers, number), measure(found)
            tried[found.numbers] = Met(found, predicted, measured, len(tried) + 1)
            if CLOSE * budget.amount <= measured <= budget.amount:
                break
            (met if measured <= budget.amount else over).append((predicted, measured))
            if met:
                (low, below), (high, above) = max(met), min(over)
                aim = low + (high - low) * (target - below) / max(above - below, 1e-9)
            else:
                aim = target * predicted / measured if left > 1 else 0.0
        kept = [one for one in tried.values() if one.measured <= budget.amount]
        if not kept:
            least = min(one.measured for one in tried.values())
            raise PassError(
                f"budget {budget} is not met: the least that was measured is latency={least:.3g}x"
            )
        best = min(kept, key=lambda one: one.assigned.cost)
        return dataclasses.replace(best, count=len(tried))

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
            self._measure(left)

    def _measure(self, pairs: Places) -> None:
        for pair in self.items.ctx.progress(pairs, "sensitivity", len(pairs)):
            self.costs.measure(*pair)

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
