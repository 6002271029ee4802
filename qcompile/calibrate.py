"""Calibration data in, statistics out.

A part of the sequences is kept to judge (never seen by an observer), split off before anything is
fitted. An *observer* reduces as it streams, so that memory does not grow with the number of
samples, and every sample reaches every observer. Statistics are cached by the content of what
computes a value, so nothing goes stale when weights change.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile import content, execute, extremes, graph, halves, patches, ports, sequences
from qcompile.errors import CalibrationError
from qcompile.graph import Layer
from qcompile.histograms import Counter, Histogram
from qcompile.sequences import Sample, Samples, State
from qcompile.sources import Data

Array = npt.NDArray[Any]
T = TypeVar("T")
Observer = Literal["minmax", "histogram", "moments"]

# At most this many sequences are kept to judge, and at most a fifth of all.
JUDGES = 16
# At most about this many samples decide whether a fit is kept.
APART = 32
# A histogram counts at least this many numbers of a picture, of all samples alike, if it has them;
# 1e-5 of them are 80. What is no picture has its few large numbers at few places, and is counted
# whole, of about this many samples.
COUNTED, WHOLE = 1 << 23, 128
# A gram of this many columns takes half a GiB.
LARGEST_GRAM = 8192
# Drawn rows for each column: correlations of the columns of a Conv with few are then as well known
# as those of the widest layers, which have fewer rows a column.
ENOUGH_ROWS = 50
# Above this grams that are not asked for again are forgotten.
GRAM_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class MinMax:
    """The extremes of a value over all samples; 0, 0 if it was always empty."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean, variance and extremes of each channel (axis 1 of rank 4 and above or rank 2, else the
    last).

    Under a mask the channel is the last axis, and a value of rank 2 is one channel.
    """

    mean: npt.NDArray[np.float64]
    variance: npt.NDArray[np.float64]
    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    count: int

    @property
    def power(self) -> npt.NDArray[np.float64]:
        """The mean square of each channel."""
        return self.mean**2 + self.variance


@dataclasses.dataclass(frozen=True)
class Gram:
    """``X.T @ X`` of the rows of the input ``X`` [rows, K] of a layer, their sum and number.

    ``matrix`` is [K, K] and ``total`` [K]; [groups, K, K] and [groups, K] for a Conv with groups.
    """

    matrix: npt.NDArray[np.float64]
    total: npt.NDArray[np.float64]
    rows: int


@dataclasses.dataclass(frozen=True)
class Magnitude:
    """The largest and the least absolute number of a value over all samples, and one shape of it.

    What is not finite does not count; 0, 0 of a value without any other number.
    """

    largest: float
    least: float
    shape: tuple[int, ...]


Statistic = MinMax | Histogram | Moments


class Calibration:
    """Owns the data; answers requests for statistics, one sweep for all values of a request.

    Args:
        data: the samples.
        progress: wraps what is swept, with a label.
        mask: the input [batch, tokens] that is 1 where a position counts and 0 where it is padding.
            Values with these leading dimensions (see ports.lined_up) are not observed at padding.
    """

    def __init__(
        self,
        data: Data,
        progress: Callable[..., Iterable[Any]] | None = None,
        mask: str | None = None,
    ) -> None:
        kept = min(JUDGES, data.samples.sequences // 5)
        self.data = data
        self.samples, judges = data.samples.split(kept)
        # With fewer than five sequences nothing can be kept apart; the report says so.
        self.judges = judges if kept else data.samples
        self.apart: bool = kept > 0
        self.mask = mask
        self._progress = progress
        self._cache: dict[tuple[str, str], Statistic] = {}
        self._grams: dict[tuple[str, str], Gram] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._once: dict[str, Any] = {}

    @property
    def state(self) -> State:
        """The inputs that are fed from outputs of the frame before."""
        return self.samples.state

    @property
    def digest(self) -> str:
        """A hash of all that statistics depend on, beside the model."""
        return f"{self.data.digest} {self.mask}" if self.mask else self.data.digest

    def to_fit(self, most: int) -> tuple[Samples, Samples]:
        """At most ``most`` samples to fit on, and up to 32 that no fit sees.

        The latter decide whether a fit is kept. Of a single sequence both are the same.
        """
        kept = self.samples.sequences // 8 or min(1, self.samples.sequences - 1)
        fit, apart = self.samples.split(kept)
        return fit.some(most), (apart if kept else fit).some(APART)

    def once(self, key: str, make: Callable[[], T]) -> T:
        """What ``make`` makes, made once for each ``key``, which says all that it depends on."""
        if key not in self._once:
            self._once[key] = make()
        return cast("T", self._once[key])

    def stats(
        self, model: ir.Model, values: Sequence[str], observer: Observer
    ) -> dict[str, Statistic]:
        """The statistic of each of ``values`` (names of floats of the main graph of ``model``).

        A histogram has the extremes of all samples for its ends. It counts about COUNTED numbers of
        a picture, and all numbers of other values, those of about WHOLE samples.

        Raises CalibrationError, naming value and sample, if one is NaN or infinite.
        """
        keys = content.keys(model, self.state)
        missing = [v for v in values if (keys[v], observer) not in self._cache]
        if missing:
            for name, found in self._sweep(model, missing, observer).items():
                self._cache[keys[name], observer] = found
        return {v: self._cache[keys[v], observer] for v in values}

    def grams(
        self,
        model: ir.Model,
        layers: Sequence[Layer],
        samples: int | None = None,
        rows: int | None = None,
    ) -> dict[str, Gram]:
        """The gram of the input of each of ``layers`` of ``model``, by the name of the layer.

        ``X`` is the matrix that the weight is multiplied with: rows of a MatMul or Gemm, patches of
        a Conv. Memory is that of the matrices; layers that read one input alike share theirs. At
        most ``samples`` samples and ``rows`` rows of each, if given, and then about ENOUGH_ROWS a
        column in all; each sample has a draw of its own.

        Raises CalibrationError for layers of another kind, above LARGEST_GRAM columns, and, naming
        value and sample, if an input is NaN or infinite.
        """
        keys = content.keys(model, self.state)
        kinds = {layer.name: patches.of(layer) for layer in layers}
        taken = self.samples if samples is None else self.samples.some(samples)
        wanted: dict[tuple[str, str], tuple[str, patches.Rows]] = {}
        keyed: dict[str, tuple[str, str]] = {}
        for layer in layers:
            kind = kinds[layer.name]
            if kind is None or layer.input is None:
                raise CalibrationError(f"layer {layer.name!r} ({layer.kind}) has no gram")
            if kind.columns > LARGEST_GRAM:
                raise CalibrationError(
                    f"the gram of layer {layer.name!r} has {kind.columns} columns; "
                    f"at most {LARGEST_GRAM} fit"
                )
            value = layer.input.value.name or ""
            key = keyed[layer.name] = keys[value], f"{kind} {len(taken)} {rows}"
            if key not in self._grams:
                wanted[key] = value, kind
        if wanted:
            if sum(gram.matrix.nbytes for gram in self._grams.values()) > GRAM_BYTES:
                kept = set(keyed.values())
                self._grams = {key: g for key, g in self._grams.items() if key in kept}
            self._grams |= self._multiplied(model, wanted, taken, rows)
        return {name: self._grams[key] for name, key in keyed.items()}

    def magnitudes(self, model: ir.Model, values: Sequence[str]) -> dict[str, Magnitude]:
        """The magnitude of each of ``values``, floats of the main graph; padding counts as well."""
        plain = halves.rounded(model)
        session = execute.Session(sequences.fetch(plain, values, self.state), planned=False)
        found = dict.fromkeys(values, Magnitude(0.0, np.inf, ()))
        for _, results in sequences.carry(
            session, self._swept("magnitudes", self.samples), self.state, values
        ):
            for name, array in results.items():
                sizes, before = np.abs(array[np.isfinite(array)]), found[name]
                largest = max(before.largest, float(sizes.max(initial=0.0)))
                least = min(before.least, float(sizes.min(initial=np.inf)))
                found[name] = Magnitude(largest, least, array.shape)
        return {
            name: m if np.isfinite(m.least) else dataclasses.replace(m, least=0.0)
            for name, m in found.items()
        }

    def shapes(self, model: ir.Model) -> dict[str, tuple[int, ...]]:
        """The shape of every value of the main graph for the first sample."""
        keys = content.keys(model, self.state)
        names = [v.name or "" for node in model.graph for v in node.outputs if v.name]
        missing = [name for name in names if keys[name] not in self._shapes]
        if missing:
            for name, shape in execute.shapes(model, missing, self.samples[0]).items():
                self._shapes[keys[name]] = shape
        found = {name: self._shapes[keys[name]] for name in names}
        return found | {n: tuple(a.shape) for n, a in self.samples[0].items()}

    # -- sweeps ---------------------------------------------------------------------------------

    def _sweep(
        self, model: ir.Model, values: Sequence[str], observer: Observer
    ) -> dict[str, Statistic]:
        model = halves.rounded(model)
        if observer == "moments":
            return dict(self._moments(model, values))
        counters = {v: Counter() for v in values} if observer == "histogram" else {}
        ranges = self._extremes(model, values, counters)
        if not counters:
            return dict(ranges)
        return {v: counters[v].histogram(ends.low, ends.high) for v, ends in ranges.items()}

    def _extremes(
        self, model: ir.Model, values: Sequence[str], counters: Mapping[str, Counter]
    ) -> dict[str, MinMax]:
        """The extremes of ``values``; ``counters`` count some of the numbers of theirs."""
        lined = ports.lined_up(model, self.mask) if self.mask else ()
        # Under a mask a value counts where another, that it is moved from, may not.
        cut = {v: extremes.Cut(v) for v in values} if self.mask else extremes.cuts(model, values)
        roots = list(dict.fromkeys(cut[v].root for v in values))
        reduced = extremes.Reduced(model, [*roots, *counters], self.state, self.mask, lined)
        answers = [reduced.extremes(root) for root in roots]
        low = np.full(len(roots), np.inf)
        high = np.full(len(roots), -np.inf)
        for number, feeds, results in self._counting(model, reduced, answers, counters):
            self._counted(feeds, self.samples.where(number))
            # One by one is faster than an array of arrays.
            scalars = (float(results[name]) for names in answers for name in names)
            rows = np.fromiter(scalars, np.float64, 3 * len(roots)).reshape(-1, 3)
            read, nans = rows[:, :2], np.isnan(rows[:, 2])
            for index in map(int, np.flatnonzero(nans | ~np.isfinite(read).all(axis=1))):
                ends = tuple(map(float, read[index]))
                # A reduction of nothing gives (inf, -inf), which is no fault; a sum may overflow.
                sound = all(map(math.isfinite, ends)) and self._finite(model, roots[index], feeds)
                if not sound and ends != (math.inf, -math.inf):
                    raise _not_finite(roots[index], self.samples.where(number))
            low, high = np.minimum(low, read[:, 0]), np.maximum(high, read[:, 1])
        place = {root: i for i, root in enumerate(roots)}
        found: dict[str, MinMax] = {}
        for value in values:
            index = place[cut[value].root]
            ends = cut[value].of(float(low[index]), float(high[index]))
            # Of what was always empty the least is above the largest.
            found[value] = MinMax(*ends) if ends[0] <= ends[1] else MinMax(0.0, 0.0)
        return found

    def _counting(
        self,
        model: ir.Model,
        reduced: extremes.Reduced,
        answers: Iterable[Sequence[str]],
        counters: Mapping[str, Counter],
    ) -> Iterator[tuple[int, Sample, Sample]]:
        """Run all samples and count values on the way: number, feeds and ``answers`` of each."""
        shapes = self.shapes(model) if counters else {}
        enough = -(-COUNTED // len(self.samples))
        pixels: dict[str, Counter] = {}
        whole: dict[str, Counter] = {}
        for value, counter in counters.items():
            some = reduced.pixels(value, shapes[value], enough)
            if some is None:
                whole[reduced.whole(value)] = counter
            else:
                pixels[some] = counter
        taken, others = self.samples.parted(WHOLE if whole else len(self.samples))
        # One session after the other: each takes memory of its own.
        for numbers, counted in ((taken, {**pixels, **whole}), (others, pixels)):
            if not numbers:
                continue
            named = [*dict.fromkeys([*itertools.chain(*answers), *counted, *self.state.values()])]
            session = execute.Session(reduced.giving(named), planned=False)
            samples = (self.samples[number] for number in self._swept("ranges", numbers))
            runs = sequences.carry(session, samples, self.state, named)
            for number, (feeds, results) in zip(numbers, runs, strict=True):
                for name, counter in counted.items():
                    counter.add(results.pop(name))
                yield number, feeds, results
            del session, runs

    def _finite(self, model: ir.Model, value: str, feeds: Sample) -> bool:
        """Whether all elements of ``value`` that count are finite."""
        array = execute.execute(model, feeds, [value])[value]
        counted = self._counted(feeds, "")
        if counted is not None and value in ports.lined_up(model, self.mask or ""):
            array = array[counted]
        return bool(np.isfinite(array).all())

    def moments(
        self, model: ir.Model, axes: Mapping[str, int], samples: int | None = None
    ) -> dict[str, Moments]:
        """The moments along the axes of the values that ``axes`` names; the last axis is -1.

        Of at most ``samples`` samples, if given.
        """
        keys = content.keys(model, self.state)
        taken = self.samples if samples is None else self.samples.some(samples)
        asked = {v: (keys[v], f"moments {axis} {len(taken)}") for v, axis in axes.items()}
        missing = [v for v, key in asked.items() if key not in self._cache]
        if missing:
            for name, found in self._moments(model, missing, axes, taken).items():
                self._cache[asked[name]] = found
        return {v: cast("Moments", self._cache[key]) for v, key in asked.items()}

    def _moments(
        self,
        model: ir.Model,
        values: Sequence[str],
        axes: Mapping[str, int] | None = None,
        samples: Samples | None = None,
    ) -> dict[str, Moments]:
        found: dict[str, Moments] = {}
        for _, name, array in self._observed(model, values, "moments", samples):
            channel = 1 if array.ndim == 2 or array.ndim >= 4 else -1
            channel = channel if axes is None else axes[name]
            rows = np.moveaxis(array, channel, -1).reshape(-1, array.shape[channel])
            found[name] = _merge(found.get(name), rows.astype(np.float64))
        return found

    def _multiplied(
        self,
        model: ir.Model,
        wanted: Mapping[tuple[str, str], tuple[str, patches.Rows]],
        samples: Samples,
        most: int | None,
    ) -> dict[tuple[str, str], Gram]:
        found: dict[tuple[str, str], Gram] = {}
        readers: dict[str, list[tuple[tuple[str, str], patches.Rows]]] = {}
        for key, (value, kind) in wanted.items():
            readers.setdefault(value, []).append((key, kind))
            found[key] = Gram(np.zeros(kind.shape), np.zeros(kind.shape[:-1]), 0)
        waiting = {key: patches.Gathered() for key in found}

        def multiply(key: tuple[str, str]) -> None:
            gram, (columns,) = found[key], waiting[key].take()
            count = columns.shape[-2]
            gram.matrix[...] += np.swapaxes(columns, -1, -2) @ columns
            gram.total[...] += np.ones(count, np.float32) @ columns
            found[key] = dataclasses.replace(gram, rows=gram.rows + count)

        for number, name, array in self._observed(model, list(readers), "grams", samples):
            for key, kind in readers[name]:
                enough = math.ceil(ENOUGH_ROWS * kind.columns / len(samples))
                for block in kind.blocks(array, most and min(most, enough), draw=number):
                    if waiting[key].add(np.asarray(block, np.float32)):
                        multiply(key)
        for key in found:
            if waiting[key]:
                multiply(key)
        return found

    def _observed(
        self, model: ir.Model, values: Sequence[str], label: str, samples: Samples | None = None
    ) -> Iterator[tuple[int, str, Array]]:
        """Each of ``values`` for each of ``samples`` (all if None): its number, name and array.

        Of what lines up with the mask only the positions that count, their axes as one: [count,
        ...]. Raises CalibrationError if one is NaN or infinite.
        """
        session = execute.Session(sequences.fetch(model, values, self.state), planned=False)
        lined = ports.lined_up(model, self.mask) if self.mask else ()
        swept = self.samples if samples is None else samples
        runs = sequences.carry(session, self._swept(label, swept), self.state, values)
        for number, (feeds, results) in enumerate(runs):
            counted = self._counted(feeds, swept.where(number))
            for name, array in results.items():
                if counted is not None and name in lined:
                    array = array[counted]
                    array = array[:, None] if array.ndim == 1 else array
                if not np.isfinite(array).all():
                    raise _not_finite(name, swept.where(number))
                yield number, name, array
                del array
            del results  # before the next sample runs

    def _counted(self, feeds: Sample, where: str) -> npt.NDArray[np.bool_] | None:
        """Which positions of a sample count, or None without a mask; ``where`` it is, in words."""
        if self.mask is None:
            return None
        mask = feeds[self.mask]
        if not np.isin(mask, (0, 1)).all():
            raise CalibrationError(
                f"mask {self.mask!r} has other numbers than 1 (counts) and 0 (padding) for "
                f"{where}: {mask.min()} to {mask.max()}"
            )
        return mask.astype(bool)

    def _swept(self, label: str, items: Sequence[T]) -> Iterable[T]:
        return self._progress(items, label) if self._progress else items


def _not_finite(value: str, where: str) -> CalibrationError:
    return CalibrationError(f"value {value!r} has NaN or infinity for {where}")


def _merge(before: Moments | None, rows: npt.NDArray[np.float64]) -> Moments:
    """Moments of all rows so far (Chan, Golub and LeVeque's pairwise update)."""
    count, channels = rows.shape
    if before is None:
        nothing: npt.NDArray[np.float64] = np.zeros(int(channels))
        before = Moments(nothing, nothing, nothing + np.inf, nothing - np.inf, 0)
    if count == 0:
        return before
    low = np.minimum(before.low, rows.min(axis=0))
    high = np.maximum(before.high, rows.max(axis=0))
    mean = rows.mean(axis=0)
    centred = rows - mean
    variance = np.einsum("ij,ij->j", centred, centred) / count
    total = before.count + count
    shift = mean - before.mean
    spread = before.variance * before.count + variance * count
    spread += shift**2 * (before.count * count / total)
    return Moments(before.mean + shift * (count / total), spread / total, low, high, total)


def quantizable_values(model: ir.Model) -> list[str]:
    """The values whose ranges a dialect may ask for.

    What layers read and write, and the outputs of the operators between them that have an integer
    form, so that one sweep serves every target. Not what a ReLU alone reads: it is part of what
    writes the value, in every dialect, and in the runtime if nobody looks between them.
    """
    wanted: dict[str, None] = {}

    def want(value: ir.Value | None) -> None:
        if value is None or not value.name or graph.is_constant(value):
            return
        if graph.is_float(value) and graph.absorbed(value) is value:
            wanted[value.name] = None

    for node in model.graph:
        layer = graph.layer_of(node)
        if layer is not None:
            want(layer.input.value if layer.input else None)
            want(layer.weight.value)
            want(layer.output)
            want(layer.biased_output)
        elif node.op_type in BETWEEN and node.domain in ("", "ai.onnx"):
            for value in (*node.inputs, *node.outputs):
                want(value)
    return list(wanted)


# Operators that stand between layers and have an integer form in some runtime.
BETWEEN = frozenset(
    [
        "Add",
        "Mul",
        "Concat",
        "Relu",
        "Clip",
        "LeakyRelu",
        "Sigmoid",
        "MaxPool",
        "AveragePool",
        "GlobalAveragePool",
        "Resize",
        "Reshape",
        "Flatten",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Pad",
    ]
)
