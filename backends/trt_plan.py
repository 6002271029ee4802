"""Read the program text inside a serialized TensorRT-RTX engine.

The format is not documented. It is used for what can be said without a GPU: which types a kernel
takes and how many bytes a constant has. A plan without text reads as empty, and the proof then says
"unknown".
"""

from __future__ import annotations

import dataclasses
import re

_TENSOR = re.compile(r"tensor=\{ ([^\n]*?) type=(\w+) ?\}")
_STEP = re.compile(r'^ *([a-z_]+)=\{ name="?([^\s"]+)"?([^\n]*)', re.M)
_LAYERS = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of the program: operation, kernel, the types it reads, the ONNX nodes it does."""

    operation: str
    name: str
    reads: tuple[str, ...]
    nodes: tuple[str, ...]


def program(plan: bytes) -> str:
    """The readable program of ``plan``, or ``""`` if there is none."""
    start = plan.find(b"header {")
    if start < 0:
        return ""
    main = plan.find(b"main {", start)
    if main < 0:
        return ""
    end = plan.find(bytes(4), main)
    return plan[start : end if end > 0 else None].decode("latin1")


def steps(text: str) -> list[Step]:
    """Every step of a program that reads something."""
    types: dict[str, str] = {}
    for attributes, kind in _TENSOR.findall(text):
        named = re.search(r'name="([^"]*)"', attributes)
        if named:
            types[named[1]] = kind
    found: list[Step] = []
    for operation, name, rest in _STEP.findall(text):
        inputs = re.search(r"input(?:_args)?=\{([^}]*)\}", rest)
        if inputs is None or operation in ("region", "tensor"):
            continue
        reads = tuple(types.get(n, "?") for n in re.findall(r'"([^"]+)"', inputs[1]))
        layers = re.search(r'layers="([^"]*)"', rest)
        nodes = tuple(_LAYERS.findall(layers[1])) if layers else ()
        found.append(Step(operation, name, reads, nodes))
    return found
