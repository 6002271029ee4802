"""Minimum and maximum of values, computed inside the graph, so that no activation leaves it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile import sequences
from qcompile.sequences import State

# What is computed of a value, and what stands for it where it is padding.
_PADDING = {"ReduceMin": np.inf, "ReduceMax": -np.inf, "IsNaN": 0.0}


def reduced(
    model: ir.Model, values: Sequence[str], state: State, mask: str | None, lined: Collection[str]
) -> tuple[ir.Model, list[str]]:
    """A clone of ``model`` that computes the extremes of ``values``, and the names of its answers.

    Three scalars a value: minimum, maximum, and whether there is a NaN (1 or 0). Of the values
    ``lined`` the positions where the input ``mask`` is 0 do not count.
    """
    clone = sequences.fetch(model, values, state)
    by_name = {v.name or "": v for v in clone.graph.outputs}
    given = [by_name[name] for name in dict.fromkeys(state.values())]
    counts: ir.Value | None = None
    if mask is not None:
        entered = next(v for v in clone.graph.inputs if v.name == mask)
        counts = _add(clone, "Cast", [entered], ir.DataType.BOOL, to=int(ir.DataType.BOOL))
    answers: list[ir.Value] = []
    for name in values:
        for kind, padding in _PADDING.items():
            read = by_name[name]
            if counts is not None and name in lined:
                read = _kept(clone, read, counts, padding)
            if kind == "IsNaN":
                # The runtime's extremes pass over a NaN that is not alone, so it is looked for.
                bad = _add(clone, "IsNaN", [read], ir.DataType.BOOL)
                read = _add(clone, "Cast", [bad], ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
                kind = "ReduceMax"
            answers.append(_add(clone, kind, [read], read.dtype, keepdims=0))
            answers[-1].shape = ir.Shape(())
    clone.graph.outputs.clear()
    clone.graph.outputs.extend([*given, *answers])
    return clone, [answer.name or "" for answer in answers]


def _kept(model: ir.Model, value: ir.Value, counts: ir.Value, padding: float) -> ir.Value:
    """``value`` where ``counts`` [batch, tokens] is true, else ``padding``."""
    assert value.shape is not None and value.dtype is not None
    dims = np.array([0, 0, *[1] * (len(value.shape) - 2)])  # 0 keeps a dimension
    shape = _constant(model, dims, ir.DataType.INT64)
    spread = _add(model, "Reshape", [counts, shape], ir.DataType.BOOL)
    fill = _constant(model, np.array(padding, value.dtype.numpy()), value.dtype)
    return _add(model, "Where", [spread, value, fill], value.dtype)


def _constant(model: ir.Model, array: Any, dtype: ir.DataType) -> ir.Value:
    return _add(model, "Constant", [], dtype, value=ir.Tensor(array))


def _add(
    model: ir.Model,
    kind: str,
    inputs: Sequence[ir.Value],
    dtype: ir.DataType | None,
    **attributes: Any,
) -> ir.Value:
    """The output of a new node at the end of the graph, with a name that nothing else has."""
    attrs = ir.convenience.convert_attributes(attributes)
    node = ir.Node("", kind, inputs, attributes=attrs)
    model.graph.append(node)
    node.outputs[0].name = f"qcompile/extremes/{model.graph.num_nodes()}"
    node.outputs[0].type = None if dtype is None else ir.TensorType(dtype)
    return node.outputs[0]
