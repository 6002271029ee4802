"""Decide formats, granularity and scales: round to nearest on a searched or min-max range.

The baseline every method is measured against (Nagel et al., arXiv 2106.08295, section 2).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import onnx_ir as ir

from qcompile import graph, numerics
from qcompile.deciding import WEIGHTED, Granularity, Weights, decide_input, decide_weights
from qcompile.errors import PassError
from qcompile.graph import Layer
from qcompile.numerics import RangeMethod
from qcompile.pipeline import Context, Pass, Stats

# How many times ``least`` all layers below it may have.
_TOGETHER = 20
Scale = Literal["static", "dynamic"]


@dataclasses.dataclass(frozen=True)
class Quantize(Pass):
    """Write a spec on the weight and the input of every Conv and linear layer, and on tables.

    Weights are symmetric. An activation gets the format and the name of its calibrated range; the
    dialect makes scale and zero point of it.

    * ``weight``, ``input``: a format, int2 to int8, or ``float``.
    * ``granularity``: of weights: one scale a tensor, an output channel, or ``block`` of weights.
    * ``block``: weights along the summed axis of a linear layer that share a scale; a layer whose
      axis is no multiple of it has one scale a channel, if others are.
    * ``method``: how the range of each scale of a weight is searched; ``output`` weighs the error
      of each weight by the mean square of what it is multiplied with (as the clipping of AWQ, Lin
      et al., arXiv 2306.00978, does), which needs data.
    * ``symmetric``: static grids of inputs have zero in their middle, as PTQ4VM (Zhu et al., arXiv
      2506.10840) has them even behind a ReLU, where half of the codes are never used; it is there
      to compare with. Without it, targets choose.
    * ``ends``: a format for weight and input of the first and last layers: those that depend on no
      other layer, and those on which none depends.
    * ``scale``: that of an input: ``static``, from its range, or ``dynamic``: taken from the tensor
      at run time, for linear layers; a Conv keeps a static one.
    * ``attention``: the format of both sides of a product of two activations.
    * ``embedding``: the format of tables whose rows are gathered: one scale a row, or ``block`` of
      a row at 4 bits and below. A table that is the weight of a linear layer as well is decided
      twice.
    * ``least``: in percent. A Conv or linear layer that has a smaller share of the MACs, and of the
      weights as well, stays float: integers win nothing there, and the grids of what it reads and
      writes make as much noise as those of a large one (most of all a depthwise Conv, whose
      channels differ in range). The smallest first, while all of them have at most 20 times that
      share of the MACs. Above 0 it needs data, for the shapes.
    * ``include``, ``exclude``: globs over the names and operator types of layers.

    Raises PassError for an unknown format, a glob that matches nothing, a block that
    divides no weight, or a Conv without a range.
    """

    name: ClassVar[str] = "quantize"
    requires: ClassVar[frozenset[str]] = frozenset({"ranges"})
    produces: ClassVar[frozenset[str]] = frozenset({"specs"})

    weight: str = "int8"
    input: str = "int8"
    granularity: Granularity = "channel"
    block: int = 32
    method: RangeMethod = "minmax"
    symmetric: bool = False
    ends: str = "as-others"
    scale: Scale = "static"
    attention: str = "float"
    embedding: str = "float"
    least: float = 0.0
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for form in (self.weight, self.input, self.attention, self.embedding):
            if form != "float":
                numerics.parse_format(form)
        if self.ends != "as-others":
            numerics.parse_format(self.ends)
        if self.block < 1:
            raise PassError(f"block must be at least 1, got {self.block}")
        if not 0 <= self.least < 5:
            raise PassError(f"least is a percentage from 0 and below 5, got {self.least:g}")
        if self.weight == "float" and self.input != "float":
            raise PassError("a quantized input needs a quantized weight: no kernel takes only one")

    def relies_on(self) -> frozenset[str]:
        """Ranges only for static scales: weights alone and dynamic scales need no data."""
        static = self.input != "float" and self.scale == "static"
        return self.requires if static or self.attention != "float" else frozenset()

    def needs_data(self) -> bool:
        """To weigh errors by what weights are multiplied with, and for the shapes of ``least``."""
        return self.method == "output" or self.least > 0

    def weight_formats(self) -> tuple[str, ...]:
        return (self.weight, self.embedding, *self._of_ends(self.weight))

    def input_formats(self) -> tuple[str, ...]:
        return (self.input, self.attention, *self._of_ends(self.input))

    def _of_ends(self, others: str) -> tuple[str, ...]:
        """The format of first and last layers, if it is another and these are quantized at all."""
        return () if "float" in (others, self.weight) or self.ends == "as-others" else (self.ends,)

    def scales(self) -> tuple[str, ...]:
        return ("tensor",) if self.scale == "dynamic" else ()

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        excluded = {layer.node for layer in graph.select(model, self.exclude, "exclude")}
        chosen = graph.select(model, self.include, "include") if any(graph.layers(model)) else []
        chosen = [layer for layer in chosen if layer.node not in excluded]
        weighted = [layer for layer in chosen if layer.kind in WEIGHTED]
        spared = self._spared(model, weighted, ctx)
        weighted = [layer for layer in weighted if layer.node not in spared]
        ends = graph.ends(model, WEIGHTED) if self._of_ends(self.weight) else frozenset[ir.Node]()
        if self.weight != "float":
            how = Weights(self.weight, self.granularity, self.block, self.method)
            last = dataclasses.replace(how, format=self.ends) if ends else how
            decide_weights(model, [x for x in weighted if x.node not in ends], how, ctx)
            decide_weights(model, [x for x in weighted if x.node in ends], last, ctx)
        tables = [layer for layer in chosen if layer.kind == "embedding"]
        if self.embedding != "float":
            decide_weights(model, tables, self._for_tables(), ctx)
        inputs = 0
        for layer in weighted:
            if layer.input is not None and self.input != "float":
                dynamic = self.scale == "dynamic" and layer.kind == "linear"
                form = self.ends if layer.node in ends else self.input
                decide_input(layer.input, form, dynamic, self.symmetric)
                inputs += 1
            elif layer.input is not None and self.weight != "float":
                layer.input.decide(None)  # an earlier quantize may have decided it
        products = [layer for layer in chosen if layer.kind == "attention"]
        if self.attention != "float":
            for layer in products:
                assert layer.input is not None
                decide_input(layer.input, self.attention)
                decide_input(layer.weight, self.attention)
        return {
            "weights": len(weighted) if self.weight != "float" else 0,
            "inputs": inputs,
            "products": len(products) if self.attention != "float" else 0,
            "tables": len(tables) if self.embedding != "float" else 0,
            "spared": len(spared),
        }

    def _spared(self, model: ir.Model, weighted: Sequence[Layer], ctx: Context) -> set[ir.Node]:
        """The nodes of the layers that ``least`` leaves in float."""
        if not self.least or self.weight == "float":
            return set()
        every, shapes = list(graph.layers(model)), ctx.data().shapes(model)
        macs = _shares([layer.macs(shapes) for layer in every])
        sizes = _shares([math.prod(graph.shape_of(layer.weight.value) or ()) for layer in every])
        of = {layer.node: each for layer, *each in zip(every, macs, sizes, strict=True)}
        found: set[ir.Node] = set()
        whole = 0.0
        for layer in sorted(weighted, key=lambda layer: of[layer.node]):
            share = of[layer.node][0]
            if max(of[layer.node]) < self.least and whole + share <= _TOGETHER * self.least:
                whole += share
                found.add(layer.node)
                for use in (layer.weight, layer.input):
                    if use is not None:
                        use.decide(None)  # an earlier quantize may have decided it
                layer.node.metadata_props[graph.REASON] = (
                    f"{share:.2g} % of the MACs: integers win nothing"
                )
        return found

    def _for_tables(self) -> Weights:
        """How a table is decided, as if it were a weight."""
        narrow = numerics.parse_format(self.embedding).bits <= 4
        granularity: Granularity = "block" if narrow else "channel"
        return Weights(self.embedding, granularity, self.block, self.method)


def _shares(parts: Sequence[int]) -> list[float]:
    """Each part in percent of all."""
    whole = max(sum(parts), 1)
    return [100 * part / whole for part in parts]
