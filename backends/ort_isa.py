"""What ONNX Runtime's kernels take by instruction set, and what its versions read.

By instruction set: the docstring of ``quantize_static`` in ONNX Runtime 1.32. By version: its table
of opsets, where in doubt the lower one, and the releases that brought MatMulNBits (1.17), tensors
of 4 bits (1.19: 1.18 refuses them), the 8-bit kernels of MatMulNBits (1.22), and packed tables in
GatherBlockQuantized (1.23: 1.22 refuses the file).
"""

from __future__ import annotations

import functools
import importlib.metadata
import pathlib
import platform
import re
from typing import Literal

from qcompile.backends.lowering import Kernels
from qcompile.errors import TargetError
from qcompile.numerics import IntFormat

Isa = Literal["auto", "avx512-vnni", "avx-vnni", "avx2", "arm"]
# What is known by rule only, not from a machine.
UNTESTED = ("avx2", "arm")

# The highest opset of each release from the one named on.
_OPSETS = {(1, 17): 20, (1, 18): 21, (1, 21): 22, (1, 23): 23, (1, 24): 24, (1, 26): 25}


@functools.cache
def machine() -> Isa:
    """The instruction set of this machine; ``avx2`` if nothing says that there is more."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "arm"
    try:
        told = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return "avx2"
    flags = set(re.findall(r"\w+", next(iter(re.findall(r"^flags.*", told, re.M)), "")))
    if "avx512_vnni" in flags:
        return "avx512-vnni"
    return "avx-vnni" if "avx_vnni" in flags else "avx2"


def installed() -> str:
    """The version of the runtime that is installed, as ``1.32``."""
    return ".".join(importlib.metadata.version("onnxruntime").split(".")[:2])


def number(version: str) -> tuple[int, int]:
    """``1.17`` as numbers; raise TargetError for what is no version, or older than 1.17."""
    match = re.fullmatch(r"(\d+)\.(\d+)", version)
    if match is None:
        raise TargetError(f"{version!r} is no version of ONNX Runtime, such as 1.17")
    found = int(match[1]), int(match[2])
    if found < min(_OPSETS):
        raise TargetError(f"ONNX Runtime {version} is not supported; 1.17 is the oldest")
    return found


def newest_opset(version: str) -> int:
    """The highest opset that a release reads."""
    return max(opset for first, opset in _OPSETS.items() if first <= number(version))


def kernels(isa: str, version: str) -> Kernels:
    """What the kernels of a release take on an instruction set.

    * VNNI adds four products of uint8 and int8 without loss.
    * AVX2 adds two of them in 16 bits, which overflow, unless the weight has 7 bits.
    * ARM multiplies int8 with int8.
    """
    return Kernels(
        activations=IntFormat(8, signed=isa == "arm"),
        widest=7 if isa == "avx2" else 8,
        alone=(4,) if number(version) < (1, 22) else (4, 8),
        tables=number(version) >= (1, 23),
        nibbles=number(version) >= (1, 19),
        unpacks=True,
        negative=True,
    )
