"""Clip the few weights that are far from all others, so that the grid of the others is finer.

Source: none; the bound on how many weights move is Chebyshev's inequality.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompile import graph
from qcompile.errors import PassError
from qcompile.pipeline import Context, Pass, Stats


@dataclasses.dataclass(frozen=True)
class ClipWeights(Pass):
    """``W`` becomes ``clip(W, -c, c)`` with ``c = limit sqrt(mean(W^2))``, one ``c`` a channel.

    Fewer than one in ``limit^2`` weights of a channel move. Left alone, and counted: products of
    two activations, and what ``exclude`` names. A ``limit`` below 1 raises PassError.

    * ``limit``: the largest weight, in root mean squares of its output channel.
    * ``exclude``: globs over the names and operator types of layers.
    """

    name: ClassVar[str] = "clip-weights"
    invalidates: ClassVar[frozenset[str]] = frozenset({"ranges", "specs"})

    limit: float = 3.5
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.limit >= 1.0:
            raise PassError(f"limit must be at least 1, got {self.limit:g}")

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        excluded = {layer.node for layer in graph.select(model, self.exclude, "exclude")}
        clipped: dict[tuple[ir.Value, int], ir.Value] = {}  # layers may share a weight
        layers = moved = left = 0
        for layer in list(graph.layers(model)):
            source = (layer.weight.value, layer.channel_axis)
            if layer.node in excluded or not graph.is_constant(source[0]):
                left += 1
                continue
            if source not in clipped:
                weight = graph.constant(source[0])
                bounded = clip(weight, source[1], self.limit)
                moved += int(np.count_nonzero(bounded != weight))
                clipped[source] = graph.add_constant(model, f"{source[0].name}/clipped", bounded)
            layer.weight.read_from(clipped[source])
            layers += 1
        graph.remove_dead(model)
        return {"layers": layers, "weights clipped": moved, "left alone": left}


def clip(weight: graph.Array, axis: int, limit: float) -> graph.Array:
    """``weight`` within ``limit`` root mean squares of each channel along ``axis``."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    squares = np.square(weight.astype(np.float64))
    bound = (limit * np.sqrt(squares.mean(axis=others, keepdims=True))).astype(weight.dtype)
    return np.clip(weight, -bound, bound)
