"""What one changed layer costs at the outputs of a float model, in one number.

All else stays float, as in MLoRQ (arXiv 2507.09616) and FMPQ (arXiv 2506.01221). The assignments
built on it take such costs to add up over layers, which is an assumption: for independent small
noise it holds to first order.

Only what depends on the changed layer is run: the values around it are computed once, in float,
and kept in a file. The weight is an input of that part, so that one session serves all trials of a
layer. What the layer reads and writes may be rounded as well. A state is that of the float model,
so that what gathers over frames does not count.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile import capture, execute, graph, sequences
from qcompile.errors import CalibrationError, PassError, QCompileError
from qcompile.graph import Layer
from qcompile.numerics import Floats, Grid
from qcompile.sequences import Sample, Samples
from qcompile.spill import Spill

Array = npt.NDArray[Any]
# What a sample was fed, what float makes of it, and what the trial made of it.
Trio = tuple[Sample, Mapping[str, Array], Mapping[str, Array]]
Metric = Callable[[Iterable[Trio]], float]


def metric(text: str) -> Metric:
    """The number that ``text`` names; 0 for float itself, more is worse.

    * ``nsr``: ``E|y - y'|^2 / E|y|^2``, averages taken apart, summed over the outputs.
    * ``mse``: ``E|y - y'|^2``, summed over the outputs.
    * ``kl``: of softmax over the last axis, ``KL(y || y')`` in nats, averaged, summed over outputs.
    * ``module:callable``: a function as for --metric; its change relative to float, negative where
      it is better.
    """
    if ":" in text:
        return _Own(text)
    known: dict[str, Metric] = {"nsr": _nsr, "mse": _mse, "kl": _kl}
    if text not in known:
        raise PassError(f"metric {text!r} is none of {', '.join(known)}, module:callable")
    return known[text]


def _floats(trios: Iterable[Trio]) -> Iterator[tuple[str, Array, Array]]:
    for _, wanted, found in trios:
        for name, array in wanted.items():
            if array.dtype.kind == "f" and array.shape == found[name].shape:
                yield name, array.astype(np.float64), found[name].astype(np.float64)


def _powers(trios: Iterable[Trio]) -> dict[str, tuple[float, float, int]]:
    """Signal, noise and number of elements of each output."""
    found: dict[str, tuple[float, float, int]] = {}
    for name, wanted, got in _floats(trios):
        signal, noise, count = found.get(name, (0.0, 0.0, 0))
        powers = float(np.sum(wanted**2)), float(np.sum((got - wanted) ** 2))
        found[name] = signal + powers[0], noise + powers[1], count + wanted.size
    return found


def _nsr(trios: Iterable[Trio]) -> float:
    return sum(noise / max(signal, 1e-300) for signal, noise, _ in _powers(trios).values())


def _mse(trios: Iterable[Trio]) -> float:
    return sum(noise / max(count, 1) for _, noise, count in _powers(trios).values())


def _kl(trios: Iterable[Trio]) -> float:
    lost: dict[str, tuple[float, int]] = {}
    for name, wanted, got in _floats(trios):
        one, other = (_log_softmax(array) for array in (wanted, got))
        total, rows = lost.get(name, (0.0, 0))
        total += float(np.sum(np.exp(one) * (one - other)))
        lost[name] = total, rows + math.prod(wanted.shape[:-1])
    return sum(total / max(rows, 1) for total, rows in lost.values())


def _log_softmax(scores: Array) -> Array:
    scores = scores - scores.max(axis=-1, keepdims=True, initial=-np.inf)
    return scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))


class _Own:
    """The relative change of a function of the user's."""

    def __init__(self, text: str) -> None:
        function = capture.load_object(text, "metric")
        if not callable(function):
            raise PassError(f"metric {text!r} is {type(function).__name__}, no function")
        self._text, self._function = text, function
        self._sign = 1.0 if getattr(function, "lower_is_better", False) else -1.0

    def __call__(self, trios: Iterable[Trio]) -> float:
        kept = list(trios)
        base = self._value((sample, dict(wanted)) for sample, wanted, _ in kept)
        value = self._value((sample, dict(found)) for sample, _, found in kept)
        return self._sign * (value - base) / max(abs(base), 1e-300)

    def _value(self, runs: Iterable[tuple[Sample, dict[str, Array]]]) -> float:
        try:
            value = float(cast("Any", self._function(runs)))
        except QCompileError:
            raise
        except Exception as error:  # whatever the user's code raises
            said = f"{type(error).__name__}: {error}"
            raise CalibrationError(f"metric {self._text!r} raises {said}") from error
        if not math.isfinite(value):
            raise CalibrationError(f"metric {self._text!r} is {value}, no number to compare")
        return value


@dataclasses.dataclass(frozen=True)
class _Part:
    """What depends on some layers, as a model; its inputs; and its share of the MACs of a run."""

    model: ir.Model
    inputs: tuple[str, ...]
    share: float


# The input of a part that is the weight on trial.
_WEIGHT = "qcompile.trial"


class Sensitivity:
    """Costs of changed layers of ``model``, on ``samples``.

    ``grids``: those, in 8 bits, to which values are rounded that changed layers read and write, by
    layer and value; what it writes is rounded for all that read it.
    ``passes`` counts forward passes over the samples so far: the one in float is 1, and a trial is
    the share of the MACs that it runs.
    """

    def __init__(
        self,
        model: ir.Model,
        samples: Sequence[Sample],
        metric: Metric,
        grids: Mapping[str, Mapping[str, Grid]] | None = None,
    ) -> None:
        self.model, self.metric, self.grids = model, metric, grids or {}
        self.samples = Samples.of(samples)
        self.passes = 0.0
        self.trials = 0
        self._entered = [v.name or "" for v in model.graph.inputs]
        self._outputs = [v.name or "" for v in model.graph.outputs]
        self._macs: dict[str, int] = {}
        self._kept: dict[str, Spill] = {}
        self._session: tuple[str, execute.Session, _Part] | None = None

    def cost(self, layers: Sequence[Layer], weight: Floats) -> float:
        """The cost if ``layers``, which share one weight, read ``weight`` in its place."""
        session, part = self._prepared(layers)
        self.passes += part.share
        self.trials += 1
        return self.metric(self._runs(session, part, weight))

    def _runs(self, session: execute.Session, part: _Part, weight: Floats) -> Iterator[Trio]:
        changed = set(session.outputs)
        for number, sample in enumerate(self.samples):
            found = session.run(self._float(part.inputs, number) | {_WEIGHT: weight})
            wanted = self._float(self._outputs, number)
            yield sample, wanted, {n: found[n] if n in changed else wanted[n] for n in wanted}

    def _prepared(self, layers: Sequence[Layer]) -> tuple[execute.Session, _Part]:
        # One session at a time: it holds copies of the weights behind the layer.
        key = layers[0].name
        if self._session is None or self._session[0] != key:
            self._session = None
            part = self._part(layers)
            self._session = key, execute.Session(part.model), part
        return self._session[1:]

    def _float(self, names: Iterable[str], number: int) -> Sample:
        """The values called ``names`` in sample ``number``, in float."""
        if not self._kept:
            read = list(dict.fromkeys([*self._boundary(), *self._outputs]))
            state = self.samples.state
            session = execute.Session(sequences.fetch(self.model, read, state))
            # A file for each, so that a trial reads no more than it needs.
            self._kept = {name: Spill() for name in [*self._entered, *read]}
            for feeds, found in sequences.carry(session, self.samples, state, read):
                for name, array in {**feeds, **found}.items():
                    if name in self._kept:
                        self._kept[name].append({name: array})
            self.passes += 1
        return {name: self._kept[name][number][name] for name in names}

    def _boundary(self) -> list[str]:
        """The values that parts of any layer read from outside."""
        found: dict[str, None] = {}
        for layer in graph.layers(self.model):
            if graph.is_constant(layer.weight.value):
                for value in _entered(self.model, [layer])[1]:
                    if not value.is_graph_input():
                        found[value.name or ""] = None
        return list(found)

    def _part(self, layers: Sequence[Layer]) -> _Part:
        nodes, entered = _entered(self.model, layers)
        names = tuple(dict.fromkeys(value.name or "" for value in entered))
        model = self.model.clone()
        inner = {node.name: node for node in model.graph}
        weight = ir.Value(
            name=_WEIGHT, type=layers[0].weight.value.type, shape=layers[0].weight.value.shape
        )
        for layer in layers:
            inner[layer.node.name].replace_input_with(layer.weight.index, weight)
        by_name = {v.name: v for v in graph.values(model)}
        for layer in layers:
            read = layer.input.value.name if layer.input is not None else None
            for name, grid in self.grids.get(layer.name, {}).items():
                only = inner[layer.node.name] if name == read else None
                _round(model, by_name[name], grid, only)
        kept = {node.name for node in nodes}
        outputs = [v for v in model.graph.outputs if (p := v.producer()) and p.name in kept]
        model.graph.outputs.clear()
        model.graph.outputs.extend(outputs)
        inputs = [by_name[name] for name in names]
        cut = [_as_input(model, value) for value in inputs]
        model.graph.inputs.clear()
        model.graph.inputs.extend([*cut, weight])
        graph.clear_ranges(model)
        graph.remove_dead(model)
        return _Part(model, names, self._share(nodes))

    def _share(self, nodes: Iterable[ir.Node]) -> float:
        if not self._macs:
            values = [v.name or "" for n in self.model.graph for v in n.outputs if v.name]
            session = execute.Session(execute.fetch(self.model, values), optimize=False)
            entered = self._float(self._entered, 0)
            shapes = {n: np.shape(a) for n, a in (session.run(entered) | entered).items()}
            self._macs = {layer.name: layer.macs(shapes) for layer in graph.layers(self.model)}
        run = sum(self._macs.get(node.name or "", 0) for node in nodes)
        return run / max(sum(self._macs.values()), 1)


def _round(model: ir.Model, value: ir.Value, grid: Grid, only: ir.Node | None) -> None:
    """Make the node ``only``, or all readers if None, read ``value`` as rounded to ``grid``."""
    kind = np.int8 if grid.format.signed else np.uint8
    ends = [
        graph.add_constant(model, f"{value.name}/trial/{what}", np.asarray(array))
        for what, array in (("scale", grid.scale), ("zero", grid.zero_point.astype(kind)))
    ]
    codes = graph.insert(
        model, "QuantizeLinear", [value, *ends],
        output=f"{value.name}/trial/codes", before=only, behind=None if only else value,
    )  # fmt: skip
    rounded = graph.insert(
        model, "DequantizeLinear", [codes, *ends],
        output=f"{value.name}/trial", behind=codes, like=value,
    )  # fmt: skip
    writer = codes.producer()
    graph.redirect(
        model, value, rounded,
        keep=lambda use: use.node is writer or (only is not None and use.node is not only),
    )  # fmt: skip


def _as_input(model: ir.Model, value: ir.Value) -> ir.Value:
    """An input of the graph in place of ``value``."""
    if value.is_graph_input():
        return value
    name, entered = value.name, ir.Value(type=value.type, shape=value.shape)
    value.name = graph.unique(model, f"{name}/computed")
    entered.name = name
    graph.redirect(model, value, entered, keep=lambda _: False)
    return entered


def _entered(model: ir.Model, layers: Sequence[Layer]) -> tuple[list[ir.Node], list[ir.Value]]:
    """The nodes that ``layers`` change, in order, and what they read that is not changed."""
    changed: set[ir.Value] = set()
    own = {layer.node for layer in layers}
    weights = {(layer.node, layer.weight.index) for layer in layers}
    nodes: list[ir.Node] = []
    for node in model.graph:
        if node in own or any(value in changed for value in _read(node)):
            nodes.append(node)
            changed |= set(node.outputs)
    entered = {
        value: None
        for node in nodes
        for reader in (node, *graph.inside(node))
        for index, value in enumerate(reader.inputs)
        if value is not None
        and value not in changed
        and (reader, index) not in weights
        and _home(value) is model.graph
        and not graph.is_constant(value)
    }
    return nodes, list(entered)


def _home(value: ir.Value) -> ir.Graph | ir.Function | None:
    """The graph that ``value`` belongs to."""
    writer = value.producer()
    return value.graph if writer is None else writer.graph


def _read(node: ir.Node) -> Iterator[ir.Value]:
    for reader in (node, *graph.inside(node)):
        yield from (value for value in reader.inputs if value is not None)
