"""Counts of numbers between edges that are not known before all numbers are."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

BINS = 2048
# More than are asked for, because a span that had to grow may be up to four times too wide.
_FINE = 4 * BINS
# Numbers that are counted at once: what is made of them stays in the cache.
_PART = 1 << 15
# A longer span has distances that float32 does not hold.
_LARGEST = 1e38


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Counts [BINS] between ``edges`` [BINS + 1], which span the extremes."""

    counts: npt.NDArray[np.int64]
    edges: npt.NDArray[np.float64]


class Counter:
    """Counts what is added to it, in fine bins of a span that doubles where numbers leave it."""

    def __init__(self) -> None:
        self._waiting: list[npt.NDArray[Any]] = []
        self._count = 0
        self._low, self._span = 0.0, 0.0
        self._counts = np.zeros(_FINE, np.int64)

    def add(self, numbers: npt.NDArray[Any]) -> None:
        """Count those of ``numbers`` that are finite."""
        self._waiting.append(numbers.reshape(-1))
        self._count += numbers.size
        if self._count >= _PART:
            self._empty()

    def histogram(self, low: float, high: float) -> Histogram:
        """What was counted, between edges from ``low`` to ``high``, the extremes.

        A fine bin counts as its centre, so that a number may be counted by the bin beside its own.
        """
        self._empty()
        edges = _edges(low, high)
        centres = self._low + self._span * (np.arange(_FINE) + 0.5) / _FINE
        counts = np.zeros(BINS, np.int64)
        np.add.at(counts, _places(centres, edges[0], edges[-1] - edges[0], BINS), self._counts)
        return Histogram(counts, edges)

    def _empty(self) -> None:
        if not self._count:
            return
        waiting = self._waiting
        numbers = waiting[0] if len(waiting) == 1 else np.concatenate(waiting)
        waiting.clear()
        self._count = 0
        low, high = float(numbers.min()), float(numbers.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            numbers = numbers[np.isfinite(numbers)]
            if not numbers.size:
                return
            low, high = float(numbers.min()), float(numbers.max())
        self._hold(low, high)
        low, factor = self._low, _FINE / self._span
        # Distances from the low end are as good as the numbers, if that is one of their kind.
        short = numbers.dtype == np.float32 and float(np.float32(low)) == low
        kind = np.float32 if short and self._span < _LARGEST else np.float64
        # The same arrays for all parts: new ones of this size are pages that the system clears.
        steps, places = np.empty(_PART, kind), np.empty(_PART, np.int64)
        for first in range(0, numbers.size, _PART):
            part = numbers[first : first + _PART]
            scaled, binned = steps[: part.size], places[: part.size]
            np.subtract(part, kind(low), out=scaled, dtype=kind)
            np.multiply(scaled, kind(factor), out=scaled)
            np.copyto(binned, scaled, casting="unsafe")
            counts = np.bincount(binned, minlength=_FINE)
            counts[_FINE - 1] += counts[_FINE:].sum()  # of the last edge
            self._counts += counts[:_FINE]

    def _hold(self, low: float, high: float) -> None:
        """Let the span hold ``low`` and ``high``."""
        if not self._span:
            edges = _edges(low, high)
            self._low, self._span = float(edges[0]), float(edges[-1] - edges[0])
        while low < self._low or high > self._low + self._span:
            pairs = self._counts.reshape(-1, 2).sum(axis=1)
            rest = np.zeros(_FINE // 2, np.int64)
            below = low < self._low
            self._counts = np.concatenate([rest, pairs] if below else [pairs, rest])
            self._low -= self._span if below else 0.0
            self._span *= 2


def _places(
    numbers: npt.NDArray[np.float64], low: float, span: float, bins: int
) -> npt.NDArray[np.int64]:
    """The bin of each of ``numbers``, the first or last of what lies outside."""
    places = numbers - low
    places *= bins / span
    np.clip(places, 0, bins - 1, out=places)
    return places.astype(np.int64)


def _edges(low: float, high: float) -> npt.NDArray[np.float64]:
    """The edges of the bins between two extremes, apart from each other if those are equal."""
    least = 1e-6 * max(abs(low), abs(high), 1e-24)
    return np.linspace(low, max(high, low + least), BINS + 1)
