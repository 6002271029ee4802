"""Does a compiled model compute on this device what it computed where it was compiled?

    python OUT/check/verify.py        or        qcompile verify OUT

Runs the model of OUT on the inputs in OUT/check and compares every output with two things: what the
compiled model must compute (a simulation of it), and what the float model computed. How far each
may lie apart was measured when the model was compiled and stands in OUT/check/check.json, beside a
hash of the files: a change that is smaller than what devices differ by shows in that alone.

Needs numpy and the runtime alone (onnxruntime; tensorrt or tensorrt_rtx, or their command trtexec),
no calibration data and no qcompile: this file imports nothing of it, and a copy lies in each check
folder. Exit codes: 0 yes, 1 it cannot be told and why, 3 no.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import hashlib
import importlib
import importlib.util
import json
import math
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

SCHEMA_VERSION = 1
MISSED = 3


class CheckError(Exception):
    """Whether the model is sound cannot be told; says why, and what to do."""


# -- comparing ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Figure:
    """How near one output is to another over all samples.

    ``value`` is the SQNR in dB of floats and the share of equal elements of whole numbers; NaN if
    nothing could be compared. ``count`` is the number of elements, and ``uneven`` that of samples
    that were left out, because the sizes differ.
    """

    value: float
    count: int
    uneven: int


def compare(wanted: Iterable[Array], actual: Iterable[Array]) -> Figure:
    """The figure of one output; powers are summed over all samples, in float64."""
    signal = noise = 0.0
    count = uneven = equal = 0
    whole = False
    for one, other in zip(wanted, actual, strict=True):
        if one.shape != other.shape:
            uneven += 1
            continue
        count += one.size
        whole = one.dtype.kind in "iub"
        if whole:
            equal += int(np.sum(one == other))
            continue
        reference = one.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            signal += float(np.sum(reference**2))
            noise += float(np.sum((other.astype(np.float64) - reference) ** 2))
    if not count or not math.isfinite(noise):
        return Figure(math.nan, count, uneven)
    if whole:
        return Figure(equal / count, count, uneven)
    return Figure(decibels(signal, noise), count, uneven)


def decibels(signal: float, noise: float) -> float:
    """Signal over noise in dB; infinite without noise."""
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One output: how near it is to what was compiled and to float, and how near each must be.

    A limit is None where nothing can be judged, because the output was not finite.
    """

    output: str
    whole: bool
    compiled: Figure
    compiled_limit: float | None
    float: Figure
    float_limit: float | None

    @property
    def agrees(self) -> bool:
        """Whether the output is what was compiled."""
        return _reaches(self.compiled, self.compiled_limit)

    @property
    def judged(self) -> bool:
        """Whether anything can be said of the output."""
        return self.compiled_limit is not None

    @property
    def as_promised(self) -> bool:
        """Whether the output is as near to float as it was where it was compiled."""
        return _reaches(self.float, self.float_limit)

    def lines(self) -> Iterator[str]:
        """What a person reads of it."""
        for what, figure, limit, good, bad in (
            ("what was compiled", self.compiled, self.compiled_limit, "agrees", "DIFFERS"),
            ("float", self.float, self.float_limit, "as good as promised", "WORSE THAN PROMISED"),
        ):
            said = f"output {self.output}: {_shown(figure.value, self.whole)} against {what}"
            if limit is None:
                yield f"{said}: not judged, it was not finite"
                continue
            word = good if _reaches(figure, limit) else bad
            left = f"; {figure.uneven} samples of another size" if figure.uneven else ""
            yield f"{said} (at least {_shown(limit, self.whole)}{left}): {word}"


def _reaches(figure: Figure, limit: float | None) -> bool:
    # Not "<": a figure that is not a number reaches nothing.
    return limit is None or figure.value >= limit


def _shown(value: float, whole: bool) -> str:
    return f"{value:.1%} equal" if whole else f"{value:.1f} dB"


@dataclasses.dataclass(frozen=True)
class Result:
    """What ran, a verdict for each output, and the files that are not those that were compiled."""

    ran: str
    target: str
    samples: int
    verdicts: tuple[Verdict, ...]
    changed: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        """Whether the files and every output are as compiled, and as good as promised.

        Not if no output can be judged.
        """
        sound = all(v.agrees and v.as_promised for v in self.verdicts)
        return not self.changed and sound and any(v.judged for v in self.verdicts)

    def lines(self) -> Iterator[str]:
        """What a person reads of it."""
        yield f"{self.target}: {self.ran}, {self.samples} samples"
        for verdict in self.verdicts:
            yield from verdict.lines()

    def summary(self) -> str:
        """The verdict in one sentence."""
        differ = ", ".join(repr(v.output) for v in self.verdicts if not v.agrees)
        worse = ", ".join(repr(v.output) for v in self.verdicts if not v.as_promised)
        unjudged = ", ".join(repr(v.output) for v in self.verdicts if not v.judged)
        if self.good:
            but = f" (nothing can judge {unjudged})" if unjudged else ""
            return f"this device computes what was compiled, as well as promised{but}"
        said = [f"{', '.join(self.changed)} changed since it was compiled"] if self.changed else []
        said += [f"output {differ} is not what was compiled"] if differ else []
        said += [f"output {worse} is worse than promised"] if worse else []
        if not any(v.judged for v in self.verdicts):
            said.append(f"nothing can judge {unjudged}: it was not finite where it was compiled")
        elif not worse:
            said.append("what it computes is as near to float as promised")
        return "; ".join(said)


def check(folder: pathlib.Path) -> Result:
    """Run the model of ``folder`` (an output folder, or the check folder in it) and compare.

    Raises CheckError if there is no bundle, or no runtime that can run it.
    """
    place = folder if (folder / "check.json").is_file() else folder / "check"
    try:
        spec: dict[str, Any] = json.loads((place / "check.json").read_text())
        inputs, expected, floats = (
            _read(place / f"{name}.npz", spec["inputs" if name == "inputs" else "outputs"])
            for name in ("inputs", "expected", "float")
        )
    except FileNotFoundError as error:
        raise CheckError(_missing(folder)) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckError(f"the check in {str(place)!r} is damaged: {error}") from error
    if spec["schema"] != SCHEMA_VERSION:
        raise CheckError(
            f"the check in {str(place)!r} has schema {spec['schema']}, this program reads "
            f"{SCHEMA_VERSION}: run the verify.py beside it"
        )
    runner = _runner(place.parent, spec)
    results = list(_carried(runner, inputs, spec))
    verdicts: list[Verdict] = []
    for output in spec["outputs"]:
        name = output["name"]
        if any(name not in found for found in results):
            raise CheckError(f"the model writes no output {name!r}: it is another one")
        compiled, near_float = (
            compare([frame[name] for frame in wanted], [frame[name] for frame in results])
            for wanted in (expected, floats)
        )
        verdicts.append(
            Verdict(
                name, output["whole"], compiled, output["compiled_limit"],
                near_float, output["float_limit"],
            )
        )  # fmt: skip
    changed = [
        name
        for name, known in spec["files"].items()
        if not (file := place.parent / name).is_file() or digest(file) != known
    ]
    return Result(runner.what, spec["target"], len(results), tuple(verdicts), tuple(changed))


def digest(file: pathlib.Path) -> str:
    """The SHA-256 of ``file``."""
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _missing(folder: pathlib.Path) -> str:
    inside = sorted(p.parent.parent for p in folder.glob("*/check/check.json"))
    if inside:
        names = " or ".join(repr(str(p)) for p in inside)
        return f"{str(folder)!r} holds several targets: name one, {names}"
    return (
        f"{str(folder)!r} has no check: name a folder that qcompile wrote with calibration data, "
        "or the check folder in it"
    )


def _read(path: pathlib.Path, names: Sequence[Any]) -> list[Arrays]:
    """The frames of an archive, whose keys are ``<frame>.<number of the name>``."""
    known = [name if isinstance(name, str) else name["name"] for name in names]
    frames: list[Arrays] = []
    with np.load(path, allow_pickle=False) as archive:
        for key in archive.files:
            frame, _, number = key.partition(".")
            while len(frames) <= int(frame):
                frames.append({})
            frames[int(frame)][known[int(number)]] = archive[key]
    return frames


def _carried(runner: Runner, inputs: Sequence[Arrays], spec: Mapping[str, Any]) -> Iterator[Arrays]:
    """The outputs for each frame; its state comes from the outputs of the frame before."""
    state: dict[str, str] = spec["state"]
    frames = iter(inputs)
    for length in spec["sequences"]:
        kept: Arrays = {}
        for _ in range(length):
            results = runner.run({**kept, **next(frames)})
            kept = {taken: results[given] for taken, given in state.items()}
            yield results


# -- running ------------------------------------------------------------------------------------


class Runner(Protocol):
    """A model on a runtime."""

    @property
    def what(self) -> str:
        """The model and the runtime, in words."""
        ...

    def run(self, feeds: Mapping[str, Array]) -> Arrays:
        """The outputs for ``feeds``."""
        ...


def _runner(out: pathlib.Path, spec: Mapping[str, Any]) -> Runner:
    """What runs the model in ``out``; raise CheckError, with what to install, if nothing does."""
    model = out / "model.onnx"
    if not model.is_file():
        raise CheckError(f"there is no file {str(model)!r} beside the check")
    package = str(spec["runtime"])
    if package == "onnxruntime":
        return _OnnxRuntime(model)
    program = next((p for p in _PROGRAMS.get(package, ()) if shutil.which(p)), None)
    if importlib.util.find_spec(package) is not None:
        runner: Runner = _engine_of(package, out, spec["profile"])
    elif program is not None:
        runner = _Program(program, out, spec["profile"])
    else:
        programs = " or ".join(_PROGRAMS.get(package, ()))
        either = f"neither the Python package {package} nor {programs} is here"
        raise CheckError(f"{either}: pip install {package.replace('_', '-')}")
    tail = out / "tail.onnx"
    return _Behind(runner, _OnnxRuntime(tail)) if tail.is_file() else runner


_PROGRAMS = {"tensorrt": ("trtexec",), "tensorrt_rtx": ("tensorrt_rtx",)}


@dataclasses.dataclass
class _Behind:
    """A model whose last part is one of its own, which reads what the first writes."""

    first: Runner
    last: _OnnxRuntime

    @property
    def what(self) -> str:
        return f"{self.first.what}, then {self.last.what}"

    def run(self, feeds: Mapping[str, Array]) -> Arrays:
        found = self.first.run(feeds)
        return {**found, **self.last.run({**feeds, **found})}


class _OnnxRuntime:
    def __init__(self, model: pathlib.Path) -> None:
        if importlib.util.find_spec("onnxruntime") is None:
            raise CheckError("ONNX Runtime is not here: pip install onnxruntime")
        runtime: Any = importlib.import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.log_severity_level = 4
        with _says(f"ONNX Runtime refuses {model.name}"):
            self._session: Any = runtime.InferenceSession(
                str(model), options, providers=["CPUExecutionProvider"]
            )
        self._inputs = [entered.name for entered in self._session.get_inputs()]
        self._outputs = [left.name for left in self._session.get_outputs()]
        self.what = f"{model.name} on ONNX Runtime {runtime.__version__}"

    def run(self, feeds: Mapping[str, Array]) -> Arrays:
        for name in self._inputs:
            if name not in feeds:
                raise CheckError(f"the model reads {name!r}, which the check does not hold")
        with _says("ONNX Runtime fails to run the model"):
            found = self._session.run(self._outputs, {name: feeds[name] for name in self._inputs})
        return dict(zip(self._outputs, found, strict=True))


class _says:
    """Turns whatever a runtime raises into a CheckError that begins with ``what``."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, CheckError):
            raise CheckError(f"{self._what}: {' '.join(str(error).split())[:600]}") from error


def logger(trt: Any) -> tuple[Any, list[str]]:
    """A log for TensorRT, and the errors that it is told, as sentences."""
    said: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                said.append(_sentence(message))

    return Log(), said


def _sentence(message: str) -> str:
    """What a message of TensorRT's says, without where in its source it is said."""
    text = " ".join(message.split())
    found = re.fullmatch(r"\S+: Error Code \d+: [^(]+\((.*?)(?: In \S+ at \S+)?\)", text)
    return found[1] if found else text


class TensorRt:
    """An engine in the Python package of TensorRT, on the first GPU; the memory is our own.

    Raises CheckError where it cannot be loaded, with what TensorRT says.
    """

    def __init__(self, package: str, engine: Any, what: str = "the engine") -> None:
        self._cuda = _Cuda()
        trt: Any = importlib.import_module(package)
        self._trt = trt
        log, said = logger(trt)
        self._runtime: Any = trt.Runtime(log)  # kept: the engine lives in it
        self._engine: Any = self._runtime.deserialize_cuda_engine(engine)
        self._context: Any = self._engine and self._engine.create_execution_context()
        if self._context is None:
            cause = said[0] if said else f"{package} says not why"
            raise CheckError(f"{what} cannot be loaded: {cause}")
        self._said = said
        self.what = f"{what} on {package} {trt.__version__}"

    def layers(self) -> str:
        """What the inspector says of the engine, as JSON; "" without one."""
        if not hasattr(self._engine, "create_engine_inspector"):
            return ""
        inspector = self._engine.create_engine_inspector()
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def run(self, feeds: Mapping[str, Array]) -> Arrays:
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        entering = self._trt.TensorIOMode.INPUT
        read = [n for n in names if self._engine.get_tensor_mode(n) == entering]
        places: list[int] = []
        try:
            for name in read:
                array = np.ascontiguousarray(feeds[name])
                self._context.set_input_shape(name, array.shape)
                places.append(self._cuda.upload(array))
                self._context.set_tensor_address(name, places[-1])
            left: dict[str, tuple[Array, int]] = {}
            for name in (n for n in names if n not in read):
                shape = tuple(self._context.get_tensor_shape(name))
                if -1 in shape:
                    raise CheckError(f"the size of output {name!r} depends on the data")
                dtype = np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name)))
                array = np.empty(shape, dtype)
                places.append(self._cuda.upload(array))
                self._context.set_tensor_address(name, places[-1])
                left[name] = array, places[-1]
            if not self._context.execute_async_v3(0):
                raise CheckError(f"TensorRT fails to run the engine: {'; '.join(self._said[:3])}")
            self._cuda.wait()
            return {
                name: self._cuda.download(place, array) for name, (array, place) in left.items()
            }
        finally:
            for place in places:
                self._cuda.free(place)


def _engine_of(package: str, out: pathlib.Path, profile: Mapping[str, Any]) -> TensorRt:
    """The engine in ``out``; built here of its ONNX file if it is for another device or version."""
    _Cuda()  # without a device nothing is built
    written = out / "model.engine"
    if written.is_file():
        with contextlib.suppress(CheckError):
            return TensorRt(package, written.read_bytes(), written.name)
    try:
        built = plan(importlib.import_module(package), out / "model.onnx", profile)
    except CheckError as error:
        raise CheckError(f"TensorRT cannot build an engine of model.onnx: {error}") from error
    return TensorRt(package, built, "an engine built here from model.onnx")


def plan(
    trt: Any, model: pathlib.Path, profile: Mapping[str, Any], capabilities: Sequence[int] = ()
) -> bytes:
    """An engine of the file ``model``, for ``capabilities`` (89) or a portable one.

    ``profile``: for each dynamic input its shape as [min, opt, max]. Raises CheckError with why
    there is none.
    """
    log, said = logger(trt)
    builder = trt.Builder(log)
    flags = trt.NetworkDefinitionCreationFlag
    strong = 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0
    network = builder.create_network(strong)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(model)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        raise CheckError("; ".join(_describe(error) for error in errors[:3]))
    config = builder.create_builder_config()
    if hasattr(config, "profiling_verbosity"):
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # names for the inspector
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for index, cc in enumerate(capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{cc}"), index)
    if profile:
        shapes = builder.create_optimization_profile()
        for name, bounds in profile.items():
            shapes.set_shape(name, *[tuple(bound) for bound in bounds])
        config.add_optimization_profile(shapes)
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise CheckError("; ".join(said[:3]) or "the builder gave no reason")
    return bytes(built)


def _describe(error: Any) -> str:
    """What the parser says of a node."""
    # The lines about a missing CUDA device stand behind every error on a machine without one.
    lines = [line for line in str(error.desc()).splitlines() if "catchCudaError" not in line]
    cause = " ".join(lines)
    if cause == "false":  # what a failed check of the parser without a text says
        cause = "not supported"
    node = error.node_name() if hasattr(error, "node_name") else ""
    operator = error.node_operator() if hasattr(error, "node_operator") else ""
    return f"{node} ({operator}): {cause}" if node else cause


class _Cuda:
    """Memory of the first CUDA device, through the driver: no package is needed for it."""

    def __init__(self) -> None:
        name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
        try:
            self._library = ctypes.CDLL(name)
        except OSError as error:
            raise CheckError(f"there is no CUDA driver here ({name}): {error}") from error
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)

    def _call(self, name: str, *words: Any) -> None:
        code = getattr(self._library, name)(*words)
        if code:
            raise CheckError(f"the CUDA driver fails: {name} returns {code}")

    def upload(self, array: Array) -> int:
        """The address of a copy of ``array`` on the device."""
        place = ctypes.c_uint64()
        size = ctypes.c_size_t(array.nbytes)
        self._call("cuMemAlloc_v2", ctypes.byref(place), ctypes.c_size_t(max(array.nbytes, 1)))
        self._call("cuMemcpyHtoD_v2", place, ctypes.c_void_p(array.ctypes.data), size)
        return place.value

    def download(self, place: int, into: Array) -> Array:
        """``into``, filled from the address ``place``."""
        size = ctypes.c_size_t(into.nbytes)
        where = ctypes.c_void_p(into.ctypes.data)
        self._call("cuMemcpyDtoH_v2", where, ctypes.c_uint64(place), size)
        return into

    def wait(self) -> None:
        """Wait until the device is done."""
        self._call("cuCtxSynchronize")

    def free(self, place: int) -> None:
        """Give the memory at ``place`` back."""
        self._call("cuMemFree_v2", ctypes.c_uint64(place))


class _Program:
    """The command of TensorRT, ``trtexec`` or ``tensorrt_rtx``: a process for each sample."""

    def __init__(self, program: str, out: pathlib.Path, profile: Mapping[str, Any]) -> None:
        self._program = program
        self._folder = tempfile.TemporaryDirectory(prefix="qcompile-")  # kept with this object
        self._engine = pathlib.Path(self._folder.name) / "model.engine"
        words = [f"--onnx={out / 'model.onnx'}", f"--saveEngine={self._engine}", "--skipInference"]
        words += ["--stronglyTyped"] if program == "trtexec" else []
        for position, option in enumerate(("minShapes", "optShapes", "maxShapes")):
            bounds = [f"{name}:{_by(shapes[position])}" for name, shapes in profile.items()]
            words += [f"--{option}={','.join(bounds)}"] if bounds else []
        self._call(*words)
        self._dynamic = set(profile)
        self.what = f"an engine built here from model.onnx on {program}"

    def run(self, feeds: Mapping[str, Array]) -> Arrays:
        folder = pathlib.Path(self._folder.name)
        files: list[str] = []
        for number, (name, array) in enumerate(feeds.items()):
            (folder / f"{number}.bin").write_bytes(np.ascontiguousarray(array).tobytes())
            files.append(f"{name}:{folder / f'{number}.bin'}")
        shapes = [f"{n}:{_by(a.shape)}" for n, a in feeds.items() if n in self._dynamic]
        words = [f"--loadEngine={self._engine}", f"--loadInputs={','.join(files)}"]
        words += [f"--shapes={','.join(shapes)}"] if shapes else []
        words += ["--iterations=1", "--warmUp=0", "--duration=0"]
        self._call(*words, f"--exportOutput={folder / 'outputs.json'}")
        return exported((folder / "outputs.json").read_text())

    def _call(self, *words: str) -> None:
        done = subprocess.run([self._program, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [x for x in (done.stdout + done.stderr).splitlines() if "[E]" in x]
            cause = lines[-1] if lines else f"exit status {done.returncode}"
            raise CheckError(f"{self._program} fails: {cause}")


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def exported(text: str) -> Arrays:
    """The outputs in what ``trtexec --exportOutput`` writes: a name, "1x10", and the numbers."""
    found: Arrays = {}
    for item in json.loads(text):
        shape = [int(d) for d in str(item["dimensions"]).split("x") if d]
        found[item["name"]] = np.array(item["values"]).reshape(shape)
    return found


def main(words: Sequence[str] | None = None, say: Callable[[str], None] = print) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="exit codes: 0 yes, 1 it cannot be told and why, 3 no",
    )
    here = pathlib.Path(__file__).resolve().parent
    parser.add_argument(
        "folder", nargs="?", type=pathlib.Path, default=here, help="what qcompile wrote"
    )
    folder: pathlib.Path = parser.parse_args(words).folder
    try:
        result = check(folder)
    except CheckError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for line in result.lines():
        say(line)
    say(result.summary())
    return 0 if result.good else MISSED


if __name__ == "__main__":
    sys.exit(main())
