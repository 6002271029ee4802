"""Learn the scales of weights on the whole model, their codes as they are.

Source: EfficientQAT (Chen et al., arXiv 2407.11062), its end-to-end training of
quantization parameters. Ours is a reconstruction: the loss is the error to the float model, where
the paper has labels, and as few steps as post-training quantization takes.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qcompile import blocks, devices, graph, patches
from qcompile.devices import Device
from qcompile.errors import PassError
from qcompile.pipeline import Context, Pass, Stats
from qcompile.sequences import Sample, Samples

if TYPE_CHECKING:
    from qcompile.prefix import Prefix
    from qcompile.quantized import Key, Maps, Quantized
    from qcompile.rounding import Scaled
    from qcompile.torch_exec import TorchGraph


Loss = Literal["nsr", "kl"]


@dataclasses.dataclass(frozen=True)
class LearnScales(Pass):
    """``W = exp(f) s Q`` with the scales ``s`` and codes ``Q`` as decided, and ``f`` learned.

    There is an ``f`` for each scale, that is for each channel or block of a Conv or linear layer.
    All are fitted at once by Adam, everything else frozen, to what the float model gives. No labels
    are read. Activations are rounded as the target rounds them. Then ``exp(f)`` goes into the
    scales: no node is added, and nothing runs slower.

    * ``loss``: ``nsr``, ``sum |z - z'|^2 / sum |z|^2``, or ``kl``, of logits: the mean of ``sum p
      log(p / p')`` with ``p`` the softmax of ``z`` over the last axis; the mean over the outputs
      ``z``.
    * ``outputs``: globs over the names of outputs. If there are none, all floats that are no
      states; with ``kl`` those of them that a linear layer writes.
    * ``steps``, ``batch``: steps of Adam, and samples in each.
    * ``rate``: of Adam for ``f``, falling to 0 along half a cosine.
    * ``samples``: how many calibration samples are used at most; an eighth of all (sequences, with
      a state) is kept apart, and everything is dropped if it is worse there.
    * ``exclude``: globs over the names and operator types of layers.
    * ``device``: ``cpu`` or ``cuda``; sums round otherwise there, so that other scales are found.

    Behind gptq or gptaq this makes good for what errors of layers add up to, which no fit of single
    layers sees. A state that is carried is that of the float model. Gradients end at operators that
    torch lacks; scales that none reaches stay as they are, as do those of a weight with a zero
    point.
    """

    name: ClassVar[str] = "learn-scales"
    requires: ClassVar[frozenset[str]] = frozenset({"specs"})
    produces: ClassVar[frozenset[str]] = frozenset({"specs"})
    keeps_float: ClassVar[bool] = True
    per_target: ClassVar[bool] = True
    reads_data: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"torch"})
    source: ClassVar[str] = "after EfficientQAT, arXiv 2407.11062"

    loss: Loss = "nsr"
    outputs: tuple[str, ...] = ()
    steps: int = 150
    batch: int = 2
    rate: float = 0.001
    samples: int = 256
    exclude: tuple[str, ...] = ()
    device: Device = "cpu"

    def __post_init__(self) -> None:
        self.starts_at(1, "steps", "batch", "samples")
        self.is_above(0, "rate")

    def lacks(self) -> str:
        return super().lacks() or devices.lacks(self.device)

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        with devices.exact(self.device, ctx.log):
            return self._fitted(model, ctx)

    def _fitted(self, model: ir.Model, ctx: Context) -> Stats:
        from qcompile.quantized import Quantized

        assert ctx.target is not None
        fit, apart = ctx.data().to_fit(self.samples)
        quantized = Quantized(model, ctx.target, self.device)
        excluded = {layer.node for layer in graph.select(model, self.exclude, "exclude")}
        scaled: dict[Key, Scaled] = {}
        for layer in quantized.layers(blocks.whole(model)):
            decided = layer.weight.spec
            takes = patches.of(layer) is not None and decided and not decided.zero_point
            if layer.node not in excluded and takes:
                scaled[quantized.key(layer)] = quantized.scaled(layer)
        count = sum(layer.weight.spec is not None for layer in graph.layers(model))
        left: Stats = {"layers": 0, "left alone": count}
        if not scaled:
            return left
        mask, outputs = ctx.data().mask, self._outputs(model, fit)
        whole, other = (
            _Whole(quantized, scaled, some, mask, outputs, self.loss) for some in (fit, apart)
        )
        before = other.mean()
        self._descend(whole, [one.log for one in scaled.values()], ctx)
        after = other.mean()
        kept = after <= before  # which it is not if it is NaN
        ctx.log(f"{self.loss} apart: {before:.5f} -> {after:.5f}{'' if kept else ', dropped'}")
        if not kept:
            return left
        moved = {key: one for key, one in scaled.items() if one.log.any()}
        for key, one in moved.items():
            quantized.scales[key], quantized.codes[key] = one.scale(), one.codes
        quantized.write()
        return {"layers": len(moved), "left alone": count - len(moved)}

    def _outputs(self, model: ir.Model, samples: Samples) -> list[str]:
        """The names of the outputs that are compared."""
        given = set(samples.state.values())
        floats = [v for v in model.graph.outputs if graph.is_float(v) and v.name not in given]
        if not floats:
            raise PassError("there is nothing to fit to: no output but states holds floats")
        if self.outputs:
            names = [v.name or "" for v in floats]
            for glob in self.outputs:
                if not any(fnmatch.fnmatchcase(name, glob) for name in names):
                    raise PassError(f"outputs={glob} names no output in floats: {', '.join(names)}")
            return [n for n in names if any(fnmatch.fnmatchcase(n, glob) for glob in self.outputs)]
        if self.loss == "kl":
            heads = {y.biased_output for y in graph.layers(model) if y.kind == "linear"}
            names = [v.name or "" for v in floats if v in heads]
            if not names:
                found = ", ".join(v.name or "" for v in floats)
                raise PassError(
                    "loss=kl compares logits, and no linear layer writes an output: name those "
                    f"that hold logits by outputs=..., of {found}"
                )
            return names
        return [v.name or "" for v in floats]

    def _descend(self, whole: _Whole, logs: Sequence[Any], ctx: Context) -> None:
        import torch

        from qcompile import rounding

        adam: Any = torch.optim.Adam(logs, lr=self.rate)  # partly untyped
        drawn = _drawn(len(whole.samples), ctx.rng("learn-scales"))
        for step in map(int, ctx.progress(range(self.steps), "learn-scales", self.steps)):
            adam.param_groups[0]["lr"] = self.rate * rounding.cosine(step / self.steps)
            adam.zero_grad()
            for _ in range(self.batch):
                loss: Any = whole.loss(next(drawn))
                if loss is not None and loss.requires_grad:
                    (loss / self.batch).backward()
            adam.step()


def _drawn(count: int, rng: np.random.Generator) -> Iterator[int]:
    """The numbers below ``count``, in a new order in each round through all of them."""
    while True:
        yield from map(int, rng.permutation(count))


class _Whole:
    """The model as one function, in float and with the weights ``scaled``, of ``samples``."""

    def __init__(
        self,
        quantized: Quantized,
        scaled: Mapping[Key, Scaled],
        samples: Samples,
        mask: str | None,
        outputs: Sequence[str],
        loss: Loss,
    ) -> None:
        from qcompile.prefix import Prefix

        block = blocks.whole(quantized.model)
        self.samples, self._outputs, self._loss = samples, outputs, loss
        self._prefix: Prefix = Prefix(quantized, [block], samples, mask)
        self._function: TorchGraph = self._prefix.function(block, block.outputs)
        self._maps: Maps = quantized.maps(block, {key: one.soft for key, one in scaled.items()})
        self._states = list(self._carried())

    def loss(self, number: int) -> Any:
        """The loss of sample ``number``; None if no output is there to compare."""
        import torch

        found, wanted = self._run(number)
        losses: list[Any] = []
        for name in self._outputs:
            if found[name].shape != wanted[name].shape or not found[name].numel():
                continue
            if self._loss == "kl":
                losses.append(self._divergence(name, found[name], wanted[name], number))
            else:
                noise, power = self._prefix.powers(name, found, wanted, [number])
                losses.append(noise / torch.clamp(power, min=1e-30))
        return torch.stack(losses).mean() if losses else None

    def _divergence(self, name: str, found: Any, wanted: Any, number: int) -> Any:
        """The mean of ``sum p log(p / p')`` over the positions of an output that count."""
        logs = [x.log_softmax(-1) for x in (wanted, found)]
        each = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
        mask = self._prefix.mask
        if mask is None or name not in self._prefix.lined:
            return each.mean()
        counted = self._prefix.tensors({mask: self.samples[number][mask]})[mask].to(each)
        return (each * counted).sum() / counted.sum().clamp(min=1)

    def mean(self) -> float:
        """The mean loss of all samples."""
        import torch

        with torch.no_grad():
            losses = [self.loss(number) for number in range(len(self.samples))]
        found = [float(loss) for loss in losses if loss is not None]
        return float(np.mean(found)) if found else 0.0

    def _run(self, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the model gives of a sample as it is rounded, and in float."""
        import torch

        feeds = self._prefix.tensors({**self._states[number], **self.samples[number]})
        with torch.no_grad():
            wanted = self._function(feeds)
        return self._function(feeds, *self._maps), wanted

    def _carried(self) -> Iterator[Sample]:
        """The state that each sample reads, of the float model."""
        import torch

        state = self.samples.state
        for span in self.samples.spans() if state else [range(len(self.samples))]:
            read: Sample = {}
            for number in span:
                yield read
                if state:
                    feeds = self._prefix.tensors({**read, **self.samples[number]})
                    with torch.no_grad():
                        found = self._function(feeds)
                    read = {taken: found[given].cpu().numpy() for taken, given in state.items()}
