"""Give layers back until the accuracy is what the user wants: wider formats first, then float.

A level is one step for every layer that it applies to: weights in 8 bits, activations in 16, float;
those that the target does not hold are left out. At each level the layers are ordered by what each
alone wins, in noise at the outputs, for what it costs (its share of the MACs and of the weights).
That is measured on calibration samples, never on the user's evaluation data, since data that
chooses may not judge. If the whole level is enough, bisection finds the shortest beginning of the
order that is; else the level is kept and the next one begins.

The evaluation data does decide how many layers are given back, so the accuracy on it is a little
too good; the report says so.

Similar: sensitivity-ordered mixed precision of NVIDIA ModelOpt's ``auto_quantize`` and of NNCF's
accuracy-aware loop; here the result is text of the pipeline, which replays without the search.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import re
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from qcompile import graph, numerics, spec
from qcompile.accuracy import Bound, Evaluation
from qcompile.backends.base import Target
from qcompile.errors import QCompileError
from qcompile.execute import Session
from qcompile.graph import Layer
from qcompile.passes.set import Set
from qcompile.pipeline import Context, Pass
from qcompile.simulate import Judge

# Samples that sensitivities are measured on.
SAMPLES = 8
# The options of a ``set`` for one layer, beside its name.
Change = Mapping[str, str | int]
Choice = dict[str, Change]
FLOAT: Change = {"weight": "float", "input": "float"}


@dataclasses.dataclass(frozen=True)
class GivenBack:
    """A layer that was given back, and what its weight and input were and are; in words."""

    layer: str
    was: str
    now: str


@dataclasses.dataclass(frozen=True)
class Found:
    """The ``passes`` to run before the lowering, what they give back, and what it took.

    ``met`` says whether the bound is; if not, this is the best that was reached. ``probes`` counts
    models that were run on ``SAMPLES`` calibration samples, and ``unnamed`` the layers that no glob
    names, so that they could not be given back.
    """

    passes: tuple[Pass, ...]
    given_back: tuple[GivenBack, ...]
    met: bool
    probes: int
    unnamed: int = 0


def meet(decided: ir.Model, ctx: Context, evaluation: Evaluation, bound: Bound) -> Found:
    """What to give back of ``decided``, a model just before its lowering, to stay within ``bound``.

    Deterministic. Each of up to three levels measures every layer once on few samples, and the
    metric itself at most ``log2(layers) + 2`` times.
    """
    return _Search(decided, ctx, evaluation, bound).run()


class _Search:
    def __init__(
        self, decided: ir.Model, ctx: Context, evaluation: Evaluation, bound: Bound
    ) -> None:
        assert ctx.target is not None
        self.decided, self.ctx, self.target = decided, ctx, ctx.target
        self.evaluation, self.bound = evaluation, bound
        self.layers = {
            layer.name: layer for layer in graph.layers(decided) if spec.all_specs(layer.node)
        }
        self.globs = {
            name: glob for name in self.layers if (glob := _glob(name, decided)) is not None
        }
        self.probes = 0
        # The best so far: its drop, how many layers it gives back, and the choice.
        self.best: tuple[float, int, Choice] = (math.inf, 0, {})

    def run(self) -> Found:
        choice: Choice = {}
        if self._meets(choice):
            return self._found(choice, True)
        self.judge = Judge(_reference(self.ctx), self.ctx.data().samples[:SAMPLES])
        self.costs = self._costs()
        for level in (_weights_of_8_bits, _inputs_of_16_bits, _float):
            self.ctx.log(f"giving layers back: {(level.__doc__ or '').splitlines()[0]}")
            order = self._ordered(level, choice)
            if level is _float and len(order) == len(self.layers):
                order = order[:-1]  # a model with nothing quantized is no answer
            whole = choice | dict(order)
            if order and self._meets(whole):
                return self._found(self._shortest(choice, order), True)
            choice = whole
        return self._found(self.best[2], False)

    def _shortest(self, base: Choice, order: Sequence[tuple[str, Change]]) -> Choice:
        """``base`` and the shortest beginning of ``order`` that meets the bound, as all of it."""
        misses, meets = 0, len(order)
        while meets - misses > 1:
            middle = (misses + meets) // 2
            if self._meets(base | dict(order[:middle])):
                meets = middle
            else:
                misses = middle
        return base | dict(order[:meets])

    def _meets(self, choice: Choice) -> bool:
        # As it will run, where this machine can.
        here = self.target.runs_here
        lowered = self._lowered(choice)
        session = Session(lowered if here else self.target.computed(lowered), optimize=here)
        drop = self.evaluation.drop(self.evaluation.measure(session))
        self.ctx.log(f"{len(choice)} layers given back: drop {drop:.4g}")
        if (drop, len(choice)) < self.best[:2]:
            self.best = drop, len(choice), choice
        return self.bound.allows(drop, self.evaluation.in_float)

    def _ordered(
        self, level: Callable[[Layer, Target], Change | None], base: Choice
    ) -> list[tuple[str, Change]]:
        """The layers that ``level`` changes: those first that win most for what they cost."""
        changes = {n: c for n in self.globs if (c := level(self.layers[n], self.target))}
        if not changes:
            return []
        changes = {
            n: c if level is _float else {**base.get(n, {}), **c} for n, c in changes.items()
        }
        before = self._noise(base)
        won = {
            name: (before - self._noise(base | {name: change})) / self.costs[name]
            for name, change in self.ctx.progress(changes.items(), "sensitivity", len(changes))
        }
        return sorted(
            changes.items(), key=lambda item: -won[item[0]]
        )  # stable: ties in graph order

    def _noise(self, choice: Choice) -> float:
        """The noise at the outputs on calibration samples, each relative to its signal, summed."""
        self.probes += 1
        found = self.judge.sqnr(Session(self._lowered(choice), optimize=False)).values()
        total = sum(10.0 ** (-decibels / 10.0) for decibels in found)
        return total if math.isfinite(total) else 1e30  # worse than all, and still a number

    def _costs(self) -> dict[str, float]:
        """The share of the MACs and of the weights that each layer has, added."""
        shapes = self.ctx.data().shapes(self.decided)
        macs = {name: layer.macs(shapes) for name, layer in self.layers.items()}
        sizes = {
            name: sum(math.prod(shape) for shape in layer.weight_shapes())
            for name, layer in self.layers.items()
        }
        all_macs, all_sizes = max(sum(macs.values()), 1), max(sum(sizes.values()), 1)
        return {n: max(macs[n] / all_macs + sizes[n] / all_sizes, 1e-9) for n in self.layers}

    def _lowered(self, choice: Choice) -> ir.Model:
        model = self._changed(choice)
        self.target.lower(model)
        return model

    def _changed(self, choice: Choice) -> ir.Model:
        model = self.decided.clone()
        for step in self._passes(choice):
            graph.forget_names(model)
            step.run(model, self.ctx)
        return model

    def _passes(self, choice: Choice) -> list[Set]:
        """One ``set`` for the layers of each change, in the order of the graph."""
        groups: dict[tuple[tuple[str, str | int], ...], list[str]] = {}
        for name in self.layers:
            if name in choice:
                groups.setdefault(tuple(choice[name].items()), []).append(self.globs[name])
        found: list[Set] = []
        for change, globs in groups.items():
            fields: dict[str, object] = dict(change)
            found.append(dataclasses.replace(Set(layer=tuple(globs)), **fields))  # type: ignore[arg-type]
        return found

    def _found(self, choice: Choice, met: bool) -> Found:
        now = {layer.name: layer for layer in graph.layers(self._changed(choice))}
        given = tuple(
            GivenBack(name, _words(self.layers[name]), _words(now[name]))
            for name in self.layers
            if name in choice
        )
        unnamed = len(self.layers) - len(self.globs)
        return Found(tuple(self._passes(choice)), given, met, self.probes, unnamed)


def _weights_of_8_bits(layer: Layer, target: Target) -> Change | None:
    """weights in 8 bits"""
    decided = layer.weight.spec
    if decided is None or layer.kind == "attention" or "int8" not in target.weight_formats:
        return None
    if numerics.parse_format(decided.format).bits >= 8:
        return None
    if decided.block is None:
        return {"weight": "int8"}
    return {"weight": "int8", "granularity": "block", "block": decided.block}


def _inputs_of_16_bits(layer: Layer, target: Target) -> Change | None:
    """activations in 16 bits"""
    decided = layer.input.spec if layer.input is not None else None
    if decided is None or "int16" not in target.input_formats:
        return None
    return {"input": "int16"} if numerics.parse_format(decided.format).bits < 16 else None


def _float(_: Layer, __: Target) -> Change | None:
    """float"""
    return FLOAT


def _glob(name: str, model: ir.Model) -> str | None:
    """A glob that fits the layer ``name`` alone and that pipeline text can hold, or None."""
    glob = re.sub(r"[\s{},\[]", "?", name)
    fits = [layer for layer in graph.layers(model) if graph.matches(layer.node, glob)]
    return (
        glob
        if [layer.name for layer in fits] == [name] and fnmatch.fnmatchcase(name, glob)
        else None
    )


def _words(layer: Layer) -> str:
    """What is decided on a layer, as the report says it."""
    entered = layer.input.spec if layer.input is not None else None
    return f"{layer.weight.spec or 'float'} x {entered or 'float'}"


def _reference(ctx: Context) -> ir.Model:
    if ctx.reference is None:
        raise QCompileError("there is no float model to compare with")
    return ctx.reference
