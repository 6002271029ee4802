"""Half floats (float16, bfloat16): what they hold, where an operator takes them, how they round."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from qcompile import graph

TYPES = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}


@dataclasses.dataclass(frozen=True)
class Half:
    """A half float: its type, its largest number, and its smallest one of full precision."""

    dtype: ir.DataType
    largest: float
    normal: float

    def scale(self, scale: graph.Array) -> graph.Array:
        """A positive ``scale`` as this type holds it, as float32.

        The nearest number; the next above below ``normal``, where the nearest may be far smaller
        or zero, and would clip. What it then rounds away, the half float would not have held.
        """
        wide = scale.astype(np.float32)
        nearest = wide.astype(self.dtype.numpy())
        above = np.nextafter(nearest, nearest.dtype.type(np.inf))
        up = (wide < self.normal) & (nearest.astype(np.float32) < wide)
        return np.where(up, above, nearest).astype(np.float32)


def of(dtype: ir.DataType | None) -> Half | None:
    """The half float that ``dtype`` is, or None."""
    if dtype is None or dtype not in TYPES.values():
        return None
    info = _information(dtype)
    return Half(dtype, float(info.max), float(info.smallest_normal))


def _information(dtype: ir.DataType) -> Any:
    library: Any = ml_dtypes  # partly untyped
    return library.finfo(dtype.numpy())


@dataclasses.dataclass(frozen=True)
class Places:
    """The float32 inputs and outputs of a node, by index, that turn where it computes in half."""

    inputs: frozenset[int]
    outputs: frozenset[int]


def places(node: ir.Node, opset: int, dtype: ir.DataType) -> Places | None:
    """Where ``node`` takes ``dtype`` in place of float32; None if ONNX does not let it.

    A Cast has an output of a type of its own, so it is none. An input of a fixed type, such as the
    scales of Resize, does not turn.
    """
    plain = node.domain in ("", "ai.onnx") and not any(True for _ in graph.inside(node))
    if not plain or node.op_type == "Cast":
        return None
    try:
        schema: Any = onnx.defs.get_schema(node.op_type, opset)  # partly untyped
    except onnx.defs.SchemaError:
        return None
    wanted = f"tensor({dtype.name.lower()})"
    takes = {c.type_param_str for c in schema.type_constraints if wanted in c.allowed_type_strs}
    inputs = _turning(node.inputs, schema.inputs)
    outputs = _turning(node.outputs, schema.outputs)
    read = {variable for variable in inputs.values() if variable in takes}
    if not read or any(variable not in read for variable in outputs.values()):
        return None
    return Places(frozenset(i for i, v in inputs.items() if v in takes), frozenset(outputs))


def _turning(values: Any, formal: Any) -> dict[int, str]:
    """The type variable of each float32 value, by index; the last formal one may be variadic."""
    return {
        index: formal[min(index, len(formal) - 1)].type_str
        for index, value in enumerate(values)
        if value is not None and value.dtype == ir.DataType.FLOAT
    }


# Operators whose type stands in an attribute: they are run as they are.
_TYPED = frozenset(
    ("Constant", "ConstantOfShape", "EyeLike", "RandomNormal", "RandomUniform", "RandomNormalLike",
     "RandomUniformLike", "Bernoulli", "Multinomial", "BlackmanWindow", "HannWindow",
     "HammingWindow", "MelWeightMatrix")
)  # fmt: skip


def rounded(model: ir.Model) -> ir.Model:
    """A clone of ``model`` that computes in float32 and rounds what half-float operators write.

    ONNX Runtime on a CPU does neither: it computes in float32 and leaves the rounding out, so that
    nothing overflows that would on a GPU, and it has no bfloat16 kernels. Sums are in float32, as
    on a GPU. A model without half floats is returned as it is, and so is one whose bodies of
    control flow hold some.
    """
    inner = [v for n in model.graph for i in graph.inside(n) for v in (*i.inputs, *i.outputs) if v]
    if not any(of(v.dtype) for v in graph.values(model)) or any(of(v.dtype) for v in inner):
        return model
    model = model.clone()
    graph.forget_names(model)
    for value in list(model.graph.initializers.values()):
        if of(value.dtype) and value not in model.graph.inputs:
            array = graph.constant(value).astype(np.float32)
            value.const_value = ir.Tensor(array, name=value.name)
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for value in model.graph.inputs:
        if of(value.dtype) and value.uses():
            _widen(model, value, list(value.uses()))
    for node in list(model.graph):
        if node.op_type == "Cast" and node.domain in ("", "ai.onnx") and of(node.outputs[0].dtype):
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
        for value in node.outputs:
            half = of(value.dtype)
            if half is not None:
                _round(model, node, value, half.dtype)
    return model


def _round(model: ir.Model, node: ir.Node, value: ir.Value, dtype: ir.DataType) -> None:
    """Let the readers of ``value`` read it rounded, as float32; an output keeps its type."""
    uses = list(value.uses())
    narrow = value
    if node.op_type not in _TYPED and node.domain in ("", "ai.onnx"):
        value.type = ir.TensorType(ir.DataType.FLOAT)
        if value.is_graph_output() or not _moves(node):
            narrow = cast(model, value, dtype, f"{value.name}/narrow")
    if value.is_graph_output() and narrow is not value:
        value.name, narrow.name = graph.unique(model, f"{value.name}/wide"), value.name
        for index, output in enumerate(model.graph.outputs):
            if output is value:
                model.graph.outputs[index] = narrow
    if narrow.dtype == dtype:
        _widen(model, narrow, uses)


def _moves(node: ir.Node) -> bool:
    return node.op_type in ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Relu")


def _widen(model: ir.Model, value: ir.Value, uses: list[Any]) -> None:
    wide = cast(model, value, ir.DataType.FLOAT, f"{value.name}/rounded")
    for node, index in uses:
        foreign = node.domain not in ("", "ai.onnx")
        node.replace_input_with(index, value if foreign else wide)


def cast(model: ir.Model, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
    """``value`` through a Cast right behind what writes it."""
    like = ir.Value(type=ir.TensorType(dtype), shape=value.shape)
    return graph.insert(
        model, "Cast", [value], {"to": int(dtype)}, output=name, behind=value, like=like
    )
