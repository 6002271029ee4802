"""Give each layer the bits that it needs, under a budget for all.

Sources: MLoRQ (arXiv 2507.09616), steps 3 to 6: noise-to-signal at the outputs with one layer
changed, and a knapsack; after FMPQ (arXiv 2506.01221): one tolerance for the relative change of a
scalar, the smallest that fits. The paper's own adaptive search is not known to us; this one finds
the same answer as a search over all breakpoints, since the levels at all tolerances are one merge
of sorted walks, and what is left of the budget is spent where it wins most.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from qcompile import content, factors, graph, numerics, sensitivity, spec
from qcompile.assignment import Assigned, Assigner
from qcompile.budget import Budget
from qcompile.calibrate import Calibration
from qcompile.candidates import FLOAT_BITS, Costs, Items, Pairs
from qcompile.deciding import WEIGHTED, Granularity, Weights, decide_input, decide_weights
from qcompile.errors import PassError
from qcompile.factors import Weigh
from qcompile.numerics import Grid, IntFormat, RangeMethod
from qcompile.passes.gptq import Gptq
from qcompile.passes.quantize import Quantize
from qcompile.passes.set import Set
from qcompile.pipeline import Context, Pass, Stats
from qcompile.sources import Data
from qcompile.timing import FLOAT, Timing

WHY = "float-is-worth-its-place-in-the-budget"


@dataclasses.dataclass(frozen=True)
class AssignBits(Pass):
    """Write a spec on the weight of every Conv and linear layer, its width chosen under budgets.

    ``z[l, c]`` chooses one width ``c`` of each layer ``l``; ``cost[l, c]`` is the ``metric`` at the
    outputs with only ``l`` rounded to ``c``, all else in float; costs are taken to add up.

    * ``budget``: ``bits=4.5`` (codes alone, on average; ``bits=`` may be left out), ``size=4MB``
      (as stored, scales counted), or ``bops=20G``, ``bops=0.3x`` of float (multiplications times
      the bits of weight and activation, of one sample), of the layers that are decided; or
      ``latency=0.6x`` of float, of the whole model on this machine; several must all be met.
    * ``choices``: the widths, of 2 to 8 bits, and ``float``, which leaves a layer as it is.
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
    * ``input``: the format of activations, ``int8`` or ``float``, where the weight is not float;
      with ``int8`` the cost of a layer is that of the rounded input as well, and of a Conv that of
      the output.
    * ``granularity``, ``block``, ``range``: as ``granularity``, ``block``, ``method`` of quantize.
    * ``include``, ``exclude``: globs over the names and operator types of layers.

    Under ``latency`` the whole model is profiled once in every choice, so that each layer is timed
    where it stands, and what is predicted is the sum over layers, what lies between them, and the
    borders between integers and floats (a cut: see ``solve``). Whole models as lowered are then run
    in turn with float, and what each layer in float takes among integers is corrected by what they
    show, until the budget is met by measurement, with little of it left. What is measured differs
    from run to run, and so may the choice; ``pipeline.txt`` has the one that was made. Targets that
    do not run here refuse it: without their clock there is ``bops``, which is exact.

    Trials of different layers are independent of each other and spread by ``ctx.map``; the rounds
    of a lazy table follow each other, since each measures what the choice before it rests on.

    Raises PassError for a budget that cannot be met, saying the least that is possible.
    """

    name: ClassVar[str] = "assign-bits"
    requires: ClassVar[frozenset[str]] = frozenset({"ranges"})
    produces: ClassVar[frozenset[str]] = frozenset({"specs"})
    reads_data: ClassVar[bool] = True
    source: ClassVar[str] = "MLoRQ, arXiv 2507.09616; FMPQ, arXiv 2506.01221"

    budget: tuple[str, ...] = ("bits=4",)
    choices: tuple[int | Literal["float"], ...] = (2, 3, 4, 5, 6, 8)
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
        kinds = [Budget.parse(text).kind for text in self.budget]
        if not self.budget:
            raise PassError("assign-bits needs a budget, such as bits=4.5 or size=4MB")
        if not self.widths() or not all(2 <= bits <= 8 for bits in self.widths()):
            listed = ",".join(map(str, self.choices)) or "none"
            raise PassError(f"choices are widths of 2 to 8 bits, and float; got {listed}")
        if kinds.count("latency") > 1:
            raise PassError("one budget of latency is enough")
        if self.measures() and (self.method != "mlorq" or self.factors):
            raise PassError("latency goes with method=mlorq and without factors")
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

    def measures(self) -> bool:
        """Whether one of the budgets is of latency."""
        return any(text.startswith("latency=") for text in self.budget)

    def widths(self) -> list[int]:
        """The choices but for float, falling."""
        return sorted({c for c in self.choices if c != FLOAT}, reverse=True)

    def weight_formats(self) -> tuple[str, ...]:
        return tuple(f"int{bits}" for bits in sorted({*self.widths(), *(self.factors or ())}))

    def input_formats(self) -> tuple[str, ...]:
        return (self.input,)

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        layers = self._layers(model)
        if not layers:
            return {"layers": 0}
        names = [layer.name for layer in layers]
        grids = {layer.name: self._grids(model, layer) for layer in layers}
        key = self._key(model, names, ctx)
        said = [(n, v, g.scale, g.zero_point) for n, read in grids.items() for v, g in read.items()]
        asked = f"{key} {said}"
        costs = ctx.data().once(asked, lambda: self._costs(model, names, grids, ctx)).anew()
        before = costs.sensitivity.passes
        timed = None
        if self.measures():
            make = functools.partial(self._timing, model, names, ctx)
            timed = ctx.data().once(f"timing {ctx.target} {key}", make)
        budgets = [Budget.parse(b) for b in self.budget]
        assigner = Assigner(costs, budgets, self.table == "full", timed)
        if timed is None:
            found: Assigned = getattr(assigner, self.method)()
            self._decide(model, costs.items, found, ctx)
            return self._stats(assigner, found, costs.sensitivity.passes - before)
        found, more = self._met(model, assigner, ctx)
        self._decide(model, costs.items, found, ctx)
        return self._stats(assigner, found, costs.sensitivity.passes - before) | more

    def chosen(self, model: ir.Model) -> Sequence[Pass]:
        """The widths of ``model``, as quantize and set say them."""
        globs: dict[str, list[str]] = {}
        for layer in self._layers(model):
            form = layer.weight.spec.format if layer.weight.spec else FLOAT
            globs.setdefault(form, []).append(graph.glob_of(layer.name))
        floats = globs.pop(FLOAT, [])
        if not globs:
            return [self]
        made: list[Pass] = [
            Quantize(
                form, self.input, self.granularity, self.block, self.range, include=tuple(names)
            )
            for form, names in sorted(globs.items())
        ]
        return made + ([Set(tuple(floats), FLOAT, FLOAT, why=WHY)] if floats else [])

    def _layers(self, model: ir.Model) -> list[graph.Layer]:
        """The layers that are to be decided."""
        excluded = {layer.node for layer in graph.select(model, self.exclude, "exclude")}
        chosen = graph.select(model, self.include, "include") if any(graph.layers(model)) else []
        return [c for c in chosen if c.node not in excluded and c.kind in WEIGHTED]

    def _met(self, model: ir.Model, assigner: Assigner, ctx: Context) -> tuple[Assigned, Stats]:
        """What meets the budget of latency by measurement, and how."""
        target, plain = ctx.target, self._plain(model)
        assert target is not None

        def measure(found: Assigned) -> float:
            decided = model.clone()
            self._decide(decided, assigner.items, found, ctx)
            ratio = target.ratio(decided, plain, ctx.data())
            ctx.log(f"  measured: {ratio:.3f} of the latency of float")
            return ratio

        met = assigner.meet(measure)
        return met.assigned, {
            "predicted latency": float(f"{met.predicted:.3g}"),
            "measured latency": float(f"{met.measured:.3g}"),
            "models measured": met.count,
        }

    def _plain(self, model: ir.Model, names: Sequence[str] | None = None) -> ir.Model:
        """A copy of ``model`` in which nothing is decided, or not the layers called ``names``."""
        plain = model.clone()
        for node in plain.graph:
            if names is None or node.name in names:
                spec.clear(node)
        return plain

    def _timing(self, model: ir.Model, names: Sequence[str], ctx: Context) -> Timing:
        assert ctx.target is not None
        decided = {FLOAT: self._plain(model, names)}
        for bits in self.widths():
            made = model.clone()
            layers = [layer for layer in graph.layers(made) if layer.name in set(names)]
            self._write(made, bits, layers, ctx)
            decided[f"int{bits}"] = made
        return ctx.target.timing(decided, ctx.data())

    def _grids(self, model: ir.Model, layer: graph.Layer) -> dict[str, Grid]:
        """The grids on which a trial of ``layer`` reads its input, and a Conv writes, by value.

        A value between two such layers counts for both: it is as in float only if both are.
        """
        if self.input == FLOAT or layer.input is None:
            return {}
        values = [layer.input.value]
        if layer.kind in ("conv", "depthwise"):
            values.append(graph.absorbed(layer.biased_output))
        found: dict[str, Grid] = {}
        for value in values:
            ends, form = graph.range_of(model, value), IntFormat(8, signed=False)
            # What is missing decide_input says, and the lowering what no kernel takes.
            if ends is not None and value.dtype in (ir.DataType.FLOAT, None):
                grid = Grid(form, *numerics.affine(*ends, form, symmetric=False))
                found[value.name or ""] = grid
        return found

    def _key(self, model: ir.Model, names: Sequence[str], ctx: Context) -> str:
        """All that costs depend on, but for the grids of inputs."""
        values = content.keys(model, ctx.data().state)
        outputs = [values[value.name or ""] for value in model.graph.outputs]
        free: dict[str, Any] = {"budget": ("bits=8",), "table": "lazy"}
        if not self.factors:
            free["method"] = "mlorq"
        return f"{dataclasses.replace(self, **free)} {outputs} {names} {ctx.seed}"

    def _costs(
        self,
        model: ir.Model,
        names: Sequence[str],
        grids: Mapping[str, Mapping[str, Grid]],
        ctx: Context,
    ) -> Costs:
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
        bits = [*self.widths(), *([FLOAT_BITS] if FLOAT in self.choices else [])]
        entered = FLOAT_BITS if self.input == FLOAT else numerics.parse_format(self.input).bits
        items = Items(kept, layers, bits, self._how(), ctx, pairs, fit, entered)
        samples = samples.some(self.samples)
        metric = sensitivity.metric(self.metric)
        return Costs(items, sensitivity.Sensitivity(kept, samples, metric, grids))

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
            self._write(model, bits, layers, ctx)
        graph.remove_dead(model)

    def _write(
        self, model: ir.Model, bits: int, layers: Sequence[graph.Layer], ctx: Context
    ) -> None:
        """Decide ``layers`` in ``bits``, or leave them in float."""
        if bits == FLOAT_BITS:
            for layer in layers:
                spec.clear(layer.node)
                layer.node.metadata_props[graph.REASON] = WHY.replace("-", " ")
            return
        how = dataclasses.replace(self._how(), format=f"int{bits}")
        decide_weights(model, list(layers), how, ctx)
        for layer in layers:
            if layer.input is not None and self.input != FLOAT:
                decide_input(layer.input, self.input)
            elif layer.input is not None:
                layer.input.decide(None)

    def _stats(self, assigner: Assigner, found: Assigned, passes: float) -> Stats:
        items = assigner.items
        chosen = [items.choices[item][number] for item, number in enumerate(found.numbers)]
        sizes = [items.size(item, choice) for item, choice in enumerate(chosen)]
        count = sum(math.prod(items.shape(item)) for item in range(len(items)))
        stats: Stats = {
            "layers": sum(map(len, items.readers)),
            "products": sum(bool(c.rank) for c in chosen),
            "bits a weight": round(sum(size.bits for size in sizes) / max(count, 1), 4),
            "stored bytes": int(sum(size.stored for size in sizes)),
            "cost": float(f"{found.cost:.4g}"),
            "gap": float(f"{found.gap:.2g}"),
            "forward passes": round(passes, 1),
            "of a whole table of": sum(map(len, items.choices)),
        }
        if FLOAT in self.choices:
            floats = (r for r, c in zip(items.readers, chosen, strict=True) if c.is_float)
            stats["in float"] = sum(map(len, floats))
        for number, budget in enumerate(assigner.budgets):
            if budget.kind == "bops":
                what = "bit operations" + (" of float" if budget.relative else "")
                stats[what] = float(f"{assigner.amount(found.numbers, number):.4g}")
        return stats
