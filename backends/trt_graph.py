"""What an engine can hold of a graph: branches that its shapes decide, and no tail without kernels.

Measured with TensorRT-RTX 1.7.1.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common

from qcompile import execute, graph
from qcompile.errors import TargetError

# Of TensorRT-RTX: the builder finds no runner for the first; the parser does not know the second.
NO_KERNEL = frozenset(("NonMaxSuppression", "NonZero"))


def settled(model: ir.Model, shapes: dict[str, list[list[int]]]) -> ir.Model:
    """``model`` with every branch taken that the shapes of its engine decide.

    A model without bodies is returned as it is. The builder knows few operators inside a body, and
    refuses branches of different shapes. Where ``shapes`` has one size for a dimension, as an
    engine of that profile has, the size is written into the input, and what follows is folded.
    """
    if not any(
        attr.type == ir.AttributeType.GRAPH for n in model.graph for attr in n.attributes.values()
    ):
        return model
    model = model.clone()
    for value in model.graph.inputs:
        if value.name in shapes and value.shape is not None:
            least, _, most = shapes[value.name]
            sizes = zip(value.shape, least, most, strict=True)
            value.shape = ir.Shape([low if low == high else dim for dim, low, high in sizes])
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    common.ShapeInferencePass()(model)
    library: Any = importlib.import_module("onnxscript.optimizer")  # 22 MB, so not sooner
    library.fold_constants(model, onnx_shape_inference=True, should_fold=_may_fold)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    model.graph.sort()  # a branch that was taken stands where it was folded
    graph.remove_dead(model)
    return model


def _may_fold(node: ir.Node) -> bool | None:
    """Not the Q/DQ of weights and biases; a ConstantOfShape; for the rest as the optimizer thinks.

    Two constants of the same bytes and different types, which the parser makes of ConstantOfShape,
    are an error of the builder.
    """
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return False
    return True if node.op_type == "ConstantOfShape" else None


def without_kernel(model: ir.Model, missing: frozenset[str] = NO_KERNEL) -> list[ir.Node]:
    """The nodes of the main graph that the runtime has no kernel for."""
    return [n for n in model.graph if n.op_type in missing and n.domain in ("", "ai.onnx")]


def behind(model: ir.Model, missing: frozenset[str] = NO_KERNEL) -> set[ir.Node]:
    """The nodes without a kernel, and all that depends on what they write."""
    found = set(without_kernel(model, missing))
    if found:
        for node in model.graph:
            if any(value.producer() in found for value in _reads(node)):
                found.add(node)
    return found


def split(model: ir.Model, missing: frozenset[str] = NO_KERNEL) -> tuple[ir.Model, ir.Model | None]:
    """``model`` up to the first operator without a kernel, and what stands behind; or None.

    The tail has the inputs of ``model`` that it reads, and what it reads of the head, by the names
    of the values. Raises TargetError if no layer stands in front.
    """
    later = behind(model, missing)
    if not later:
        return model, None
    crossing = {
        value.name or "": None
        for node in model.graph
        if node in later
        for value in _reads(node)
        if value.producer() is not None
        and value.producer() not in later
        and value.producer().graph is model.graph  # pyright: ignore[reportOptionalMemberAccess]
    }
    if not any(layer.node not in later for layer in graph.layers(model)) and not crossing:
        first = without_kernel(model, missing)[0]
        raise TargetError(f"TensorRT-RTX has no kernel for {first.name!r} ({first.op_type})")
    written = [v.name or "" for v in model.graph.outputs if v.producer() not in later]
    head = execute.fetch(model, list(dict.fromkeys([*written, *crossing])))
    graph.remove_dead(head)
    wanted = [v.name or "" for v in model.graph.outputs if v.producer() in later]
    tail = execute.fetch(model, wanted)
    for node in list(tail.graph):
        for value in node.outputs:
            if value.name in crossing:
                _cut(tail, value)
    graph.remove_dead(tail)
    for value in [v for v in tail.graph.inputs if not v.uses()]:
        tail.graph.inputs.remove(value)
    return head, tail


def _cut(model: ir.Model, value: ir.Value) -> None:
    """Make an input of ``value``."""
    entered = ir.Value(name=value.name, type=value.type, shape=value.shape)
    value.name = f"{value.name}/head"
    for node, index in list(value.uses()):
        node.replace_input_with(index, entered)
    model.graph.inputs.append(entered)


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """What ``node`` reads, its bodies included."""
    yield from (value for value in node.inputs if value is not None)
    for inner in graph.inside(node):
        yield from (value for value in inner.inputs if value is not None)
