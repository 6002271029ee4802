"""Build a TensorRT engine. Run as a child process, because a builder can crash and take all along.

``python -m qcompile.backends.trt_build`` reads one JSON request from standard input and writes one
JSON answer to standard output.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pathlib
import sys
from typing import Any, TypedDict

from qcompile import selfcheck


class Request(TypedDict):
    """``module``: ``tensorrt_rtx`` or ``tensorrt``; ``cc``: compute capabilities such as 89;
    ``profile``: for each dynamic input its shape as [min, opt, max]."""

    module: str
    model: str
    engine: str
    cc: list[int]
    profile: dict[str, list[list[int]]]


class Answer(TypedDict):
    """``error`` is empty if the engine was written."""

    error: str
    version: str


def build(request: Request) -> Answer:
    """Parse the ONNX file of ``request`` and write the engine."""
    trt: Any = importlib.import_module(request["module"])
    version, model = str(trt.__version__), pathlib.Path(request["model"])
    try:
        plan = selfcheck.plan(trt, model, request["profile"], request["cc"])
    except selfcheck.CheckError as error:
        return Answer(error=str(error), version=version)
    pathlib.Path(request["engine"]).write_bytes(plan)
    return Answer(error="", version=version)


def main() -> None:
    """Answer the request on standard input."""
    # Libraries below print to standard output; the answer must stand there alone.
    answer_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with contextlib.closing(answer_to):
        json.dump(build(json.load(sys.stdin)), answer_to)


if __name__ == "__main__":
    main()
