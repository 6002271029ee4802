"""Build a TensorRT engine. Run as a child process, because a builder can crash and take all along.

``python -m qcompile.backends.trt_build`` reads one JSON request from standard input and writes one
JSON answer to standard output. It imports nothing of qcompile, so that it starts fast.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from typing import Any, TypedDict


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
    version = str(trt.__version__)
    messages: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                messages.append(message.strip())

    builder = trt.Builder(Log())
    flags = trt.NetworkDefinitionCreationFlag
    strong = 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0
    network = builder.create_network(strong)
    parser = trt.OnnxParser(network, builder.logger if hasattr(builder, "logger") else Log())
    if not parser.parse_from_file(request["model"]):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        return Answer(error="; ".join(_describe(e) for e in errors[:3]), version=version)
    config = builder.create_builder_config()
    if hasattr(config, "profiling_verbosity"):
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # names for the inspector
    if request["cc"]:
        config.num_compute_capabilities = len(request["cc"])
        for index, cc in enumerate(request["cc"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{cc}"), index)
    if request["profile"]:
        profile = builder.create_optimization_profile()
        for name, shapes in request["profile"].items():
            profile.set_shape(name, *[tuple(s) for s in shapes])
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return Answer(
            error="; ".join(messages[:3]) or "the builder gave no reason", version=version
        )
    with open(request["engine"], "wb") as file:
        file.write(plan)
    return Answer(error="", version=version)


def _describe(error: Any) -> str:
    # The lines about a missing CUDA device stand behind every error on a machine without one.
    lines = [line for line in str(error.desc()).splitlines() if "catchCudaError" not in line]
    cause = " ".join(lines)
    if cause == "false":  # what a failed check of the parser without a text says
        cause = "not supported"
    node = error.node_name() if hasattr(error, "node_name") else ""
    operator = error.node_operator() if hasattr(error, "node_operator") else ""
    return f"{node} ({operator}): {cause}" if node else cause


def main() -> None:
    """Answer the request on standard input."""
    # Libraries below print to standard output; the answer must stand there alone.
    answer_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with contextlib.closing(answer_to):
        json.dump(build(json.load(sys.stdin)), answer_to)


if __name__ == "__main__":
    main()
