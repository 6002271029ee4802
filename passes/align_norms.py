"""Give all channels behind a LayerNormalization one range, folded into what is around it.

Source: the scale reparameterization of RepQ-ViT (Li et al., arXiv 2212.08254), which MLoRQ (arXiv
2507.09616) applies before it quantizes activations. Where we differ: ranges are extremes, no scales
and zero points; channels that are constant stay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile import graph, noise, patches
from qcompile.calibrate import Moments
from qcompile.graph import Layer, Use
from qcompile.pipeline import Context, Pass, Stats

Doubles = npt.NDArray[np.float64]

# A channel is scaled by no more than this, so that one that hardly moves does not drown the rest.
_LARGEST = 1e3


@dataclasses.dataclass(frozen=True)
class AlignNorms(Pass):
    """``W x + c = (W diag(r)) x' + (c + W diag(r) b)`` with ``x' = x / r - b``.

    With ``[l_j, h_j]`` the range of channel ``j`` of what the normalization writes: ``r_j`` is
    ``h_j - l_j`` over its mean over channels, and ``b_j = l_j / r_j - m``, with ``m`` the mean of
    ``l_j``. Every channel of ``x'`` then has the range ``[m, m + mean(h - l)]``, so that one scale
    a tensor does for it what one a channel did for ``x``. The gain and the shift of the
    normalization become ``g / r`` and ``s / r - b``; the weights of what reads it have to hold
    ``r`` in turn.

    A normalization is left alone, and counted, unless it works along the last axis, with a constant
    gain and shift, and all that reads it are linear layers with constant weights and biases of
    their own (behind a residual join it is not so: there is ``equalize``).

    * ``samples``: how many calibration samples are used at most.
    * ``exclude``: globs over the names and operator types of layers; what such a layer reads stays.
    """

    name: ClassVar[str] = "align-norms"
    invalidates: ClassVar[frozenset[str]] = frozenset({"ranges", "specs"})
    keeps_float: ClassVar[bool] = True
    reads_data: ClassVar[bool] = True
    source: ClassVar[str] = "RepQ-ViT, arXiv 2212.08254; MLoRQ, arXiv 2507.09616"

    samples: int = 64
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.starts_at(1, "samples")

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        excluded = {layer.node for layer in graph.select(model, self.exclude, "exclude")}
        norms = [node for node in model.graph if node.op_type == "LayerNormalization"]
        found = {node: _readers(model, node, excluded) for node in norms}
        taken = {node: readers for node, readers in found.items() if readers}
        axes = {node.outputs[0].name or "": -1 for node in taken}
        moments = ctx.data().moments(model, axes, self.samples) if taken else {}
        aligned = sum(
            _align(model, node, readers, moments[node.outputs[0].name or ""])
            for node, readers in taken.items()
        )
        graph.remove_dead(model)
        return {"aligned": aligned, "left alone": len(norms) - aligned}


def _readers(model: ir.Model, norm: ir.Node, excluded: set[ir.Node]) -> list[Layer]:
    """The layers that read ``norm``, or none if something stands against changing it."""
    written = norm.outputs[0]
    rank, axis = graph.rank_of(written), graph.attribute(norm, "axis", -1)
    constant = all(v is not None and graph.is_constant(v) for v in norm.inputs[1:])
    if written.is_graph_output() or not constant or len(norm.inputs) < 3:
        return []
    if axis != -1 and (rank is None or axis != rank - 1):
        return []
    layers = {layer.node: layer for layer in graph.layers(model)}
    readers = [layers.get(use.node) for use in graph.readers(written)]
    fit = [
        layer
        for layer in readers
        if layer is not None and layer.node not in excluded and _takes(layer, written)
    ]
    return fit if len(fit) == len(readers) else []


def _takes(layer: Layer, written: ir.Value) -> bool:
    """Whether the weight and bias of ``layer`` can hold what ``written`` no longer has."""
    if layer.kind != "linear" or layer.input is None or layer.input.value is not written:
        return False
    if not graph.is_constant(layer.weight.value) or len(graph.readers(layer.weight.value)) > 1:
        return False
    if layer.bias is None or not graph.is_constant(layer.bias.value):
        return False
    plain = all(graph.attribute(layer.node, name, 1.0) == 1.0 for name in ("alpha", "beta"))
    return plain and not graph.attribute(layer.node, "transA", 0)


def _align(model: ir.Model, norm: ir.Node, readers: Sequence[Layer], seen: Moments) -> bool:
    """Align ``norm``; False if it writes nothing but constants."""
    spread = seen.high - seen.low
    mean = spread[spread > 0].mean() if (spread > 0).any() else 0.0
    if not np.isfinite(mean) or mean == 0:
        return False
    ratio = np.where(spread > 0, np.clip(spread / mean, 1 / _LARGEST, _LARGEST), 1.0)
    middle = np.where(spread > 0, seen.low / ratio - seen.low.mean(), 0.0)
    gain, shift = (Use(norm, index) for index in (1, 2))
    _write(model, gain, graph.constant(gain.value) / ratio)
    _write(model, shift, graph.constant(shift.value) / ratio - middle)
    for layer in readers:
        weight, bias = graph.constant(layer.weight.value).astype(np.float64), layer.bias
        assert bias is not None
        scaled = weight * noise.along_input(layer, ratio, weight.shape)
        more: Doubles = patches.to_matrix(layer, scaled)[0] @ middle
        _write(model, layer.weight, scaled)
        _write(model, bias, graph.constant(bias.value) + more)
    # It no longer holds what its name stood for.
    norm.outputs[0].name = graph.unique(model, f"{norm.outputs[0].name}/aligned")
    return True


def _write(model: ir.Model, use: Use, array: Doubles) -> None:
    kind = graph.constant(use.value).dtype
    use.read_from(graph.add_constant(model, f"{use.value.name}/aligned", array.astype(kind)))
