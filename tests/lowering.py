"""Helpers of the tests that lower: a decided graph, its calibration, and the run of a target."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import graphs
import numpy.typing as npt
import onnx_ir as ir

from qcompile import compiler, execute, pipeline, registry, verify
from qcompile.backends.base import Ran, Target
from qcompile.backends.lowering import Lowering, Rule
from qcompile.backends.onnxruntime import OrtCpu
from qcompile.calibrate import Calibration
from qcompile.pipeline import Context
from qcompile.sources import Data, Sample

Array = npt.NDArray[Any]

DECIDE = "simplify,fold-bn,calibrate,quantize"
WEIGHT_ONLY = "simplify,fold-bn,calibrate,quantize{input=float}"


def graph_of(source: str, arrays: Mapping[str, Array] | None = None, opset: int = 18) -> ir.Model:
    """The captured model of ``source``, with ``arrays`` in place of the weights of these names."""
    model = graphs.graph(source, opset)
    for name, array in (arrays or {}).items():
        model.graph.initializers[name].const_value = ir.Tensor(array, name=name)
    return model


def calibration_of(model: ir.Model, samples: Sequence[Sample] | None = None) -> Calibration:
    """A calibration of ``samples``, or of normal numbers."""
    return Calibration(Data("test", list(samples or graphs.samples(model, 20))))


def decide(
    model: ir.Model, passes: str = DECIDE, samples: Sequence[Sample] | None = None
) -> Calibration:
    """Run ``passes`` over ``model``; the calibration that they used."""
    calibration = calibration_of(model, samples)
    steps = pipeline.parse(passes, registry.passes())
    pipeline.run(model, steps, Context(calibration=calibration, target=OrtCpu()))
    return calibration


def apply(model: ir.Model, dialect: Sequence[Rule], last: str) -> dict[str, int]:
    """Apply the rules of ``dialect`` up to ``last`` to a decided model; how often each acted."""
    lowering = Lowering(model)
    counts: dict[str, int] = {}
    for rule in dialect:
        counts[rule.name] = rule.apply(lowering)
        if rule.name == last:
            return counts
    raise KeyError(last)


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A float model, what a target made of it, and where its files are."""

    reference: ir.Model
    model: ir.Model
    calibration: Calibration
    folder: pathlib.Path
    proof: dict[str, Ran]


def lower(
    source: str | ir.Model,
    target: Target,
    folder: pathlib.Path,
    passes: str = DECIDE,
    arrays: Mapping[str, Array] | None = None,
    samples: Sequence[Sample] | None = None,
) -> Lowered:
    """Decide, lower, emit and prove."""
    model = graph_of(source, arrays) if isinstance(source, str) else source
    reference = model.clone()
    calibration = decide(model, passes, samples)
    target.lower(model)
    verify.verify(model)
    folder.mkdir(parents=True, exist_ok=True)
    target.emit(model, folder, calibration)
    return Lowered(reference, model, calibration, folder, target.prove(model, folder))


def optimized(model: ir.Model | pathlib.Path, folder: pathlib.Path) -> ir.Model:
    """The graph that ONNX Runtime makes of ``model``."""
    path = folder / "optimized.onnx"
    source = folder / "lowered.onnx"
    if isinstance(model, ir.Model):
        execute.save(model, source)
    execute.optimize(source if isinstance(model, ir.Model) else model, path)
    return compiler.load(path)


def operators(model: ir.Model) -> list[str]:
    """The operator types of the main graph, in its order."""
    return [node.op_type for node in model.graph]
