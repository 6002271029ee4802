"""Operators that torch has no entry for, run by ONNX Runtime one at a time, without a gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from torch import Tensor

from qcompile.execute import Session
from qcompile.torch_table import Call, Entry, from_array


def entry(node: ir.Node, opset_imports: Mapping[str, int]) -> Entry:
    """``node``, which has no bodies, as ONNX Runtime computes it on the CPU."""
    sessions: dict[tuple[np.dtype[Any], ...], Session] = {}

    def run(_: Call, *read: Tensor | None) -> tuple[Tensor | None, ...]:
        arrays = {str(i): x.detach().cpu().numpy() for i, x in enumerate(read) if x is not None}
        types = tuple(array.dtype for array in arrays.values())
        if types not in sessions:
            sessions[types] = Session(_alone(node, arrays, opset_imports), optimize=False)
        results = sessions[types].run(arrays)
        return tuple(
            from_array(np.array(results[value.name])) if value.name else None
            for value in node.outputs
        )

    return Entry(run, frozenset(range(len(node.inputs))))


def _alone(
    node: ir.Node, arrays: Mapping[str, npt.NDArray[Any]], opset_imports: Mapping[str, int]
) -> ir.Model:
    """A graph of ``node`` alone, whose inputs are called by their numbers."""
    inputs = {
        name: ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            shape=ir.Shape([None] * array.ndim),
        )
        for name, array in arrays.items()
    }
    outputs = [ir.Value(name=value.name, type=value.type) for value in node.outputs]
    read = [inputs.get(str(index)) for index in range(len(node.inputs))]
    copied = ir.Node(
        node.domain, node.op_type, read, tuple(node.attributes.values()),
        overload=node.overload, outputs=outputs, name=node.name,
    )  # fmt: skip
    graph = ir.Graph(
        list(inputs.values()), [value for value in outputs if value.name], nodes=[copied],
        opset_imports=dict(opset_imports), name="alone",
    )  # fmt: skip
    return ir.Model(graph, ir_version=10)
