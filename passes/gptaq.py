"""Round weights so that layers make good for what the rounded layers in front of them did.

Source: GPTQ (Frantar et al., arXiv 2210.17323) on the quantized trajectory with the float one as
the target, the setting of GPTAQ (Li et al., arXiv 2504.02692). Ours is a reconstruction: the float
weight is first moved to the ridge regression of the float output on the rounded input, and then
rounded by GPTQ, where GPTAQ corrects column by column.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

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
    that are rounded already, on the grid of its own input. With ``H = X^T X + d`` and ``d`` =
    ``damping`` times the mean of the diagonal of ``X^T X``, the weight becomes ``W' = W (F^T X + d)
    H^-1``, and the codes those of gptq for ``W'`` and ``H``. The scales stay as they were decided.

    Layers that share a weight, of another kind than Conv and linear, or that the target keeps in
    float are left as they were, and counted.

    * ``damping``: see above, above 0.
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

    damping: float = 0.01
    samples: int = 64
    rows: int = 128
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise PassError(f"damping must be above 0, got {self.damping:g}")
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
        for number in ctx.progress(range(len(parts)), "gptaq", len(parts)):
            part = prefix.enter(number)
            for layer in quantized.layers(parts[number]):
                shared = len(graph.readers(layer.weight.value)) > 1
                if layer.node not in left and gptq.fits(layer) and not shared:
                    gram, cross = self._grams(prefix, parts[number], layer)
                    job = moved(gptq.job(model, layer, gram), cross, self.damping)
                    codes, _ = gptq.fitted(job, self.damping)
                    found = patches.from_matrix(layer, codes)
                    quantized.codes[quantized.key(layer)] = found
                    done += 1
            prefix.leave(number, part)
        quantized.write()
        decided = sum(layer.weight.spec is not None for layer in graph.layers(model))
        return {"layers": done, "left alone": decided - done}

    def _grams(self, prefix: Prefix, block: Block, layer: Layer) -> tuple[Doubles, Doubles]:
        """``X^T X`` and ``F^T X`` a row, [groups, K, K]."""
        import torch

        kind = patches.of(layer)
        assert kind is not None and layer.input is not None
        name = layer.input.value.name or ""
        at, after = prefix.quantized.maps(block)
        here = at.get((layer.node.name or "", layer.input.index))
        entered = prefix.function(block, [name])
        gram, cross, seen = np.zeros(kind.shape), np.zeros(kind.shape), 0
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
            pairs = (kind.blocks(array, self.rows, draw=number) for array in arrays)
            for one, other in zip(*pairs, strict=True):
                gram += np.swapaxes(other, -1, -2) @ other
                cross += np.swapaxes(one, -1, -2) @ other
                seen += one.shape[-2]
        shape = (-1, *kind.shape[-2:])
        return gram.reshape(shape) / max(seen, 1), cross.reshape(shape) / max(seen, 1)


def moved(job: gptq.Job, cross: Doubles, damping: float) -> gptq.Job:
    """``job`` with the weight moved to give of ``X`` what it gave of ``F``; ``cross`` is F^T X."""
    diagonal = np.einsum("gkk->gk", job.gram)
    ridge = damping * diagonal.mean(axis=1)[:, None, None] * np.eye(job.gram.shape[-1])
    ridge[diagonal.mean(axis=1) == 0] = np.eye(job.gram.shape[-1])
    # W (C + d) (H + d)^-1, with the symmetric factor solved for from the right.
    target = job.weight.astype(np.float64) @ (cross + ridge)
    weight: Doubles = np.linalg.solve(job.gram + ridge, np.swapaxes(target, -1, -2))
    return dataclasses.replace(job, weight=np.swapaxes(weight, -1, -2).astype(np.float32))
