"""The cheapest choice of types: against every choice of small graphs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qcompile import cut


@pytest.mark.parametrize("seed", range(20))
def test_no_other_choice_is_cheaper(seed: int) -> None:
    rng = np.random.default_rng(seed)
    choice, count = cut.Choice(), 6
    prices = [int(p) for p in rng.integers(0, 8, count)]
    forced = [bool(f) for f in rng.integers(0, 4, count) == 0]
    places = [choice.place(p, f) for p, f in zip(prices, forced, strict=True)]
    spots = [cut.FIRST, cut.SECOND, *places]
    values = [
        (int(rng.choice(spots)), [int(r) for r in rng.choice(spots, 2)], int(rng.integers(1, 6)))
        for _ in range(8)
    ]
    for writer, readers, price in values:
        choice.value(writer, readers, price)

    def cost(second: set[int]) -> int:
        total = sum(p for p, spot in zip(prices, places, strict=True) if spot in second)
        for writer, readers, price in values:
            kinds = {reader in second for reader in readers}
            total += price * len(kinds - {writer in second})
        return total

    possible = (
        {cut.SECOND, *(s for s, taken in zip(places, pick, strict=True) if taken)}
        for pick in itertools.product([False, True], repeat=count)
        if all(taken or not must for taken, must in zip(pick, forced, strict=True))
    )
    free = [p for p, must in zip(prices, forced, strict=True) if must]
    found = choice.second() & set(spots)
    assert all(spot in found for spot, must in zip(places, forced, strict=True) if must)
    assert cost(found) == min(map(cost, possible)), (free, values)


def test_ties_are_of_the_first_type() -> None:
    choice = cut.Choice()
    place = choice.place()
    choice.value(cut.SECOND, [place], 3)
    choice.value(place, [cut.FIRST], 3)
    assert place not in choice.second()
