"""Scale channels so that activations and weights quantize equally well, at no cost at run time.

Source: SmoothQuant (Xiao et al., arXiv 2211.10438), cross-layer equalization (Nagel et al., arXiv
1906.04721) and, for weights alone, the scaling of AWQ (Lin et al., arXiv 2306.00978), as one pass.
Where we differ: what may be scaled is found by ``channels`` on any graph; the exponent is searched
for each group of layers on the noise that the grids will make, from statistics, without trial runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import scipy.sparse as sparse
from scipy.sparse import csgraph

from qcompile import channels, graph, numerics
from qcompile.calibrate import Moments
from qcompile.channels import Channels, Reader
from qcompile.errors import PassError
from qcompile.pipeline import Context, Pass, Stats

Doubles = npt.NDArray[np.float64]

EXPONENTS = tuple(float(a) for a in np.linspace(0.0, 1.0, 21))
# A channel is scaled by no more than this, so that a dead one does not become an infinite one.
_LARGEST = 1e3


@dataclasses.dataclass(frozen=True)
class Equalize(Pass):
    """``W x = (W diag(s)) (x / s)``, with ``x / s`` folded into what writes ``x``.

    ``s_j = a_j^e / w_j^(1 - e)`` over the channels ``j``, with ``a`` the largest magnitude of the
    activation and ``w`` that of the weights that read it. ``e`` is the one of 21 exponents, or no
    scaling, for which the layers of a group have the least noise to signal, summed:

    * of the activation ``D^2 / 12 sum_j s_j^2 |W_j|^2``, ``D`` the step of a grid over the whole of
      ``x / s``, or nothing if ``input=float``;
    * of the weights ``sum_o d_o^2 / 12 sum_j E[x_j^2] / s_j^2``, ``d_o`` the step of output ``o``
      (of each block, if ``block`` is given);
    * against the signal ``sum_j E[x_j^2] |W_j|^2``.

    The fold goes into Conv, linear layers, normalisations with a gain and products with a constant,
    through whatever hands channels on (see ``channels``); what cannot be folded is left alone.

    * ``weight``, ``input``: the formats that are to come, or ``input=float``.
    * ``block``: weights along the summed axis that will share a scale; 0 for one a channel.
    * ``samples``: how many calibration samples are used at most.
    * ``exclude``: globs over the names and operator types of layers whose input stays as it is.
    """

    name: ClassVar[str] = "equalize"
    invalidates: ClassVar[frozenset[str]] = frozenset({"ranges", "specs"})
    keeps_float: ClassVar[bool] = True
    reads_data: ClassVar[bool] = True
    source: ClassVar[str] = "SmoothQuant, arXiv 2211.10438; AWQ, arXiv 2306.00978"

    weight: str = "int8"
    input: str = "int8"
    block: int = 0
    samples: int = 64
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        numerics.parse_format(self.weight)
        if self.input != "float":
            numerics.parse_format(self.input)
        if self.block < 0:
            raise PassError(f"block is a number of weights, or 0; got {self.block}")
        if self.samples < 1:
            raise PassError(f"samples start at 1, got {self.samples}")

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        excluded = {layer.node for layer in graph.select(model, self.exclude, "exclude")}
        found = channels.trace(model, ctx.data().shapes(model))
        stays = [r.ids for r in found.readers if r.layer.node in excluded]
        for ids in stays:
            found.free[ids] = False
        readers = [r for r in found.readers if found.free[r.ids].any()]
        if not readers:
            return {"groups": 0, "scaled": 0, "layers": 0}
        moments = ctx.data().moments(model, _axes(readers), self.samples)
        scales = np.ones(found.count)
        scaled = 0
        groups = _groups(found, readers)
        for group in groups:
            measured = [_measure(reader, moments, self.block) for reader in group]
            scaled += self._choose(found, measured, scales)
        done = _fold(model, found, scales)
        return {"groups": len(groups), "scaled": scaled, "layers": done}

    def _choose(self, found: Channels, group: Sequence[_Measured], scales: Doubles) -> bool:
        """Write the scales of one group if any are better than none."""
        largest, heaviest = np.zeros(found.count), np.zeros(found.count)
        for reader in group:
            np.maximum.at(largest, reader.ids, np.maximum(-reader.low, reader.high))
            np.maximum.at(heaviest, reader.ids, reader.heaviest)
        own = np.unique(np.concatenate([reader.ids for reader in group]))
        own = own[found.free[own] & (largest[own] > 0) & (heaviest[own] > 0)]
        if not own.size:
            return False
        best, least = None, self._noise(group, np.ones(found.count))
        for exponent in EXPONENTS:
            chosen = np.ones(found.count)
            wanted = largest[own] ** exponent / heaviest[own] ** (1 - exponent)
            wanted /= np.exp(np.log(wanted).mean())
            chosen[own] = np.clip(wanted, 1 / _LARGEST, _LARGEST)
            noise = self._noise(group, chosen)
            if noise < least:
                best, least = chosen, noise
        if best is None:
            return False
        scales[own] = best[own]
        return True

    def _noise(self, group: Sequence[_Measured], scales: Doubles) -> float:
        """Noise to signal of the layers of a group, summed."""
        weight = numerics.parse_format(self.weight)
        total = 0.0
        for reader in group:
            s = scales[reader.ids]
            steps = (reader.blocks * s[:, None]).reshape(reader.block_shape).max(axis=1)
            powers = (reader.power / s**2).reshape(reader.block_shape[:2]).sum(axis=1)
            noise = float(((steps / weight.high) ** 2).sum(axis=1) @ powers) / 12 * reader.window
            if self.input != "float":
                form = numerics.parse_format(self.input)
                span = max((reader.high / s).max(), 0.0) - min((reader.low / s).min(), 0.0)
                step = span / (form.high - form.low)
                noise += step**2 / 12 * float(s**2 @ reader.squares)
            total += noise / max(float(reader.power @ reader.squares), 1e-30)
        return total


@dataclasses.dataclass(frozen=True)
class _Measured:
    """What the noise of a layer depends on; one number an input channel [K], unless it says so.

    ``squares``: sum of the squared weights; ``heaviest``: largest weight; ``blocks`` [K, N]: the
    largest weight of each output; ``block_shape``: [blocks, channels of a block, N]; ``window``:
    weights of an input channel for one output.
    """

    ids: channels.Ids
    low: Doubles
    high: Doubles
    power: Doubles
    squares: Doubles
    heaviest: Doubles
    blocks: Doubles
    block_shape: tuple[int, int, int]
    window: int


def _axes(readers: Sequence[Reader]) -> dict[str, int]:
    axes: dict[str, int] = {}
    for reader in readers:
        assert reader.layer.input is not None
        axes[reader.layer.input.value.name or ""] = -1 if reader.layer.kind == "linear" else 1
    return axes


def _groups(found: Channels, readers: Sequence[Reader]) -> list[list[Reader]]:
    """The readers that share channels, directly or through others."""
    rows = np.concatenate([np.full(len(r.ids), i) for i, r in enumerate(readers)])
    columns = len(readers) + np.concatenate([r.ids for r in readers])
    kept = found.free[columns - len(readers)]
    arrays: Any = sparse  # partly untyped
    graphs: Any = csgraph
    size = len(readers) + found.count
    edges = arrays.coo_array((np.ones(kept.sum()), (rows[kept], columns[kept])), (size, size))
    label = graphs.connected_components(edges, directed=False)[1][: len(readers)]
    return [
        [r for r, own in zip(readers, label, strict=True) if own == g] for g in np.unique(label)
    ]


def _by_input(reader: Reader) -> Doubles:
    """The weight as [K, rest], ``K`` the input channels, and zeros where a group does not read."""
    layer = reader.layer
    weight = graph.finite_weight(layer).astype(np.float64)
    if layer.kind == "linear":
        return np.moveaxis(weight, layer.reduce_axis, 0)
    groups = len(reader.ids) // weight.shape[1]
    split = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return split.transpose(0, 2, 1, 3).reshape(len(reader.ids), split.shape[1], -1)


def _measure(reader: Reader, moments: Mapping[str, Moments], block: int) -> _Measured:
    assert reader.layer.input is not None
    seen = moments[reader.layer.input.value.name or ""]
    weight = np.abs(_by_input(reader))
    rows = weight.reshape(len(weight), -1)
    outputs = weight.reshape(len(weight), weight.shape[1], -1).max(axis=2)
    # Without blocks an output has one step over all the channels that its group reads.
    each = len(rows)
    if reader.layer.kind != "linear":
        each = (graph.shape_of(reader.layer.weight.value) or (0, each))[1]
    elif block and len(rows) % block == 0:
        each = block
    return _Measured(
        reader.ids, seen.low, seen.high, seen.power,
        (rows**2).sum(axis=1), rows.max(axis=1), outputs,
        (len(rows) // each, each, outputs.shape[1]), rows.shape[1] // outputs.shape[1],
    )  # fmt: skip


def _fold(model: ir.Model, found: Channels, scales: Doubles) -> int:
    """Fold ``scales`` into the constants that write channels, and those that read them."""
    touched = [f for f in found.folds if (scales[f.ids] != 1).any()]
    reading = [r for r in found.readers if (scales[r.ids] != 1).any()]
    for fold in touched:
        array = graph.constant(fold.use.value)
        scaled = (array / scales[fold.ids]).astype(array.dtype)
        name = f"{fold.use.value.name}/equalized"
        fold.use.read_from(graph.add_constant(model, name, scaled))
    for reader in reading:
        layer = reader.layer
        weight = graph.constant(layer.weight.value)
        factor = _along_input(layer, scales[reader.ids], weight.shape)
        scaled = (weight.astype(np.float64) * factor).astype(weight.dtype)
        name = f"{layer.weight.value.name}/equalized".replace("/equalized/equalized", "/equalized")
        layer.weight.read_from(graph.add_constant(model, name, scaled))
    for value, ids in found.carried.items():
        if (scales[ids] != 1).any():  # it no longer holds what its name stood for
            value.name = graph.unique(model, f"{value.name}/equalized")
    graph.remove_dead(model)
    return len(reading)


def _along_input(layer: graph.Layer, scales: Doubles, shape: tuple[int, ...]) -> Doubles:
    """``scales`` [K] so that they broadcast to the weight of ``layer``."""
    if layer.kind == "linear":
        along = [1] * len(shape)
        along[layer.reduce_axis] = -1
        return scales.reshape(along)
    groups = len(scales) // shape[1]
    spread = np.repeat(scales.reshape(groups, 1, shape[1]), shape[0] // groups, axis=1)
    return spread.reshape(shape[0], shape[1], *[1] * (len(shape) - 2))
