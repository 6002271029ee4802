"""Round weights so that layers make good for what the rounded layers in front of them did.

Source: GPTQ (Frantar et al., arXiv 2210.17323) on the quantized trajectory with the float one as
the target, the setting of GPTAQ (Li et al., arXiv 2504.02692). Ours is a reconstruction: the float
weight is first moved to the ridge regression of the float output on the rounded input, and then
rounded by GPTQ, where GPTAQ corrects column by column.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile import blocks, graph, patches
from qcompile.blocks import Block
from qcompile.errors import PassError
from qcompile.graph import Layer
from qcompile.passes import gptq
from qcompile.pipeline import Context, Pass, Stats

if TYPE_CHECKING:
    from qcompile.prefix import Prefix

Doubles = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Gptaq(Pass):
    """Codes ``Q`` [N, K] that make ``|F W^T - X Q^T|`` small, layer after layer.

    ``F`` [rows, K] is what the layer reads in the float model and ``X`` what it reads behind layers
    that are rounded already, on the grid of its own input. The weight moves to ``W' = W (F^T X + d)
    (X^T X + d)^-1``, and the codes are those of gptq for ``W'`` and ``X^T X``. The scales stay as
    they were decided.

    Layers that share a weight, of another kind than Conv and linear, or that the target keeps in
    float are left as they were, and counted.

    Where a layer has a bias, ``F`` and ``X`` are centred, and the layer gets the bias that keeps
    the mean of each output.

    * ``ridge``: share of the mean of the diagonal of ``X^T X`` that is ``d``, above 0.
    * ``damping``: as in gptq, above 0.
    * ``samples``, ``rows``: how many calibration samples, and rows of each, are used at most.
    * ``exclude``: globs over the names and operator types of layers.
    """

    name: ClassVar[str] = "gptaq"
    requires: ClassVar[frozenset[str]] = frozenset({"specs"})
    produces: ClassVar[frozenset[str]] = frozenset({"specs"})
    keeps_float: ClassVar[bool] = True
    per_target: ClassVar[bool] = True
    reads_data: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"torch"})
    source: ClassVar[str] = "after GPTAQ, arXiv 2504.02692"

    ridge: float = 0.2
    damping: float = 0.1
    samples: int = 64
    rows: int = 128
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for option in ("damping", "ridge"):
            if not getattr(self, option) > 0:
                raise PassError(f"{option} must be above 0, got {getattr(self, option):g}")
        if self.samples < 1 or self.rows < 1:
            raise PassError(f"samples and rows start at 1, got {self.samples} and {self.rows}")

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        from qcompile.prefix import Prefix
        from qcompile.quantized import Quantized

        assert ctx.target is not None
        data, excluded = ctx.data(), graph.select(model, self.exclude, "exclude")
        quantized = Quantized(model, ctx.target)
        parts = blocks.partition(model, data.state, "layer")
        prefix = Prefix(quantized, parts, data.samples.some(self.samples), data.mask)
        left = {layer.node for layer in excluded}
        done = 0
        for number in map(int, ctx.progress(range(len(parts)), "gptaq", len(parts))):
            part = prefix.enter(number)
            for layer in quantized.layers(parts[number]):
                shared = len(graph.readers(layer.weight.value)) > 1
                if layer.node not in left and gptq.fits(layer) and not shared:
                    self._fit(prefix, parts[number], layer)
                    done += 1
            prefix.leave(number, part)
        quantized.write()
        decided = sum(layer.weight.spec is not None for layer in graph.layers(model))
        return {"layers": done, "left alone": decided - done}

    def _fit(self, prefix: Prefix, block: Block, layer: Layer) -> None:
        quantized, seen = prefix.quantized, self._seen(prefix, block, layer)
        gram, cross = seen.gram, seen.cross
        if layer.bias is not None and graph.is_constant(layer.bias.value):
            # The bias makes good for the mean.
            gram = gram - seen.found[:, :, None] * seen.found[:, None]
            cross = cross - seen.wanted[:, :, None] * seen.found[:, None]
        job = gptq.job(quantized.model, layer, gram)
        codes, _ = gptq.fitted(moved(job, cross, self.ridge), self.damping)
        quantized.codes[quantized.key(layer)] = patches.from_matrix(layer, codes)
        if layer.bias is not None and graph.is_constant(layer.bias.value):
            bias = graph.constant(layer.bias.value)
            rounded = codes * job.scale.astype(np.float64)
            lost = np.einsum("gnk,gk->gn", job.weight, seen.wanted)
            lost = lost - np.einsum("gnk,gk->gn", rounded, seen.found)
            quantized.biases[layer.name] = (bias + lost.reshape(-1)).astype(bias.dtype)

    def _seen(self, prefix: Prefix, block: Block, layer: Layer) -> _Seen:
        import torch

        kind = patches.of(layer)
        assert kind is not None and layer.input is not None
        name = layer.input.value.name or ""
        at, after = prefix.quantized.maps(block)
        here = at.get((layer.node.name or "", layer.input.index))
        entered = prefix.function(block, [name])
        gram, cross = np.zeros(kind.shape), np.zeros(kind.shape)
        means = [np.zeros(kind.shape[:-1]), np.zeros(kind.shape[:-1])]
        rows = 0
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
            for both in zip(*(kind.blocks(a, self.rows) for a in arrays), strict=True):
                one, other = (np.asarray(part, np.float32) for part in both)
                gram += np.swapaxes(other, -1, -2) @ other
                cross += np.swapaxes(one, -1, -2) @ other
                means[0] += one.sum(axis=-2, dtype=np.float64)
                means[1] += other.sum(axis=-2, dtype=np.float64)
                rows += one.shape[-2]
        square, each, rows = (-1, *kind.shape[-2:]), (-1, kind.columns), max(rows, 1)
        return _Seen(
            gram.reshape(square) / rows, cross.reshape(square) / rows,
            means[0].reshape(each) / rows, means[1].reshape(each) / rows,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Seen:
    """``X^T X`` and ``F^T X`` [groups, K, K], and means of ``F`` and ``X`` [groups, K], a row."""

    gram: Doubles
    cross: Doubles
    wanted: Doubles
    found: Doubles


def moved(job: gptq.Job, cross: Doubles, damping: float) -> gptq.Job:
    """``job`` with the weight moved to give of ``X`` what it gave of ``F``; ``cross`` is F^T X."""
    diagonal = np.einsum("gkk->gk", job.gram)
    ridge = damping * diagonal.mean(axis=1)[:, None, None] * np.eye(job.gram.shape[-1])
    ridge[diagonal.mean(axis=1) == 0] = np.eye(job.gram.shape[-1])
    # W (C + d) (H + d)^-1, with the symmetric factor solved for from the right.
    target = job.weight.astype(np.float64) @ (cross + ridge)
    library: Any = np.linalg  # partly untyped
    solved: Doubles = library.solve(job.gram + ridge, np.swapaxes(target, -1, -2))
    return dataclasses.replace(job, weight=np.swapaxes(solved, -1, -2).astype(np.float32))
