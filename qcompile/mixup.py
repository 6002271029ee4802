"""Samples and blends of them, so that fits learn less of a few samples by heart.

Source: mixup (Zhang et al., arXiv 1710.09412), of inputs alone: a fit reads no labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

from qcompile.sequences import Sample, Samples

# The share of the first of two samples in their blend: near 0 or 1 it would be one of them.
SHARES = 0.3, 0.7
# Blends of each sample at most, and samples below which there are none: blends of few lie in the
# plane of these few, and a fit learns that plane.
MOST, LEAST = 2, 6


def filled(
    samples: Samples, count: int, rng: np.random.Generator, blended: Sequence[int]
) -> Samples:
    """``samples``, and behind them blends ``a x + (1 - a) z`` of two until there are ``count``.

    ``blended`` are the numbers of those that blends are made of, twice as many at most.
    ``samples`` themselves if these are fewer than 6, or where blends say nothing: an input is no
    float (token ids, masks), shapes differ, or a state is carried.
    """
    if samples.state or len(samples) >= count or len(blended) < LEAST:
        return samples
    kinds = {tuple((n, a.dtype, a.shape) for n, a in sorted(s.items())) for s in samples}
    if len(kinds) > 1 or any(dtype.kind != "f" for _, dtype, _ in next(iter(kinds))):
        return samples
    return Samples(_Blends(samples, count, rng, np.asarray(blended)))


class _Blends(Sequence[Sample]):
    """Blended as they are asked for, the same each time."""

    def __init__(
        self,
        samples: Samples,
        count: int,
        rng: np.random.Generator,
        blended: npt.NDArray[np.intp],
    ) -> None:
        few = len(blended)
        made = min(count - len(samples), MOST * few)
        first = np.arange(made) % few
        self._samples = samples
        self._pairs = blended[[first, (first + rng.integers(1, few, made)) % few]].T
        self._shares = rng.uniform(*SHARES, made)

    def __len__(self) -> int:
        return len(self._samples) + len(self._pairs)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = index - len(self._samples)
        if number < 0:
            return self._samples[index]
        one, other = (self._samples[int(each)] for each in self._pairs[number])
        share = self._shares[number]
        return {n: (share * a + (1 - share) * other[n]).astype(a.dtype) for n, a in one.items()}
