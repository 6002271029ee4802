"""What computes a value, as a hash: what is known of one value holds for all with the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from qcompile import graph
from qcompile.sequences import State


def keys(model: ir.Model, state: State | None = None) -> dict[str, str]:
    """A hash for each value of the main graph of all that computes it.

    Operators, attributes, tensor bytes and names of inputs count; names of inner values and specs
    do not. Two values with one key hold the same numbers for the same data. What reads ``state``
    depends on all that computes the state of the frame before.
    """
    inputs = {v.name or "": f"input {v.name}" for v in model.graph.inputs}
    found = _keys(model, inputs)
    if state:
        given = hashlib.sha256("\n".join(found[name] for name in state.values()).encode())
        inputs |= {name: f"state {name} {given.hexdigest()}" for name in state}
        found = _keys(model, inputs)
    return found


def _keys(model: ir.Model, inputs: Mapping[str, str]) -> dict[str, str]:
    found = dict(inputs)
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            found[name] = graph.tensor_digest(value.const_value)
    for node in model.graph:
        text = [node.domain, node.op_type]
        read = (value.name or "" if value is not None else "" for value in node.inputs)
        text += [found.get(name, name) for name in read]
        text += [f"{n}={_attribute(node.attributes[n])}" for n in sorted(node.attributes)]
        digest = hashlib.sha256("\n".join(text).encode()).hexdigest()
        for position, value in enumerate(node.outputs):
            found[value.name or ""] = f"{digest}.{position}"
    return found


def _attribute(attr: ir.Attr) -> str:
    if attr.type == ir.AttributeType.TENSOR:
        return graph.tensor_digest(attr.value)
    if attr.type == ir.AttributeType.GRAPH:
        library: Any = ir  # partly untyped
        proto = library.to_proto(attr.value)
        return str(proto.SerializeToString(deterministic=True).hex())
    return str(attr.value)
