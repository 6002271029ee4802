"""What layers take on this machine, in float and in integers: for ``--measure`` and for budgets.

The model is run in float and as it was decided, with the runtime's profiler, so that every layer is
timed where it stands: with its shapes, its neighbours, and the memory layout that the runtime gives
to a chain of such layers, which a layer taken out alone would not have. What a border between float
and integers costs by element is in the second profile as well. The assignment of least total time
is then a minimum cut between *integers* and *float* (all costs are those of a node on one side, or
of a value whose writer and readers lie on two). At last whole models are timed against each other,
and the fastest is taken, so that a wrong estimate costs nothing. Under a budget of latency the cut
is a constraint (see ``solve.Network``).
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qcompile import bench, execute, graph, spec
from qcompile.backends.base import Target
from qcompile.backends.lowering import MOVES
from qcompile.calibrate import BETWEEN, Calibration
from qcompile.graph import Layer
from qcompile.solve import FIRST, OTHER, Edge, Network
from qcompile.timing import FLOAT, Timing

Times = Mapping[str, float]
# Where a model is less than this much faster than another, noise decides.
MARGIN = 0.02
# Seconds that one profile may take, and that the comparison of two models may.
SECONDS = 2.0
WHY = "faster-in-float-here"
_CONVERSIONS = (
    "QuantizeLinear", "DequantizeLinear", "Transpose", "ReorderInput", "ReorderOutput",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Choice:
    """Layers by name: those that become float, and those whose weight alone stays quantized."""

    float: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()

    def texts(self) -> list[str]:
        """The passes that make this choice."""
        found: list[str] = []
        if self.float:
            globs = ",".join(map(graph.glob_of, self.float))
            found.append(f"set{{layer={globs} weight=float input=float why={WHY}}}")
        if self.alone:
            found.append(f"set{{layer={','.join(map(graph.glob_of, self.alone))} input=float}}")
        return found


def choose(
    decided: ir.Model, target: Target, calibration: Calibration, log: Callable[[str], None]
) -> Choice:
    """The choice for the layers of ``decided`` with which the model is fastest here."""
    layers = [layer for layer in graph.layers(decided) if spec.all_specs(layer.node)]
    asked = Choice()
    if not layers:
        return asked
    sample = calibration.samples[0]
    plain = changed(decided, Choice(float=tuple(layer.name for layer in layers)))
    floats = _profile(plain, target, sample, decided)
    integers = _profile(decided, target, sample, decided)
    left = cut(decided, layers, floats, integers, calibration.shapes(decided))
    linear = [layer.name for layer in layers if _may_stand_alone(layer)]
    alone: tuple[str, ...] = ()
    if linear:
        weights = _profile(changed(decided, Choice(alone=tuple(linear))), target, sample, decided)
        best = {n: min(floats.node(n) if n in left else integers.node(n), math.inf) for n in linear}
        alone = tuple(n for n in linear if weights.node(n) < (1 - 5 * MARGIN) * best[n])
    found = Choice(tuple(sorted(left - set(alone))), alone)
    log(f"measured: {len(found.float)} of {len(layers)} layers faster in float, {len(alone)} alone")
    candidates = [asked] if found == asked else [found, asked]
    return _fastest(decided, target, plain, candidates, calibration, log)


def changed(decided: ir.Model, choice: Choice) -> ir.Model:
    """A copy of ``decided`` with ``choice`` made."""
    model = decided.clone()
    for layer in graph.layers(model):
        if layer.name in choice.float:
            spec.clear(layer.node)
        elif layer.name in choice.alone and layer.input is not None:
            layer.input.decide(None)
    return model


def _may_stand_alone(layer: Layer) -> bool:
    entered = layer.input.spec if layer.input else None
    return layer.kind == "linear" and entered is not None and layer.weight.spec is not None


# -- profiles -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Profile:
    """Microseconds by the name of a node of the decided graph, and of all conversions."""

    times: Times
    conversions: float

    def node(self, name: str) -> float:
        """Microseconds of one node; 0 where it was fused into another."""
        return self.times.get(name, 0.0)


def _profile(
    model: ir.Model, target: Target, sample: Mapping[str, execute.Array], decided: ir.Model
) -> Profile:
    """Time every node of ``model`` as lowered; a fused kernel counts for the layer that it is."""
    lowered = model.clone()
    target.lower(lowered)
    layers = {n.name or "": graph.origins(n) for n in lowered.graph if graph.origins(n)}
    writers = {v.name or "": n.name or "" for n in decided.graph for v in n.outputs}
    names = {n.name or "" for n in decided.graph}
    ids = {o: n.name or "" for n in decided.graph for o in graph.origins(n)}
    times: dict[str, float] = {}
    conversions = 0.0
    for (name, kind), duration in execute.profile(lowered, sample, SECONDS).items():
        stem = re.sub(r"(_token_\d+|_nchwc)+$", "", name.removeprefix("fused "))
        while stem and stem not in layers and stem not in names and stem not in writers:
            stem = stem.rpartition("/")[0]
        of = [ids[o] for o in layers.get(stem, ()) if o in ids]
        if of:
            times[of[0]] = times.get(of[0], 0.0) + duration
        elif kind in _CONVERSIONS and name not in names:
            conversions += duration
        elif stem:
            node = stem if stem in names else writers[stem]
            times[node] = times.get(node, 0.0) + duration
    return Profile(times, conversions)


# -- the cut ------------------------------------------------------------------------------------


def cut(
    model: ir.Model,
    layers: Sequence[Layer],
    floats: Profile,
    integers: Profile,
    shapes: graph.Shapes,
) -> set[str]:
    """The layers that the assignment of least time leaves in float."""
    rate = integers.conversions / max(_borders(model, layers, shapes), 1)
    edges = borders(model, layers, floats, integers, rate, shapes)
    names = [layer.name for layer in layers]
    places = {name: number for number, name in enumerate(names)}
    network = Network(0, edges, places, [np.array([True, False])] * len(names))
    times = [np.array([integers.node(name), floats.node(name)], np.float64) for name in names]
    return {name for name, side in zip(names, network.least(times)[1], strict=True) if side}


def borders(
    model: ir.Model,
    layers: Sequence[Layer],
    floats: Profile,
    integers: Profile,
    rate: float,
    shapes: graph.Shapes,
) -> list[Edge]:
    """What lies between ``layers``, and getting from integers (the first side) to floats and back.

    That takes ``rate`` an element. An operator that has an integer form runs in integers only where
    all that it reads are.
    """
    follows = _follows(model)
    writes, whole = _sides(layers, follows)
    edges: list[Edge] = []
    for node in (n for n in model.graph if n in follows):
        name = node.name or ""
        edges += [(FIRST, name, floats.node(name)), (name, OTHER, integers.node(name))]
        for value in node.inputs:
            writer = value.producer() if value is not None else None
            if value is None or graph.is_constant(value):
                continue
            known = writer is not None and writer in writes
            edges.append((name, (writer.name or "") if known and writer else OTHER, math.inf))
    for value in _values(model):
        size = rate * math.prod(shapes.get(value.name or "", ()))
        writer = value.producer()
        source = (writer.name or "") if writer is not None and writer in writes else OTHER
        inside = [use.node for use in graph.readers(value) if use.node in whole]
        outside = len(inside) < len(graph.readers(value)) or value.is_graph_output()
        ends = [node.name or "" for node in inside] + ([OTHER] if outside else [])
        out, back = f"from {value.name}", f"to {value.name}"
        if source != OTHER:
            edges.append((source, out, size))
            edges += [(out, end, math.inf) for end in ends]
        if inside:
            edges.append((back, source, size))
            edges += [(end, back, math.inf) for end in ends if end != OTHER]
    return edges


def _follows(model: ir.Model) -> set[ir.Node]:
    """The operators between layers that have an integer form."""
    return {n for n in model.graph if n.op_type in (*MOVES, "Relu", "Clip", *BETWEEN)}


def _values(model: ir.Model) -> Iterable[ir.Value]:
    """The activations that are read in the main graph."""
    for value in (*model.graph.inputs, *(v for n in model.graph for v in n.outputs)):
        if graph.is_float(value) and not graph.is_constant(value):
            yield value


def _sides(layers: Sequence[Layer], follows: set[ir.Node]) -> tuple[set[ir.Node], set[ir.Node]]:
    """What may write integers, and what may read them."""
    writes = {layer.node for layer in layers if layer.kind in ("conv", "depthwise")}
    return writes | follows, {layer.node for layer in layers} | follows


def _borders(model: ir.Model, layers: Sequence[Layer], shapes: graph.Shapes) -> float:
    """The elements that are converted where ``layers`` run in integers and no others."""
    writes, whole = _sides(layers, _follows(model))
    inside = {layer.node for layer in layers}
    for node in model.graph:
        read = [v for v in node.inputs if v is not None and not graph.is_constant(v)]
        if node in whole and all(v.producer() in inside & writes for v in read):
            inside.add(node)
    count = 0.0
    for value in _values(model):
        source = value.producer() in inside & writes
        sides = {use.node in inside for use in graph.readers(value)}
        sides |= {False} if value.is_graph_output() else set()
        count += math.prod(shapes.get(value.name or "", ())) * (sides != {source} and bool(sides))
    return count


# -- budgets -----------------------------------------------------------------------------------


def timing(decided: Mapping[str, ir.Model], target: Target, calibration: Calibration) -> Timing:
    """What each layer takes in each form, from one profile of the whole model for each.

    ``decided`` holds the model with all these layers decided in one form, and as FLOAT with none.
    Where inputs are quantized, borders are those of the first form.
    """
    plain, sample = decided[FLOAT], calibration.samples[0]
    forms = [form for form in decided if form != FLOAT]
    first = decided[forms[0]]
    before = {node.name for node in plain.graph if spec.all_specs(node)}
    every = (layer for layer in graph.layers(first) if layer.name not in before)
    layers = [layer for layer in every if spec.all_specs(layer.node)]
    names = [layer.name for layer in layers]
    profiles = {form: _profile(m, target, sample, plain) for form, m in decided.items()}
    floats, edges = profiles[FLOAT], list[Edge]()
    whole = sum(floats.times.values()) + floats.conversions
    varied = set(names)
    if any(layer.input is not None and layer.input.spec is not None for layer in layers):
        shapes = calibration.shapes(first)
        # With every second layer in float, for borders of the sizes that a choice will have.
        mixed = changed(first, Choice(float=tuple(names[1::2])))
        conversions = _profile(mixed, target, sample, plain).conversions
        rate = conversions / max(_borders(first, layers[::2], shapes), 1)
        edges = borders(first, layers, floats, profiles[forms[0]], rate, shapes)
        varied |= {node.name or "" for node in _follows(first)}
    rest = whole - sum(floats.node(name) for name in varied)
    times = {form: {n: profile.node(n) for n in names} for form, profile in profiles.items()}
    return Timing(times, whole, rest, tuple(edges))


def ratio(decided: ir.Model, floats: ir.Model, target: Target, calibration: Calibration) -> float:
    """The latency of ``decided`` in that of ``floats``, both lowered and run in turn.

    The median of three medians, each of sessions of its own, because where a session finds its
    memory makes a difference. By the clock of the thread, which does not run while the thread waits
    for what else the machine does; on an idle one it is that of the wall.
    """
    lowered = [model.clone() for model in (floats, floats, decided)]
    for model in lowered:
        target.lower(model)
    found: list[float] = []
    for _ in range(3):
        one, again, other = (execute.Session(model, threads=1) for model in lowered)
        rounds = bench.rounds_for(one, calibration.samples, SECONDS)
        timed = bench.interleaved(one, again, other, calibration.samples, rounds, time.thread_time)
        found.append(timed.ratio)
    return statistics.median(found)


# -- whole models -------------------------------------------------------------------------------


def _fastest(
    decided: ir.Model,
    target: Target,
    plain: ir.Model,
    candidates: Sequence[Choice],
    calibration: Calibration,
    log: Callable[[str], None],
) -> Choice:
    """The candidate of least latency; the last, what was asked, if none is clearly faster."""
    sessions: list[execute.Session] = []
    for choice in candidates:
        model = changed(decided, choice)
        target.lower(model)
        sessions.append(execute.Session(model, threads=1))
    floats = execute.Session(plain, threads=1)
    rounds = bench.rounds_for(floats, calibration.samples, SECONDS)
    asked, best, least = candidates[-1], candidates[-1], 1 - MARGIN
    for choice, session in zip(candidates[:-1], sessions[:-1], strict=True):
        found = bench.interleaved(sessions[-1], floats, session, calibration.samples, rounds)
        log(f"measured: {found.ratio_of_minima:.2f} of what was asked")
        if found.ratio_of_minima < least:
            best, least = choice, found.ratio_of_minima
    return best if best is not asked else asked
