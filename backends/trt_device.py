"""The GPU of this machine, and an engine run on it.

``python -m qcompile.backends.trt_device`` reads one JSON request from standard input and writes one
JSON answer to standard output, as trt_build does. Not run by us: it needs a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import pathlib
import sys
from typing import Any, TypedDict


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
    trt: Any = importlib.import_module(request["module"])
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(pathlib.Path(request["engine"]).read_bytes())
    if engine is None:
        return Answer(error="the engine cannot be loaded on this GPU", layers="")
    layers = ""
    if hasattr(engine, "create_engine_inspector"):
        inspector = engine.create_engine_inspector()
        layers = str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    torch: Any = importlib.import_module("torch")  # holds the memory of the GPU
    numpy: Any = importlib.import_module("numpy")
    context = engine.create_execution_context()
    stream = torch.cuda.Stream()
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
    for feeds, results in zip(request["feeds"], request["results"], strict=True):
        arrays, held = numpy.load(feeds), dict[str, Any]()
        for name in inputs:
            held[name] = torch.from_numpy(numpy.ascontiguousarray(arrays[name])).cuda()
            context.set_input_shape(name, tuple(held[name].shape))
        for name in set(names) - set(inputs):
            kind = numpy.dtype(trt.nptype(engine.get_tensor_dtype(name)))
            empty = numpy.empty(tuple(context.get_tensor_shape(name)), kind)
            held[name] = torch.from_numpy(empty).cuda()
        for name, tensor in held.items():
            context.set_tensor_address(name, tensor.data_ptr())
        torch.cuda.synchronize()
        if not context.execute_async_v3(stream.cuda_stream):
            return Answer(error="the engine did not run", layers=layers)
        stream.synchronize()
        numpy.savez(results, **{n: held[n].cpu().numpy() for n in names if n not in inputs})
    return Answer(error="", layers=layers)


def main() -> None:
    """Answer the request on standard input."""
    answer_to = os.fdopen(os.dup(1), "w")  # libraries below print to standard output
    os.dup2(2, 1)
    with contextlib.closing(answer_to):
        try:
            answer = run(json.load(sys.stdin))
        except Exception as error:  # whatever a driver, a runtime or torch raises
            answer = Answer(error=f"{type(error).__name__}: {error}", layers="")
        json.dump(answer, answer_to)


if __name__ == "__main__":
    main()
