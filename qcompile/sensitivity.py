"""What one changed layer costs at the outputs of a float model, in one number.

All else stays float, as in MLoRQ (arXiv 2507.09616) and FMPQ (arXiv 2506.01221). The assignments
built on it take such costs to add up over layers, which is an assumption: for independent small
noise it holds to first order.

Only what depends on the changed layer is run: the values around it are computed once, in float,
and kept in a file. What the layer reads and writes may be rounded as well. A state is that of the
float model, so that what gathers over frames does not count. Layers are independent of each other:
the trials of each are a task (see ``trials``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile import capture, execute, graph, sequences, trials
from qcompile.errors import CalibrationError, PassError, QCompileError
from qcompile.graph import Layer
from qcompile.numerics import Floats, Grid
from qcompile.pipeline import Context
from qcompile.sequences import Sample, Samples
from qcompile.spill import Spill
from qcompile.trials import Lent, Metric, Trials, Trio

Array = npt.NDArray[Any]


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
        self._text = text
        _ = self._function  # what is wrong with it is said before anything runs

    def __getstate__(self) -> dict[str, str]:
        return {"_text": self._text}  # loaded again where it is called

    @functools.cached_property
    def _function(self) -> Callable[..., Any]:
        function = capture.load_object(self._text, "metric")
        if not callable(function):
            raise PassError(f"metric {self._text!r} is {type(function).__name__}, no function")
        return function

    def __call__(self, trios: Iterable[Trio]) -> float:
        kept = list(trios)
        base = self._value((sample, dict(wanted)) for sample, wanted, _ in kept)
        value = self._value((sample, dict(found)) for sample, _, found in kept)
        change = (value - base) / max(abs(base), 1e-300)
        return change if getattr(self._function, "lower_is_better", False) else -change

    def _value(self, runs: Iterable[tuple[Sample, dict[str, Array]]]) -> float:
        try:
            value = float(self._function(runs))
        except QCompileError:
            raise
        except Exception as error:  # whatever the user's code raises
            said = f"{type(error).__name__}: {error}"
            raise CalibrationError(f"metric {self._text!r} raises {said}") from error
        if not math.isfinite(value):
            raise CalibrationError(f"metric {self._text!r} is {value}, no number to compare")
        return value


class Sensitivity:
    """Costs of changed layers of ``model``, which must stay as it is, on ``samples``.

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
        self._lent = Lent(model)
        self._entered = [v.name or "" for v in model.graph.inputs]
        self._outputs = tuple(v.name or "" for v in model.graph.outputs)

    def cost(self, layers: Sequence[Layer], weight: Floats) -> float:
        """The cost if ``layers``, which share one weight, read ``weight`` in its place."""
        [cost] = trials.costs(self._trials(layers, [weight]))
        return cost

    def costs(
        self, asked: Iterable[tuple[Sequence[Layer], Sequence[Floats]]], ctx: Context, total: int
    ) -> list[list[float]]:
        """The costs of each of ``total`` pairs of layers that share a weight, and weights for it.

        The pairs are spread by ``ctx.map``, which may draw them in another thread.
        """
        _ = self._floats, self._macs  # computed here, and not by what draws
        tasks = (self._trials(layers, weights) for layers, weights in asked)
        return ctx.map(trials.costs, tasks, "sensitivity", total)

    def _trials(self, layers: Sequence[Layer], weights: Sequence[Floats]) -> Trials:
        nodes, entered = trials.behind(self.model, layers)
        run = sum(self._macs.get(node.name or "", 0) for node in nodes)
        self.passes += len(weights) * run / max(sum(self._macs.values()), 1)
        self.trials += len(weights)
        names = dict.fromkeys([*(value.name or "" for value in entered), *self._outputs])
        return Trials(
            self._lent, tuple(layer.name for layer in layers), weights, self.grids, self.samples,
            {name: self._floats[name] for name in names}, self._outputs, self.metric,
        )  # fmt: skip

    @functools.cached_property
    def _floats(self) -> dict[str, Spill]:
        """What parts of any layer read from outside, and the outputs, in float, by value."""
        read = list(dict.fromkeys([*self._boundary(), *self._outputs]))
        state = self.samples.state
        session = execute.Session(sequences.fetch(self.model, read, state))
        # A file for each, so that a trial reads no more than it needs.
        kept = {name: Spill() for name in [*self._entered, *read]}
        for feeds, found in sequences.carry(session, self.samples, state, read):
            for name, array in {**feeds, **found}.items():
                if name in kept:
                    kept[name].append({name: array})
        self.passes += 1
        return kept

    def _boundary(self) -> list[str]:
        """The values that parts of any layer read from outside."""
        found: dict[str, None] = {}
        for layer in graph.layers(self.model):
            if graph.is_constant(layer.weight.value):
                for value in trials.behind(self.model, [layer])[1]:
                    if not value.is_graph_input():
                        found[value.name or ""] = None
        return list(found)

    @functools.cached_property
    def _macs(self) -> dict[str, int]:
        """The MACs of each layer in the first sample."""
        values = [v.name or "" for n in self.model.graph for v in n.outputs if v.name]
        entered = {name: self._floats[name][0][name] for name in self._entered}
        shapes = execute.shapes(self.model, values, entered)
        shapes |= {name: np.shape(array) for name, array in entered.items()}
        return {layer.name: layer.macs(shapes) for layer in graph.layers(self.model)}
