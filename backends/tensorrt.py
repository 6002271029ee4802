"""TensorRT-RTX: the target ``tensorrt-rtx``, its engine, and the proof from the plan's program."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from qcompile import execute, graph, ports
from qcompile.backends import trt_graph, trt_plan, trt_rules
from qcompile.backends.base import Ran, Rule, Target, float_in_file, together, why_float
from qcompile.backends.trt_build import Answer, Request
from qcompile.errors import TargetError

if TYPE_CHECKING:
    from qcompile.calibrate import Calibration

CAPABILITIES = (75, 80, 86, 89, 120, 121)


@dataclasses.dataclass(frozen=True)
class TensorRtRtx(Target):
    """TensorRT-RTX: engines for one or several compute capabilities, built without a GPU.

    Holds symmetric int8 activations with int8 weights, and int4 block weights alone. Engines are
    built in a child process and are not run here: the proof says "built, not run".

    * ``cc``: compute capabilities, such as 89; none makes a portable engine.
    """

    name: ClassVar[str] = "tensorrt-rtx"
    weight_formats: ClassVar[tuple[str, ...]] = tuple(f"int{b}" for b in range(8, 1, -1))
    input_formats: ClassVar[tuple[str, ...]] = ("int8",)
    dialect: ClassVar[tuple[Rule, ...]] = trt_rules.DIALECT
    newest_opset: ClassVar[int] = 25

    cc: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for capability in self.cc:
            if capability not in CAPABILITIES:
                known = ", ".join(map(str, CAPABILITIES))
                raise TargetError(f"unknown compute capability {capability}; known are {known}")

    def available(self) -> None:
        if importlib.util.find_spec("tensorrt_rtx") is None:
            raise TargetError(
                "the target tensorrt-rtx needs its builder: pip install 'qcompile[tensorrt-rtx]'"
            )

    def emit(
        self, model: ir.Model, folder: pathlib.Path, calibration: Calibration | None
    ) -> pathlib.Path:
        """Write ``model.onnx``, which the engine is made of, and ``model.engine``.

        What stands behind an operator without a kernel goes into ``tail.onnx``, which reads what
        the engine writes. Raises TargetError if the parser or the builder refuses the model, or
        crashes.
        """
        source, engine = folder / "model.onnx", folder / "model.engine"
        shapes = profile(model, calibration)
        head, tail = trt_graph.split(trt_graph.settled(model, shapes))
        execute.save(head, source)
        if tail is not None:
            execute.save(tail, folder / "tail.onnx")
        request = Request(
            module="tensorrt_rtx",
            model=str(source),
            engine=str(engine),
            cc=list(self.cc),
            profile=shapes,
        )
        done = subprocess.run(
            [sys.executable, "-m", "qcompile.backends.trt_build"],
            input=json.dumps(request), capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode or not done.stdout:
            cause = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise TargetError(f"the TensorRT-RTX builder crashed: {cause}")
        answer: Answer = json.loads(done.stdout)
        if answer["error"]:
            raise TargetError(f"TensorRT-RTX refuses the model: {answer['error']}")
        return engine

    def prove(self, model: ir.Model, folder: pathlib.Path) -> dict[str, Ran]:
        """Find each layer's kernel in the program of the plan: built, not run."""
        steps = trt_plan.steps(trt_plan.program((folder / "model.engine").read_bytes()))
        kernels: dict[str, trt_plan.Step] = {}
        tables = {n.name for n in model.graph if n.op_type == "Gather" and graph.origins(n)}
        for step in steps:
            for node in step.nodes:
                linear = step.operation in ("corrltn", "fully_connected")
                gathers = node in tables and "Gath" in step.name
                if linear or gathers or step.name.endswith("Fc"):
                    kernels.setdefault(node, step)
        found: dict[str, Ran] = {}
        behind, missing = trt_graph.behind(model), self._missing(model)
        for node in model.graph:
            step = kernels.get(node.name or "")
            for layer in graph.origins(node):
                reason = why_float(node, "the builder chose a float kernel")
                if node in behind:
                    found[layer] = Ran("unknown", "", f"in tail.onnx: {missing}")
                elif step is not None:
                    found[layer] = together(found.get(layer), _ran(step, reason))
                elif layer not in found and float_in_file(node):
                    found[layer] = Ran("float", "", reason)
                elif layer not in found:
                    found[layer] = Ran("unknown", "", "no kernel of this name in the plan")
        return found

    def notes(self, model: ir.Model) -> list[str]:
        count = len(trt_graph.behind(model))
        tail = f"tail.onnx holds {count} of {len(model.graph)} nodes, to be run behind the engine"
        return [f"{tail}: {self._missing(model)}"] if count else []

    def _missing(self, model: ir.Model) -> str:
        """Which operators have no kernel, in the user's words."""
        kinds = sorted({node.op_type for node in trt_graph.without_kernel(model)})
        return f"TensorRT-RTX has no kernel for {', '.join(kinds)}"


def profile(model: ir.Model, calibration: Calibration | None) -> dict[str, list[list[int]]]:
    """For each input with a dynamic dimension its smallest, first and largest calibration shape.

    Where ``--shape`` gives one, that is all three. Raises TargetError if there is a dynamic
    dimension, no shape and no data.
    """
    shapes: dict[str, list[list[int]]] = {}
    for wanted in ports.inputs_of(model):
        if None not in wanted.shape:
            continue
        if wanted.chosen is not None:
            seen = [list(wanted.chosen)]
        elif calibration is not None:
            seen = [list(shape) for shape in calibration.data.samples.shapes(wanted.name)]
        else:
            raise TargetError(
                f"{wanted} is dynamic: give --calib, whose shapes bound it, or --shape"
            )
        least = [min(dims) for dims in zip(*seen, strict=True)]
        most = [max(dims) for dims in zip(*seen, strict=True)]
        shapes[wanted.name] = [least, seen[0], most]
    return shapes


def _ran(step: trt_plan.Step, reason: str) -> Ran:
    integers = [kind for kind in step.reads if kind in ("int4", "int8")]  # not indices
    kernel = step.operation if step.operation != "runtime_fusion" else step.name
    if len(integers) >= 2 and set(integers[:2]) == {"int8"}:
        return Ran("int8", kernel, "built, not run")
    if integers:
        return Ran(f"{integers[0]} weights", kernel, "built, not run")
    return Ran("float", kernel, reason)
