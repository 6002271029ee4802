"""The cheapest choice between two types for every node of a graph: a minimum cut.

Each node computes in one type or the other. A node has a price in the second type, and a value that
is written in one type and read in the other has the price of a conversion, once each way. The sum
is least at a minimum cut (Ford and Fulkerson, 1956); the price that several readers share is the
usual auxiliary node.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import scipy.sparse
from scipy.sparse import csgraph

FIRST, SECOND = 0, 1  # places that are of the first or the second type whatever it costs
_FORCED = 1 << 28


class Choice:
    """Places 0 and 1 are FIRST and SECOND; ``place`` adds more."""

    def __init__(self) -> None:
        self._count = 2
        self._prices: dict[tuple[int, int], int] = {}

    def place(self, price: int = 0, forced: bool = False) -> int:
        """A new place that costs ``price`` in the second type, or is ``forced`` into it."""
        self._count += 1
        number = self._count - 1
        if forced:
            self._price(number, SECOND, _FORCED)
        elif price:
            self._price(FIRST, number, price)
        return number

    def value(self, writer: int, readers: Iterable[int], price: int) -> None:
        """A value from ``writer`` to ``readers``; it costs ``price`` a conversion."""
        down, up = self.place(), self.place()
        self._price(writer, down, price)
        self._price(up, writer, price)
        for reader in readers:
            self._price(down, reader, _FORCED)
            self._price(reader, up, _FORCED)

    def _price(self, one: int, other: int, price: int) -> None:
        """What it costs that ``one`` is of the first type and ``other`` of the second."""
        if one != other:
            self._prices[one, other] = min(self._prices.get((one, other), 0) + price, _FORCED)

    def second(self) -> set[int]:
        """The places of the second type in the cheapest choice; as few of them as may be."""
        library: Any = scipy.sparse  # untyped
        graphs: Any = csgraph
        ends = np.array([*self._prices, (FIRST, SECOND)], np.int32)
        prices = np.array([*self._prices.values(), 0], np.int32)
        shape = (self._count, self._count)
        network = library.csr_matrix((prices, (ends[:, 0], ends[:, 1])), shape=shape)
        flow = graphs.maximum_flow(network, FIRST, SECOND).flow
        left = library.csr_matrix(((network - flow) > 0).T)
        reached = graphs.breadth_first_order(left, SECOND, return_predecessors=False)
        return set(map(int, reached))
