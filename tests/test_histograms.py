"""Laws of histograms whose edges are not known before all numbers are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import graphs
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from qcompile import calibrate, extremes, graph, sources
from qcompile.calibrate import Calibration
from qcompile.histograms import BINS, Counter, Histogram

Parts = Sequence[npt.NDArray[Any]]
PARTS = st.lists(
    arrays.arrays(np.float32, st.integers(1, 50), elements=st.floats(-1e6, 1e6, width=32)),
    min_size=1,
    max_size=6,
)


def counted(parts: Parts, each: bool) -> Histogram:
    """The histogram of ``parts``; with ``each`` the span has to grow."""
    counter = Counter()
    for part in parts:
        counter.add(part)
        if each:
            counter.histogram(float(part.min()), float(part.max()))
    return counter.histogram(float(min(map(np.min, parts))), float(max(map(np.max, parts))))


@given(PARTS, st.booleans())
def test_every_number_is_counted_within_a_bin_of_its_own(parts: Parts, each: bool) -> None:
    found = counted(parts, each)
    numbers = np.concatenate(parts).astype(np.float64)
    assert found.counts.sum() == numbers.size
    assert (found.edges[0], len(found.counts)) == (numbers.min(), BINS)
    below = np.cumsum(found.counts)
    own = np.cumsum(np.histogram(numbers, found.edges)[0])
    # What was counted up to an edge lies between the true counts up to the bins beside it.
    assert (below[2:] >= own[:-2]).all() and (below[:-2] <= own[2:]).all()


def test_a_span_grows_to_both_sides_and_keeps_its_counts() -> None:
    parts = [np.full(3, x, np.float32) for x in (0.0, 1.0, -70.0, 900.0, -1e5)]
    found = counted(parts, each=True)
    filled = np.flatnonzero(found.counts)
    assert found.counts.sum() == 15 and filled[0] == 0 and filled[-1] == BINS - 1


def test_what_is_not_finite_is_no_number() -> None:
    counter = Counter()
    counter.add(np.array([np.nan, np.inf, -np.inf, 1.0], np.float32))
    counter.add(np.array([np.nan], np.float32))
    assert counter.histogram(0.0, 1.0).counts.sum() == 1
    assert Counter().histogram(0.0, 0.0).counts.sum() == 0


PICTURE = """(float[1,4,32,32] x) => (float[1,4,32,32] y) <float[4,4,1,1] w> {
    h = Conv(x, w)
    r = Relu(h)
    t = Transpose<perm=[0,1,3,2]>(r)
    y = Sigmoid(t)
}"""


@pytest.fixture
def calibration() -> Calibration:
    model = graphs.graph(PICTURE)
    return Calibration(sources.Data("test", graphs.samples(model, 20)))


def test_every_third_pixel_of_a_picture_is_counted(
    calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = graphs.graph(PICTURE)
    samples = len(calibration.samples)
    monkeypatch.setattr(calibrate, "COUNTED", samples * 4 * 11 * 11)
    found = calibration.stats(model, ["h", "r"], "histogram")
    for value in ("h", "r"):
        histogram = found[value]
        assert isinstance(histogram, Histogram)
        assert histogram.counts.sum() == samples * 4 * 11 * 11
    whole = calibration.stats(model, ["h"], "minmax")["h"]
    assert isinstance(whole, calibrate.MinMax) and isinstance(found["h"], Histogram)
    assert (found["h"].edges[0], found["h"].edges[-1]) == (whole.low, whole.high)


def test_what_is_no_picture_is_counted_whole_of_some_samples(
    calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = graphs.graph(PICTURE)
    monkeypatch.setattr(calibrate, "COUNTED", 1)
    monkeypatch.setattr(calibrate, "WHOLE", 4)
    found = calibration.stats(model, ["x", "r", "t"], "histogram")
    for value, count in (("x", 4 * 4096), ("t", 4 * 4096), ("r", len(calibration.samples) * 4)):
        histogram = found[value]
        assert isinstance(histogram, Histogram) and histogram.counts.sum() == count


def test_the_numbers_of_every_third_pixel_are_those_of_the_picture(
    calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = graphs.graph(PICTURE)
    monkeypatch.setattr(calibrate, "COUNTED", len(calibration.samples) * 4 * 11 * 11)
    histogram = calibration.stats(model, ["h"], "histogram")["h"]
    assert isinstance(histogram, Histogram)
    weight = graph.constant(model.graph.initializers["w"])[:, :, 0, 0].astype(np.float64)
    some = [
        np.einsum("oi,nihw->nohw", weight, sample["x"][:, :, ::3, ::3])
        for sample in calibration.samples
    ]
    own, _ = np.histogram(np.concatenate(some).ravel(), histogram.edges)
    below, wanted = np.cumsum(histogram.counts), np.cumsum(own)
    assert (below[2:] >= wanted[:-2]).all() and (below[:-2] <= wanted[2:]).all()


@pytest.mark.parametrize(("lined", "found"), [((), True), (("h",), False)])
def test_a_picture_with_padding_is_counted_whole(lined: tuple[str, ...], found: bool) -> None:
    source = "(float[1,4,32,32] x, int64[1,4] m) => (float[1,4,32,32] h) <float[4,4,1,1] w> {"
    model = graphs.graph(source + "h = Conv(x, w) }")
    reduced = extremes.Reduced(model, ["h"], {}, "m", lined)
    assert (reduced.pixels("h", (1, 4, 32, 32), 100) is not None) == found


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_the_widest_and_the_narrowest_span_of_a_type_are_counted(kind: type[np.floating]) -> None:
    most = min(np.finfo(kind).max, np.finfo(np.float32).max)
    ends = np.array([-most, most], kind) / kind(4)
    near = np.array([1000, 1001], kind)
    for parts in ([ends, ends * kind(3)], [near], [near, near - kind(3)]):
        found = counted(parts, each=True)
        assert found.counts.sum() == np.concatenate(parts).size
        assert found.counts[:2].any() and found.counts[-2:].any()
