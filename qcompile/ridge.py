"""The weight with which a layer gives its float output of an input that is rounded.

``F`` [rows, K] is what the layer reads in the float model and ``X`` what it reads in the rounded
one. A weight ``W`` [N, K] moves to ``W' = W + W (F - X)^T X (X^T X + d)^-1``, for which the sum of
the squares of ``F W^T - X W'^T`` and ``d`` times those of ``W - W'`` is least. Where a layer has a
bias, ``F`` and ``X`` are centred. ``F - X`` is little beside ``X``, and is never the difference of
two large sums, whose float32 would not hold it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.patches import Floats, Gathered

Doubles = npt.NDArray[np.float64]

# Of sums of squares in float64, of which nothing is left.
_ROUNDING = 1e-12


class Seen:
    """Sums over rows: ``(F - X)^T X`` and ``X^T X`` [groups, K, K], ``F - X``, ``X`` [groups, K].

    ``X`` is less a ``centre`` [groups, 1, K], about its mean: without it, what squares leave of one
    another when means are taken away would be the rounding of float32.
    """

    def __init__(self, centre: Floats) -> None:
        groups, _, columns = centre.shape
        self.centre = centre
        self.rows = 0
        self._cross = np.zeros((groups, columns, columns))
        self._square = np.zeros_like(self._cross)
        self._gap = np.zeros((groups, columns))
        self._found = np.zeros_like(self._gap)
        self._waiting = Gathered()

    def add(self, wanted: Floats, found: Floats) -> None:
        """Count some rows of ``F`` and ``X`` [groups, rows, K]."""
        self.rows += wanted.shape[1]
        if self._waiting.add(wanted - found, found - self.centre):
            self._multiply()

    def _multiply(self) -> None:
        if not self._waiting:
            return
        gap, found = self._waiting.take()
        ones = np.ones(gap.shape[1], np.float32)
        self._cross += np.swapaxes(gap, 1, 2) @ found
        self._square += np.swapaxes(found, 1, 2) @ found
        self._gap += ones @ gap
        self._found += ones @ found

    def __add__(self, other: Seen) -> Seen:
        """Of the rows of both, which are less one centre."""
        whole = Seen(self.centre)
        for part in (self, other):
            part._multiply()
            whole.rows += part.rows
            whole._cross += part._cross
            whole._square += part._square
            whole._gap += part._gap
            whole._found += part._found
        return whole

    def means(self) -> tuple[Doubles, Doubles]:
        """Of ``F`` and of ``X`` [groups, K]."""
        gap, found = self._means()
        found = found + self.centre[:, 0]
        return gap + found, found

    def _means(self) -> tuple[Doubles, Doubles]:
        """Of ``F - X``, and of ``X`` less the centre."""
        self._multiply()
        return self._gap / max(self.rows, 1), self._found / max(self.rows, 1)

    def products(self, centred: bool) -> tuple[Doubles, Doubles]:
        """``(F - X)^T X`` and ``X^T X`` a row, less the means if ``centred``; else the centre is 0.

        Of what does not differ from its mean, that leaves the rounding of sums, which may be below
        zero: a share of the whole is added to the diagonal.
        """
        gap, found = self._means()
        cross, square = self._cross / max(self.rows, 1), self._square / max(self.rows, 1)
        if not centred:
            return cross, square
        cross -= gap[:, :, None] * found[:, None]
        whole = np.einsum("gkk->g", square) + np.square(self.centre).sum((1, 2))
        rounding = _ROUNDING * whole[:, None, None]
        square -= found[:, :, None] * found[:, None]
        return cross, square + rounding * np.eye(square.shape[-1])

    def gram(self, centred: bool) -> Doubles:
        """``X^T X`` a row."""
        return self.products(centred)[1]


# Shares of the mean of the diagonal of X^T X; the last moves no weight.
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, np.inf)


def moved(weight: Floats, seen: Seen, ridge: float, centred: bool) -> Floats:
    """``W`` [groups, N, K] moved, with ``d`` the share ``ridge`` of the mean square of ``X``."""
    if not np.isfinite(ridge):
        return weight
    library: Any = np.linalg  # partly untyped
    cross, square = seen.products(centred)
    added = ridge * _mean(square) * np.eye(weight.shape[2])
    move: Doubles = library.solve(square + added, np.swapaxes(weight @ cross, 1, 2))
    return (weight + np.swapaxes(move, 1, 2)).astype(np.float32)


def best(weight: Floats, fit: Seen, apart: Seen, centred: bool) -> float:
    """The one of ``RIDGES`` with which ``W`` moved by ``fit`` errs least on ``apart``.

    In the basis in which ``X^T X`` of ``fit`` is diagonal, a ridge takes a division.
    """
    if not fit.rows or not apart.rows:
        return np.inf
    library: Any = np.linalg  # partly untyped
    cross, square = fit.products(centred)
    mean = _mean(square)
    values, basis = library.eigh(square)
    target = weight @ cross @ basis
    cross, square = apart.products(centred)
    square = np.swapaxes(basis, 1, 2) @ square @ basis
    twice = 2 * weight @ cross @ basis

    def error(ridge: float) -> float:
        """``|F W^T - X W'^T|^2``, less what it is where ``W' = W``."""
        move = target / (values[:, None] + ridge * mean)
        return float(np.sum((move @ square - twice) * move))

    return min(RIDGES, key=error)


def _mean(square: Doubles) -> Doubles:
    """The mean of the diagonals [groups, 1, 1]; 1 of an input that is always the same."""
    mean = np.einsum("gkk->gk", square).mean(axis=1)[:, None, None]
    mean[mean == 0] = 1.0
    return mean
