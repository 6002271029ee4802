"""Override the decision on single layers, by name: the user's last word before the lowering."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from qcompile import graph, numerics, spec
from qcompile.deciding import Granularity, Weights, decide_input, decide_weights
from qcompile.errors import PassError
from qcompile.numerics import RangeMethod
from qcompile.passes.quantize import Scale
from qcompile.pipeline import Context, Pass, Stats


@dataclasses.dataclass(frozen=True)
class Set(Pass):
    """Decide anew the layers that a glob matches.

    A float weight makes its input float as well, since no kernel takes only a quantized input.
    Raises PassError if a glob matches no layer, for ``weight=float`` beside a quantized ``input``,
    or for ``scale=dynamic`` of a layer that is not linear.

    * ``layer``: globs over the names and operator types of layers; must be given.
    * ``weight``, ``input``: a format, ``float``, or ``keep`` for what is decided already; ``input``
      of a product of two activations is that of both.
    * ``granularity``, ``block``, ``method``, ``scale``: as those of quantize.
    * ``why``: a word for the report where a layer becomes float.
    """

    name: ClassVar[str] = "set"
    requires: ClassVar[frozenset[str]] = frozenset({"specs", "ranges"})
    produces: ClassVar[frozenset[str]] = frozenset({"specs"})

    layer: tuple[str, ...] = ()
    weight: str = "keep"
    input: str = "keep"
    granularity: Granularity = "channel"
    block: int = 32
    method: RangeMethod = "minmax"
    scale: Scale = "static"
    why: str = ""

    def __post_init__(self) -> None:
        if not self.layer:
            raise PassError("set needs layer=GLOB")
        if self.weight == "float" and self.input not in ("float", "keep"):
            raise PassError("a quantized input needs a quantized weight: no kernel takes only one")
        for form in (self.weight, self.input):
            if form not in ("float", "keep"):
                numerics.parse_format(form)

    def needs_data(self) -> bool:
        """Only to weigh errors by what weights are multiplied with."""
        return self.method == "output"

    def weight_formats(self) -> tuple[str, ...]:
        return () if self.weight == "keep" else (self.weight,)

    def input_formats(self) -> tuple[str, ...]:
        return () if self.input == "keep" else (self.input,)

    def relies_on(self) -> frozenset[str]:
        """Ranges only for an input with a static scale."""
        static = self.input not in ("float", "keep") and self.scale == "static"
        return self.requires if static else self.requires - {"ranges"}

    def scales(self) -> tuple[str, ...]:
        return ("tensor",) if self.scale == "dynamic" else ()

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        chosen = graph.select(model, self.layer, "layer")
        for layer in chosen:
            if self.weight == "float":
                layer.weight.decide(None)
            uses = [layer.input, layer.weight] if layer.kind == "attention" else [layer.input]
            for use in uses:
                if use is not None and "float" in (self.input, self.weight):
                    use.decide(None)
                elif use is not None and self.input != "keep":
                    if self.scale == "dynamic" and layer.kind != "linear":
                        raise PassError(f"{layer.name!r} is no linear layer: no scale at run time")
                    decide_input(use, self.input, self.scale == "dynamic")
        if self.weight not in ("float", "keep"):
            weighted = [layer for layer in chosen if graph.is_constant(layer.weight.value)]
            how = Weights(self.weight, self.granularity, self.block, self.method)
            decide_weights(model, weighted, how, ctx)
        for layer in chosen:
            if not spec.all_specs(layer.node):
                layer.node.metadata_props[graph.REASON] = self.why.replace("-", " ") or f"{self}"
        return {"layers": len(chosen)}
