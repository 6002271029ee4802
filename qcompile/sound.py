"""Refuse what is no sound model, in the user's words, before any library works on it.

The libraries behind rely on a graph that is whole: what reads a value that nothing writes makes
them raise far from the cause, and an attribute of the wrong type kills ONNX's converter and with it
the process. What computes nonsense but is whole is left to the runtime to refuse.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import onnx
import onnx_ir as ir

from qcompile.errors import CaptureError, reason

_ONNX = ("", "ai.onnx")
_UNTYPED = (None, ir.DataType.UNDEFINED)
# A schema that takes any number of values says a very large one.
_ANY_NUMBER = 1 << 16


def check(model: ir.Model) -> None:
    """Raise CaptureError, naming node or value, unless ``model`` is whole.

    Inputs are tensors of a known type; what is read is written; weights, and the files that they
    lie in, have the bytes that their shapes need; attributes are those of ONNX, and of its types.
    """
    for word in _words(model):
        if isinstance(word, bytes):
            raise _broken(f"the name {word!r} is no text")
    for value in model.graph.inputs:
        if isinstance(value.type, ir.SequenceType | ir.OptionalType):
            raise _broken(f"input {value.name!r} is no tensor ({value.type})")
        if value.dtype in _UNTYPED:
            raise _broken(f"input {value.name!r} has no type")
    for graph in _graphs(model):
        for value in graph.outputs:
            if _from_nowhere(value):
                raise _broken(f"output {value.name!r} is written by nothing")
        for node in graph:
            for value in node.inputs:
                if value is not None and _from_nowhere(value):
                    what = f"reads {value.name!r}, which nothing writes"
                    raise _broken(f"node {name_of(node)!r} ({node.op_type}) {what}")
    for tensor, name in _tensors(model):
        _check_tensor(tensor, name)
    for node in model.graph.all_nodes():
        _check_node(node, model.opset_imports)
    for function in model.functions.values():
        for node in function.all_nodes():
            _check_node(node, function.opset_imports)


def check_places(model: ir.Model) -> None:
    """Raise CaptureError if external weights lie outside the folder of the model's file.

    A file from somebody else must not choose what is read of this machine.
    """
    for tensor, name in _tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            external: Any = tensor  # partly untyped
            place = str(external.location)
            path = pathlib.PurePath(place)
            if path.is_absolute() or ".." in path.parts or "\0" in place:
                raise _broken(f"weight {name!r} lies in {place!r}, outside the folder of the model")


def weights(model: ir.Model) -> Iterator[ir.Value]:
    """The initializers of the main graph, of functions, and of the bodies inside."""
    for graph in _graphs(model):
        yield from graph.initializers.values()


def name_of(node: ir.Node) -> str:
    """What a user knows ``node`` by: its name, or that of the first value that it writes."""
    return node.name or next((v.name for v in node.outputs if v.name), "")


def _broken(what: str) -> CaptureError:
    return CaptureError(f"the model is broken: {what}")


def _graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """The main graph, those of functions, and the bodies inside."""
    waiting = [model.graph, *(function.graph for function in model.functions.values())]
    while waiting:
        graph = waiting.pop()
        yield graph
        waiting += (body for node in graph for body in _bodies(node))


def _words(model: ir.Model) -> Iterator[Any]:
    """The names in ``model``; protobuf leaves those as bytes that are not UTF-8."""
    for graph in _graphs(model):
        yield from (v.name for v in (*graph.inputs, *graph.initializers.values()))
        for node in graph:
            yield from (node.domain, node.op_type, node.name, *node.attributes)
            yield from (v.name for v in node.outputs)


def _bodies(node: ir.Node) -> Iterable[ir.Graph]:
    for attr in node.attributes.values():
        if not attr.is_ref() and attr.type == ir.AttributeType.GRAPH:
            yield attr.value
        elif not attr.is_ref() and attr.type == ir.AttributeType.GRAPHS:
            yield from attr.value


def _from_nowhere(value: ir.Value) -> bool:
    return not (value.producer() or value.is_graph_input() or value.is_initializer())


def _tensors(model: ir.Model) -> Iterator[tuple[ir.TensorProtocol, str]]:
    """The tensors of initializers and attributes, each with a name for it."""
    for value in weights(model):
        if value.const_value is None:
            raise _broken(f"weight {value.name!r} has no numbers")
        yield value.const_value, value.name or ""
    for graph in _graphs(model):
        for node in graph:
            for attr in node.attributes.values():
                if attr.type == ir.AttributeType.TENSOR and not attr.is_ref():
                    yield attr.value, name_of(node)


def _check_tensor(tensor: ir.TensorProtocol, name: str) -> None:
    dims = list(tensor.shape.numpy())
    if any(size < 0 for size in dims):
        raise _broken(f"weight {name!r} has the shape {dims}")
    if tensor.dtype == ir.DataType.UNDEFINED:
        raise _broken(f"weight {name!r} has no type")
    if isinstance(tensor, ir.ExternalTensor):
        _check_file(tensor, name)
    elif isinstance(tensor, ir.TensorProtoTensor) and tensor.dtype != ir.DataType.STRING:
        proto: Any = tensor.raw  # untyped
        if proto.HasField("raw_data"):
            held, needed = len(proto.raw_data), tensor.nbytes
            if held != needed:
                raise _broken(f"weight {name!r} of shape {dims} has {held} bytes, not {needed}")
            return
        try:
            tensor.numpy()
        except Exception as error:  # numpy and onnx-ir raise their own kinds
            raise _broken(f"weight {name!r} cannot be read: {reason(error)}") from error


def _check_file(tensor: ir.ExternalTensor, name: str) -> None:
    path, start = pathlib.Path(tensor.path), tensor.offset or 0
    if not path.is_file():
        raise CaptureError(f"weight {name!r} lies in {str(path)!r}, which is missing")
    size, end = path.stat().st_size, start + tensor.nbytes
    if start < 0 or end > size:
        raise CaptureError(
            f"weight {name!r} lies in bytes {start} to {end} of {str(path)!r}, which has {size}"
        )
    if tensor.length is not None and tensor.length < tensor.nbytes:
        raise _broken(f"weight {name!r} has {tensor.length} bytes, not {tensor.nbytes}")


def _check_node(node: ir.Node, opsets: dict[str, int]) -> None:
    """Compare what ``node`` has with the schema of its operator, if that is known."""
    domain = "" if node.domain in _ONNX else node.domain
    version = opsets.get(domain, opsets.get("ai.onnx") if domain == "" else None)
    if version is None:
        return
    try:
        schema: Any = onnx.defs.get_schema(node.op_type, version, domain)  # partly untyped
    except onnx.defs.SchemaError:
        return  # the runtime may know it
    _check_count(node, "reads", node.inputs, schema.min_input, schema.max_input)
    _check_count(node, "writes", node.outputs, schema.min_output, schema.max_output)
    for value, wanted in zip(node.inputs, schema.inputs, strict=False):
        if value is None and wanted.option == onnx.defs.OpSchema.FormalParameterOption.Single:
            raise _broken(
                f"node {name_of(node)!r} ({node.op_type}) lacks its input {wanted.name!r}"
            )
    for attr in node.attributes.values():
        wanted = schema.attributes.get(attr.name)
        what = f"node {name_of(node)!r} ({node.op_type}) has the attribute {attr.name!r}"
        if wanted is None and not attr.name.startswith("__"):  # those are for anybody
            raise _broken(f"{what}, which ONNX does not know")
        if wanted is not None and wanted.type.value != attr.type.value:
            raise _broken(f"{what} as {attr.type.name}; ONNX wants {wanted.type.name}")


def _check_count(node: ir.Node, what: str, found: Sequence[Any], least: int, most: int) -> None:
    if not least <= len(found) <= most:
        wanted = f"{least}" if least == most else f"{least} to {most}"
        wanted = f"at least {least}" if most > _ANY_NUMBER else wanted
        where = f"node {name_of(node)!r} ({node.op_type})"
        raise _broken(f"{where} {what} {len(found)} values; ONNX wants {wanted}")
