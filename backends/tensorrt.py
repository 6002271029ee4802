"""TensorRT: the targets ``tensorrt`` and ``tensorrt-rtx``, their engines, and the proof.

Both share the dialect, the refusals, the builder and the readers of what it made. TensorRT-RTX
builds without a GPU; TensorRT builds where its package and the GPU of the target are, and elsewhere
leaves a checked ONNX file with the command that builds the engine on the device.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib.metadata
import importlib.util
import json
import pathlib
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from qcompile import execute, graph, halves, ports, simulate
from qcompile.backends import trt_build, trt_check, trt_device, trt_graph, trt_plan, trt_rules
from qcompile.backends.base import Ran, Target, float_in_file, together, why_float
from qcompile.backends.lowering import NARROW, Kernels, Rule
from qcompile.errors import TargetError, nearest

if TYPE_CHECKING:
    from qcompile.calibrate import Calibration

Profile = dict[str, list[list[int]]]


@dataclasses.dataclass(frozen=True)
class Engine(Target, abc.ABC):
    """What both have in common. ``capabilities`` is empty where the engine is portable."""

    weight_formats: ClassVar[tuple[str, ...]] = tuple(f"int{b}" for b in range(8, 1, -1))
    input_formats: ClassVar[tuple[str, ...]] = ("int8", *NARROW)
    dialect: ClassVar[tuple[Rule, ...]] = trt_rules.DIALECT
    newest_opset: ClassVar[int] = 25
    float_formats: ClassVar[tuple[str, ...]] = ("float16", "bfloat16")
    runtime: ClassVar[str]
    module: ClassVar[str]
    missing: ClassVar[frozenset[str]] = frozenset()  # operators without a kernel

    @property
    @abc.abstractmethod
    def capabilities(self) -> tuple[int, ...]:
        """The compute capabilities that the engine is for."""

    @property
    def release(self) -> trt_check.Version | None:
        """The version of TensorRT; None for TensorRT-RTX."""
        return None

    @abc.abstractmethod
    def builds_here(self) -> str:
        """Why the engine cannot be built on this machine; "" if it can."""

    def _refuse(self, form: str, held: Sequence[str], what: str, where: str) -> None:
        super()._refuse(form, held, what, where)
        for capability in self.capabilities:
            if reason := trt_check.lacks(form, capability):
                raise TargetError(f"{self} holds no {form} {what} (asked for by {where}): {reason}")

    def kernels(self) -> Kernels:
        # The builder clips no integers.
        return Kernels(activations=trt_rules.INT8, clips_codes=False)

    def computed(self, model: ir.Model) -> ir.Model:
        return halves.rounded(model)

    def emit(
        self, model: ir.Model, folder: pathlib.Path, calibration: Calibration | None
    ) -> pathlib.Path:
        """Write ``model.onnx``, and ``model.engine`` where it can be built here.

        What stands behind an operator without a kernel goes into ``tail.onnx``, which reads what
        the engine writes. Raises TargetError for what no engine holds, and if the parser or the
        builder refuses the model, or crashes.
        """
        source, engine = folder / "model.onnx", folder / "model.engine"
        shapes = profile(model, calibration)
        head, tail = trt_graph.split(trt_graph.settled(model, shapes), self.missing)
        self._check(head)
        execute.save(head, source)
        if tail is not None:
            execute.save(tail, folder / "tail.onnx")
        self._script(folder, shapes)
        if self.builds_here():
            return source
        cc = list(self.capabilities) if self.module == "tensorrt_rtx" else []
        request = trt_build.Request(
            module=self.module, model=str(source), engine=str(engine), cc=cc, profile=shapes
        )
        answer = _child("trt_build", request, f"the {self.runtime} builder crashed")
        if answer["error"]:
            raise TargetError(f"{self.runtime} refuses the model: {answer['error']}")
        if trt_device.capability() is not None and tail is None:
            self._run(head, folder, calibration)
        return engine

    def check_shapes(self, model: ir.Model, calibration: Calibration | None) -> None:
        profile(model, calibration)

    def _check(self, model: ir.Model) -> None:
        found = trt_check.refusals(model, self.capabilities, self.release)
        if model.opset_imports.get("", 0) > self.opset_limit():
            found.insert(0, f"it reads opsets up to {self.opset_limit()}")
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise TargetError(f"{self.runtime} refuses the model: {found[0]}{more}")

    def _script(self, folder: pathlib.Path, shapes: Profile) -> None:
        """Write what the device needs beside the model; nothing by default."""

    def _run(self, model: ir.Model, folder: pathlib.Path, calibration: Calibration | None) -> None:
        """Run the engine on the GPU here: what its inspector says, and SQNR to the simulation.

        Not run by us. Writes ``layers.json`` and ``device.json``; an engine that does not run
        leaves the reason there.
        """
        samples = [] if calibration is None else list(calibration.judges)[:4]
        simulated = execute.Session(self.computed(model), optimize=False)
        with tempfile.TemporaryDirectory(prefix="qcompile-") as scratch:
            files = [pathlib.Path(scratch) / str(i) for i in range(len(samples))]
            feeds: list[dict[str, Any]] = [
                {n: sample[n] for n in simulated.inputs if n in sample} for sample in samples
            ]
            for file, arrays in zip(files, feeds, strict=True):
                np.savez(f"{file}.feeds.npz", **arrays)
            request = trt_device.Request(
                module=self.module,
                engine=str(folder / "model.engine"),
                feeds=[f"{file}.feeds.npz" for file in files],
                results=[f"{file}.results.npz" for file in files],
            )
            answer = _child("trt_device", request, f"{self.runtime} crashed on this GPU")
            said: dict[str, Any] = {"error": answer["error"], "sqnr": []}
            for file, arrays in zip(files, feeds, strict=True) if not answer["error"] else ():
                actual, wanted = np.load(f"{file}.results.npz"), simulated.run(arrays)
                said["sqnr"] += [simulate.sqnr(wanted[name], actual[name]) for name in wanted]
        (folder / "device.json").write_text(json.dumps(said))
        if answer["layers"]:
            (folder / "layers.json").write_text(answer["layers"])

    def prove(self, model: ir.Model, folder: pathlib.Path) -> dict[str, Ran]:
        """Find each layer's kernel in what was built.

        What the engine's inspector says on a GPU counts, else the program of the plan.
        """
        plan, inspected = folder / "model.engine", folder / "layers.json"
        if not plan.exists():
            return self._asked(model)
        if inspected.exists():
            steps, how = trt_plan.inspected(inspected.read_text()), _on_device(folder)
        else:
            steps, how = trt_plan.steps(trt_plan.program(plan.read_bytes())), "built, not run"
        return self._proof(model, steps, how)

    def _asked(self, model: ir.Model) -> dict[str, Ran]:
        """What is known of layers whose engine was not built: which are float in the file."""
        why = f"not built here ({self.builds_here()}): run build.sh on the device"
        found: dict[str, Ran] = {}
        for node in model.graph:
            plain = float_in_file(node) and not _half_in_file(node)
            ran = Ran("float", "", why_float(node, "")) if plain else Ran("unknown", "", why)
            for layer in graph.origins(node):
                found[layer] = together(found.get(layer), ran)
        return found

    def _proof(self, model: ir.Model, steps: Sequence[trt_plan.Step], how: str) -> dict[str, Ran]:
        found: dict[str, Ran] = {}
        behind, missing = trt_graph.behind(model, self.missing), self._missing(model)
        products, others = trt_plan.by_node(steps)
        for node in model.graph:
            name, half = node.name or "", _half_in_file(node)
            # Small products in half floats are fused into what does not look like a product, and
            # rows of a table with what dequantizes them.
            rows = node.op_type == "Gather" and not float_in_file(node)
            step = products.get(name) or (others.get(name) if half or rows else None)
            for layer in graph.origins(node):
                reason = why_float(node, "the builder chose a float kernel")
                if node in behind:
                    found[layer] = Ran("unknown", "", f"in tail.onnx: {missing}")
                elif step is not None:
                    found[layer] = together(found.get(layer), _ran(step, half, how, reason))
                elif layer not in found and float_in_file(node) and not half:
                    found[layer] = Ran("float", "", reason)
                elif layer not in found:
                    found[layer] = Ran("unknown", "", "no kernel of this name in the plan")
        return found

    def notes(self, model: ir.Model, folder: pathlib.Path) -> list[str]:
        count = len(trt_graph.behind(model, self.missing))
        tail = f"tail.onnx holds {count} of {len(model.graph)} nodes, to be run behind the engine"
        found = super().notes(model, folder)
        found += [f"{tail}: {self._missing(model)}"] if count else []
        tried = folder / "device.json"
        failed = json.loads(tried.read_text())["error"] if tried.exists() else ""
        return [*found, f"it does not run on the GPU here: {failed}"] if failed else found

    def _missing(self, model: ir.Model) -> str:
        """Which operators have no kernel, in the user's words."""
        kinds = sorted({node.op_type for node in trt_graph.without_kernel(model, self.missing)})
        return f"{self.runtime} has no kernel for {', '.join(kinds)}"


CAPABILITIES = (75, 80, 86, 89, 120, 121)


@dataclasses.dataclass(frozen=True)
class TensorRtRtx(Engine):
    """TensorRT-RTX: engines for one or several compute capabilities, built without a GPU.

    Holds symmetric int8 activations with int8 weights, and int4 block weights alone, beside
    float32, float16 or bfloat16. Engines are built in a child process and are not run here: the
    proof says "built, not run".

    * ``cc``: compute capabilities, such as 89; none makes a portable engine.
    """

    name: ClassVar[str] = "tensorrt-rtx"
    runtime: ClassVar[str] = "TensorRT-RTX"
    module: ClassVar[str] = "tensorrt_rtx"
    missing: ClassVar[frozenset[str]] = trt_graph.NO_KERNEL

    cc: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for capability in self.cc:
            if capability not in CAPABILITIES:
                known = ", ".join(map(str, CAPABILITIES))
                raise TargetError(f"unknown compute capability {capability}; known are {known}")

    @property
    def capabilities(self) -> tuple[int, ...]:
        return self.cc

    def builds_here(self) -> str:
        return ""

    def available(self) -> None:
        if importlib.util.find_spec("tensorrt_rtx") is None:
            raise TargetError(
                "the target tensorrt-rtx needs its builder: pip install 'qcompile[tensorrt-rtx]'"
            )


# Compute capabilities by name, and those that there are besides.
ARCHITECTURES = {"turing": 75, "orin": 87, "ada": 89, "hopper": 90, "thor": 110}
OTHERS = (80, 86, 100, 103, 120, 121)
_JETSONS = ("orin", "thor")
# The newest opset of each version: that of the ONNX release that its parser is built with (1.17
# from 10.6 on, 1.20 in 11), but 21 before, because int4 is read since 10.0 and is of opset 21.
_OPSETS = {(10, 0): 21, (10, 6): 22, (11, 0): 25}


@dataclasses.dataclass(frozen=True)
class TensorRt(Engine):
    """TensorRT 10 and 11: a checked ONNX file, and the command that builds its engine elsewhere.

    Holds symmetric int8 activations with int8 weights, and int4 block weights alone, beside
    float32, float16 or bfloat16. Where the package ``tensorrt`` of this version and a GPU of this
    architecture are, the engine is built, inspected and run; that part has not been run by us.
    Elsewhere ``build.sh`` holds the ``trtexec`` command, and the proof says "unknown".

    JetPack 6 is TensorRT 10.3 on Orin: ``tensorrt{version=10.3 arch=orin}``.

    * ``version``: of TensorRT, such as 10.3; must be given.
    * ``arch``: turing, orin, ada, hopper or thor, or a compute capability such as 86; must be
      given.
    """

    name: ClassVar[str] = "tensorrt"
    runtime: ClassVar[str] = "TensorRT"
    module: ClassVar[str] = "tensorrt"

    version: str = ""
    arch: str = ""

    def __post_init__(self) -> None:
        if not self.version or not self.arch:
            raise TargetError("tensorrt needs both, as in tensorrt{version=10.3 arch=orin}")
        parts = self.version.split(".")
        if (
            len(parts) != 2
            or not all(p.isdecimal() for p in parts)
            or int(parts[0]) not in (10, 11)
        ):
            raise TargetError(f"version={self.version} is not a TensorRT 10 or 11, such as 10.3")
        if self.arch in ("xavier", "72"):
            raise TargetError("Xavier ends with TensorRT 8 (JetPack 5); this target begins with 10")
        known = {**ARCHITECTURES, **{str(cc): cc for cc in (*ARCHITECTURES.values(), *OTHERS)}}
        if self.arch not in known:
            raise TargetError(f"unknown architecture {self.arch!r}; {nearest(self.arch, known)}")
        if parts[0] == "11" and self.arch in _JETSONS:
            raise TargetError(f"TensorRT 11 has no JetPack: {self.arch} stays with TensorRT 10")

    @property
    def capabilities(self) -> tuple[int, ...]:
        return (ARCHITECTURES.get(self.arch) or int(self.arch),)

    @property
    def release(self) -> trt_check.Version:
        major, minor = self.version.split(".")
        return int(major), int(minor)

    def opset_limit(self) -> int:
        return _OPSETS[max(version for version in _OPSETS if version <= self.release)]

    def available(self) -> None:
        """Always there: without the package, the command for the device is written."""

    def builds_here(self) -> str:
        if importlib.util.find_spec("tensorrt") is None:
            return "the package tensorrt is not installed"
        installed = importlib.metadata.version("tensorrt")
        if not f"{installed}.".startswith(f"{self.version}."):
            return f"TensorRT {installed} is installed, not {self.version}"
        here = trt_device.capability()
        if here not in self.capabilities:
            return "there is no GPU" if here is None else f"the GPU here is of capability {here}"
        return ""

    def _script(self, folder: pathlib.Path, shapes: Profile) -> None:
        script = folder / "build.sh"
        script.write_text(
            "#!/bin/sh\n"
            f"# Builds model.engine; on the device, which is {self}.\n"
            "# trtexec stands in /usr/src/tensorrt/bin where it is not on the PATH.\n"
            'cd "$(dirname "$0")" || exit 1\n'
            'PATH="$PATH:/usr/src/tensorrt/bin"\n'
            f'exec {self.command(shapes)} "$@"\n'
        )
        script.chmod(0o755)

    def command(self, shapes: Mapping[str, Sequence[Sequence[int]]]) -> str:
        """What builds the engine for the profile ``shapes``, and lists the types of its layers."""
        words = ["trtexec", "--onnx=model.onnx", "--saveEngine=model.engine"]
        if self.release < (11, 0):  # 11 has no other kind of network
            words.append("--stronglyTyped")
        for number, what in enumerate(("min", "opt", "max")):
            sizes = (f"{n}:{'x'.join(map(str, each[number]))}" for n, each in shapes.items())
            words += [f"--{what}Shapes={','.join(sizes)}"] if shapes else []
        words += ["--profilingVerbosity=detailed", "--exportLayerInfo=layers.json"]
        return shlex.join(words)

    def notes(self, model: ir.Model, folder: pathlib.Path) -> list[str]:
        why = self.builds_here()
        if not why:
            return super().notes(model, folder)
        command = (folder / "build.sh").read_text().splitlines()[-1]
        command = command.removeprefix("exec ").removesuffix(' "$@"')
        asked = f"the engine is not built here ({why}); build.sh does on the device: {command}"
        return [*super().notes(model, folder), asked]


def profile(model: ir.Model, calibration: Calibration | None) -> Profile:
    """For each input with a dynamic dimension its smallest, first and largest calibration shape.

    Where ``--shape`` gives one, that is all three, or the ends of what it spans: then the engine is
    tuned for the first calibration shape if that lies between, else for the largest. Raises
    TargetError if there is a dynamic dimension, no shape and no data.
    """
    shapes: Profile = {}
    for wanted in ports.inputs_of(model):
        if None not in wanted.shape:
            continue
        samples = calibration.data.samples if calibration is not None else None
        seen = [list(shape) for shape in samples.shapes(wanted.name)] if samples else []
        if wanted.chosen is not None and wanted.most is not None:
            least, most = list(wanted.chosen), list(wanted.most)
            between = [s for s in seen[:1] if all(map(_between, least, s, most))]
            seen = between or [most]
        elif seen:
            least = [min(dims) for dims in zip(*seen, strict=True)]
            most = [max(dims) for dims in zip(*seen, strict=True)]
        else:
            raise TargetError(
                f"{wanted} is dynamic: give --calib, whose shapes bound it, or --shape"
            )
        shapes[wanted.name] = [least, seen[0], most]
    return shapes


def _between(least: int, size: int, most: int) -> bool:
    return least <= size <= most


def _child(module: str, request: Any, crashed: str) -> Any:
    """What the module answers in a process of its own; raise TargetError if that dies."""
    done = subprocess.run(
        [sys.executable, "-m", f"qcompile.backends.{module}"],
        input=json.dumps(request), capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode or not done.stdout:
        cause = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise TargetError(f"{crashed}: {cause}")
    return json.loads(done.stdout)


def _half_in_file(node: ir.Node) -> bool:
    """Whether ``node`` reads half floats that were not dequantized."""
    read = [v for v in node.inputs[:2] if v is not None]
    return float_in_file(node) and any(halves.of(v.dtype) for v in read)


def _on_device(folder: pathlib.Path) -> str:
    said = json.loads((folder / "device.json").read_text())
    if said["error"]:
        return f"built and inspected here; {said['error']}"
    worst = f": {min(said['sqnr']):.1f} dB to the simulation" if said["sqnr"] else ""
    return f"built and run here{worst}"


def _ran(step: trt_plan.Step, half: bool, how: str, reason: str) -> Ran:
    """How a layer runs in ``step``; ``half`` if the file has it in half floats."""
    integers = [kind for kind in step.reads if kind in ("int8", "int4")]  # others are indices
    kernel = step.operation if step.operation != "runtime_fusion" else step.name
    if len(integers) >= 2 and set(integers[:2]) == {"int8"}:
        return Ran("int8", kernel, how)
    if integers:
        return Ran(f"{integers[0]} weights", kernel, how)
    narrow = [_HALVES[kind] for kind in step.reads if kind in _HALVES]
    return Ran(narrow[0], kernel, how) if half and narrow else Ran("float", kernel, reason)


_HALVES = {"half": "float16", "bfloat16": "bfloat16", "bf16": "bfloat16"}
