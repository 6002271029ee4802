"""Fit how weights and activations are rounded, block by block, to what the float model computes.

Sources: AdaRound (Nagel et al., arXiv 2004.10568), BRECQ (Li et al., arXiv 2102.05426), QDrop (Wei
et al., arXiv 2203.05740), LSQ (Esser et al., arXiv 1902.08153).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import onnx_ir as ir

from qcompile import blocks
from qcompile.blocks import Granularity
from qcompile.errors import PassError
from qcompile.pipeline import Context, Pass, Stats

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
    model has in its place, so that it makes good for errors in front.

    * ``method``: ``adaround`` fits weights alone; ``brecq`` weights, then ranges; ``qdrop`` both at
      once, each element that is read or rounded inside left in float by a chance of one half.
    * ``granularity``: ``block`` (residual blocks, modules: see ``qcompile.blocks``) or ``layer``.
    * ``steps``, ``batch``: steps for each block, and samples in each step.
    * ``rate``, ``range-rate``: of Adam, for ``V`` and for ``f``.
    * ``samples``: how many calibration samples are used at most; an eighth of all (sequences, with
      a state) is kept apart. A block whose fit makes it worse on those keeps what it had, and all
      do if the outputs of the whole model get worse there.
    * ``device``: ``cpu`` or ``cuda``.

    A block with an operator that torch cannot run here is left as it was, and counted. With another
    number of threads sums round otherwise, and codes may differ.
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
    steps: int = 400
    batch: int = 16
    rate: float = 0.01
    range_rate: float = 0.001
    samples: int = 128
    decide: float = 0.1
    device: str = "cpu"

    def __post_init__(self) -> None:
        for option, known in (("method", Method), ("granularity", Granularity)):
            if getattr(self, option) not in get_args(known):
                found = getattr(self, option)
                raise PassError(f"{option} is {' or '.join(get_args(known))}, not {found!r}")
        for option in ("steps", "batch"):
            if getattr(self, option) < 1:
                raise PassError(f"{option} starts at 1, got {getattr(self, option)}")

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        from qcompile.prefix import Prefix
        from qcompile.quantized import Quantized
        from qcompile.reconstruct import Engine

        assert ctx.target is not None
        data = ctx.data()
        samples, kept = data.to_fit(self.samples)
        quantized = Quantized(model, ctx.target, self.device)
        parts = blocks.partition(model, samples.state, self.granularity)
        prefix, apart = (Prefix(quantized, parts, s, data.mask) for s in (samples, kept))
        engine = Engine(prefix, apart, self._settings(), ctx.rng)
        done: list[Fitted] = []
        for number in ctx.progress(range(len(parts)), "blocks", len(parts)):
            fitted = engine.step(number)
            if fitted is not None:
                done.append(fitted)
                ctx.log(
                    f"{fitted.block}: {fitted.before:.5f} -> {fitted.after:.5f}"
                    + ("" if fitted.kept else ", dropped")
                )
        quantized.write()
        return {
            "blocks": len(done),
            "dropped": sum(not fitted.kept for fitted in done),
        }

    def _settings(self) -> Settings:
        from qcompile.reconstruct import Settings

        return Settings(
            steps=self.steps,
            batch=self.batch,
            mix=0.5 if self.method == "qdrop" else 0.0,
            ranges=self.method != "adaround",
            weight_rate=self.rate,
            range_rate=self.range_rate,
            decide=self.decide,
        )
