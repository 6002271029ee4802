"""Replace the weight of a layer by a product of two of low rank, or take such a product out of it.

Sources: MLoRQ (arXiv 2507.09616), steps 0 and 1; SVDQuant (Li et al., arXiv 2411.05007) without its
smoothing, which is another pass here. Where we differ: a 1x1 Conv has its stride and padding in the
first of the two only, and its bias not in them at all or in the second only; errors may weigh.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import onnx_ir as ir

from qcompile import factors, graph
from qcompile.errors import PassError
from qcompile.pipeline import Context, Pass, Stats

Form = Literal["product", "branch"]


@dataclasses.dataclass(frozen=True)
class LowRank(Pass):
    """``x W^T`` becomes ``(x B^T) A^T`` with ``A`` [N, r], ``B`` [r, K] (see ``factors``).

    That is ``form=product``: the two layers stand for the one that was captured. With ``branch`` it
    becomes ``x (W - A B)^T + (x B^T) A^T``, the same function up to the rounding of floats. The
    layer keeps the residual ``W - A B``, whose range is smaller where ``W`` has a few large
    directions: without weighing, its largest singular value is number ``r + 1`` of ``W``. The
    branch (``LAYER/branch/inner`` and ``LAYER/branch/outer``) is no layer, so whatever follows
    leaves it in float. ``equalize`` no longer scales what a branch reads: it comes before.

    Linear layers and 1x1 Convs of one group. Left alone, and counted: layers of another kind, and
    those whose weight others read as well. ``macs %`` are the MACs of all layers and branches in
    percent of those before, if there is data, for the shapes.

    * ``form``: ``product`` or ``branch``.
    * ``rank``: of each layer, at most the smaller side of its weight; 0 to take ``share``.
    * ``share``: of the multiplications of the layer that the two factors take, above 0.
    * ``weigh``: what errors of the weight count for: ``hessian`` by output channel, which needs
      torch, ``input`` by the power of what each input channel is multiplied with, ``both``, or
      ``none``.
    * ``include``, ``exclude``: globs over the names and operator types of layers.
    """

    name: ClassVar[str] = "low-rank"
    invalidates: ClassVar[frozenset[str]] = frozenset({"ranges", "specs"})
    reads_data: ClassVar[bool] = True
    source: ClassVar[str] = "MLoRQ, arXiv 2507.09616; SVDQuant, arXiv 2411.05007"

    form: Form = "product"
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
        macs = _macs(model, ctx)
        before = after = added = 0
        for layer in fit:
            matrix, (left, right) = factors.matrix(layer), weights[layer.name]
            shared = int(self.share * matrix.size / sum(matrix.shape))
            rank = max(1, min(self.rank or shared, *matrix.shape))
            found = factors.decompose(matrix, left, right, ctx.rng(layer.name), rank)
            change = factors.split if self.form == "product" else factors.branch
            change(model, layer, found)
            more = found.a.size + found.b.size - matrix.size * (self.form == "product")
            before, after = before + matrix.size, after + matrix.size + more
            added += macs.get(layer.name, 0) * more / matrix.size
        graph.remove_dead(model)
        stats: Stats = {
            "layers": len(fit),
            "weights": after,
            "before": before,
            "left alone": len(chosen) - len(fit),
        }
        whole = sum(macs.values())
        return stats | ({"macs %": round(100 * (1 + added / whole), 1)} if whole else {})


def _macs(model: ir.Model, ctx: Context) -> dict[str, int]:
    """The MACs of each layer by name; none without data."""
    if ctx.calibration is None:
        return {}
    shapes = ctx.calibration.shapes(model)
    return {layer.name: layer.macs(shapes) for layer in graph.layers(model)}
