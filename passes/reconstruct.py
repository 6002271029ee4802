"""Fit how weights and activations are rounded, block by block, to what the float model computes.

Sources: AdaRound (Nagel et al., arXiv 2004.10568), BRECQ (Li et al., arXiv 2102.05426), QDrop (Wei
et al., arXiv 2203.05740), LSQ (Esser et al., arXiv 1902.08153). That both factors of a layer of low
rank are fitted together is from MLoRQ (arXiv 2507.09616), step 9; losses and steps are these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import onnx_ir as ir

from qcompile import blocks, devices
from qcompile.blocks import Granularity
from qcompile.devices import Device
from qcompile.errors import PassError
from qcompile.pipeline import Context, Pass, Stats
from qcompile.sequences import Sample

if TYPE_CHECKING:
    from qcompile.reconstruct import Fitted, Settings

Method = Literal["adaround", "brecq", "qdrop"]


@dataclasses.dataclass(frozen=True)
class Reconstruct(Pass):
    """Codes of weights, and ranges of activations, that keep each block's output near float.

    A weight ``w`` on steps of ``s`` becomes ``s clip(floor(w / s) + h(V), low, high)``, with ``h``
    from 0 to 1; ``V`` is fitted by Adam to the relative error of the block, ``sum |y - y'|^2 /
    sum |y|^2``, and ends at down or up. It starts from the codes that are there (gptq). A range
    becomes ``exp(f)`` times what it was.

    A block reads what the quantized blocks in front of it give, and is fitted to what the float
    model has in its place, so that it makes good for errors in front. Where a layer became two of
    low rank, both are in one block, and that is what the model as captured has there: rounding
    makes good for a part of what was cut off.

    * ``method``: ``adaround`` fits weights alone; ``brecq`` weights, then ranges, with squared
      errors weighed by how much the outputs of the model feel them; ``qdrop`` both at once, each
      element that is read or rounded inside left in float by a chance of one half. The weights of
      ``brecq`` are our reconstruction: the paper squares gradients of a loss with labels, we
      those of outputs with random signs.
    * ``granularity``: ``block`` (residual blocks, modules: see ``qcompile.blocks``) or ``layer``.
    * ``steps``, ``batch``: steps for each block, and samples in each step.
    * ``rate``, ``range-rate``: of Adam, for ``V`` and for ``f``.
    * ``decide``: what undecided ``h`` cost beside the relative error, from a fifth of the steps.
    * ``samples``: how many calibration samples are used at most; an eighth of all (sequences, with
      a state) is kept apart. A block whose fit makes it worse on those keeps what it had, and all
      do if the outputs of the whole model get worse there.
    * ``device``: ``cpu`` or ``cuda``; sums round otherwise there, so that other codes are found.

    Of a block with an operator that torch cannot run here the layers are fitted one by one; if it
    cannot be divided (a state is carried through it) it is left as it was, and counted. ``brecq``
    raises PassError for such an operator. With another number of threads sums round otherwise, and
    codes may differ. With ``--resume`` an interrupted run goes on behind the last block that was
    fitted.
    """

    name: ClassVar[str] = "reconstruct"
    requires: ClassVar[frozenset[str]] = frozenset({"specs"})
    produces: ClassVar[frozenset[str]] = frozenset({"specs"})
    keeps_float: ClassVar[bool] = True
    per_target: ClassVar[bool] = True
    reads_data: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"torch"})
    source: ClassVar[str] = "AdaRound 2004.10568, BRECQ 2102.05426, QDrop 2203.05740"

    method: Method = "qdrop"
    granularity: Granularity = "block"
    steps: int = 200
    batch: int = 16
    rate: float = 0.1
    range_rate: float = 0.001
    samples: int = 128
    decide: float = 0.1
    device: Device = "cpu"

    def __post_init__(self) -> None:
        self.starts_at(1, "steps", "batch", "samples")
        self.is_above(0, "rate", "range_rate")
        self.starts_at(0, "decide")

    def lacks(self) -> str:
        return super().lacks() or devices.lacks(self.device)

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        with devices.exact(self.device, ctx.log):
            return self._fitted(model, ctx)

    def _fitted(self, model: ir.Model, ctx: Context) -> Stats:
        from qcompile import torch_exec
        from qcompile.importance import importance
        from qcompile.prefix import Prefix
        from qcompile.quantized import Quantized
        from qcompile.reconstruct import Engine, Fitted

        assert ctx.target is not None
        data = ctx.data()
        samples, kept = data.to_fit(self.samples)
        quantized = Quantized(model, ctx.target, self.device)
        lacking = [node for node in model.graph if torch_exec.missing([node])]
        for node in lacking:
            said = ", ".join(torch_exec.missing([node]))
            ctx.log(f"{node.name}: torch cannot run {said}; layers around it are fitted one by one")
        parts = blocks.partition(model, samples.state, self.granularity, alone=lacking)
        plain, prefix, apart = (
            Prefix(quantized, parts, some, data.mask, ctx.reference)
            for some in (kept, samples, kept)
        )
        if self.method == "brecq":
            self._check(torch_exec.missing(model.graph))
            for name, each in (("fit", prefix), ("apart", apart)):
                each.importance = importance(each, ctx.rng(f"importance {name}"))
        plain.run()
        engine = Engine(prefix, apart, self._settings(), ctx.rng)
        done: list[Fitted] = []
        left = 0
        for number in map(int, ctx.progress(range(len(parts)), "blocks", len(parts))):
            engine.enter(number)
            arrays = ctx.checkpoint(f"block {number}", lambda n=number: _arrays(engine.fit(n)))
            if quantized.layers(parts[number]) and torch_exec.missing(parts[number].nodes):
                left += 1
                ctx.log(f"{parts[number].name}: left, it cannot be divided")
            if arrays:
                fitted = Fitted.from_arrays(arrays)
                quantized.codes |= fitted.codes
                quantized.factors |= fitted.factors
                done.append(fitted)
                said = "" if fitted.kept else ", dropped"
                ctx.log(f"{fitted.block}: {fitted.before:.5f} -> {fitted.after:.5f}{said}")
            engine.leave(number)
        before, after = plain.error(), apart.error()
        better = after <= before
        ctx.log(f"outputs: {before:.5f} -> {after:.5f}{'' if better else ', all dropped'}")
        if better:
            quantized.write()
        kept_blocks = [fitted for fitted in done if fitted.kept and better]
        return {"blocks": len(done), "dropped": len(done) - len(kept_blocks), "left alone": left}

    def _check(self, lacking: Sequence[str]) -> None:
        if lacking:
            raise PassError(
                f"method=brecq takes gradients through the whole model, and torch cannot run "
                f"{', '.join(lacking)} here; qdrop and adaround leave out the blocks that have it"
            )

    def _settings(self) -> list[Settings]:
        """One for each stage of the fit of a block."""
        from qcompile.reconstruct import Settings

        both = Settings(
            steps=self.steps,
            batch=self.batch,
            mix=0.5 if self.method == "qdrop" else 0.0,
            weight_rate=self.rate,
            range_rate=self.range_rate,
            decide=self.decide,
            weighed=self.method == "brecq",
        )
        stages = [dataclasses.replace(both, ranges=False), dataclasses.replace(both, weights=False)]
        return {"qdrop": [both], "adaround": stages[:1], "brecq": stages}[self.method]


def _arrays(fitted: Fitted | None) -> Sample:
    """What is kept of a block; nothing if it had nothing to fit."""
    return {} if fitted is None else fitted.to_arrays()
