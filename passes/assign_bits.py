"""Give each layer the bits that it needs, under a budget for all.

Sources: MLoRQ (arXiv 2507.09616), steps 3 to 6: noise-to-signal at the outputs with one layer
changed, and a knapsack; after FMPQ (arXiv 2506.01221): one tolerance for the relative change of a
scalar, the smallest that fits. The paper's own adaptive search is not known to us; this one finds
the same answer as a search over all breakpoints, since the levels at all tolerances are one merge
of sorted walks, and what is left of the budget is spent where it wins most.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from qcompile import factors, graph, sensitivity
from qcompile.assignment import Assigned, Assigner, Budget, Costs, Items, Pairs
from qcompile.calibrate import Calibration, content_keys
from qcompile.deciding import WEIGHTED, Granularity, Weights, decide_input, decide_weights
from qcompile.errors import PassError
from qcompile.factors import Weigh
from qcompile.numerics import RangeMethod
from qcompile.passes.gptq import Gptq
from qcompile.pipeline import Context, Pass, Stats
from qcompile.sources import Data


@dataclasses.dataclass(frozen=True)
class AssignBits(Pass):
    """Write a spec on the weight of every Conv and linear layer, its width chosen under budgets.

    ``z[l, c]`` chooses one width ``c`` of each layer ``l``; ``cost[l, c]`` is the ``metric`` at the
    outputs with only ``l`` rounded to ``c``, all else in float; costs are taken to add up.

    * ``budget``: ``bits=4.5`` (codes alone, on average; ``bits=`` may be left out) or ``size=4MB``
      (as stored, scales counted) of the layers that are decided; several must all be met.
    * ``choices``: the widths, of 2 to 8 bits.
    * ``method``: ``mlorq``: least summed cost; ``fmpq``: no layer costs more than the smallest
      tolerance that fits; ``greedy``: widths fall one at a time where least is lost.
    * ``factors``: widths of the two factors of products of low rank, which ``mlorq`` considers
      beside the widths (linear layers and 1x1 Convs); ``none`` leaves them out.
    * ``weigh``: what errors count for in these factors, as in low-rank; ``hessian`` is the paper's.
    * ``metric``: ``nsr``, ``mse``, ``kl`` or ``module:callable`` (see ``sensitivity``).
    * ``table``: ``lazy`` measures what the choice rests on and guesses the rest from the error of
      the layer; ``full`` measures every width of every layer.
    * ``rounding``: how weights on trial are rounded: ``nearest``, or as ``gptq`` rounds them, where
      that pass follows; it is fitted on other samples than those that are run.
    * ``samples``: how many calibration samples are run.
    * ``input``: the format of activations, ``int8`` or ``float``.
    * ``granularity``, ``block``, ``range``: as ``granularity``, ``block``, ``method`` of quantize.
    * ``include``, ``exclude``: globs over the names and operator types of layers.

    Raises PassError for a budget that cannot be met, saying the least that is possible.
    """

    name: ClassVar[str] = "assign-bits"
    requires: ClassVar[frozenset[str]] = frozenset({"ranges"})
    produces: ClassVar[frozenset[str]] = frozenset({"specs"})
    reads_data: ClassVar[bool] = True
    source: ClassVar[str] = "MLoRQ, arXiv 2507.09616; FMPQ, arXiv 2506.01221"

    budget: tuple[str, ...] = ("bits=4",)
    choices: tuple[int, ...] = (2, 3, 4, 6, 8)
    method: Literal["mlorq", "fmpq", "greedy"] = "mlorq"
    factors: tuple[int, ...] | None = None
    weigh: Weigh = "input"
    metric: str = "nsr"
    table: Literal["lazy", "full"] = "lazy"
    rounding: Literal["nearest", "gptq"] = "nearest"
    samples: int = 16
    input: Literal["float", "int8"] = "float"
    granularity: Granularity = "channel"
    block: int = 32
    range: RangeMethod = "mse"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for text in self.budget:
            Budget.parse(text)
        if not self.budget:
            raise PassError("assign-bits needs a budget, such as bits=4.5 or size=4MB")
        if not self.choices or not all(2 <= bits <= 8 for bits in self.choices):
            raise PassError(f"choices are widths of 2 to 8 bits, got {self.choices or 'none'}")
        if self.factors is not None and not all(2 <= bits <= 8 for bits in self.factors):
            raise PassError(f"factors are widths of 2 to 8 bits, got {self.factors}")
        if self.factors and (self.method != "mlorq" or self.input != "float"):
            raise PassError("factors go with method=mlorq and input=float")
        if ":" not in self.metric:
            sensitivity.metric(self.metric)
        self.starts_at(1, "samples")

    def relies_on(self) -> frozenset[str]:
        """Ranges only where activations are quantized."""
        return self.requires if self.input != "float" else frozenset()

    def weight_formats(self) -> tuple[str, ...]:
        return tuple(f"int{bits}" for bits in sorted({*self.choices, *(self.factors or ())}))

    def input_formats(self) -> tuple[str, ...]:
        return (self.input,)

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        excluded = {layer.node for layer in graph.select(model, self.exclude, "exclude")}
        chosen = graph.select(model, self.include, "include") if any(graph.layers(model)) else []
        layers = [c for c in chosen if c.node not in excluded and c.kind in WEIGHTED]
        if not layers:
            return {"layers": 0}
        names = [layer.name for layer in layers]
        key = self._key(model, names, ctx)
        costs = ctx.data().once(key, lambda: self._costs(model, names, ctx)).anew()
        before = costs.sensitivity.passes
        assigner = Assigner(costs, [Budget.parse(b) for b in self.budget], self.table == "full")
        found: Assigned = getattr(assigner, self.method)()
        self._decide(model, costs.items, found, ctx)
        return self._stats(costs, found, costs.sensitivity.passes - before)

    def _key(self, model: ir.Model, names: Sequence[str], ctx: Context) -> str:
        """All that costs depend on."""
        values = content_keys(model, ctx.data().state)
        outputs = [values[value.name or ""] for value in model.graph.outputs]
        free: dict[str, Any] = {"budget": ("bits=8",), "table": "lazy", "input": "float"}
        if not self.factors:
            free["method"] = "mlorq"
        return f"{dataclasses.replace(self, **free)} {outputs} {names} {ctx.seed}"

    def _costs(self, model: ir.Model, names: Sequence[str], ctx: Context) -> Costs:
        kept = model.clone()
        layers = [layer for layer in graph.layers(kept) if layer.name in set(names)]
        pairs = Pairs(self.factors, self.weigh) if self.factors else None
        fit, samples = None, ctx.data().samples
        if self.rounding == "gptq":
            # What it was fitted on makes few bits look better than they are.
            seen, samples = ctx.data().to_fit(len(samples))
            fitted = Calibration(Data(ctx.data().data.source, seen), mask=ctx.data().mask)
            ctx = dataclasses.replace(ctx, calibration=fitted)
            fit = Gptq(damping=0.1)
        items = Items(kept, layers, self.choices, self._how(), ctx, pairs, fit)
        samples = samples.some(self.samples)
        metric = sensitivity.metric(self.metric)
        return Costs(items, sensitivity.Sensitivity(kept, samples, metric))

    def _how(self) -> Weights:
        return Weights("int8", self.granularity, self.block, self.range)

    def _decide(self, model: ir.Model, items: Items, found: Assigned, ctx: Context) -> None:
        by_width: dict[int, list[graph.Layer]] = {}
        here = {layer.name: layer for layer in graph.layers(model)}
        for item, number in enumerate(found.numbers):
            choice = items.choices[item][number]
            ctx.log(f"  {items.name(item)}: {choice}")
            layers = [here[layer.name] for layer in items.readers[item]]
            by_width.setdefault(choice.bits, []).extend(layers)
            if choice.rank:
                inner = factors.split(model, layers[0], items.factors[item].cut(choice.rank))
                by_width.setdefault(choice.inner, []).append(inner)
        for bits, layers in sorted(by_width.items()):
            how = dataclasses.replace(self._how(), format=f"int{bits}")
            decide_weights(model, layers, how, ctx)
            for layer in layers:
                if layer.input is not None and self.input != "float":
                    decide_input(layer.input, self.input)
                elif layer.input is not None:
                    layer.input.decide(None)
        graph.remove_dead(model)

    def _stats(self, costs: Costs, found: Assigned, passes: float) -> Stats:
        items = costs.items
        chosen = [items.choices[item][number] for item, number in enumerate(found.numbers)]
        sizes = [items.size(item, choice) for item, choice in enumerate(chosen)]
        count = sum(math.prod(items.shape(item)) for item in range(len(items)))
        return {
            "layers": sum(map(len, items.readers)),
            "products": sum(bool(c.rank) for c in chosen),
            "bits a weight": round(sum(size.bits for size in sizes) / max(count, 1), 4),
            "stored bytes": int(sum(size.stored for size in sizes)),
            "cost": float(f"{found.cost:.4g}"),
            "gap": float(f"{found.gap:.2g}"),
            "forward passes": round(passes, 1),
            "of a whole table of": sum(map(len, items.choices)),
        }
