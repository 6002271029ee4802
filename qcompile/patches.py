"""The input of a layer as the rows of the matrix that its weight is multiplied with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile import graph
from qcompile.graph import Layer

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

# Numbers in one block of patches: 64 MiB in float64.
_BLOCK = 1 << 23
# Rows, or numbers in all groups, that are multiplied at once: a product of fewer rows takes no less
# than reading the matrix.
_WORTH_ROWS, _WORTH_NUMBERS = 1024, 1 << 21


@dataclasses.dataclass(frozen=True)
class Rows:
    """How the array that a layer reads becomes ``X`` [rows, columns].

    * ``kernel`` is () for a linear layer, whose rows are the last axis (the first if
      ``transposed``). A row of a Conv is a patch: its channels, each with its window, as in the
      weight [N, channels, *kernel].
    * ``groups`` of a Conv each have rows of their own, [groups, rows, columns].
    * ``same`` is "SAME_UPPER" or "SAME_LOWER" if ``pads`` depend on the size, else "".
    """

    columns: int
    transposed: bool = False
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    same: str = ""
    groups: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of ``X.T @ X``."""
        square = (self.columns, self.columns)
        return square if self.groups == 1 else (self.groups, *square)

    def blocks(self, array: Array, most: int | None = None, draw: int = 0) -> Iterator[Array]:
        """``X`` in blocks of rows; at most ``most`` rows if given, those of that number of draw."""
        if not self.kernel:
            rows = (array.T if self.transposed else array).reshape(-1, self.columns)
            yield rows if most is None else rows[_drawn(len(rows), most, draw)]
            return
        if most is not None:
            yield self._some(array, max(1, most // len(array)), draw)
            return
        windows = self._windows(array)
        rank = len(self.kernel)
        each = math.prod(windows.shape) // max(windows.shape[2], 1)
        step = max(1, _BLOCK // max(each, 1))
        for first in range(0, windows.shape[2], step):
            # [N, C, *out, *kernel] to [N, *out, C, *kernel]
            part = np.moveaxis(windows[:, :, first : first + step], 1, 1 + rank)
            rows = part.reshape(-1, self.groups, self.columns)
            yield rows[:, 0] if self.groups == 1 else rows.swapaxes(0, 1)

    def _some(self, array: Array, most: int, draw: int) -> Array:
        """The rows of at most ``most`` places of each of ``array``."""
        padded, spans = self._padded(array)
        sizes = padded.shape[2:]
        out = [(n - s) // by + 1 for n, s, by in zip(sizes, spans, self.strides, strict=True)]
        places = np.unravel_index(_drawn(math.prod(out), most, draw), out)
        corners = [place * by for place, by in zip(places, self.strides, strict=True)]
        inner = np.indices(self.kernel).reshape(len(self.kernel), -1)
        inner *= np.array(self.dilations)[:, None]
        index = np.ravel_multi_index(corners, sizes)[:, None]
        index = index + np.ravel_multi_index(list(inner), sizes)
        taken = padded.reshape(*padded.shape[:2], -1).take(index, axis=2)
        # [N, groups, channels, places, window] to [groups, N, places, channels, window]
        taken = taken.reshape(len(array), self.groups, -1, *index.shape).transpose(1, 0, 3, 2, 4)
        rows = taken.reshape(self.groups, -1, self.columns)
        return rows[0] if self.groups == 1 else rows

    def _windows(self, array: Array) -> Array:
        """A view [N, C, *out, *kernel] of the padded array."""
        padded, spans = self._padded(array)
        axes = tuple(range(2, 2 + len(spans)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=axes)
        steps = [slice(None, None, s) for s in (*self.strides, *self.dilations)]
        return windows[(slice(None), slice(None), *steps)]

    def _padded(self, array: Array) -> tuple[Array, list[int]]:
        """``array`` with its padding, and what the window spans on each axis."""
        spans = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]
        sides = [(0, 0), (0, 0), *self._sides(array.shape[2:], spans)]
        return np.pad(array, sides) if any(map(any, sides)) else array, spans

    def _sides(self, sizes: tuple[int, ...], spans: list[int]) -> list[tuple[int, int]]:
        """The padding before and behind each spatial axis."""
        if not self.same:
            rank = len(spans)
            return list(zip(self.pads[:rank], self.pads[rank:], strict=True))
        found: list[tuple[int, int]] = []
        for size, span, stride in zip(sizes, spans, self.strides, strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + span - size, 0)
            less, more = total // 2, total - total // 2
            found.append((less, more) if self.same == "SAME_UPPER" else (more, less))
        return found


class Gathered:
    """Rows that wait until a product of them is worth reading the matrix that it is added to."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Floats, ...]] = []

    def add(self, *rows: Floats) -> bool:
        """Keep ``rows``, arrays [..., rows, K] of one shape; whether all together are worth it."""
        self._waiting.append(rows)
        count = sum(first.shape[-2] for first, *_ in self._waiting)
        each = rows[0].size // max(rows[0].shape[-2], 1)
        return count >= _WORTH_ROWS or count * each >= _WORTH_NUMBERS

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def take(self) -> list[Floats]:
        """What was kept, joined; nothing is left."""
        parts = list(zip(*self._waiting, strict=True))
        self._waiting.clear()
        return [part[0] if len(part) == 1 else np.concatenate(part, axis=-2) for part in parts]


def _drawn(count: int, most: int, draw: int) -> npt.NDArray[np.intp]:
    """At most ``most`` of ``count`` places, drawn without regard to any grid that they lie on."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(draw).choice(count, most, replace=False))


def to_matrix(layer: Layer, array: Array) -> Array:
    """An array like the weight of ``layer`` as [groups, N / groups, columns], a view of it.

    ``X @ to_matrix(layer, weight)[g].T`` is what group ``g`` of the layer computes of its rows.
    """
    if layer.kind == "linear":
        return (array if layer.channel_axis == 0 else array.T)[None]
    groups = graph.attribute(layer.node, "group", 1)
    return array.reshape(groups, array.shape[0] // groups, -1)


def from_matrix(layer: Layer, matrix: Array) -> Array:
    """What ``to_matrix`` made a matrix of, in the shape of the weight of ``layer``."""
    shape = graph.shape_of(layer.weight.value)
    assert shape is not None
    if layer.kind == "linear":
        return matrix[0] if layer.channel_axis == 0 else matrix[0].T
    return matrix.reshape(shape)


def of(layer: Layer) -> Rows | None:
    """The rows of a linear layer or a Conv with a constant weight; None for any other."""
    shape = graph.shape_of(layer.weight.value)
    if shape is None or not graph.is_constant(layer.weight.value):
        return None
    if layer.kind == "linear":
        transposed = layer.node.op_type == "Gemm" and graph.attribute(layer.node, "transA", 0)
        return Rows(shape[layer.reduce_axis], transposed=bool(transposed))
    if layer.kind not in ("conv", "depthwise"):
        return None
    kernel = shape[2:]
    ones, zeros = [1] * len(kernel), [0] * (2 * len(kernel))
    padding = graph.attribute(layer.node, "auto_pad", "NOTSET")
    return Rows(
        columns=math.prod(shape[1:]),
        kernel=kernel,
        strides=tuple(graph.attribute(layer.node, "strides", ones)),
        dilations=tuple(graph.attribute(layer.node, "dilations", ones)),
        pads=tuple(graph.attribute(layer.node, "pads", zeros)),
        same=padding if padding.startswith("SAME") else "",
        groups=graph.attribute(layer.node, "group", 1),
    )
