"""Laws of blends of samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile import mixup
from qcompile.mixup import LEAST, MOST, SHARES
from qcompile.sequences import Sample, Samples


def some(count: int) -> Samples:
    rng = np.random.default_rng(1)
    made = [{"x": rng.random((1, 3), np.float32), "y": rng.random(2)} for _ in range(count)]
    return Samples(made)


@given(st.integers(1, 20), st.integers(1, 60), st.integers(0, 2**32))
def test_samples_stay_and_blends_lie_between_two(count: int, wanted: int, seed: int) -> None:
    samples, blended = some(count), [n for n in range(count) if n % 4 != 3]
    found = mixup.filled(samples, wanted, np.random.default_rng(seed), blended)
    again = mixup.filled(samples, wanted, np.random.default_rng(seed), blended)
    made = min(max(wanted - count, 0), MOST * len(blended)) if len(blended) >= LEAST else 0
    assert len(found) == count + made
    for number, sample in enumerate(found):
        assert all(np.array_equal(sample[n], again[number][n]) for n in sample)
        assert {n: (a.dtype, a.shape) for n, a in sample.items()} == {
            n: (a.dtype, a.shape) for n, a in samples[0].items()
        }
        if number < count:
            assert sample is samples[number]
        else:
            assert between(sample, [samples[n] for n in blended])


def between(blend: Sample, samples: list[Sample]) -> bool:
    """Whether one share of some pair gives ``blend``."""
    for first in samples:
        for second in samples:
            gap = first["y"] - second["y"]
            if first is not second:
                share = float((blend["y"] - second["y"]) @ gap / (gap @ gap))
                close = [
                    np.allclose(second[n] + share * (first[n] - second[n]), blend[n]) for n in blend
                ]
                if all(close) and SHARES[0] - 1e-6 <= share <= SHARES[1] + 1e-6:
                    return True
    return False


@pytest.mark.parametrize(
    "samples",
    [
        Samples([{"ids": np.array([n])} for n in range(10)]),
        Samples([{"x": np.zeros(n + 1, np.float32)} for n in range(10)]),
        Samples([{"x": np.zeros(1, np.float32)}] * 10, state={"x": "y"}),
    ],
)
def test_what_has_no_blend_stays_as_it_is(samples: Samples) -> None:
    assert mixup.filled(samples, 40, np.random.default_rng(0), range(10)) is samples
