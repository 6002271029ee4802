"""Learn a gain and a shift of what each layer writes, on the whole model, and fold them away.

Source: PTQ4VM (Zhu et al., arXiv 2506.10840): Global Affine Calibration, and its optical flow term.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import onnx_ir as ir

from qcompile import blocks, devices, graph
from qcompile.devices import Device
from qcompile.errors import PassError
from qcompile.pipeline import Context, Pass, Stats
from qcompile.sequences import Samples

if TYPE_CHECKING:
    from qcompile.prefix import Prefix
    from qcompile.reconstruct import Term

Gains = Literal["none", "layer", "channel"]
Form = Literal["output", "weight"]
Temporal = Literal["none", "flow"]


@dataclasses.dataclass(frozen=True)
class CalibrateAffine(Pass):
    """``y = g (Q x + b) + t`` for each layer with rounded weight ``Q``, ``g`` and ``t`` learned.

    All ``g``, ``t`` and the ranges of activations are fitted at once by Adam, everything else
    frozen, to what the float model gives: ``sum |z - z'|^2 / sum |z|^2``, the mean over the outputs
    ``z`` that are no states. No labels are read. Of a model with a state it runs ``frames`` frames
    in a row, gradients through time. Then ``g`` goes into the scale of ``Q`` and ``g b + t`` is the
    bias: no node is left of it, and float weights and bias stay as they were.

    With ``temporal=flow`` the loss has a second term, for flicker: the mean of ``|z'_t - w(z'_t+1,
    F)|`` times ``flow-weight``, with ``F`` the flow from input frame t to t + 1 by OpenCV's DIS and
    ``w`` the warp along it, where the flow back ends at its start. It needs one image input [1, 3,
    H, W] in 0..1 and one output of that size, and a model with a state. The flow is that of the
    official code (from t to t + 1), on a grid of pixel centres, so that no flow is the identity.

    With ``form=weight`` it is the form of the paper's text, ``W' = g Q + t``, which adds ``t``
    times the sum over the window. ``t`` is no whole number of steps of ``Q``, and no runtime has a
    zero point that is not whole: the levels of ``W'``, as many as ``Q`` has, are rounded to 8 bits
    a channel, in which narrow weights are stored beside a quantized input anyway. The fit is judged
    with the levels rounded. What is decided is 8 bits then, and the report says so.

    * ``gains``: ``layer`` (one ``g`` and ``t`` each, as in the paper), ``channel``, or ``none``:
      the control, ranges alone.
    * ``form``: ``output``, that of the paper's code, or ``weight``.
    * ``temporal``, ``flow-weight``: ``none`` or ``flow``, the second term, and what it counts.
    * ``frames``: the most frames in a row that a step goes through, of a model with a state.
    * ``steps``, ``batch``, ``rate``: steps of Adam, samples or runs of frames in each, and its rate
      for ``g``, ``t`` and the logarithm of ranges, falling to 0 along half a cosine.
    * ``samples``: how many calibration samples are used at most; an eighth of all (sequences, with
      a state) is kept apart, and everything is dropped if it is worse there.
    * ``device``: ``cpu`` or ``cuda``; sums round otherwise there, so that other codes are found.

    Layers that share a weight or (``form=output``) have no constant bias get no gain, nor
    (``form=weight``) those of 8 bits, with blocks, or with a float input; they are counted. Raises
    PassError if an operator of the model cannot run in torch.
    """

    name: ClassVar[str] = "calibrate-affine"
    requires: ClassVar[frozenset[str]] = frozenset({"specs"})
    produces: ClassVar[frozenset[str]] = frozenset({"specs"})
    keeps_float: ClassVar[bool] = True
    per_target: ClassVar[bool] = True
    reads_data: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"torch"})
    source: ClassVar[str] = "PTQ4VM, arXiv 2506.10840"

    gains: Gains = "layer"
    form: Form = "output"
    temporal: Temporal = "none"
    flow_weight: float = 0.05
    steps: int = 200
    batch: int = 8
    rate: float = 0.001
    frames: int = 4
    samples: int = 128
    device: Device = "cpu"

    def __post_init__(self) -> None:
        self.starts_at(1, "steps", "batch", "frames", "samples")
        self.is_above(0, "rate")
        self.starts_at(0, "flow_weight")

    def lacks(self) -> str:
        return super().lacks() or devices.lacks(self.device)

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        with devices.exact(self.device, ctx.log):
            return self._fitted(model, ctx)

    def _fitted(self, model: ir.Model, ctx: Context) -> Stats:
        from qcompile import torch_exec
        from qcompile.prefix import Prefix
        from qcompile.quantized import Quantized
        from qcompile.reconstruct import Engine, Settings

        assert ctx.target is not None
        lacking = torch_exec.missing(model.graph)
        if lacking:
            raise PassError(
                f"gradients go through the whole model, and torch cannot run {', '.join(lacking)} "
                "here; reconstruct leaves out the blocks that have it"
            )
        data = ctx.data()
        samples, kept = data.to_fit(self.samples)
        quantized = Quantized(model, ctx.target, self.device)
        whole = blocks.whole(model)
        prefix, apart = (Prefix(quantized, [whole], s, data.mask) for s in (samples, kept))
        given = set(samples.state.values())
        outputs = [name for name in whole.outputs if name not in given]
        term = _flow_term(prefix, outputs, self.flow_weight) if self.temporal == "flow" else None
        settings = Settings(
            steps=self.steps, batch=self.batch, mix=0.0, weights=False, gains=self.gains,
            gains_of=self.form, range_rate=self.rate, frames=self.frames,
        )  # fmt: skip
        engine = Engine(prefix, apart, [settings], ctx.rng, outputs, term, ctx.progress)
        engine.enter(0)
        fitted = engine.fit(0)
        quantized.write()
        decided = sum(layer.weight.spec is not None for layer in graph.layers(model))
        gains = len(quantized.gains)
        if fitted is not None:
            said = "" if fitted.kept else ", dropped"
            ctx.log(f"relative error apart: {fitted.before:.5f} -> {fitted.after:.5f}{said}")
        return {
            "gains": gains,
            "ranges": len(quantized.factors),
            "left alone": decided - gains,
        }


def _flow_term(prefix: Prefix, outputs: Sequence[str], weight: float) -> Term:
    """``weight`` times the mean difference of each output from the next one, warped back."""
    import torch

    from qcompile import flow

    frame = _frame(prefix, outputs)
    known: dict[int, tuple[Any, Any]] = {}

    def flow_from(number: int) -> tuple[Any, Any]:
        if number not in known:
            pair = [prefix.samples[n][frame] for n in (number, number + 1)]
            known[number] = flow.dis(torch.cat([prefix.tensors({"": p})[""] for p in pair]))
        return known[number]

    def term(frames: Sequence[Sequence[int]], results: Sequence[dict[str, Any]]) -> Any:
        losses: list[Any] = []
        for numbers, now, then in zip(frames[:-1], results[:-1], results[1:], strict=True):
            pairs = [flow_from(number) for number in numbers]
            forward, sure = (torch.cat([pair[i] for pair in pairs]) for i in (0, 1))
            for name in outputs:
                if now[name].shape[-2:] == forward.shape[-2:]:
                    gap = (now[name] - flow.warp(then[name], forward)).abs() * sure
                    losses.append(gap.mean())
        return weight * torch.stack(losses).mean() if losses else torch.zeros(())

    return term


def _frame(prefix: Prefix, outputs: Sequence[str]) -> str:
    """The one input that holds frames, of which ``outputs`` have the size."""
    samples: Samples = prefix.samples
    if not samples.state:
        raise PassError("temporal=flow compares frames in a row: give a model with --state")
    images = [n for n, a in samples[0].items() if a.ndim == 4 and a.shape[:2] == (1, 3)]
    images = [name for name in images if name not in samples.state]
    if len(images) != 1:
        found = ", ".join(f"{n} {list(a.shape)}" for n, a in samples[0].items())
        raise PassError(f"temporal=flow needs one input of frames [1, 3, H, W], found {found}")
    return images[0]
