"""Move the mean error that rounding the weights makes of each output into the bias.

Source: Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction"
(arXiv 1906.04721), section 4.2, with means from data, layer by layer.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile import decisions, graph, patches
from qcompile.calibrate import LARGEST_GRAM, Gram
from qcompile.graph import Layer
from qcompile.pipeline import Context, Pass, Stats


@dataclasses.dataclass(frozen=True)
class BiasCorrect(Pass):
    """A quantized layer gets ``b + (W - Q) E[x]``, with ``Q`` [N, K] what the codes of ``W`` say.

    It stands beside ``b``, which the layer keeps in float, and takes the place of a bias that an
    earlier pass fitted.

    ``E[x]`` [K] is the mean row of the matrix that the weight is multiplied with: of a Conv a
    patch, its padding included. Behind gptq little is left to correct, since the mean is a part of
    the power that it keeps small. Left alone, and counted: layers without a constant bias, and what
    has no decided weight that is multiplied with rows.

    * ``samples``: how many calibration samples are used at most.
    * ``rows``: rows of each sample that are used at most; about 50 a column in all.
    * ``exclude``: globs over the names and operator types of layers.
    """

    name: ClassVar[str] = "bias-correct"
    requires: ClassVar[frozenset[str]] = frozenset({"specs"})
    produces: ClassVar[frozenset[str]] = frozenset({"specs"})
    keeps_float: ClassVar[bool] = True
    reads_data: ClassVar[bool] = True
    source: ClassVar[str] = "arXiv 1906.04721, section 4.2"

    samples: int = 64
    rows: int = 128
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.starts_at(1, "samples", "rows")

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        excluded = {layer.node for layer in graph.select(model, self.exclude, "exclude")}
        decided = [layer for layer in graph.layers(model) if layer.weight.spec is not None]
        chosen = [layer for layer in decided if layer.node not in excluded and _takes(layer)]
        grams = ctx.data().grams(model, chosen, self.samples, self.rows) if chosen else {}
        for layer in chosen:
            _correct(model, layer, grams[layer.name])
        graph.remove_dead(model)
        return {"layers": len(chosen), "left alone": len(decided) - len(chosen)}


def _takes(layer: Layer) -> bool:
    """Whether the rows of what ``layer`` reads are known, and its bias has a number an output."""
    kind, weight = patches.of(layer), graph.shape_of(layer.weight.value)
    if kind is None or kind.columns > LARGEST_GRAM or layer.bias is None or weight is None:
        return False
    if not graph.is_constant(layer.bias.value) or graph.attribute(layer.node, "beta", 1.0) != 1.0:
        return False
    size = graph.shape_of(layer.bias.value)
    return size is not None and size[-1:] == (weight[layer.channel_axis],) == (np.prod(size),)


def _correct(model: ir.Model, layer: Layer, gram: Gram) -> None:
    assert layer.bias is not None and layer.weight.spec is not None
    weight = graph.finite_weight(layer).astype(np.float64)
    rounded = decisions.rounded(model, layer.weight.value, layer.weight.spec)
    error = patches.to_matrix(layer, weight - rounded)
    mean = (gram.total / max(gram.rows, 1)).reshape(len(error), -1)
    moved: npt.NDArray[np.float64] = np.einsum("gnk,gk->gn", error, mean).ravel()
    bias = graph.constant(layer.bias.value)  # of the float layer: what was fitted before goes
    scale = graph.attribute(layer.node, "alpha", 1.0)
    corrected = (bias + scale * moved.reshape(bias.shape)).astype(bias.dtype)
    decisions.write_bias(model, layer, corrected)
