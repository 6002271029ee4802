"""Helpers of the tests of what fits: a decided model, its engine, and its error on other data."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import graphs
import numpy as np
import onnx_ir as ir
import pytest

from qcompile import compiler, pipeline, ports, registry, simulate, sources
from qcompile.backends.base import Target
from qcompile.backends.onnxruntime import OrtCpu
from qcompile.calibrate import Calibration
from qcompile.capture import capture
from qcompile.models import fashion
from qcompile.models import matting_video as video
from qcompile.pipeline import Context, Step
from qcompile.sources import Data, Sample

# Four bits a channel, so that there is an error to lower.
FOUR = "simplify,fold-bn,calibrate,quantize{weight=int4}"


def shipped(name: str) -> ir.Model:
    """A model of the package, as captured."""
    return capture(fashion.path(name))


@functools.cache
def images() -> Data:
    """The calibration pictures of the shipped classifiers."""
    model = shipped(fashion.CNN)
    return sources.load(fashion.path(fashion.CALIBRATION), ports.inputs_of(model))


def calibration(count: int = 48) -> Calibration:
    """``count`` of the pictures, of which some are kept to judge."""
    return Calibration(Data("pictures", list(images().samples.some(count))))


def apart(count: int = 48) -> list[Sample]:
    """The pictures that ``calibration(count)`` has not; its few judges tell little."""
    samples = images().samples
    return [samples[number] for number in samples.parted(count)[1]]


def correlated(model: ir.Model, count: int = 40) -> Calibration:
    """Samples whose columns hang together, as those of a network do."""
    rng = np.random.default_rng(5)
    found: list[Sample] = []
    for sample in graphs.samples(model, count):
        common = {name: rng.standard_normal((*a.shape[:-1], 1)) for name, a in sample.items()}
        found.append(
            {
                n: (0.3 * a + common[n]).astype(np.float32) if a.dtype == np.float32 else a
                for n, a in sample.items()
            }
        )
    return Calibration(Data("test", found))


def run(
    model: ir.Model,
    passes: str,
    data: Calibration,
    target: Target | None = None,
    seed: int = 0,
    said: list[str] | None = None,
    reference: ir.Model | None = None,
) -> list[Step]:
    """Run ``passes`` over ``model`` in place; what is logged goes to ``said``."""
    steps = pipeline.parse(passes, registry.passes())
    log = pipeline.silent if said is None else said.append
    context = Context(seed, data, target or OrtCpu(), reference, log=log)
    return pipeline.run(model, steps, context)


def noise(
    reference: ir.Model, model: ir.Model, samples: Sequence[Sample], target: Target | None = None
) -> float:
    """The power of the error of all outputs of the simulated ``model`` over that of the outputs."""
    judge = simulate.Judge(reference, samples)
    found = judge.sqnr(simulate.simulate(model, target or OrtCpu()))
    return float(np.mean([10 ** (-db / 10) for db in found.values()]))


def matting(frames: int) -> tuple[ir.Model, Calibration]:
    """The shipped matting model, which has states, and the first ``frames`` frames of its clips."""
    model = capture(video.path("matting.onnx"))
    state = {f"r{i}": f"r{i}_out" for i in (1, 2, 3, 4)}
    source = video.path("matting_calibration.npz")
    clips = sources.load(source, ports.inputs_of(model), state=state).samples
    few = [list(clips.sequence(n)[:frames]) for n in range(clips.sequences)]
    return model, Calibration(sources.load(few, ports.inputs_of(model), state=state))


class Killed(BaseException):
    """Ends a run as a signal does."""


def resumes(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, passes: str, behind: int
) -> None:
    """A run that is killed ``behind`` some parts of a pass goes on there, to the same bytes."""
    options: dict[str, Any] = {
        "calib": str(fashion.path(fashion.CALIBRATION)), "resume": True, "passes": passes,
    }  # fmt: skip
    source, said = fashion.path(fashion.CNN), list[str]()
    monkeypatch.setenv("QCOMPILE_CACHE", str(folder / "whole-states"))
    compiler.compile(source, folder / "whole", **options)
    monkeypatch.setenv("QCOMPILE_CACHE", str(folder / "states"))
    checkpoint, done = Context.checkpoint, 0

    def killing(context: Context, key: str, compute: Callable[[], Sample]) -> Sample:
        nonlocal done
        if done == behind:
            raise Killed
        done += 1
        return checkpoint(context, key, compute)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Context, "checkpoint", killing)
        compiler.compile(source, folder / "out", **options)
    compiler.compile(source, folder / "out", **options, log=said.append)
    assert f"resumed inside a pass, of which {behind} parts were done" in said
    one, other = ((folder / name / "model.onnx").read_bytes() for name in ("whole", "out"))
    assert one == other
    assert not list((folder / "states").glob("*.parts"))
