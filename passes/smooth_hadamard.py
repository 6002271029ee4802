"""Rotate the input of linear layers by a block Hadamard matrix, folded into their weights.

Source: after CLQ (arXiv 2509.24416), orthogonal-based smoothing, with the identity as permutation;
the block size is ours (the paper gives none beyond one figure). QuaRot (arXiv 2404.00456) has the
same algebra with one block.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import scipy.linalg

from qcompile import graph
from qcompile.errors import PassError
from qcompile.graph import Layer
from qcompile.numerics import Floats
from qcompile.pipeline import Context, Pass, Stats


@dataclasses.dataclass(frozen=True)
class SmoothHadamard(Pass):
    """``x W = (x G)(G^T W)`` with ``G`` block-diagonal, its blocks orthonormal Hadamard matrices.

    Outliers of ``x`` are spread over each block, so the grid of ``x G`` is finer; the function is
    unchanged up to rounding. Linear layers (``x`` [..., K], ``W`` [K, N] or transposed) and 1x1
    Convs of one group (``x`` [B, K, H, W]) are rotated. All readers of one ``x`` share one
    rotation, which costs ``block`` MACs an element: Reshape and a [block, block] MatMul, or a
    grouped 1x1 Conv.

    Left alone, and counted: layers whose K is not a multiple of ``block``, and inputs of unknown
    rank. A ``block`` that is no power of two raises PassError.

    * ``block``: the size of the Hadamard matrix, a power of two.
    * ``exclude``: globs over the names and operator types of layers.
    """

    name: ClassVar[str] = "smooth-hadamard"
    produces: ClassVar[frozenset[str]] = frozenset({"rotated"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"ranges", "specs"})
    keeps_float: ClassVar[bool] = True
    source: ClassVar[str] = "CLQ, arXiv 2509.24416"

    block: int = 64
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.block < 2 or self.block & (self.block - 1):
            raise PassError(f"a Hadamard block must be a power of two from 2, got {self.block}")

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        excluded = {layer.node for layer in graph.select(model, self.exclude, "exclude")}
        library: Any = scipy.linalg  # untyped
        signs: npt.NDArray[np.int64] = library.hadamard(self.block)
        hadamard = (signs / np.sqrt(self.block)).astype(np.float32)
        rotated: dict[tuple[ir.Value, str], ir.Value] = {}
        weights: dict[tuple[ir.Value, int], ir.Value] = {}
        skipped = done = 0
        for layer in list(graph.layers(model)):
            if not _linear(layer):
                continue
            assert layer.input is not None
            width = graph.shape_of(layer.weight.value)
            rank = graph.rank_of(layer.input.value)
            fits = width is not None and width[layer.reduce_axis] % self.block == 0
            if not fits or rank is None or layer.node in excluded:
                skipped += 1
                continue
            key = (layer.input.value, layer.node.op_type == "Conv")
            place = (key[0], "conv" if key[1] else "linear")
            if place not in rotated:
                rotate = _rotate_channels if key[1] else _rotate_last
                rotated[place] = rotate(model, layer, hadamard, rank)
            source = (layer.weight.value, layer.reduce_axis)
            if source not in weights:
                folded = _fold(graph.finite_weight(layer), source[1], hadamard)
                name = f"{source[0].name}/rotated"
                weights[source] = graph.add_constant(model, name, folded)
            layer.input.read_from(rotated[place])
            layer.weight.read_from(weights[source])
            done += 1
        graph.remove_dead(model)
        return {"layers": done, "rotations": len(rotated), "left alone": skipped}


def _linear(layer: Layer) -> bool:
    """A layer that sums over one axis only: linear, or a 1x1 Conv of one group."""
    if layer.kind == "conv":
        weight = graph.shape_of(layer.weight.value)
        one = weight is not None and all(d == 1 for d in weight[2:])
        return one and graph.attribute(layer.node, "group", 1) == 1
    return layer.kind == "linear" and not graph.attribute(layer.node, "transA", 0)


def _fold(weight: graph.Array, axis: int, hadamard: Floats) -> graph.Array:
    """``G^T W`` for ``W`` with its summed axis at ``axis``."""
    block = len(hadamard)
    moved = np.moveaxis(weight, axis, 0)
    blocks = moved.reshape(-1, block, moved[0].size)
    turned = np.einsum("ij,bik->bjk", hadamard, blocks, optimize=True).reshape(moved.shape)
    return np.ascontiguousarray(np.moveaxis(turned, 0, axis)).astype(weight.dtype)


def _rotate_last(model: ir.Model, layer: Layer, hadamard: Floats, rank: int) -> ir.Value:
    assert layer.input is not None
    x, block = layer.input.value, len(hadamard)
    width = graph.shape_of(layer.weight.value)
    assert width is not None
    count = width[layer.reduce_axis] // block
    lead = list(x.shape or ())[:-1]
    split = graph.add_constant(
        model, f"{x.name}/split", np.array([0] * (rank - 1) + [count, block])
    )
    whole = graph.add_constant(
        model, f"{x.name}/whole", np.array([0] * (rank - 1) + [count * block])
    )
    matrix = graph.add_constant(model, f"{x.name}/hadamard", hadamard.astype(_dtype(x)))
    like = ir.Value(type=x.type, shape=ir.Shape([*lead, count, block]))
    blocks = graph.insert(
        model, "Reshape", [x, split], output=f"{x.name}/blocks", behind=x, like=like
    )
    turned = graph.insert(
        model, "MatMul", [blocks, matrix],
        output=f"{x.name}/turned", behind=blocks, like=like, role="rotation",
    )  # fmt: skip
    return graph.insert(
        model, "Reshape", [turned, whole], output=f"{x.name}/rotated", behind=turned, like=x
    )


def _rotate_channels(model: ir.Model, layer: Layer, hadamard: Floats, rank: int) -> ir.Value:
    assert layer.input is not None
    x, block = layer.input.value, len(hadamard)
    width = graph.shape_of(layer.weight.value)
    assert width is not None
    groups = width[1] // block
    kernel = np.tile(hadamard.T, (groups, 1)).reshape(-1, block, *(1,) * (rank - 2))
    matrix = graph.add_constant(model, f"{x.name}/hadamard", kernel.astype(_dtype(x)))
    return graph.insert(
        model, "Conv", [x, matrix], {"group": groups},
        output=f"{x.name}/rotated", behind=x, like=x, role="rotation",
    )  # fmt: skip


def _dtype(value: ir.Value) -> np.dtype[np.float32]:
    assert value.dtype is not None
    return np.dtype(value.dtype.numpy())
