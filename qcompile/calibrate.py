"""Calibration data in, statistics out.

A part of the samples is kept to judge (never seen by an observer), split off before anything is
fitted. An *observer* reduces as it streams, so that memory does not grow with the number of
samples, and every sample reaches every observer. Statistics are cached by the content of what
computes a value, so nothing goes stale when weights change.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile import execute, graph
from qcompile.errors import CalibrationError
from qcompile.sources import Data, Sample

Observer = Literal["minmax", "histogram", "moments"]

# At most this many samples are kept to judge, and at most a fifth of all.
JUDGES = 16
BINS = 2048


@dataclasses.dataclass(frozen=True)
class MinMax:
    """The extremes of a value over all samples; 0, 0 if it was always empty."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Counts [BINS] between ``edges`` [BINS + 1], which span the extremes."""

    counts: npt.NDArray[np.int64]
    edges: npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and variance of each channel (axis 1 of rank 4 and above or rank 2, else the last)."""

    mean: npt.NDArray[np.float64]
    variance: npt.NDArray[np.float64]
    count: int


Statistic = MinMax | Histogram | Moments


class Calibration:
    """Owns the data; answers requests for statistics, one sweep for all values of a request."""

    def __init__(
        self,
        data: Data,
        progress: Callable[..., Iterable[Any]] | None = None,
    ) -> None:
        kept = min(JUDGES, len(data.samples) // 5)
        self.data = data
        self.samples: list[Sample] = data.samples[: len(data.samples) - kept]
        # With fewer than five samples nothing can be kept apart; the report says so.
        self.judges: list[Sample] = data.samples[len(data.samples) - kept :] or data.samples
        self.apart: bool = kept > 0
        self._progress = progress
        self._cache: dict[tuple[str, str], Statistic] = {}

    def stats(
        self, model: ir.Model, values: Sequence[str], observer: Observer
    ) -> dict[str, Statistic]:
        """The statistic of each of ``values`` (names of floats of the main graph of ``model``).

        Raises CalibrationError, naming value and sample, if one is NaN or infinite.
        """
        keys = content_keys(model)
        missing = [v for v in values if (keys[v], observer) not in self._cache]
        if missing:
            for name, found in self._sweep(model, missing, observer).items():
                self._cache[keys[name], observer] = found
        return {v: self._cache[keys[v], observer] for v in values}

    def shapes(self, model: ir.Model) -> dict[str, tuple[int, ...]]:
        """The shape of every value of the main graph for the first sample."""
        names = [v.name or "" for node in model.graph for v in node.outputs if v.name]
        results = execute.Session(execute.fetch(model, names), optimize=False).run(self.samples[0])
        found = {name: tuple(np.shape(array)) for name, array in results.items()}
        return found | {n: tuple(a.shape) for n, a in self.samples[0].items()}

    def _sweep(
        self, model: ir.Model, values: Sequence[str], observer: Observer
    ) -> dict[str, Statistic]:
        if observer == "minmax":
            return dict(self._extremes(model, values))
        if observer == "moments":
            return dict(self._moments(model, values))
        extremes = cast("dict[str, MinMax]", self.stats(model, values, "minmax"))
        return dict(self._histograms(model, extremes))

    def _extremes(self, model: ir.Model, values: Sequence[str]) -> dict[str, MinMax]:
        # The reductions run inside the graph, so that no activation leaves the runtime.
        reduced = execute.fetch(model, values)
        outputs = list(reduced.graph.outputs)
        reduced.graph.outputs.clear()
        for value in outputs:
            # The runtime's extremes pass over a NaN that is not alone, so NaN is looked for apart.
            bad = ir.Node("", "IsNaN", [value])
            whole = ir.Node("", "Cast", bad.outputs, [ir.AttrInt64("to", ir.DataType.FLOAT)])
            reduced.graph.extend([bad, whole])
            bad.outputs[0].name, whole.outputs[0].name = f"nan/{value.name}", f"nans/{value.name}"
            bad.outputs[0].type = ir.TensorType(ir.DataType.BOOL)
            whole.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            sides = (("ReduceMin", value), ("ReduceMax", value), ("ReduceMax", whole.outputs[0]))
            for kind, read in sides:
                node = ir.Node("", kind, [read], attributes=[ir.AttrInt64("keepdims", 0)])
                reduced.graph.append(node)
                node.outputs[0].name = f"{kind}/{read.name}"
                node.outputs[0].type, node.outputs[0].shape = read.type, ir.Shape(())
                reduced.graph.outputs.append(node.outputs[0])
        session = execute.Session(reduced)
        low = np.full(len(values), np.inf)
        high = np.full(len(values), -np.inf)
        for number, sample in enumerate(self._swept("ranges")):
            answers = np.array(list(session.run(sample).values()), np.float64).reshape(-1, 3)
            found, nans = answers[:, :2], answers[:, 2] > 0
            for index in map(int, np.flatnonzero(nans | ~np.isfinite(found).all(axis=1))):
                if not (np.isposinf(found[index, 0]) and np.isneginf(found[index, 1])):
                    raise CalibrationError(
                        f"value {values[index]!r} has NaN or infinity for sample {number}"
                    )  # a reduction of nothing gives (inf, -inf), which is no fault
            low, high = np.minimum(low, found[:, 0]), np.maximum(high, found[:, 1])
        low, high = np.where(low > high, 0.0, low), np.where(low > high, 0.0, high)
        return {v: MinMax(float(low[i]), float(high[i])) for i, v in enumerate(values)}

    def _histograms(self, model: ir.Model, extremes: Mapping[str, MinMax]) -> dict[str, Histogram]:
        edges = {
            v: np.linspace(e.low, max(e.high, e.low + 1e-30), BINS + 1) for v, e in extremes.items()
        }
        counts = {v: np.zeros(BINS, np.int64) for v in extremes}
        session = execute.Session(execute.fetch(model, list(extremes)))
        for sample in self._swept("histograms"):
            for name, array in session.run(sample).items():
                low, high = edges[name][0], edges[name][-1]
                index = ((array.ravel().astype(np.float64) - low) * (BINS / (high - low))).astype(
                    np.int64
                )
                counts[name] += np.bincount(np.clip(index, 0, BINS - 1), minlength=BINS)
        return {v: Histogram(counts[v], edges[v]) for v in extremes}

    def _moments(self, model: ir.Model, values: Sequence[str]) -> dict[str, Moments]:
        found: dict[str, Moments] = {}
        session = execute.Session(execute.fetch(model, values))
        for number, sample in enumerate(self._swept("moments")):
            for name, array in session.run(sample).items():
                if not np.isfinite(array).all():
                    raise CalibrationError(
                        f"value {name!r} has NaN or infinity for sample {number}"
                    )
                channel = 1 if array.ndim == 2 or array.ndim >= 4 else -1
                rows = np.moveaxis(array, channel, -1).reshape(-1, array.shape[channel])
                found[name] = _merge(found.get(name), rows.astype(np.float64))
        return found

    def _swept(self, label: str) -> Iterable[Sample]:
        return self._progress(self.samples, label) if self._progress else self.samples


def _merge(before: Moments | None, rows: npt.NDArray[np.float64]) -> Moments:
    """Moments of all rows so far (Chan, Golub and LeVeque's pairwise update)."""
    mean, variance, count = rows.mean(axis=0), rows.var(axis=0), len(rows)
    if before is None:
        return Moments(mean, variance, count)
    total = before.count + count
    shift = mean - before.mean
    spread = before.variance * before.count + variance * count
    spread += shift**2 * (before.count * count / total)
    return Moments(before.mean + shift * (count / total), spread / total, total)


def content_keys(model: ir.Model) -> dict[str, str]:
    """A hash for each value of the main graph of all that computes it.

    Operators, attributes, tensor bytes and names of inputs count; names of inner values and specs
    do not. Two values with one key hold the same numbers for the same data.
    """
    keys: dict[str, str] = {v.name or "": f"input {v.name}" for v in model.graph.inputs}
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            keys[name] = graph.tensor_digest(value.const_value)
    for node in model.graph:
        text = [node.domain, node.op_type]
        text += [keys.get(v.name or "", v.name or "") if v is not None else "" for v in node.inputs]
        text += [f"{n}={_attribute_key(node.attributes[n])}" for n in sorted(node.attributes)]
        digest = hashlib.sha256("\n".join(text).encode()).hexdigest()
        for position, value in enumerate(node.outputs):
            keys[value.name or ""] = f"{digest}.{position}"
    return keys


def _attribute_key(attr: ir.Attr) -> str:
    if attr.type == ir.AttributeType.TENSOR:
        return graph.tensor_digest(attr.value)
    if attr.type == ir.AttributeType.GRAPH:
        library: Any = ir  # partly untyped
        proto = library.to_proto(attr.value)
        return str(proto.SerializeToString(deterministic=True).hex())
    return str(attr.value)


def quantizable_values(model: ir.Model) -> list[str]:
    """The values whose ranges a dialect may ask for.

    What layers read and write, and the outputs of the operators between them that have an integer
    form, so that one sweep serves every target.
    """
    wanted: dict[str, None] = {}

    def want(value: ir.Value | None) -> None:
        if value is None or not value.name or graph.is_constant(value):
            return
        if graph.is_float(value):
            wanted[value.name] = None

    for node in model.graph:
        layer = graph.layer_of(node)
        if layer is not None:
            want(layer.input.value if layer.input else None)
            want(layer.weight.value)
            want(layer.output)
            want(layer.biased_output)
        elif node.op_type in BETWEEN and node.domain in ("", "ai.onnx"):
            for value in (*node.inputs, *node.outputs):
                want(value)
    return list(wanted)


# Operators that stand between layers and have an integer form in some runtime.
BETWEEN = frozenset(
    [
        "Add",
        "Mul",
        "Concat",
        "Relu",
        "Clip",
        "LeakyRelu",
        "Sigmoid",
        "MaxPool",
        "AveragePool",
        "GlobalAveragePool",
        "Resize",
        "Reshape",
        "Flatten",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Pad",
    ]
)
