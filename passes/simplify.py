"""Remove what computes nothing: identities, constant weights behind moves, zero biases, dead nodes.

Our own housekeeping, no paper. It runs first in every recipe, so that later passes see a weight as
one initializer.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qcompile import graph
from qcompile.pipeline import Context, Pass, Stats


@dataclasses.dataclass(frozen=True)
class Simplify(Pass):
    """Keep the function bit for bit, with fewer nodes.

    * Identity nodes go (names of graph inputs and outputs stay).
    * A weight or bias of a layer that stands behind Transpose, Reshape, Cast, ... becomes one
      initializer. Large weights of layers that need nothing are not read.
    * A bias of a Conv that is all zeros goes.
    """

    name: ClassVar[str] = "simplify"
    keeps_float: ClassVar[bool] = True

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        before = model.graph.num_nodes()
        common.IdentityEliminationPass()(model)
        folded = biases = 0
        made: dict[ir.Value, ir.Value] = {}
        for layer in list(graph.layers(model)):
            for use in (layer.weight, layer.bias):
                if use is None or use.value.producer() is None or not graph.is_constant(use.value):
                    continue
                value = use.value
                if value not in made:
                    made[value] = graph.add_constant(
                        model, f"{value.name}/folded", np.ascontiguousarray(graph.constant(value))
                    )
                use.read_from(made[value])
                folded += 1
            bias = layer.bias
            if bias is not None and layer.node.op_type == "Conv" and graph.is_constant(bias.value):
                if not graph.constant(bias.value).any():
                    layer.node.resize_inputs(2)
                    biases += 1
        graph.remove_dead(model)
        return {
            "nodes": before - model.graph.num_nodes(),
            "weights": folded,
            "zero biases": biases,
        }
