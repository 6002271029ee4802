"""What each layer of a model may become, what that takes, and what it costs at the outputs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile import (
    deciding,
    decisions,
    factors,
    graph,
    numerics,
    packing,
    patches,
    solve,
    timing,
)
from qcompile.deciding import Weights
from qcompile.factors import Factors
from qcompile.graph import Layer
from qcompile.numerics import Floats, Grid
from qcompile.pipeline import Context, Pass
from qcompile.sensitivity import Sensitivity
from qcompile.spec import TensorSpec

# The bits of a float: as a scale is stored, and as bit operations count it.
SCALE_BITS = FLOAT_BITS = 32


@dataclasses.dataclass(frozen=True)
class Size:
    """What a weight takes: ``bits`` of codes, ``stored`` bytes as written, bit operations."""

    bits: float
    stored: float
    bops: float = 0.0

    def of(self, kind: str) -> float:
        """The number that a budget of ``kind`` adds up."""
        return {"bits": self.bits, "size": self.stored, "bops": self.bops}[kind]


def size_of(
    shape: Sequence[int], decided: TensorSpec, unpacks: bool = False, wide: bool = False
) -> Size:
    """The size of a weight of ``shape`` as ``decided``.

    Packed if a runtime ``unpacks`` codes, else in types of 8 bits if ``wide``, as beside a
    quantized input.
    """
    form, count = numerics.parse_format(decided.format), math.prod(shape)
    groups = 1
    if decided.axis is not None:
        groups = shape[decided.axis] if decided.block is None else count // decided.block
    held = max(form.stored.bits, 8 if wide else 0)
    packed = packing.bits_of(form, held, count) if unpacks and decided.block is None else held
    codes, zeros = packed * math.ceil(count / 8), math.ceil(groups * held / 8)
    codes += packing.NODES if packed < held else 0
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
        self.unpacks = ctx.target is not None and ctx.target.kernels().unpacks
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

    def decide(self) -> None:
        """Decide all weights in each of the widths, once; spread by ``Context.map``."""
        if self._decided:
            return
        widths = [c.bits for c in self.choices[0][: self.widths] if not c.is_float]
        ways = [dataclasses.replace(self.how, format=f"int{bits}") for bits in widths]
        names = [layer.name for readers in self.readers for layer in readers]
        layers = [layer for layer in graph.layers(self.model) if layer.name in set(names)]
        grids = list(deciding.grids_of(self.model, layers, ways, self.ctx))
        for place, (bits, how) in enumerate(zip(widths, ways, strict=True)):
            model = self.model.clone()
            kept = {layer.name: layer for layer in graph.layers(model)}
            here = [kept[layer.name] for layer in layers]
            deciding.write_weights(model, here, how, (each[place] for each in grids))
            if self.fit is not None:
                self.fit.run(model, self.ctx)
            self._decided[bits] = model, {layer.name: layer for layer in here}

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
            a = size_of(cut.a.shape, TensorSpec(f"int{choice.bits}", 0), self.unpacks)
            b = size_of(cut.b.shape, TensorSpec(f"int{choice.inner}", 0), self.unpacks)
            return Size(a.bits + b.bits, a.stored + b.stored)
        if choice.is_float:
            bits = FLOAT_BITS * math.prod(self.shape(item))
            return Size(bits, bits / 8)
        decided = self._with(choice.bits)[1][self.name(item)].weight.spec
        assert decided is not None
        return size_of(self.shape(item), decided, self.unpacks, self.entered != FLOAT_BITS)

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
            self._powers = deciding.powers(self.model, firsts, self.ctx)
        error = graph.finite_weight(layer).astype(np.float64) - self.rounded(item, choice)
        return float(np.mean(error**2 * self._powers.get(layer.name, np.float32(1))))

    def _grid(self, factor: npt.NDArray[np.float64], bits: int) -> Grid:
        """The grid of a factor: a scale for each row, as that of the layer that it becomes."""
        form = numerics.parse_format(f"int{bits}")
        method = "mse" if self.how.method == "output" else self.how.method
        return numerics.weight_grid(factor.astype(np.float32), form, 0, method=method)

    def _with(self, bits: int) -> tuple[ir.Model, dict[str, Layer]]:
        """A model in which all weights are decided in ``bits``, and its layers by name."""
        self.decide()
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

    def measure(self, places: Iterable[tuple[int, int]]) -> None:
        """Measure choices, each by its item and number; those of an item are one task."""
        places, items = list(places), self.items
        wanted: dict[int, list[int]] = {}
        for item, number in places:
            if items.choices[item][number].is_float:
                self._measured[item, number] = 0.0
            if (item, number) not in self._measured:
                wanted.setdefault(item, []).append(number)
        items.decide()  # and not where tasks are drawn, which is another thread
        asked = (
            (items.readers[item], [items.rounded(item, items.choices[item][n]) for n in numbers])
            for item, numbers in wanted.items()
        )
        found = self.sensitivity.costs(asked, items.ctx, len(wanted))
        for (item, numbers), costs in zip(wanted.items(), found, strict=True):
            for number, cost in zip(numbers, costs, strict=True):
                self._measured[item, number] = cost
        for item, number in places:
            self._known.setdefault(item, {})[number] = self._measured[item, number]

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
