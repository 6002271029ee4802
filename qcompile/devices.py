"""Where fits by gradients compute: on the processor, or on a GPU through CUDA.

torch is imported where it is needed: passes that never leave the processor load this module too.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import warnings
from collections.abc import Callable, Generator
from typing import Any, Literal

Device = Literal["cpu", "cuda"]


def lacks(device: Device) -> str:
    """Why torch cannot compute on ``device`` here, and what to do; "" if it can."""
    if device == "cpu":
        return ""
    torch: Any = importlib.import_module("torch")
    if torch.cuda.is_available():
        return ""
    why = "finds no GPU" if torch.backends.cuda.is_built() else "is built without CUDA"
    return f"torch {torch.__version__} {why}: choose device=cpu"


def room(device: str) -> int:
    """Bytes that samples may take on ``device``: half of what is free, none of the processor's."""
    if device == "cpu":
        return 0
    torch: Any = importlib.import_module("torch")
    free, _ = torch.cuda.mem_get_info()
    return free // 2


@contextlib.contextmanager
def exact(device: Device, log: Callable[[str], None]) -> Generator[None]:
    """Inside it a GPU multiplies float32 as such, and computes the same each time.

    By default convolutions there round to 10 bits (TF32), which is noise of the size of that of
    8 bits, and gradients are summed in the order in which they are ready. What torch has no kernel
    of fixed order for is logged.
    """
    if device == "cpu":
        yield
        return
    torch: Any = importlib.import_module("torch")
    # Read when the library is first used; without it, it may choose another algorithm each time.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    strict = torch.are_deterministic_algorithms_enabled()
    lenient = torch.is_deterministic_algorithms_warn_only_enabled()
    matmul = torch.backends.cuda.matmul
    rounded, matmul.allow_tf32 = matmul.allow_tf32, False
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with (
            torch.backends.cudnn.flags(deterministic=True, benchmark=False, allow_tf32=False),
            warnings.catch_warnings(record=True) as said,
        ):
            warnings.filterwarnings("always", message=_ORDER)
            yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=lenient)
        matmul.allow_tf32 = rounded
    kernels: set[str] = set()
    for warning in said:
        found = re.match(_ORDER, str(warning.message))
        if found:
            kernels.add(found[1])
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    for kernel in sorted(kernels):
        log(f"{kernel} sums in another order each time on a GPU: so does what is fitted")


# What torch says of a kernel without a fixed order.
_ORDER = r"(\S+) does not have a deterministic implementation"
