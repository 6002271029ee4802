"""The model as a target will compute it, and how far that is from float.

Simulation is the lowered graph run with the runtime's optimizations off: the same codes and scales
as the file, every operator in float between its Q/DQ pairs. For ``ort-cpu`` the tests compare it
with what the optimized runtime computes; for TensorRT it is equal by definition until an engine
runs on a device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile import graph, sequences, spec, text
from qcompile.backends.base import Target
from qcompile.execute import Session
from qcompile.sequences import Sample, Samples
from qcompile.spill import Spill

Array = npt.NDArray[Any]


def simulate(model: ir.Model, target: Target) -> Session:
    """``model`` as ``target`` computes it; a model without decisions runs as it is."""
    return Session(lowered(model, target), optimize=False)


def lowered(model: ir.Model, target: Target) -> ir.Model:
    """``model`` as ``target`` computes it, to be run without optimizations; without its ranges."""
    model = model.clone()
    if any(spec.all_specs(node) for node in model.graph):
        target.lower(model)
    graph.clear_ranges(model)
    graph.remove_dead(model)
    return target.computed(model)


class Judge:
    """Compares models with the float reference on samples that nothing was fitted on.

    Powers are summed over all samples before they are divided, in float64. Every model carries a
    state of its own from frame to frame, so that what its state has lost counts. A sample for which
    an output has another size than in float, as the boxes of a detector may, is left out of the
    figures of that output; an output with no sample left has none. ``wanted`` is what the reference
    computes of the samples.
    """

    def __init__(self, reference: ir.Model, samples: Sequence[Sample]) -> None:
        self.samples = Samples.of(samples)
        self.outputs = [v.name or "" for v in reference.graph.outputs if _is_float(v)]
        self._asked = [v.name or "" for v in reference.graph.outputs]
        self.wanted = self.run(Session(reference))
        self._simulated: dict[str, Spill] = {}  # the last, by the text of the graph

    def run(self, session: Session) -> Spill:
        """What ``session`` computes of the samples, but for what is no array of numbers."""
        kept = Spill()
        for results in self._results(session):
            kept.append({n: a for n, a in results.items() if n in self.outputs or is_plain(a)})
        return kept

    def simulated(self, lowered: ir.Model) -> Spill:
        """What ``lowered`` computes; known if it was the last asked for.

        Without optimizations if it rounds anything: they may leave a rounding out. What is in float
        is the same function with them, some times as fast.
        """
        key = text.render(lowered, weights=True)
        if key not in self._simulated:
            self._simulated = {key: self.run(Session(lowered, optimize=not _rounds(lowered)))}
        return self._simulated[key]

    def sqnr(self, session: Session | Spill) -> dict[str, float]:
        """SQNR in dB of each floating-point output of ``session``, by output name."""
        return self._compare(self.wanted, session)

    def cosine(self, session: Session | Spill) -> dict[str, float]:
        """Mean cosine similarity of each output over the samples, by output name."""
        found: dict[str, list[float]] = {name: [] for name in self.outputs}
        for wanted, actual in zip(self.wanted, self._results(session), strict=True):
            for name in self.outputs:
                if np.shape(wanted[name]) == np.shape(actual[name]):
                    found[name].append(cosine(wanted[name], actual[name]))
        return {name: float(np.mean(values)) for name, values in found.items() if values}

    def uneven(self, session: Session | Spill) -> dict[str, int]:
        """For how many samples each output of ``session`` has another size than in float."""
        count = dict.fromkeys(self.outputs, 0)
        for wanted, actual in zip(self.wanted, self._results(session), strict=True):
            for name in self.outputs:
                count[name] += np.shape(wanted[name]) != np.shape(actual[name])
        return count

    def worst(self, session: Session | Spill) -> float:
        """The lowest SQNR of all outputs; infinity if there is no floating-point output."""
        return min(self.sqnr(session).values(), default=float("inf"))

    def between(self, one: Session | Spill, other: Session | Spill) -> dict[str, float]:
        """SQNR in dB of ``other`` against ``one`` as the reference."""
        return self._compare(self._results(one), other)

    def _compare(
        self, wanted: Iterable[dict[str, Array]], session: Session | Spill
    ) -> dict[str, float]:
        return _sqnr_of(self.outputs, zip(wanted, self._results(session), strict=True))

    def _results(self, session: Session | Spill) -> Iterable[dict[str, Array]]:
        if isinstance(session, Spill):
            return session
        runs = sequences.carry(session, self.samples, self.samples.state, self._asked)
        return (results for _, results in runs)


def is_plain(array: Any) -> bool:
    """Whether numpy alone holds ``array``: no strings, no sequences, no types of ml_dtypes."""
    kind: str = getattr(getattr(array, "dtype", None), "kind", "")
    return kind != "" and kind in "iubf"


def sqnr(reference: npt.ArrayLike, actual: npt.ArrayLike) -> float:
    """Signal-to-quantization-noise ratio of ``actual`` in dB; see ``ratio``."""
    signal = np.asarray(reference, np.float64)
    noise = np.asarray(actual, np.float64) - signal
    return ratio(float(np.sum(signal**2)), float(np.sum(noise**2)))


def ratio(signal: float, noise: float) -> float:
    """Signal over noise in dB; infinite without noise, NaN if the noise is not finite."""
    if not np.isfinite(noise):
        return float("nan")
    if noise == 0.0:
        return float("inf")
    return 10.0 * float(np.log10(signal / noise)) if signal > 0 else float("-inf")


def cosine(one: Array, other: Array) -> float:
    """Cosine of the angle between two arrays; 1 if both are zero, NaN if one is not finite."""
    a, b = np.asarray(one, np.float64).ravel(), np.asarray(other, np.float64).ravel()
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("nan")
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return 1.0 if norm == 0.0 and np.array_equal(a, b) else float(a @ b / norm) if norm else 0.0


def layer_sqnr(
    reference: ir.Model, lowered: ir.Model, values: Sequence[str], samples: Sequence[Sample]
) -> dict[str, float]:
    """SQNR of inner values that both models have by name: error gathered up to there."""
    shared = [v for v in values if v in _names(reference) and v in _names(lowered)]
    if not shared:
        return {}
    state = Samples.of(samples).state

    def runs(model: ir.Model) -> Iterator[dict[str, Array]]:
        session = Session(sequences.fetch(model, shared, state), optimize=False)
        for _, found in sequences.carry(session, samples, state, shared):
            yield from ({name: found.pop(name)} for name in shared)

    wanted = Spill()  # one session at a time, and one value: all together are large
    for found in runs(reference):
        wanted.append(found)
    return _sqnr_of(shared, zip(wanted, runs(lowered), strict=True))


def _sqnr_of(
    names: Sequence[str], pairs: Iterable[tuple[dict[str, Array], dict[str, Array]]]
) -> dict[str, float]:
    """SQNR in dB of each name over pairs of what is wanted and what is, where sizes agree."""
    signal, noise = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    compared: set[str] = set()
    for wanted, actual in pairs:
        for name in wanted.keys() & names:
            if np.shape(wanted[name]) != np.shape(actual[name]):
                continue
            compared.add(name)
            # In place: the largest value of a model may be large.
            squares, noises = (np.array(a, np.float64) for a in (wanted[name], actual[name]))
            with np.errstate(invalid="ignore", over="ignore"):  # the ratio of those is NaN
                noises -= squares
                noise[name] += float(np.sum(np.square(noises, out=noises)))
                signal[name] += float(np.sum(np.square(squares, out=squares)))
    return {name: ratio(signal[name], noise[name]) for name in names if name in compared}


def _rounds(model: ir.Model) -> bool:
    """Whether any value of ``model`` has a type that less than 32 bits hold, but for booleans."""
    types = {value.dtype for value in graph.values(model)} - {None, *_WHOLE}
    return any(dtype is not None and dtype.bitwidth < 32 for dtype in types)


# Of no width, or of two numbers only.
_WHOLE = frozenset((ir.DataType.BOOL, ir.DataType.STRING, ir.DataType.UNDEFINED))


def _names(model: ir.Model) -> set[str]:
    return {v.name or "" for node in model.graph for v in node.outputs}


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()
