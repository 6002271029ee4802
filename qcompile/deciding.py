"""What writes a decision on a weight or an activation: the specs and scales of a layer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from qcompile import graph, noise, numerics
from qcompile.errors import PassError
from qcompile.graph import Layer
from qcompile.numerics import Floats, Grid, IntFormat, RangeMethod
from qcompile.pipeline import Context
from qcompile.spec import TensorSpec

# The kinds of layers with one constant weight that is multiplied with an activation.
WEIGHTED = ("conv", "depthwise", "conv-transpose", "linear")
Granularity = Literal["tensor", "channel", "block"]


@dataclasses.dataclass(frozen=True)
class Weights:
    """How weights are decided: their ``format``, and what a scale is for and how it is searched.

    ``granularity``, ``block`` and ``method`` are as those of the pass quantize.
    """

    format: str
    granularity: Granularity = "channel"
    block: int = 32
    method: RangeMethod = "minmax"


def decide_input(use: graph.Use, form: str, dynamic: bool = False, symmetric: bool = False) -> None:
    """Write the spec of an activation.

    Raises PassError if it has no range for a static scale, and for a dynamic one below 8 bits.
    """
    if dynamic:
        if numerics.parse_format(form).bits < 8:
            raise PassError(f"scale=dynamic has 8 bits, not {form}: no kernel rounds to fewer")
        use.decide(TensorSpec(form, symmetric=False, scale_from="tensor"))
        return
    name = graph.range_name(use.value)
    if name is None:
        kind = "" if use.node.op_type != "Conv" else ": a Conv takes no scale at run time"
        raise PassError(f"{use.value.name!r} has no range; calibrate first{kind}")
    use.decide(TensorSpec(form, symmetric=symmetric, range=name))


def decide_weights(model: ir.Model, layers: list[Layer], how: Weights, ctx: Context) -> None:
    """Write specs and scales of the weights of ``layers``, ranges searched as ``how`` says."""
    write_weights(model, layers, how, (grid for [grid] in grids_of(model, layers, [how], ctx)))


def grids_of(
    model: ir.Model, layers: Sequence[Layer], ways: Sequence[Weights], ctx: Context
) -> Iterable[list[Grid]]:
    """For each of ``layers`` in turn the grids of its weight, one for each of ``ways``.

    These differ in their formats alone.
    """
    if not layers:
        return []
    how = ways[0]
    blocks = _with_blocks(layers, how)
    seen = powers(model, layers, ctx) if how.method == "output" else {}
    # One weight at a time, for a model larger than memory.
    jobs = (
        _Job(
            graph.finite_weight(layer).astype(np.float32, copy=False), *_axes(layer, how, blocks),
            seen.get(layer.name),
        )
        for layer in layers
    )  # fmt: skip
    forms = [numerics.parse_format(how.format) for how in ways]
    search = functools.partial(_grids, forms=forms, method=how.method)
    quick = how.method == "minmax"
    return map(search, jobs) if quick else ctx.map(search, jobs, "weights", len(layers))


def write_weights(
    model: ir.Model, layers: Sequence[Layer], how: Weights, grids: Iterable[Grid]
) -> None:
    """Write specs and scales of the weights of ``layers``, which have ``grids``."""
    made: dict[tuple[ir.Value, int | None, int | None], TensorSpec] = {}
    for layer, grid in zip(layers, grids, strict=True):
        key = (layer.weight.value, grid.axis, grid.block)
        if key not in made:
            scale = graph.add_constant(model, f"{layer.weight.value.name}/scale", grid.scale)
            made[key] = TensorSpec(how.format, grid.axis, grid.block, scale=scale.name or "")
        layer.weight.decide(made[key])


_BLOCKED = ("linear", "embedding")


def _with_blocks(layers: Sequence[Layer], how: Weights) -> set[ir.Node]:
    """Those whose weight has a scale a block; PassError if it is asked for and divides none."""
    asked = [layer for layer in layers if layer.kind in _BLOCKED and how.granularity == "block"]
    sizes = {
        layer.node: shape[layer.reduce_axis]
        for layer in asked
        if (shape := graph.shape_of(layer.weight.value)) is not None
    }
    found = {node for node, size in sizes.items() if size % how.block == 0}
    if asked and not found:
        layer = asked[0]
        raise PassError(
            f"block {how.block} divides the summed axis of no layer; that of {layer.name!r} has "
            f"{sizes.get(layer.node)}"
        )
    return found


def _axes(layer: Layer, how: Weights, blocks: set[ir.Node]) -> tuple[int | None, int | None]:
    """Axis and block of the scales of a weight."""
    if how.granularity == "tensor":
        return None, None
    if layer.node in blocks:
        return layer.reduce_axis, how.block
    return layer.channel_axis, None


@dataclasses.dataclass(frozen=True)
class _Job:
    """A weight, axis and block of its scales, and the importance of its elements."""

    array: Floats
    axis: int | None
    block: int | None
    importance: Floats | None


def _grids(job: _Job, forms: Sequence[IntFormat], method: RangeMethod) -> list[Grid]:
    method = "mse" if method == "output" and job.importance is None else method
    return [
        numerics.weight_grid(
            job.array, form, job.axis, job.block, method=method, importance=job.importance
        )
        for form in forms
    ]


# Samples that say what weights are multiplied with.
_SAMPLES = 64


def powers(model: ir.Model, layers: Sequence[Layer], ctx: Context) -> dict[str, Floats]:
    """The mean square of what each weight is multiplied with, by layer, to broadcast to it."""
    read = {
        layer.name: (layer, layer.input.value.name or "", graph.shape_of(layer.weight.value))
        for layer in layers
        if layer.input is not None and layer.kind in ("conv", "depthwise", "linear")
    }
    axes = {value: noise.channel_axis(layer) for layer, value, _ in read.values()}
    moments = ctx.data().moments(model, axes, _SAMPLES)
    return {
        name: noise.along_input(layer, moments[value].power.astype(np.float32), shape)
        for name, (layer, value, shape) in read.items()
        if shape is not None
    }
