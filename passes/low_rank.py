"""Replace the weight of a layer by a product of two of low rank.

Source: MLoRQ (arXiv 2507.09616), steps 0 and 1. Where we differ: a 1x1 Conv has its stride and
padding in the first of the two only, and its bias in the second only.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from qcompile import factors, graph
from qcompile.errors import PassError
from qcompile.pipeline import Context, Pass, Stats


@dataclasses.dataclass(frozen=True)
class LowRank(Pass):
    """``x W^T`` becomes ``(x B^T) A^T`` with ``A`` [N, r], ``B`` [r, K] (see ``factors``).

    Linear layers and 1x1 Convs of one group. Their two layers stand for the one that was captured.
    Left alone, and counted: layers of another kind, and those whose weight others read as well.

    * ``rank``: of each layer, at most the smaller side of its weight; 0 to take ``share``.
    * ``share``: of the multiplications of the layer that the two of them take, above 0.
    * ``weigh``: what errors of the weight count for: ``hessian`` by output channel, which needs
      torch, ``input`` by the power of what each input channel is multiplied with, ``both``, or
      ``none``.
    * ``include``, ``exclude``: globs over the names and operator types of layers.
    """

    name: ClassVar[str] = "low-rank"
    invalidates: ClassVar[frozenset[str]] = frozenset({"ranges", "specs"})
    reads_data: ClassVar[bool] = True
    source: ClassVar[str] = "MLoRQ, arXiv 2507.09616"

    rank: int = 0
    share: float = 0.5
    weigh: factors.Weigh = "hessian"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise PassError(f"rank starts at 1, or is 0 to take share; got {self.rank}")
        if not self.share > 0:
            raise PassError(f"share of the multiplications must be above 0, got {self.share:g}")

    def needs_data(self) -> bool:
        """Only for what weighs errors."""
        return self.weigh != "none"

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        excluded = {layer.node for layer in graph.select(model, self.exclude, "exclude")}
        chosen = graph.select(model, self.include, "include") if any(graph.layers(model)) else []
        chosen = [layer for layer in chosen if layer.node not in excluded]
        fit = [
            layer
            for layer in chosen
            if factors.factorable(layer) and len(graph.readers(layer.weight.value)) == 1
        ]
        weights = factors.weights(model, fit, self.weigh, ctx)
        before = after = 0
        for layer in fit:
            matrix, (left, right) = factors.matrix(layer), weights[layer.name]
            shared = int(self.share * matrix.size / sum(matrix.shape))
            rank = max(1, min(self.rank or shared, *matrix.shape))
            found = factors.decompose(matrix, left, right, ctx.rng(layer.name), rank)
            factors.split(model, layer, found)
            before, after = before + matrix.size, after + found.a.size + found.b.size
        graph.remove_dead(model)
        return {
            "layers": len(fit),
            "weights": after,
            "before": before,
            "left alone": len(chosen) - len(fit),
        }
