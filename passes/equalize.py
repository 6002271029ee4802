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

from qcompile import channels, graph, noise, numerics
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
    scaling, for which the layers of a group have the least noise to signal, summed (``noise`` has
    the formula; of the weights alone if ``input=float``).

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
        self.starts_at(1, "samples")

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
            np.maximum.at(largest, reader.ids, reader.inputs.magnitude)
            np.maximum.at(heaviest, reader.ids, reader.inputs.heaviest)
        own = np.unique(np.concatenate([reader.ids for reader in group]))
        own = own[found.free[own] & (largest[own] > 0) & (heaviest[own] > 0)]
        if not own.size:
            return False

        def total(scales: Doubles) -> float:
            return sum(r.inputs.ratio(self.weight, self.input, scales[r.ids]) for r in group)

        best, least = None, total(np.ones(found.count))
        for exponent in EXPONENTS:
            chosen = np.ones(found.count)
            wanted = largest[own] ** exponent / heaviest[own] ** (1 - exponent)
            wanted /= np.exp(np.log(wanted).mean())
            chosen[own] = np.clip(wanted, 1 / _LARGEST, _LARGEST)
            if (ratio := total(chosen)) < least:
                best, least = chosen, ratio
        if best is None:
            return False
        scales[own] = best[own]
        return True


@dataclasses.dataclass(frozen=True)
class _Measured:
    """A reader, and what its noise depends on."""

    ids: channels.Ids
    inputs: noise.Inputs


def _axes(readers: Sequence[Reader]) -> dict[str, int]:
    axes: dict[str, int] = {}
    for reader in readers:
        assert reader.layer.input is not None
        axes[reader.layer.input.value.name or ""] = noise.channel_axis(reader.layer)
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


def _measure(reader: Reader, moments: Mapping[str, Moments], block: int) -> _Measured:
    assert reader.layer.input is not None
    seen = moments[reader.layer.input.value.name or ""]
    return _Measured(reader.ids, noise.inputs(reader.layer, seen, block))


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
        factor = noise.along_input(layer, scales[reader.ids], weight.shape)
        scaled = (weight.astype(np.float64) * factor).astype(weight.dtype)
        name = f"{layer.weight.value.name}/equalized".replace("/equalized/equalized", "/equalized")
        layer.weight.read_from(graph.add_constant(model, name, scaled))
    for value, ids in found.carried.items():
        if (scales[ids] != 1).any():  # it no longer holds what its name stood for
            value.name = graph.unique(model, f"{value.name}/equalized")
    graph.remove_dead(model)
    return len(reading)
