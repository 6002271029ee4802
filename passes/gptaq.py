"""Round weights so that layers make good for what the rounded layers in front of them did.

Source: GPTQ (Frantar et al., arXiv 2210.17323) on the quantized trajectory with the float one as
the target, the setting of GPTAQ (Li et al., arXiv 2504.02692). Ours is a reconstruction: the float
weight is first moved to the ridge regression of the float output on the rounded input, and then
rounded by GPTQ, where GPTAQ corrects column by column.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from qcompile import blocks, graph, mixup, patches, ridge
from qcompile.backends.lowering import Rounding
from qcompile.blocks import Block
from qcompile.graph import Layer
from qcompile.passes import gptq
from qcompile.pipeline import Context, Pass, Stats
from qcompile.ridge import Seen
from qcompile.sequences import Sample

if TYPE_CHECKING:
    from qcompile.prefix import Prefix

# Rows for each column, of all samples: with 50, as many as gptq takes, what is moved is worse on
# other data (EfficientNet-Lite0 by 0.2 dB), and more than 200 gain nothing.
_ENOUGH = 200


@dataclasses.dataclass(frozen=True)
class Gptaq(Pass):
    """Codes ``Q`` [N, K] that make ``|F W^T - X Q^T|`` small, layer after layer.

    ``F`` [rows, K] is what the layer reads in the float model and ``X`` what it reads behind layers
    that are rounded already, on the grid of its own input. The weight moves to ``W' = W + W (F -
    X)^T X (X^T X + d)^-1`` (see ``qcompile.ridge``), and the codes are those of gptq for ``W'`` and
    ``X^T X``. The scales stay as they were decided, or are searched as by gptq.

    Layers that share a weight, of another kind than Conv and linear, or that the target keeps in
    float are left as they were, and counted.

    Where a layer has a bias, ``F`` and ``X`` are centred, and the layer gets the bias that keeps
    the mean of each output. ``d`` is, layer by layer, that of a few shares of the mean of the
    diagonal of ``X^T X`` (and no move at all) which is best on a fourth of the samples, found by
    the others: a layer with more columns than rows would learn its samples by heart.

    * ``damping``: as in gptq, above 0.
    * ``samples``, ``rows``: how many calibration samples, and rows of each, are used at most (about
      200 rows a column in all); the eighth that other fits keep apart is not.
    * ``mixup``: where there are fewer than ``samples``, blends of two make up for some (see
      ``qcompile.mixup``), if all inputs are floats and no state is carried.
    * ``rescale``: as in gptq; the scale of a block of a weight alone may be below zero where the
      target takes it, so that codes reach one further on the side where the block does.
    * ``exclude``: globs over the names and operator types of layers.

    With ``--resume`` an interrupted run goes on behind the last layer that was fitted.
    """

    name: ClassVar[str] = "gptaq"
    requires: ClassVar[frozenset[str]] = frozenset({"specs"})
    produces: ClassVar[frozenset[str]] = frozenset({"specs"})
    keeps_float: ClassVar[bool] = True
    per_target: ClassVar[bool] = True
    reads_data: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"torch"})
    source: ClassVar[str] = "after GPTAQ, arXiv 2504.02692"

    damping: float = 0.1
    samples: int = 64
    rows: int = 128
    mixup: bool = False
    rescale: bool = False
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.is_above(0, "damping")
        self.starts_at(1, "samples", "rows")

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        from qcompile.prefix import Prefix
        from qcompile.quantized import Quantized

        assert ctx.target is not None
        data, excluded = ctx.data(), graph.select(model, self.exclude, "exclude")
        quantized = Quantized(model, ctx.target)
        parts = blocks.partition(model, data.state, "layer")
        real, _ = data.to_fit(self.samples)
        apart = range(3, len(real), 4)
        others = [number for number in range(len(real)) if number not in apart]
        mixed = self.mixup
        samples = mixup.filled(real, self.samples, ctx.rng("mixup"), others) if mixed else real
        prefix = Prefix(quantized, parts, samples, data.mask, ctx.reference, outputs=False)
        read = _Read(prefix, apart, self.rows)
        left = {layer.node for layer in excluded}
        negative = ctx.target.kernels().negative
        done = 0
        for number in map(int, ctx.progress(range(len(parts)), "gptaq", len(parts))):
            part = prefix.enter(number)
            for layer in quantized.layers(parts[number]):
                shared = len(graph.readers(layer.weight.value)) > 1
                if layer.node not in left and gptq.fits(layer) and not shared:
                    fit = functools.partial(self._fitted, read, parts[number], layer, negative)
                    arrays = ctx.checkpoint(layer.name, fit)
                    quantized.codes[quantized.key(layer)] = arrays["codes"]
                    if "scale" in arrays:
                        quantized.scales[quantized.key(layer)] = arrays["scale"]
                    if "bias" in arrays:
                        quantized.biases[layer.name] = arrays["bias"]
                    done += 1
            prefix.leave(number, part)
        quantized.write()
        decided = sum(layer.weight.spec is not None for layer in graph.layers(model))
        blends = len(samples) - len(real)
        return {"layers": done, "left alone": decided - done, "blends": blends}

    def _fitted(self, read: _Read, block: Block, layer: Layer, negative: bool) -> Sample:
        """The ``codes`` of the weight of ``layer``, and its ``bias`` if it has one."""
        biased = layer.bias is not None and graph.is_constant(layer.bias.value)
        folds = read.by(layer, block, biased)
        seen = folds[0] + folds[1]
        job = gptq.job(read.model, layer, seen.gram(biased))
        share = ridge.best(job.weight, *folds, biased)
        assert layer.weight.spec is not None and layer.input is not None
        alone = layer.weight.spec.block is not None and layer.input.spec is None
        weight = ridge.moved(job.weight, seen, share, biased)
        goal = dataclasses.replace(job, weight=weight, signed=negative and alone)
        found = gptq.fitted(goal, self.damping, self.rescale)
        scale = job.scale if found.scale is None else found.scale
        arrays: Sample = {"codes": patches.from_matrix(layer, found.codes)}
        if found.scale is not None:
            arrays["scale"] = patches.from_matrix(layer, scale)
        if layer.bias is not None and biased:
            bias = graph.constant(layer.bias.value)
            rounded = found.codes * scale.astype(np.float64)
            means = seen.means()
            lost = np.einsum("gnk,gk->gn", job.weight, means[0])
            lost = lost - np.einsum("gnk,gk->gn", rounded, means[1])
            arrays["bias"] = (bias + lost.reshape(bias.shape)).astype(bias.dtype)
        return arrays


class _Read:
    """What layers read, at most ``rows`` rows of each sample, in sums.

    Layers that read one value alike share them, if they come one behind the other, such as those of
    queries, keys and values.
    """

    def __init__(self, prefix: Prefix, apart: range, rows: int) -> None:
        self._prefix, self._apart, self._rows = prefix, apart, rows
        self.model = prefix.quantized.model
        self._key: tuple[str, patches.Rows | None, bool] | None = None
        self._rounding: Rounding | None = None
        self._folds: tuple[Seen, ...] = ()

    def by(self, layer: Layer, block: Block, biased: bool) -> tuple[Seen, Seen]:
        """By ``layer`` of ``block``: in all samples but those ``apart``, and in those."""
        assert layer.input is not None
        key = layer.input.value.name or "", patches.of(layer), biased
        place = layer.node.name or "", layer.input.index
        rounding = self._prefix.quantized.roundings.uses.get(place)
        before, self._rounding = self._rounding, rounding
        alike = rounding.alike(before) if rounding and before else rounding is before
        if key != self._key or not alike:
            self._folds = ()  # their memory may be large
            self._key, self._folds = key, self._summed(layer, block, biased)
        return self._folds[0], self._folds[1]

    def _summed(self, layer: Layer, block: Block, biased: bool) -> tuple[Seen, ...]:
        import torch

        kind = patches.of(layer)
        assert kind is not None and layer.input is not None
        prefix = self._prefix
        name = layer.input.value.name or ""
        at, after = prefix.quantized.maps(block)
        here = at.get((layer.node.name or "", layer.input.index))
        entered = prefix.function(block, [name])
        folds = tuple(Seen(np.zeros((kind.groups, 1, kind.columns), np.float32)) for _ in range(2))
        most = min(self._rows, math.ceil(_ENOUGH * kind.columns / len(prefix.samples)))
        for number in range(len(prefix.samples)):
            with torch.no_grad():
                floats = prefix.float.feeds(block.inputs, number)
                wanted = entered(prefix.tensors(floats))[name]
                found = entered(prefix.tensors(prefix.feeds(block, number)), at, after)[name]
                found = found if here is None else here(found)
            arrays = [wanted.cpu().numpy(), found.cpu().numpy()]
            if prefix.mask is not None and name in prefix.lined:
                counted = prefix.samples[number][prefix.mask].astype(bool)
                arrays = [array[counted] for array in arrays]
            pairs = (kind.blocks(array, most, draw=number) for array in arrays)
            for both in zip(*pairs, strict=True):
                each = (kind.groups, -1, kind.columns)
                rows = [np.asarray(part, np.float32).reshape(each) for part in both]
                if biased and rows[1].size and not any(fold.rows for fold in folds):
                    folds = tuple(Seen(rows[1].mean(1, keepdims=True)) for _ in range(2))
                folds[number in self._apart].add(rows[0], rows[1])
        return folds
