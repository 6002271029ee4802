"""The GPU of this machine, and an engine run on it.

``python -m qcompile.backends.trt_device`` reads one JSON request from standard input and writes one
JSON answer to standard output, as trt_build does. No engine has run here by us: the one GPU that we
had, of compute capability 9.0, is refused by TensorRT-RTX, and that is said.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pathlib
import sys
from typing import Any, TypedDict

import numpy as np

from qcompile import selfcheck


class Request(TypedDict):
    """``feeds`` and ``results``: ``.npz`` files with one array an input, and one an output."""

    module: str
    engine: str
    feeds: list[str]
    results: list[str]


class Answer(TypedDict):
    """``error`` is empty if the engine ran; ``layers`` is what its inspector says, as JSON."""

    error: str
    layers: str


def capability() -> int | None:
    """The compute capability of the first GPU here, such as 89, or None without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    if driver.cuDeviceComputeCapability(ctypes.byref(major), ctypes.byref(minor), 0):
        return None
    return major.value * 10 + minor.value


def run(request: Request) -> Answer:
    """Inspect the engine, and run it for each of the feeds."""
    engine = selfcheck.TensorRt(request["module"], pathlib.Path(request["engine"]).read_bytes())
    layers = engine.layers()
    try:
        for feeds, results in zip(request["feeds"], request["results"], strict=True):
            with np.load(feeds) as arrays:
                left: dict[str, Any] = engine.run(dict(arrays))
            np.savez(results, **left)
    except selfcheck.CheckError as error:
        return Answer(error=str(error), layers=layers)
    return Answer(error="", layers=layers)


def main() -> None:
    """Answer the request on standard input."""
    answer_to = os.fdopen(os.dup(1), "w")  # libraries below print to standard output
    os.dup2(2, 1)
    with contextlib.closing(answer_to):
        try:
            answer = run(json.load(sys.stdin))
        except selfcheck.CheckError as error:
            answer = Answer(error=str(error), layers="")
        except Exception as error:  # whatever a driver or a runtime raises
            answer = Answer(error=f"{type(error).__name__}: {error}", layers="")
        json.dump(answer, answer_to)


if __name__ == "__main__":
    main()
