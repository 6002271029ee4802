"""How much of the output of a layer its grids will make noise of, from statistics, without a run.

A rounding to steps of ``d`` makes noise of power ``d^2 / 12``, without correlation to the signal or
other roundings (Widrow and Kollar, Quantization Noise, chapter 5). So for ``y = W x``, with one
grid over ``x`` and one step for each output of ``W``:

* noise of the activation: ``D^2 / 12 sum_j |W_j|^2``;
* noise of the weights: ``sum_o d_o^2 / 12 sum_j E[x_j^2]``;
* signal: ``sum_j E[x_j^2] |W_j|^2``, as if channels had no correlation.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from qcompile import graph, numerics
from qcompile.calibrate import Moments
from qcompile.graph import Layer

Doubles = npt.NDArray[np.float64]
Number = TypeVar("Number", np.float32, np.float64)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the noise of a layer depends on, for each of its ``K`` input channels.

    ``low``, ``high``, ``power``: of the activation. ``squares``, ``heaviest``: of the weights that
    read the channel; ``largest`` [K, N]: the largest of those of each output. ``blocks`` is
    [blocks, channels of a block, N]: the weights that share a step. ``window``: weights of a
    channel for one output.
    """

    low: Doubles
    high: Doubles
    power: Doubles
    squares: Doubles
    heaviest: Doubles
    largest: Doubles
    blocks: tuple[int, int, int]
    window: int

    @property
    def magnitude(self) -> Doubles:
        """The largest magnitude of each channel of the activation."""
        return np.maximum(-self.low, self.high)

    def ratio(self, weight: str, entered: str, scales: Doubles | float = 1.0) -> float:
        """Noise to signal with formats ``weight`` and ``entered`` (``float`` for none).

        ``scales`` [K]: the activation is divided by them, and the weights take them back.
        """
        s = np.broadcast_to(np.asarray(scales, np.float64), self.power.shape)
        noise = 0.0
        if weight != "float":
            levels = numerics.parse_format(weight).high
            steps = (self.largest * s[:, None]).reshape(self.blocks).max(axis=1) / levels
            powers = (self.power / s**2).reshape(self.blocks[:2]).sum(axis=1)
            noise = float((steps**2).sum(axis=1) @ powers) / 12 * self.window
        if entered != "float":
            form = numerics.parse_format(entered)
            span = max(float((self.high / s).max()), 0.0) - min(float((self.low / s).min()), 0.0)
            step = span / (form.high - form.low)
            noise += step**2 / 12 * float(s**2 @ self.squares)
        return noise / max(float(self.power @ self.squares), 1e-30)


def inputs(layer: Layer, seen: Moments, block: int = 0) -> Inputs:
    """The inputs of a Conv or linear ``layer``, which reads what ``seen`` is of.

    ``block``: weights along the summed axis that share a step; 0 for all of an output.
    """
    weight = np.abs(_by_input(layer, len(seen.power)))
    rows = weight.reshape(len(weight), -1)
    largest = weight.max(axis=2)
    # An output has one step over all the channels that its group reads.
    each = len(rows)
    if layer.kind != "linear":
        each = (graph.shape_of(layer.weight.value) or (0, each))[1]
    elif block and each % block == 0:
        each = block
    return Inputs(
        seen.low, seen.high, seen.power,
        (rows**2).sum(axis=1), rows.max(axis=1), largest,
        (len(rows) // each, each, largest.shape[1]), weight.shape[2],
    )  # fmt: skip


def _by_input(layer: Layer, channels: int) -> Doubles:
    """The weight as [K, N, window]; of a Conv with groups ``N`` are the outputs of one group."""
    weight = graph.finite_weight(layer).astype(np.float64)
    if layer.kind == "linear":
        return np.moveaxis(weight, layer.reduce_axis, 0)[:, :, None]
    groups = channels // weight.shape[1]
    split = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return split.transpose(0, 2, 1, 3).reshape(channels, split.shape[1], -1)


def channel_axis(layer: Layer) -> int:
    """The axis of what ``layer`` reads that its channels lie on."""
    return -1 if layer.kind == "linear" else 1


def along_input(
    layer: Layer, each: npt.NDArray[Number], shape: tuple[int, ...]
) -> npt.NDArray[Number]:
    """``each`` [K], one number an input channel of ``layer``, to broadcast to its weight."""
    if layer.kind == "linear":
        along = [1] * len(shape)
        along[layer.reduce_axis] = -1
        return each.reshape(along)
    groups = len(each) // shape[1]
    spread = np.repeat(each.reshape(groups, 1, shape[1]), shape[0] // groups, axis=1)
    return spread.reshape(shape[0], shape[1], *[1] * (len(shape) - 2))
