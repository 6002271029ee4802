"""Rotate the input of linear layers by a block Hadamard matrix, folded into their weights.

Source: after CLQ (arXiv 2509.24416), orthogonal-based smoothing, with the identity as permutation;
the block size is ours (the paper gives none beyond one figure). QuaRot (arXiv 2404.00456) has the
same algebra with one block.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import scipy.linalg

from qcompile import graph, noise
from qcompile.calibrate import Calibration
from qcompile.errors import PassError
from qcompile.graph import Layer
from qcompile.numerics import Floats
from qcompile.pipeline import Context, Pass, Stats

# What a MAC of a rotation between Convs costs against one of a layer: it leaves the integers, and a
# grouped Conv with few channels is slow. 29 of them took 40 % of the time of EfficientNet-Lite0.
_OF_A_CONV = 10
# Samples on which ranges are compared.
_SAMPLES = 32


@dataclasses.dataclass(frozen=True)
class SmoothHadamard(Pass):
    """``x W = (x G)(G^T W)`` with ``G`` block-diagonal, its blocks orthonormal Hadamard matrices.

    Outliers of ``x`` are spread over each block, so the grid of ``x G`` is finer; the function is
    unchanged up to rounding. Linear layers (``x`` [..., K], ``W`` [K, N] or transposed) and 1x1
    Convs of one group (``x`` [B, K, H, W]) are rotated. All readers of one ``x`` share one
    rotation, which costs ``block`` MACs an element: Reshape and a [block, block] MatMul, or a
    grouped 1x1 Conv.

    With ``place=pays`` a rotation must win more than ``min-gain`` of the noise that an activation
    of 8 bits makes in its readers (``noise`` has the formula; ranges of ``x G`` are measured; the
    noise of the weights is left to what fits them). Of those the ones that win most for their MACs
    are taken, up to ``max-cost``. What each would win and cost is logged.

    Left alone, and counted: layers whose K is not a multiple of ``block``, inputs of unknown rank,
    and rotations that do not pay. A ``block`` that is no power of two raises PassError.

    * ``block``: the size of the Hadamard matrix, a power of two.
    * ``place``: ``pays``, which needs data, or ``everywhere``.
    * ``min-gain``: in dB.
    * ``max-cost``: MACs of all rotations, in percent of those of all layers; those in front of a
      Conv count ten times.
    * ``exclude``: globs over the names and operator types of layers.
    """

    name: ClassVar[str] = "smooth-hadamard"
    produces: ClassVar[frozenset[str]] = frozenset({"rotated"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"ranges", "specs"})
    keeps_float: ClassVar[bool] = True
    reads_data: ClassVar[bool] = True
    source: ClassVar[str] = "CLQ, arXiv 2509.24416"

    block: int = 64
    place: Literal["pays", "everywhere"] = "pays"
    min_gain: float = 0.0
    max_cost: float = 5.0
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.block < 2 or self.block & (self.block - 1):
            raise PassError(f"a Hadamard block must be a power of two from 2, got {self.block}")
        if not self.max_cost > 0:
            raise PassError(f"max-cost is a percentage above 0, got {self.max_cost:g}")

    def needs_data(self) -> bool:
        """Only to find out where a rotation pays."""
        return self.place == "pays"

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        excluded = {layer.node for layer in graph.select(model, self.exclude, "exclude")}
        linear = [layer for layer in graph.layers(model) if _linear(layer)]
        chosen: dict[_Place, list[Layer]] = {}
        for layer in linear:
            if layer.node not in excluded and _fits(layer, self.block):
                chosen.setdefault(_place(layer), []).append(layer)
        if self.place == "pays" and chosen:
            chosen = {place: chosen[place] for place in self._paying(model, chosen, ctx)}
        _rotate(model, chosen, self.block)
        done = sum(map(len, chosen.values()))
        return {"layers": done, "rotations": len(chosen), "left alone": len(linear) - done}

    def _paying(
        self, model: ir.Model, chosen: Mapping[_Place, list[Layer]], ctx: Context
    ) -> list[_Place]:
        """The places where a rotation pays, in their order."""
        data = ctx.data()
        shapes = data.shapes(model)
        whole = sum(layer.macs(shapes) for layer in graph.layers(model))
        before = _ratios(model, chosen, data)
        trial = model.clone()
        again = {(layer.name, layer.node.op_type): layer for layer in graph.layers(trial)}
        turned = {
            place: [again[layer.name, layer.node.op_type] for layer in readers]
            for place, readers in chosen.items()
        }
        _rotate(trial, {_place(readers[0]): readers for readers in turned.values()}, self.block)
        after = _ratios(trial, turned, data)
        worth: dict[_Place, tuple[float, float]] = {}
        for place in chosen:
            gain = 10 * math.log10(max(before[place], 1e-30) / max(after[place], 1e-30))
            size = math.prod(shapes.get(place[0].name or "", (0,)))
            cost = 100 * size * self.block * (_OF_A_CONV if place[1] else 1) / max(whole, 1)
            ctx.log(f"  rotating {place[0].name!r}: {gain:+.1f} dB for {cost:.2f} % of the MACs")
            if gain > self.min_gain:
                worth[place] = before[place] - after[place], cost
        taken: set[_Place] = set()
        spent = 0.0
        for place, (won, cost) in sorted(worth.items(), key=lambda p: -p[1][0] / (p[1][1] + 1e-9)):
            if won > 0 and spent + cost <= self.max_cost:
                taken.add(place)
                spent += cost
        return [place for place in chosen if place in taken]


# What is rotated, and whether its channels are those of a Conv.
_Place = tuple[ir.Value, bool]


def _place(layer: Layer) -> _Place:
    assert layer.input is not None
    return layer.input.value, layer.kind == "conv"


def _fits(layer: Layer, block: int) -> bool:
    width = graph.shape_of(layer.weight.value)
    known = layer.input is not None and graph.rank_of(layer.input.value) is not None
    return known and width is not None and width[layer.reduce_axis] % block == 0


def _ratios(
    model: ir.Model, chosen: Mapping[_Place, list[Layer]], data: Calibration
) -> dict[_Place, float]:
    """Noise to signal of the readers of each place, summed."""
    axes = {
        reader.input.value.name or "": noise.channel_axis(reader)
        for readers in chosen.values()
        for reader in readers
        if reader.input is not None
    }
    seen = data.moments(model, axes, _SAMPLES)
    return {
        place: sum(
            noise.inputs(reader, seen[reader.input.value.name or ""]).ratio("float", "int8")
            for reader in readers
            if reader.input is not None
        )
        for place, readers in chosen.items()
    }


def _rotate(model: ir.Model, chosen: Mapping[_Place, list[Layer]], block: int) -> None:
    """Rotate what the layers of each place read, and their weights."""
    library: Any = scipy.linalg  # untyped
    signs: npt.NDArray[np.int64] = library.hadamard(block)
    hadamard = (signs / np.sqrt(block)).astype(np.float32)
    weights: dict[tuple[ir.Value, int], ir.Value] = {}
    for (value, conv), readers in chosen.items():
        rank = graph.rank_of(value)
        assert rank is not None
        turn = _rotate_channels if conv else _rotate_last
        rotated = turn(model, readers[0], hadamard, rank)
        for layer in readers:
            assert layer.input is not None
            source = (layer.weight.value, layer.reduce_axis)
            if source not in weights:
                folded = _fold(graph.finite_weight(layer), source[1], hadamard)
                name = f"{source[0].name}/rotated"
                weights[source] = graph.add_constant(model, name, folded)
            layer.input.read_from(rotated)
            layer.weight.read_from(weights[source])
    graph.remove_dead(model)


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
