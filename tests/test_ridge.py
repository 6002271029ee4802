"""Laws of the weight that is moved, and of the sums that it is found by."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qcompile import ridge
from qcompile.ridge import RIDGES, Seen

Floats = npt.NDArray[np.float32]


def summed(wanted: Floats, found: Floats, centre: Floats) -> Seen:
    """Of some rows [groups, rows, K]."""
    seen = Seen(centre)
    seen.add(wanted, found)
    return seen


NO_CENTRE = np.zeros((1, 1, 6), np.float32)


def seen(rows: int, seed: int, gap: float) -> Seen:
    rng = np.random.default_rng(seed)
    wanted = rng.standard_normal((1, rows, 6)).astype(np.float32)
    found = wanted + gap * rng.standard_normal(wanted.shape)
    return summed(wanted, found.astype(np.float32), NO_CENTRE)


def test_what_was_not_rounded_moves_no_weight() -> None:
    weight = np.random.default_rng(0).standard_normal((1, 3, 6)).astype(np.float32)
    same = seen(50, 0, 0.0)
    for share in RIDGES:
        np.testing.assert_allclose(ridge.moved(weight, same, share, False), weight, atol=1e-5)


def test_without_a_ridge_it_is_the_regression() -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((1, 3, 6)).astype(np.float32)
    wanted = rng.standard_normal((40, 6)).astype(np.float32)
    found = (wanted + 0.3 * rng.standard_normal((40, 6))).astype(np.float32)
    library: Any = np.linalg  # partly untyped
    goal = library.lstsq(found, wanted @ weight[0].T, rcond=None)[0]
    actual = ridge.moved(weight, summed(wanted[None], found[None], NO_CENTRE), 1e-9, False)
    np.testing.assert_allclose(actual[0], goal.T, atol=1e-4)


def test_too_few_rows_choose_a_larger_ridge_than_many() -> None:
    weight = np.random.default_rng(0).standard_normal((1, 3, 6)).astype(np.float32)
    few, many = (ridge.best(weight, seen(n, 0, 1.0), seen(400, 9, 1.0), False) for n in (4, 4000))
    assert few > many
    nothing = Seen(NO_CENTRE)
    assert ridge.best(weight, nothing, seen(4, 0, 1.0), False) == np.inf


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("groups", [1, 5])
def test_the_ridge_that_is_chosen_moves_to_what_errs_least(groups: int, centred: bool) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        weight = rng.standard_normal((groups, 3, 6)).astype(np.float32)
        pairs: list[tuple[Floats, Floats]] = []
        for rows in (8, 40):
            wanted = 2 * centred + rng.standard_normal((groups, rows, 6))
            found = wanted + (seed / 10) * rng.standard_normal(wanted.shape)
            pairs.append((wanted.astype(np.float32), found.astype(np.float32)))
        fit, apart = (summed(*pair, np.zeros((groups, 1, 6), np.float32)) for pair in pairs)
        wanted, found = (p - p.mean(1, keepdims=True) if centred else p for p in pairs[1])

        def error(share: float) -> float:
            after = ridge.moved(weight, fit, share, centred)  # noqa: B023
            lost = wanted @ weight.swapaxes(1, 2) - found @ after.swapaxes(1, 2)  # noqa: B023
            return float(np.square(lost).sum())

        chosen = error(ridge.best(weight, fit, apart, centred))
        assert chosen <= min(map(error, RIDGES)) * (1 + 1e-4)


# -- the sums -----------------------------------------------------------------------------------


def test_what_does_not_differ_from_its_mean_has_a_gram_all_the_same() -> None:
    rng = np.random.default_rng(0)
    for spread in (1e-6, 0.0):
        rows = (7 + spread * rng.standard_normal((3, 500, 9))).astype(np.float32)
        gram = summed(rows, rows, rows[:, :9].mean(1, keepdims=True)).gram(centred=True)
        assert np.linalg.eigvalsh(gram).min() > 0


def test_the_centre_changes_no_mean_and_no_gram() -> None:
    rng = np.random.default_rng(1)
    one, other = (5 + rng.standard_normal((2, 300, 4)).astype(np.float32) for _ in range(2))
    plain, less = (summed(one, other, np.full((2, 1, 4), centre, np.float32)) for centre in (0, 5))
    for one, other in ((plain, less), (plain + plain, less + less)):
        for a, b in zip(one.means(), other.means(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)
        for a, b in zip(one.products(True), other.products(True), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-3)


def test_rows_may_come_in_any_parts() -> None:
    rng = np.random.default_rng(2)
    wanted, found = (rng.standard_normal((2, 3000, 4)).astype(np.float32) for _ in range(2))
    centre = np.full((2, 1, 4), 0.5, np.float32)
    whole, parts = summed(wanted, found, centre), Seen(centre)
    for first in range(0, 3000, 7):
        parts.add(wanted[:, first : first + 7], found[:, first : first + 7])
    assert parts.rows == whole.rows
    for one, other in zip(whole.products(True), parts.products(True), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
