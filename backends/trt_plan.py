"""Read what an engine consists of: the program text inside its plan, or what its inspector says.

The format of the first is not documented. It is used for what can be said without a GPU: which
types a kernel takes and how many bytes a constant has. A plan without text reads as empty, and the
proof then says "unknown".
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

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


# How the builder names what it fuses around a product.
_MULTIPLIES = re.compile(r"Fc|gemm|mha|conv", re.IGNORECASE)


def by_node(steps: Sequence[Step]) -> tuple[dict[str, Step], dict[str, Step]]:
    """The first step that multiplies, and the first of all, for each ONNX node."""
    products, every = dict[str, Step](), dict[str, Step]()
    for step in steps:
        for node in step.nodes:
            every.setdefault(node, step)
            multiplies = step.operation in ("corrltn", "fully_connected")
            if multiplies or _MULTIPLIES.search(step.name):
                products.setdefault(node, step)
    return products, every


# What the inspector calls types, in the words of the program text.
_TYPES = {
    "Int8": "int8", "Int4": "int4", "INT4": "int4", "INT8": "int8", "FP8": "fp8", "FP4": "fp4",
    "BF16": "bf16", "FP16": "half", "Half": "half", "FP32": "float", "Float": "float",
}  # fmt: skip


def inspected(text: str) -> list[Step]:
    """Every step in what an engine inspector says as JSON, for an engine of detailed verbosity.

    Not run by us.
    """
    layers: list[Any] = json.loads(text).get("Layers", [])
    found: list[Step] = []
    for layer in layers:
        if not isinstance(layer, dict):
            continue  # a name alone: the verbosity was not detailed
        said: Any = layer  # pyright: ignore[reportUnknownVariableType]
        types = [_type(str(each.get("Format/Datatype", ""))) for each in said.get("Inputs", [])]
        if isinstance(said.get("Weights"), dict):
            types.append(_type(str(said["Weights"].get("Type", ""))))
        nodes = tuple(_LAYERS.findall(str(said.get("Metadata", ""))))
        kind = str(said.get("LayerType", ""))
        found.append(Step(kind, f"{kind} {said.get('Name', '')}", tuple(types), nodes))
    return found


def _type(text: str) -> str:
    return next((kind for word, kind in _TYPES.items() if word in text), "?")
