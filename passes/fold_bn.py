"""Fold BatchNormalization into the convolution or linear layer in front of it.

Common knowledge (Jacob et al., arXiv 1712.05877, section 3.2); the algebra is below.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompile import graph
from qcompile.graph import Layer
from qcompile.pipeline import Context, Pass, Stats


@dataclasses.dataclass(frozen=True)
class FoldBn(Pass):
    """``BN(W x + b)`` becomes ``(g W) x + (g (b - mean) + beta)``, ``g = gamma / sqrt(var + eps)``.

    ``W`` is [O, I, kh, kw] of a Conv ([I, O / groups, kh, kw] of a ConvTranspose) or the weight of
    a Gemm; ``g``, mean, var and beta are [O]. The fold is done in float64. Left alone, and counted:
    a BatchNormalization in training mode, with statistics that are not constant, or behind anything
    but a layer whose only reader it is.
    """

    name: ClassVar[str] = "fold-bn"
    invalidates: ClassVar[frozenset[str]] = frozenset({"ranges", "specs"})
    keeps_float: ClassVar[bool] = True

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        by_output = {layer.output: layer for layer in graph.layers(model)}
        folded = left = 0
        for node in list(model.graph):
            if node.op_type != "BatchNormalization" or node.domain not in ("", "ai.onnx"):
                continue
            entered = node.inputs[0]
            layer = by_output.get(entered) if entered is not None else None
            if layer is None or not _foldable(layer, node):
                left += 1
                continue
            _fold(model, layer, node)
            folded += 1
        graph.remove_dead(model)
        return {"folded": folded, "left alone": left}


def _foldable(layer: Layer, bn: ir.Node) -> bool:
    constants = [layer.weight.value, *(v for v in bn.inputs[1:] if v is not None)]
    if layer.bias is not None:
        constants.append(layer.bias.value)
    grouped = layer.kind == "conv-transpose" and graph.attribute(layer.node, "group", 1) != 1
    return (
        layer.node.op_type in ("Conv", "ConvTranspose", "Gemm")
        and not grouped
        and len(layer.output.uses()) == 1
        and not layer.output.is_graph_output()
        and not graph.attribute(bn, "training_mode", 0)
        and all(graph.is_constant(value) for value in constants)
    )


def _fold(model: ir.Model, layer: Layer, bn: ir.Node) -> None:
    gamma, beta, mean, variance = (
        graph.constant(v).astype(np.float64) for v in bn.inputs[1:5] if v is not None
    )
    weight = graph.constant(layer.weight.value)
    gain = gamma / np.sqrt(variance + graph.attribute(bn, "epsilon", 1e-5))
    shape = [1] * weight.ndim
    shape[layer.channel_axis] = -1
    bias = 0.0 if layer.bias is None else graph.constant(layer.bias.value).astype(np.float64)
    if layer.node.op_type == "Gemm":
        # y = alpha x W + beta_gemm b: the gain goes onto both terms alike.
        scale = graph.attribute(layer.node, "beta", 1.0)
        bias = (gain * (scale * bias - mean) + beta) / (scale or 1.0)
        if scale == 0.0:
            layer.node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)
    else:
        bias = gain * (bias - mean) + beta
    folded = (weight.astype(np.float64) * gain.reshape(shape)).astype(weight.dtype)
    name = layer.weight.value.name
    layer.weight.read_from(graph.add_constant(model, f"{name}/folded", folded))
    added = graph.add_constant(model, f"{layer.name}/bias", bias.astype(weight.dtype))
    if len(layer.node.inputs) < 3:
        layer.node.resize_inputs(3)
    layer.node.replace_input_with(2, added)
    # What the layer writes has changed, so it takes the name of the value that it now computes.
    normalized, name = bn.outputs[0], bn.outputs[0].name
    graph.redirect(model, normalized, layer.output, keep=lambda _: False)
    if not layer.output.is_graph_output():
        normalized.name, layer.output.name = graph.unique(model, f"{name}/gone"), name
    graph.fuse(layer.node, bn)
