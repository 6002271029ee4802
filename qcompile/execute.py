"""Running a graph in ONNX Runtime: the one place that touches its untyped Python interface."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
from onnx_ir import serde

from qcompile import message, sound
from qcompile.errors import TargetError, reason

runtime: Any = onnxruntime  # untyped
Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]

# Protobuf holds a model twice while it reads or writes it, and never 2 GiB of it; above this the
# weights go into a file of their own.
_IN_MEMORY_BYTES = 256 << 20
# Seconds after which a Loop counts as one without an end; a sample takes far less than one.
_PATIENCE = 600


class Session:
    """A graph that ONNX Runtime runs on the CPU.

    Args:
        model: the graph, or the path of a file.
        optimize: whether the runtime may rewrite the graph.
        planned: whether the runtime plans memory and order ahead, in an arena that doubles where it
            is full. It is quicker, and takes room at once for all values that are asked for or wait
            to be reduced.
        threads: threads inside an operator; if None, those that this process may use.
        profile: the beginning of the path of a file that says what each node takes.

    Raises TargetError if the runtime refuses the model.
    """

    def __init__(
        self,
        model: ir.Model | str | os.PathLike[str],
        *,
        optimize: bool = True,
        planned: bool = True,
        threads: int | None = None,
        profile: str | None = None,
    ) -> None:
        _give_back()
        options: Any = runtime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = _allowed() if threads is None else threads
        options.inter_op_num_threads = 1
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, profile
        if not (planned and optimize):
            options.enable_mem_pattern = options.enable_cpu_mem_arena = False
            options.execution_order = runtime.ExecutionOrder.PRIORITY_BASED
        if not optimize:
            options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._stack = contextlib.ExitStack()
        try:
            source = self._source(model, options)
            session: Any = runtime.InferenceSession(
                source, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the binding raises a dozen types that share no base
            self._stack.close()
            raise TargetError(f"ONNX Runtime refuses the model: {reason(error)}") from error
        self._session = session
        # Sizes are numbers, names, or None.
        self.shapes: dict[str, list[Any]] = {i.name: i.shape for i in session.get_inputs()}
        self.inputs: tuple[str, ...] = tuple(self.shapes)
        self.outputs: tuple[str, ...] = tuple(o.name for o in session.get_outputs())

    def _source(self, model: ir.Model | str | os.PathLike[str], options: Any) -> str | bytes:
        if not isinstance(model, ir.Model):
            return os.fspath(model)
        read_external(model)
        shared = _to_share(model)
        rest = [value for value in sound.weights(model) if value not in shared]
        if sum(v.const_value.nbytes for v in rest if v.const_value) < _IN_MEMORY_BYTES:
            self._shared = {v.name or "": array for v, array in shared.items()}  # not the runtime's
            options.add_external_initializers(list(self._shared), list(self._shared.values()))
            return _message(model, shared, rest)
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="qcompile-"))
        path = pathlib.Path(folder) / "model.onnx"
        save(model, path)
        return str(path)

    def end_profile(self) -> str:
        """Stop profiling; the path of what was written."""
        return self._session.end_profiling()

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """The values of ``outputs`` (all if None) for ``feeds``."""
        names = list(self.outputs if outputs is None else outputs)
        if not names:
            return {}
        kept = {name: feeds[name] for name in self.inputs}
        try:
            results: list[Array] = self._session.run(names, kept)
        except Exception as error:  # see above
            raise TargetError(f"ONNX Runtime fails to run the model: {reason(error)}") from error
        return dict(zip(names, results, strict=True))


def _give_back() -> None:
    """Let the allocator give what was freed back to the system, where it can be asked to (glibc).

    What sessions before this one have freed lies between what lives on.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


# Types that numpy has; smaller weights are quicker copied than kept track of.
_SHARED = frozenset(
    (
        ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.INT8,
        ir.DataType.UINT8, ir.DataType.INT32, ir.DataType.INT64,
    )
)  # fmt: skip
_LEAST_SHARED = 4096


def _to_share(model: ir.Model) -> dict[ir.Value, Any]:
    """The large weights of ``model`` that nodes read, for the runtime.

    They are neither written nor read nor copied on their way to it. Those that lie in a file are
    left to the runtime: mapped here they would stay in memory beside what it makes of them.
    """
    shared: dict[ir.Value, Any] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if value.is_graph_input() or _unused(value) or isinstance(tensor, ir.ExternalTensor):
            continue
        if tensor is None or tensor.dtype not in _SHARED or tensor.nbytes < _LEAST_SHARED:
            continue
        shared[value] = runtime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(tensor.numpy()))
    return shared


def _unused(value: ir.Value) -> bool:
    """Whether a decision alone names ``value``; the runtime drops it."""
    return not (value.uses() or value.is_graph_input() or value.is_graph_output())


def _message(model: ir.Model, shared: Collection[ir.Value], rest: Iterable[ir.Value]) -> bytes:
    """``model`` as bytes: the weights ``shared`` only named, those that are not used left out."""
    instead: dict[ir.Value, ir.TensorProtocol] = {}
    left = {value for value in model.graph.initializers.values() if _unused(value)}
    for value in (*shared, *rest):
        tensor = value.const_value
        if tensor is not None and (value in shared or value in left):
            instead[value] = message.elsewhere(tensor, value.name or "")
        elif (read := _in_memory(value)) is not None:
            instead[value] = read
    made, names = message.of(model, instead), {value.name for value in left}
    for number in reversed(range(len(made.graph.initializer))):
        if made.graph.initializer[number].name in names:
            del made.graph.initializer[number]
    return made.SerializeToString()


def _allowed() -> int:
    """How many threads a process that is kept to fewer than all cores may use; 0 for no limit.

    The runtime counts the cores of the machine, and threads that share a core wait for each other
    by spinning on it.
    """
    told = os.environ.get("OMP_NUM_THREADS", "")
    limits = [int(told)] if told.isdecimal() and int(told) > 0 else []
    if hasattr(os, "sched_getaffinity") and (mine := len(os.sched_getaffinity(0))) < (
        os.cpu_count() or mine
    ):
        limits.append(mine)
    return min(limits, default=0)


def profile(model: ir.Model, feeds: Feeds, seconds: float) -> dict[tuple[str, str], float]:
    """Microseconds of each node of the graph as optimized, by its name and operator type.

    One thread; the least of as many runs as take ``seconds``, at least five.
    """
    session = Session(model, threads=1)
    started = time.perf_counter()
    session.run(feeds)
    each = time.perf_counter() - started
    with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
        session = Session(model, threads=1, profile=os.path.join(folder, "profile"))
        for _ in range(min(max(int(seconds / max(each, 1e-6)), 5), 100)):
            session.run(feeds)
        events: list[dict[str, Any]] = json.loads(pathlib.Path(session.end_profile()).read_text())
    found: dict[tuple[str, str], list[float]] = {}
    ending = "_kernel_time"
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(ending):
            key = event["name"].removesuffix(ending), event["args"]["op_name"]
            found.setdefault(key, []).append(event["dur"])
    return {key: min(durations) for key, durations in found.items()}


def optimize(
    path: pathlib.Path, optimized: pathlib.Path, settings: Mapping[str, str] | None = None
) -> None:
    """Write what ONNX Runtime makes of the file ``path`` to ``optimized``.

    ``settings`` are entries of the configuration of the session. In a process of its own: the
    weights of both are in its memory, and go with it. Raises TargetError if the runtime refuses the
    model, or crashes.
    """
    words = [f"{key}={value}" for key, value in (settings or {}).items()]
    done = apart(_OPTIMIZE, path, optimized, *words)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise TargetError(f"ONNX Runtime refuses the model: {reason(RuntimeError(lines[-1]))}")


def survive(model: ir.Model, feeds: Feeds) -> None:
    """Raise TargetError if ONNX Runtime dies of running ``model`` once, or does not end.

    ONNX's checks do not see into control flow and operators of other domains, and kernels that rely
    on them end the process, as a Loop does that counts to a tensor of no elements. So what has any
    runs in a process of its own first, unless it is large: such a file is nobody's accident.
    """
    nodes = list(model.graph)
    bodies = any(a.type == ir.AttributeType.GRAPH for n in nodes for a in n.attributes.values())
    foreign = any(node.domain not in ("", "ai.onnx") for node in nodes)
    if not (bodies or foreign) or weight_bytes(model) >= _IN_MEMORY_BYTES:
        return
    with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
        file, data = pathlib.Path(folder) / "model.onnx", pathlib.Path(folder) / "data.npz"
        save(model, file)
        np.savez(data, *(feeds[value.name or ""] for value in model.graph.inputs))
        try:
            apart(
                _RUN, file, data, patience=_PATIENCE
            )  # what it refuses is said where it runs next
        except subprocess.TimeoutExpired as error:
            raise TargetError(f"one run of the model takes more than {_PATIENCE} s") from error


def apart(
    code: str, *words: str | os.PathLike[str], patience: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own; raise TargetError if a signal ends it."""
    command = [sys.executable, "-c", code, *(os.fspath(word) for word in words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience)
    if done.returncode < 0:
        died = signal.Signals(-done.returncode).name
        raise TargetError(f"ONNX Runtime dies of the model ({died})")
    return done


_RUN = """
import sys
import numpy
import onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
arrays = numpy.load(sys.argv[2])
names = [entered.name for entered in session.get_inputs()]
session.run(None, {name: arrays[f"arr_{number}"] for number, name in enumerate(names)})
"""


# Imports nothing of qcompile, so that it starts fast. Without prepacking, which no rewrite needs,
# the weights are not copied once more.
_OPTIMIZE = """
import sys
import onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
options.optimized_model_filepath = sys.argv[2]
for entry in (
    "session.disable_prepacking=1",
    "session.optimized_model_external_initializers_file_name=optimized.data",
    "session.optimized_model_external_initializers_min_size_in_bytes=1024",
    *sys.argv[3:],
):
    options.add_session_config_entry(*entry.split("="))
onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
"""


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers of the main graph as stored."""
    return sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Read a graph; external weights stay in their file until they are needed."""
    library: Any = ir  # partly untyped
    return library.load(path)


def read_external(model: ir.Model) -> None:
    """Read the weights of a small model, so that it no longer depends on their file.

    Nor on the message that it was read from, of which every look at a weight makes a copy.
    """
    if weight_bytes(model) < _IN_MEMORY_BYTES:
        _read(sound.weights(model))


def _read(values: Iterable[ir.Value]) -> None:
    """Read weights into memory: bytes have no folder that a file of them could be in."""
    for value in values:
        read = _in_memory(value)
        if read is not None:
            value.const_value = read


def _in_memory(value: ir.Value) -> ir.TensorProtocol | None:
    """The weight ``value``, read from its file or message; None if it is in memory already."""
    tensor = value.const_value
    if isinstance(tensor, ir.ExternalTensor):
        array = tensor.numpy().copy()
        tensor.release()
        return ir.Tensor(array, dtype=tensor.dtype, name=value.name)
    if isinstance(tensor, serde.TensorProtoTensor) and tensor.dtype in _SHARED:
        return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)
    return None


def save(model: ir.Model, path: str | os.PathLike[str], beside: bool = False) -> None:
    """Write ``model`` to ``path``.

    Large models keep their weights in ``<path>.data`` beside it, and others if ``beside``: then
    they are not written into memory first.
    """
    library: Any = ir  # partly untyped
    small = weight_bytes(model) < _IN_MEMORY_BYTES
    if small:
        read_external(model)  # of a large model that became small, what stayed in its file
    if small and not beside:
        message.write(model, pathlib.Path(path))
    else:
        library.save(model, path, external_data=f"{pathlib.Path(path).name}.data")


def fetch(model: ir.Model, values: Sequence[str]) -> ir.Model:
    """A clone of ``model`` whose outputs are ``values``, names of its main graph."""
    clone = model.clone()
    by_name = {v.name: v for v in (*clone.graph.inputs, *clone.graph.initializers.values())}
    by_name |= {v.name: v for node in clone.graph for v in node.outputs}
    clone.graph.outputs.clear()
    clone.graph.outputs.extend(by_name[name] for name in values)
    return clone


def shapes(model: ir.Model, values: Sequence[str], feeds: Feeds) -> dict[str, tuple[int, ...]]:
    """The shapes of ``values``, names of the main graph of ``model``, for ``feeds``.

    They are taken inside the graph, right behind each value, so that the values are not kept.
    """
    asked = fetch(model, values)
    given = list(asked.graph.outputs)
    asked.graph.outputs.clear()
    for number, value in enumerate(given):
        if not isinstance(value.type, ir.TensorType):  # a list has no operator for its shape
            asked.graph.outputs.append(value)
            continue
        node = ir.Node("", "Shape", [value])
        writer = value.producer()
        if writer is None:
            asked.graph.append(node)
        else:
            asked.graph.insert_after(writer, node)
        node.outputs[0].name = f"qcompile/shapes/{number}"
        node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        asked.graph.outputs.append(node.outputs[0])
    session = Session(asked, optimize=False)
    results = session.run(feeds)
    return {
        name: tuple(map(int, found)) if out.startswith("qcompile/shapes/") else np.shape(found)
        for name, (out, found) in zip(values, results.items(), strict=True)
    }


def complete_types(model: ir.Model, feeds: Feeds) -> None:
    """Give values of unknown type, those behind operators of other domains, the type of one run.

    The shape stays unknown: that of one run need not be that of all.
    """
    unknown = [v for node in model.graph for v in node.outputs if v.name and v.type is None]
    if not unknown:
        return
    names = [v.name or "" for v in unknown]
    found = Session(fetch(model, names), optimize=False).run(feeds)
    for value in unknown:
        kind = getattr(found[value.name or ""], "dtype", None)
        if kind is not None:  # a sequence is a list
            value.type = ir.TensorType(ir.DataType.from_numpy(kind))


def execute(
    model: ir.Model, feeds: Feeds, outputs: Sequence[str] | None = None
) -> dict[str, Array]:
    """Run ``model`` once without optimizations; ``outputs`` may name any value of its graph."""
    wanted = model if outputs is None else fetch(model, outputs)
    return Session(wanted, optimize=False).run(feeds)


def as_float(array: Array) -> npt.NDArray[np.float32]:
    """``array`` as float32."""
    return np.asarray(array, np.float32)
