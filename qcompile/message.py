"""The message that an ONNX file is, written weight by weight.

Protobuf holds a message and its bytes at once, which is each weight twice. Its wire format lets the
parts of a message stand behind each other, each with its length in front.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import onnx
import onnx_ir as ir

# Bytes of a weight that is written apart from the rest.
_LARGE = 4096


def write(model: ir.Model, path: pathlib.Path) -> None:
    """Write ``model`` into one file, the message that protobuf would hold twice on the way."""
    large: dict[str, ir.TensorProtocol] = {}
    instead: dict[ir.Value, ir.TensorProtocol] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype == ir.DataType.STRING or tensor.nbytes < _LARGE:
            continue
        large[name], instead[value] = tensor, elsewhere(tensor, name)
    head = of(model, instead)
    weights = list(head.graph.initializer)
    head.graph.ClearField("initializer")
    nodes: bytes = head.graph.SerializeToString()
    head.ClearField("graph")
    parts: list[tuple[bytes, ir.TensorProtocol | None]] = [(nodes, None)]
    for weight in weights:
        tensor = large.get(weight.name)
        if tensor is not None:
            weight.ClearField("external_data")
            weight.ClearField("data_location")
        start: bytes = weight.SerializeToString()
        if tensor is not None:
            start += _tag(onnx.TensorProto.RAW_DATA_FIELD_NUMBER, tensor.nbytes)
        length = len(start) + (0 if tensor is None else tensor.nbytes)
        parts.append((_tag(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, length) + start, tensor))
    whole = sum(len(start) + (0 if tensor is None else tensor.nbytes) for start, tensor in parts)
    with open(path, "wb") as file:
        file.write(head.SerializeToString())
        file.write(_tag(onnx.ModelProto.GRAPH_FIELD_NUMBER, whole))
        for start, tensor in parts:
            file.write(start)
            if tensor is not None:
                file.write(tensor.tobytes())


def of(model: ir.Model, instead: Mapping[ir.Value, ir.TensorProtocol]) -> Any:
    """The message of ``model`` with the tensors ``instead`` of those of some weights.

    They take the place of those for as long as it is written: a clone takes as long.
    """
    kept = {value: value.const_value for value in instead}
    try:
        for value, tensor in instead.items():
            value.const_value = tensor
        return ir.to_proto(model)
    finally:
        for value, tensor in kept.items():
            value.const_value = tensor


def _tag(field: int, length: int) -> bytes:
    """What protobuf writes in front of ``length`` bytes of ``field``."""
    return _varint(field << 3 | 2) + _varint(length)


def _varint(number: int) -> bytes:
    """``number``, not negative, as protobuf writes it."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*found, number))


def elsewhere(tensor: ir.TensorProtocol, name: str) -> ir.ExternalTensor:
    """What stands for ``tensor``, whose numbers are given apart."""
    return ir.ExternalTensor(
        "memory", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
    )
