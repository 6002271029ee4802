"""What a decision on a weight means in numbers: its grid, its codes, the values they stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile import graph, halves, numerics, spec
from qcompile.graph import Layer
from qcompile.numerics import Codes, Floats, Grid
from qcompile.spec import TensorSpec


def grid(model: ir.Model, decided: TensorSpec, dtype: ir.DataType | None = None) -> Grid:
    """The grid of a weight of ``dtype``, in which its scale is stored."""
    initializers = model.graph.initializers
    scale = graph.constant(initializers[decided.scale]).astype(np.float32, copy=False)
    zero = np.broadcast_to(np.int32(0), scale.shape)  # takes no memory
    if decided.zero_point:
        zero = numerics.unpack(_tensor(initializers[decided.zero_point]))
    form = numerics.parse_format(decided.format)
    return in_type(Grid(form, scale, zero, decided.axis, decided.block), dtype)


def in_type(grid: Grid, dtype: ir.DataType | None) -> Grid:
    """``grid`` with its scale as ``dtype`` holds it."""
    half = halves.of(dtype)
    return grid if half is None else dataclasses.replace(grid, scale=half.scale(grid.scale))


def codes(model: ir.Model, weight: ir.Value, decided: TensorSpec) -> Codes:
    """The codes of ``weight``, as fitted or else rounded to the nearest."""
    if decided.codes:
        return numerics.unpack(_tensor(model.graph.initializers[decided.codes]))
    array = graph.constant(weight).astype(np.float32, copy=False)
    return grid(model, decided, weight.dtype).quantize(array)


def rounded(model: ir.Model, weight: ir.Value, decided: TensorSpec) -> Floats:
    """The values that the codes of ``weight`` stand for."""
    return grid(model, decided, weight.dtype).dequantize(codes(model, weight, decided))


def write_codes(model: ir.Model, layers: Sequence[Layer], codes: Codes) -> None:
    """Write fitted ``codes``, in the shape of the weight that ``layers`` share, beside it."""
    value, decided = layers[0].weight.value, layers[0].weight.spec
    assert decided is not None
    form = numerics.parse_format(decided.format)
    packed = numerics.pack(np.ascontiguousarray(codes), form.stored, "")
    added = graph.add_constant(model, f"{value.name}/fitted", packed)
    for layer in layers:
        layer.weight.decide(dataclasses.replace(decided, codes=added.name or ""))


def write_grid(model: ir.Model, layers: Sequence[Layer], grid: Grid) -> None:
    """Write the symmetric ``grid`` of the weight that ``layers`` share, of the same granularity."""
    decided = layers[0].weight.spec
    assert decided is not None
    added = graph.add_constant(model, decided.scale, grid.scale)
    written = dataclasses.replace(
        decided, format=grid.format.name, symmetric=True, scale=added.name or "", zero_point="",
        codes="",
    )  # fmt: skip
    for layer in layers:
        layer.weight.decide(written)


def bias(model: ir.Model, layer: Layer) -> npt.NDArray[Any] | None:
    """The bias of ``layer`` with its decisions, fitted or as in float; None without one."""
    if layer.bias is None or not graph.is_constant(layer.bias.value):
        return None
    name = spec.bias(layer.node)
    return graph.constant(model.graph.initializers[name] if name else layer.bias.value)


def write_bias(model: ir.Model, layer: Layer, array: npt.NDArray[Any]) -> None:
    """Write what the bias of ``layer``, which has one, is to be beside its decisions."""
    assert layer.bias is not None
    name = spec.bias(layer.node)
    if name:
        model.graph.initializers[name].const_value = ir.Tensor(array, name=name)
        return
    added = graph.add_constant(model, f"{layer.bias.value.name}/fitted", array)
    layer.node.metadata_props[spec.BIAS] = added.name or ""


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value
