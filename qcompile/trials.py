"""Trials of weights, as tasks for other processes.

Only what depends on the changed layers is run: the values around it were computed in float, and lie
in files. The weight is an input of that part, so that one session serves all trials of a layer.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile import execute, graph, spill
from qcompile.graph import Layer
from qcompile.numerics import Floats, Grid
from qcompile.sequences import Sample, Samples
from qcompile.spill import Stored

Array = npt.NDArray[Any]
# What a sample was fed, what float makes of it, and what the trial made of it.
Trio = tuple[Sample, Mapping[str, Array], Mapping[str, Array]]
Metric = Callable[[Iterable[Trio]], float]


class Lent:
    """A model for tasks. What is pickled is the path of its file, which is written then, once."""

    def __init__(self, model: ir.Model | pathlib.Path) -> None:
        self._model = model
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def get(self) -> ir.Model:
        """The model, which must stay as it is; CalibrationError if this machine has no file."""
        if isinstance(self._model, ir.Model):
            return self._model
        return _loaded(self._model)

    def __reduce__(self) -> tuple[Any, ...]:
        if not isinstance(self._model, ir.Model):
            return Lent, (self._model,)
        written = self._folder is not None
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="qcompile-")
        path = pathlib.Path(self._folder.name) / "model.onnx"
        if not written:
            # Of a clone: while it is written its weights are others, and others may read them.
            execute.save(self._model.clone(), path, beside=True)
        return Lent, (path,)


@functools.lru_cache(maxsize=1)
def _loaded(path: pathlib.Path) -> ir.Model:
    try:
        return execute.load(path)
    except FileNotFoundError as error:
        raise spill.missing(path) from error


@dataclasses.dataclass(frozen=True)
class Trials:
    """``weights``, each in place of the one that ``layers`` share, and what their costs rest on.

    * ``grids``: what the changed layers read and write, by layer and value, is rounded to these.
    * ``floats``: for each sample in turn, what ``model`` makes of it in float, by value; its
      ``outputs`` and what ``behind`` reads at least.
    """

    model: Lent
    layers: tuple[str, ...]
    weights: Sequence[Floats]
    grids: Mapping[str, Mapping[str, Grid]]
    samples: Samples
    floats: Mapping[str, Stored]
    outputs: tuple[str, ...]
    metric: Metric

    def at(self, number: int, names: Iterable[str]) -> Sample:
        """The values called ``names`` in sample ``number``, in float."""
        return {name: self.floats[name][number][name] for name in names}


def costs(trials: Trials) -> list[float]:
    """The cost of each of the weights, in order."""
    session = execute.Session(_part(trials))
    return [trials.metric(_runs(trials, session, weight)) for weight in trials.weights]


def _runs(trials: Trials, session: execute.Session, weight: Floats) -> Iterator[Trio]:
    read = [name for name in session.inputs if name != _WEIGHT]
    changed = set(session.outputs)
    for number, sample in enumerate(trials.samples):
        found = session.run(trials.at(number, read) | {_WEIGHT: weight})
        wanted = trials.at(number, trials.outputs)
        yield sample, wanted, {n: found[n] if n in changed else wanted[n] for n in wanted}


# The input of a part that is the weight on trial.
_WEIGHT = "qcompile.trial"


def _part(trials: Trials) -> ir.Model:
    """What depends on the layers, as a model; what it reads from outside are its inputs."""
    model = trials.model.get().clone()
    layers = [layer for layer in graph.layers(model) if layer.name in trials.layers]
    nodes, entered = behind(model, layers)
    value = layers[0].weight.value
    weight = ir.Value(name=_WEIGHT, type=value.type, shape=value.shape)
    for layer in layers:
        layer.node.replace_input_with(layer.weight.index, weight)
    by_name = {v.name: v for v in graph.values(model)}
    for layer in layers:
        read = layer.input.value.name if layer.input is not None else None
        for name, grid in trials.grids.get(layer.name, {}).items():
            _round(model, by_name[name], grid, layer.node if name == read else None)
    kept = set(nodes)
    outputs = [v for v in model.graph.outputs if v.producer() in kept]
    model.graph.outputs.clear()
    model.graph.outputs.extend(outputs)
    cut = [_as_input(model, value) for value in entered]
    model.graph.inputs.clear()
    model.graph.inputs.extend([*cut, weight])
    graph.clear_ranges(model)
    graph.remove_dead(model)
    return model


def behind(model: ir.Model, layers: Sequence[Layer]) -> tuple[list[ir.Node], list[ir.Value]]:
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
