"""A reproducer of a crash, and its replay.

What escapes a pass and is no QCompileError is a bug. The model before the failing pass, the text of
the passes that were left, the target, the seed, a few samples and the traceback are written into a
folder, and ``qcompile replay FOLDER`` runs it again.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import tempfile
import traceback
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile import execute, folders, pipeline, registry
from qcompile.calibrate import Calibration
from qcompile.errors import Bug, PassBug, QCompileError
from qcompile.options import parse_target
from qcompile.pipeline import Context
from qcompile.sequences import Samples, State
from qcompile.sources import Data

# Samples in a reproducer: enough to fail again, few enough to send.
SAMPLES, BYTES = 8, 64 << 20


@dataclasses.dataclass(frozen=True)
class Part:
    """The part of a run that was on its way: its model, the passes still to come, its target."""

    model: ir.Model | None
    passes: str
    target: str
    calibration: Calibration | None = None


def write(error: Exception, out: pathlib.Path, part: Part, seed: int) -> Bug:
    """Write the reproducer of ``error`` beside ``out`` and return what to raise."""
    what = str(error) if isinstance(error, PassBug) else f"{type(error).__name__}: {error}"
    place = _place(out)
    try:
        with folders.appearing(place) as folder:
            (folder / "traceback.txt").write_text("".join(traceback.format_exception(error)))
            wanted = {"passes": part.passes, "target": part.target, "seed": seed, "error": what}
            if part.calibration is not None:
                wanted |= {"state": dict(part.calibration.state), "mask": part.calibration.mask}
            (folder / "run.json").write_text(json.dumps(wanted, indent=1) + "\n")
            if part.model is not None:
                execute.save(part.model, folder / "model.onnx")
            if part.calibration is not None:
                np.savez_compressed(folder / "data.npz", **_few(part.calibration))
    except Exception as another:  # what is broken enough to crash may not be writable either
        return Bug(f"{what} (no reproducer could be written: {another})", None)
    return Bug(what, place)


def _place(out: pathlib.Path) -> pathlib.Path:
    """The folder for a reproducer; one that is there already is replaced if it is ours."""
    place, count = out.parent / f"{out.name}-crash", 0
    while place.exists() and not (place / "traceback.txt").is_file():
        count += 1
        place = out.parent / f"{out.name}-crash.{count}"
    return place


def _few(calibration: Calibration) -> dict[str, Any]:
    """The first samples, each array under ``<number>/<input>``."""
    kept: dict[str, Any] = {}
    total = 0
    for number, sample in enumerate(calibration.samples[:SAMPLES]):
        total += sum(array.nbytes for array in sample.values())
        if number and total > BYTES:
            break
        kept |= {f"{number}/{name}": array for name, array in sample.items()}
    return kept


def replay(folder: pathlib.Path) -> list[str]:
    """Run the reproducer in ``folder`` and return what each pass did.

    Raises QCompileError if the folder is no reproducer, and whatever the run raises.
    """
    try:
        wanted: dict[str, Any] = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError) as error:
        raise QCompileError(
            f"{str(folder)!r} is no reproducer: it has no readable run.json"
        ) from error
    if not (folder / "model.onnx").exists():
        raise QCompileError(f"{str(folder)!r} holds no model: the crash came before one was read")
    model = execute.load(folder / "model.onnx")
    target = parse_target(wanted["target"])
    calibration = _calibration(folder / "data.npz", wanted.get("state") or {}, wanted.get("mask"))
    context = Context(
        seed=wanted["seed"], calibration=calibration, target=target, reference=model.clone()
    )
    passes = pipeline.parse(wanted["passes"], registry.passes()) if wanted["passes"] else []
    steps = pipeline.run(model, passes, context)
    if any("lowered" in p.produces for p in passes) or not passes:
        with tempfile.TemporaryDirectory(prefix="qcompile-") as scratch:
            target.emit(model, pathlib.Path(scratch), calibration)
            target.prove(model, pathlib.Path(scratch))
    return [f"{step.text}: {step.counters}" for step in steps]


def _calibration(path: pathlib.Path, state: State, mask: str | None) -> Calibration | None:
    if not path.exists():
        return None
    samples: dict[str, dict[str, Any]] = {}
    with np.load(path, allow_pickle=False) as archive:
        for key in archive.files:
            number, _, name = key.partition("/")
            samples.setdefault(number, {})[name] = archive[key]
    frames = list(samples.values())
    # With state they are the start of one sequence, which may not be cut.
    kept = Samples(frames, [0], state) if state else frames
    return Calibration(Data("reproducer", kept), mask=mask)
