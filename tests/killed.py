"""Runs of the command line that are killed, for test_resume.py and benchmarks/kill.py."""

from __future__ import annotations

import os
import pathlib
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence


def command(model: pathlib.Path, calib: pathlib.Path, out: pathlib.Path) -> list[str]:
    """A run with ``--resume``: default pipeline, a method that takes a while, two passes more."""
    passes = "simplify,fold-bn,smooth-hadamard{block=16},calibrate{method=mse},quantize,insert-qdq"
    run = [sys.executable, "-m", "qcompile.cli", str(model), "--calib", str(calib)]
    return [*run, "-o", str(out), "--passes", passes, "--resume"]


def run(command: Sequence[str], cache: pathlib.Path) -> subprocess.CompletedProcess[str]:
    """Run to the end, with states in ``cache``."""
    return subprocess.run(
        command, env={**os.environ, "QCOMPILE_CACHE": str(cache)}, capture_output=True, text=True
    )


def kill_and_resume(
    model: pathlib.Path, calib: pathlib.Path, folder: pathlib.Path, moments: int, seed: int = 0
) -> Iterator[tuple[float, bool, str]]:
    """Kill a run at ``moments`` random moments; for each the second, whether it ends in the same
    bytes when it goes on, and what it said then. Yields after each moment.

    Nothing but the output may stay: no scratch folder beside it.
    """
    whole = folder / "whole"
    started = time.monotonic()
    done = run(command(model, calib, whole), folder / "cache-whole")
    assert done.returncode == 0, done.stderr
    seconds = time.monotonic() - started
    expected = (whole / "model.onnx").read_bytes()
    choice = random.Random(seed)
    for number in range(moments):
        place = folder / f"killed{number}"
        place.mkdir()
        moment = choice.uniform(0.05, 1.0) * seconds
        arguments = command(model, calib, place / "out")
        cache = folder / f"cache{number}"
        with subprocess.Popen(
            arguments, env={**os.environ, "QCOMPILE_CACHE": str(cache)},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as process:  # fmt: skip
            time.sleep(moment)
            process.kill()
        again = run(arguments, cache)
        same = again.returncode == 0
        same = same and (place / "out" / "model.onnx").read_bytes() == expected
        same = same and [p.name for p in place.iterdir()] == ["out"]
        yield moment, same, again.stderr
