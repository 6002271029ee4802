"""Calibration data in, statistics out.

A *source* yields samples: complete dicts of inputs, one run of the model each. A part is kept to
judge (never seen by an observer), split off before anything is fitted. An *observer* reduces as it
streams, so that memory does not grow with the number of samples, and every sample reaches every
observer. Statistics are cached by the content of what computes a value, so nothing goes stale when
weights change.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile import capture, execute, graph
from qcompile.errors import CalibrationError, nearest

Array = npt.NDArray[Any]
Sample = dict[str, Array]
Observer = Literal["minmax", "histogram", "moments"]

# At most this many samples are kept to judge, and at most a fifth of all.
JUDGES = 16
BINS = 2048


@dataclasses.dataclass(frozen=True)
class Input:
    """An input of the model: name, element type, and shape with None where it is dynamic."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        shape = ",".join("?" if d is None else str(d) for d in self.shape)
        return f"{self.name}: {self.dtype}[{shape}]"


def inputs_of(model: ir.Model) -> list[Input]:
    """The inputs that a sample must hold."""
    found: list[Input] = []
    for value in model.graph.inputs:
        dims = [d if isinstance(d, int) else None for d in value.shape or ()]
        assert value.dtype is not None
        found.append(Input(value.name or "", np.dtype(value.dtype.numpy()), tuple(dims)))
    return found


# -- sources ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Data:
    """Samples that fit a model, and where they came from."""

    source: str
    samples: list[Sample]
    random: bool = False

    @property
    def digest(self) -> str:
        """A hash of all samples."""
        digest = hashlib.sha256()
        for sample in self.samples:
            for name in sorted(sample):
                digest.update(f"{name}{sample[name].dtype}{sample[name].shape}".encode())
                digest.update(np.ascontiguousarray(sample[name]).tobytes())
        return digest.hexdigest()


def load(source: str | Iterable[Mapping[str, Any]], inputs: Sequence[Input], seed: int = 0) -> Data:
    """Read a source.

    Args:
        source: the path of an ``.npz`` (arrays named like the inputs, with a leading sample axis,
            or exactly the shape of the input for a constant); ``package.module:name`` of an
            iterable of samples, or of a function that returns one; ``random`` for noise, which
            calibrates nothing and is marked as such; or the iterable itself.
        inputs: what the model reads.
        seed: for ``random`` only.

    Raises CalibrationError if the source cannot be read or does not fit the model.
    """
    if not isinstance(source, str):
        return Data("python", _checked(source, inputs, "python"))
    if source == "random":
        return Data("random", _random(inputs, seed), random=True)
    path = pathlib.Path(source)
    if path.suffix == ".npz" or path.exists():
        return Data(source, _checked(_npz(path, inputs), inputs, source))
    if ":" not in source:
        raise CalibrationError(f"there is no file {source!r}; a source is {_SOURCES}")
    found = capture.load_object(source, "calibration source")
    return Data(source, _checked(found() if callable(found) else found, inputs, source))


_SOURCES = "an .npz file, package.module:iterable, or 'random' for noise"


def _npz(path: pathlib.Path, inputs: Sequence[Input]) -> list[Sample]:
    if path.is_dir() or path.suffix != ".npz":
        raise CalibrationError(f"{str(path)!r} is no .npz file; a source is {_SOURCES}")
    if not path.exists():
        raise CalibrationError(f"there is no file {str(path)!r}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays: dict[str, Array] = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise CalibrationError(f"{str(path)!r} is not a readable .npz: {error}") from error
    if not arrays:
        raise CalibrationError(f"{str(path)!r} holds no arrays")
    _same_names(arrays, inputs, str(path))
    counts: dict[str, int] = {}
    pick: dict[str, Callable[[int], Array]] = {}
    for wanted in inputs:
        counts[wanted.name], pick[wanted.name] = _sample_axis(arrays[wanted.name], wanted)
    several = {count for count in counts.values() if count > 0}
    if len(several) > 1:
        raise CalibrationError(f"{str(path)!r} has different numbers of samples: {counts}")
    return [{n: p(i) for n, p in pick.items()} for i in range(several.pop() if several else 1)]


def _sample_axis(array: Array, wanted: Input) -> tuple[int, Callable[[int], Array]]:
    """How many samples ``array`` holds (0 for a constant), and how to take one."""
    rank = len(wanted.shape)
    if array.ndim == rank + 1:
        return _not_empty(array.shape[0], wanted), lambda i: array[i]
    if array.ndim != rank:
        raise CalibrationError(
            f"array {wanted.name!r} has shape {list(array.shape)}, but the model reads {wanted}; "
            "add a leading sample axis or the batch axis"
        )
    if None not in wanted.shape and array.shape == wanted.shape:
        return 0, lambda _: array
    if rank == 0:
        return 0, lambda _: array
    batch = wanted.shape[0] or 1
    return _not_empty(array.shape[0] // batch, wanted), lambda i: array[i * batch : (i + 1) * batch]


def _not_empty(count: int, wanted: Input) -> int:
    if count == 0:
        raise CalibrationError(f"array {wanted.name!r} holds no sample for {wanted}")
    return count


def _random(inputs: Sequence[Input], seed: int) -> list[Sample]:
    rng = np.random.default_rng(seed)
    samples: list[Sample] = []
    for _ in range(16):
        sample: Sample = {}
        for wanted in inputs:
            shape = [1 if d is None else d for d in wanted.shape]
            whole = wanted.dtype.kind in "iub"
            noise = np.zeros(shape) if whole else rng.standard_normal(shape)
            sample[wanted.name] = noise.astype(wanted.dtype)
        samples.append(sample)
    return samples


def _checked(samples: object, inputs: Sequence[Input], source: str) -> list[Sample]:
    """``samples`` as arrays of the right names, types and shapes, without NaN or infinity."""
    if isinstance(samples, Mapping) or not isinstance(samples, Iterable):
        raise CalibrationError(
            f"calibration source {source!r} must yield dicts of arrays, one a run; "
            f"it is {type(cast(object, samples)).__name__}"
        )
    kept: list[Sample] = []
    for number, sample in enumerate(cast("Iterable[object]", samples)):
        where = f"sample {number} of {source!r}"
        if not isinstance(sample, Mapping):
            raise CalibrationError(f"{where} is {type(sample).__name__}, not a dict of arrays")
        named = cast("Mapping[str, Any]", sample)
        _same_names(named, inputs, where)
        kept.append({i.name: _checked_array(np.asarray(named[i.name]), i, where) for i in inputs})
    if not kept:
        raise CalibrationError(f"calibration source {source!r} yields no samples")
    return kept


def _checked_array(array: Array, wanted: Input, where: str) -> Array:
    fits = array.ndim == len(wanted.shape) and all(
        d is None or d == got for d, got in zip(wanted.shape, array.shape, strict=True)
    )
    if not fits:
        raise CalibrationError(
            f"{where}: {wanted.name!r} has shape {list(array.shape)}, the model reads {wanted}"
        )
    if array.dtype != wanted.dtype:
        whole = wanted.dtype.kind in "iub"
        if whole != (array.dtype.kind in "iub"):
            raise CalibrationError(
                f"{where}: {wanted.name!r} is {array.dtype}, the model reads {wanted}"
            )
        array = array.astype(wanted.dtype)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise CalibrationError(f"{where}: {wanted.name!r} has NaN or infinity in it")
    return array


def _same_names(arrays: Mapping[str, Any], inputs: Sequence[Input], where: str) -> None:
    names = [i.name for i in inputs]
    for name in names:
        if name not in arrays:
            raise CalibrationError(
                f"{where} has no array for input {name!r}; it has {', '.join(map(str, arrays))}"
            )
    for name in arrays:
        if name not in names:
            raise CalibrationError(
                f"{where} has an array {name!r}, which is no input; {nearest(str(name), names)}"
            )


# -- statistics ---------------------------------------------------------------------------------


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
