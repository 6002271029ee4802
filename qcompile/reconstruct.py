"""Fits what a quantized model rounds with to what the float model computes, block after block.

One engine. What differs between methods is said by ``Settings``: what a block reads (the float
trajectory, the quantized one, or a mix), what it should give (the float trajectory, or the float
block of what it read), which parameters move (rounding of weights, ranges of activations), and how
errors are weighed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from qcompile import devices, graph, rounding, torch_exec
from qcompile.blocks import Block
from qcompile.numerics import Codes
from qcompile.prefix import Prefix, Tensors, joined
from qcompile.quantized import Gain, Key, Maps, Of, Spare
from qcompile.sequences import Sample, Samples
from qcompile.torch_exec import TorchGraph


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a block is fitted.

    * ``steps``, ``batch``: steps of Adam, and samples (runs of frames, if the block has a state) in
      each.
    * ``mix``: the share of elements that a block reads from the float trajectory, and that it
      leaves unrounded inside, drawn anew in each step (QDrop, Wei et al., arXiv 2203.05740).
    * ``prefix``: whether a block reads the quantized trajectory at all, or the float one alone.
    * ``target``: the float trajectory, or the float block of what it read.
    * ``weights``, ``ranges``, ``gains``: what moves: how weights are rounded, ranges of
      activations, and a gain of what layers write (or of their weights, by ``gains_of``), one a
      layer or one a channel. ``weight_rate`` and ``range_rate`` are of Adam; the latter, of
      logarithms and gains, falls to 0 along half a cosine.
    * ``decide``: what the mean over the weights of ``1 - |2 h - 1| ** b`` counts beside the
      relative error, in the last 80 % of the steps, with ``b`` falling from 20 to 2 (AdaRound).
    * ``frames``: the most frames in a row that a step goes through.
    * ``weighed``: whether squared errors count by ``Prefix.importance``.
    """

    steps: int
    batch: int
    mix: float = 0.5
    prefix: bool = True
    target: Literal["float", "recomputed"] = "float"
    weights: bool = True
    ranges: bool = True
    gains: Literal["none", "layer", "channel"] = "none"
    gains_of: Of = "output"
    weight_rate: float = 0.0
    range_rate: float = 0.0
    decide: float = 0.0
    frames: int = 8
    weighed: bool = False


Term = Callable[[Sequence[Sequence[int]], Sequence[Tensors]], Tensor]


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What became of a block: its relative error on the samples apart, before and after its fit.

    The power of the error over that of the float output, the mean over outputs. ``kept`` is false
    where the fit made it worse and was dropped; else ``codes`` and ``factors`` were found.
    """

    block: str
    before: float
    after: float
    kept: bool
    codes: Mapping[Key, Codes]
    factors: Mapping[str, float]

    def to_arrays(self) -> Sample:
        """As arrays by name."""
        fields = dataclasses.asdict(self) | {"codes": [list(key) for key in self.codes]}
        arrays = {str(number): array for number, array in enumerate(self.codes.values())}
        return {"fields": np.array(json.dumps(fields)), **arrays}

    @staticmethod
    def from_arrays(arrays: Sample) -> Fitted:
        """What ``to_arrays`` made arrays of."""
        fields = json.loads(str(arrays["fields"]))
        keys: list[Key] = [(weight, scale) for weight, scale in fields["codes"]]
        fields["codes"] = {key: arrays[str(number)] for number, key in enumerate(keys)}
        return Fitted(**fields)


class Engine:
    """Fits the blocks of a quantized model one after the other.

    A block is entered, fitted, and left.

    Args:
        prefix: the model, and the samples to fit on.
        apart: the same model, and the samples that decide whether a fit is kept.
        settings: how; one after the other, each kept or dropped by itself.
        rng: randomness by key.
        outputs: what is compared of each block; all floats that it writes if None.
        term: added to the loss, of the numbers of the frames in a row of some windows, and what the
            block wrote for each.
        progress: wraps the steps of a fit, with a label.
    """

    def __init__(
        self,
        prefix: Prefix,
        apart: Prefix,
        settings: Sequence[Settings],
        rng: Callable[[str], np.random.Generator],
        outputs: Sequence[str] | None = None,
        term: Term | None = None,
        progress: Callable[..., Iterable[Any]] | None = None,
    ) -> None:
        self.progress = progress
        self.outputs = outputs
        self.term = term
        self.prefix = prefix
        self.apart = apart
        self.settings = settings
        self.rng = rng
        self._part: TorchGraph | None = None

    def enter(self, number: int) -> None:
        """Run block ``number`` in float."""
        self._part = self.prefix.enter(number)
        self.apart.enter(number)

    def fit(self, number: int) -> Fitted | None:
        """Fit block ``number``; None if it has nothing to fit, or an operator without gradient."""
        assert self._part is not None
        block = self.prefix.blocks[number]
        if torch_exec.missing(block.nodes):
            return None
        fits = [_Fit(self, settings, self._part, block).run() for settings in self.settings]
        done = [fit for fit in fits if fit is not None]
        if not done:
            return None
        kept = [fit for fit in done if fit.kept]
        last = done[-1]
        return Fitted(
            block.name,
            done[0].before,
            last.after if last.kept or not kept else last.before,
            bool(kept),
            {key: codes for fit in kept for key, codes in fit.codes.items()},
            {value: factor for fit in kept for value, factor in fit.factors.items()},
        )

    def leave(self, number: int) -> None:
        """Run block ``number`` as it is rounded now."""
        assert self._part is not None
        for prefix in (self.prefix, self.apart):
            prefix.leave(number, self._part)


# Numbers of samples, the frames of a sequence in a row.
Window = Sequence[int]


class _Fit:
    """The fit of one block."""

    def __init__(self, engine: Engine, settings: Settings, part: TorchGraph, block: Block) -> None:
        self._engine = engine
        self._settings = settings
        self._prefix = engine.prefix
        self._quantized = engine.prefix.quantized
        self._part = part
        self._block = block
        state = engine.prefix.samples.state
        self._state = {taken: state[taken] for taken in block.inputs if taken in state}
        floats = engine.prefix.float
        named = block.outputs if engine.outputs is None else engine.outputs
        self._outputs = [name for name in named if floats.value(name, 0).dtype.kind == "f"]
        self._room = devices.room(engine.prefix.quantized.device)
        self._held: dict[tuple[str, int], Tensors] = {}

    def run(self) -> Fitted | None:
        """Fit what the settings say, and keep it if that is no worse on the samples apart."""
        quantized, settings = self._quantized, self._settings
        layers = quantized.layers(self._block) if settings.weights else []
        weights = {
            quantized.key(layer): quantized.weight(layer)
            for layer in layers
            if quantized.key(layer) not in quantized.codes
        }
        owners = quantized.owners(self._block) if settings.ranges else []
        factors = {
            value: torch.zeros((), device=quantized.device, requires_grad=True)
            for value in owners
            if value not in quantized.factors
        }
        gains = self._gains()
        if not self._outputs or not (weights or factors or gains):
            return None
        before = self._error()
        self._descend(weights, factors, gains)
        codes = {key: weight.codes() for key, weight in weights.items()}
        found = {value: float(torch.exp(log.detach())) for value, log in factors.items()}
        quantized.codes |= codes
        quantized.factors |= found
        quantized.gains |= gains
        after = self._error()
        kept = after <= before  # which it is not if it is NaN
        if not kept:
            for name in gains:
                del quantized.gains[name]
            quantized.drop(codes, found)
            codes, found = {}, {}
        return Fitted(self._block.name, before, after, kept, codes, found)

    def _gains(self) -> dict[str, Gain]:
        """A gain of one and a shift of zero for each layer that takes one."""
        if self._settings.gains == "none":
            return {}
        of = self._settings.gains_of
        found: dict[str, Gain] = {}
        for layer in self._quantized.layers(self._block):
            shape = graph.shape_of(layer.weight.value)
            if self._quantized.gainable(layer, of) and shape is not None:
                many = shape[layer.channel_axis] if self._settings.gains == "channel" else 1
                ones = torch.ones(many, device=self._quantized.device)
                zeros = torch.zeros_like(ones)
                found[layer.name] = Gain(ones.requires_grad_(), zeros.requires_grad_(), of)
        return found

    def _descend(
        self,
        weights: Mapping[Key, rounding.Weight],
        factors: Mapping[str, Tensor],
        gains: Mapping[str, Gain],
    ) -> None:
        settings = self._settings
        rng = self._engine.rng(f"reconstruct {self._block.name}")
        drop = torch.Generator(self._quantized.device)
        drop.manual_seed(int(rng.integers(1 << 62)))

        def spare(x: Tensor, y: Tensor) -> Tensor:
            chosen = torch.rand(x.shape, generator=drop, device=x.device) < settings.mix
            return torch.where(chosen, x, y)

        logits = [weight.logits for weight in weights.values()]
        elements = sum(map(torch.numel, logits))
        moved = [tensor for gain in gains.values() for tensor in (gain.factor, gain.shift)]
        adam: Any = torch.optim.Adam(  # partly untyped
            [
                {"params": [*factors.values(), *moved], "lr": settings.range_rate},
                {"params": logits, "lr": settings.weight_rate},
            ]
        )
        soft = {key: weight.soft for key, weight in weights.items()}
        left = spare if settings.mix else None
        maps = self._quantized.maps(self._block, soft, factors, left, gains)
        together = self._may_be_joined()
        warm = settings.steps // 5
        steps = self._drawn(rng)
        if self._engine.progress is not None:
            steps = self._engine.progress(steps, f"fit {self._block.name}", settings.steps)
        for step, windows in enumerate(steps):
            fall = rounding.cosine(step / settings.steps)
            adam.param_groups[0]["lr"] = settings.range_rate * fall
            adam.zero_grad()
            for group in _alike(windows, self._shapes) if together else [[w] for w in windows]:
                loss = self._loss(group, maps, left)
                _add_gradient(loss * len(group) / len(windows))
            if weights and step >= warm:
                exponent = 2 + 18 * rounding.cosine((step - warm) / (settings.steps - warm))
                for weight in weights.values():
                    share = settings.decide * weight.logits.numel() / elements
                    _add_gradient(share * weight.undecided(exponent))
            adam.step()

    def _drawn(self, rng: np.random.Generator) -> Iterator[list[Window]]:
        """The windows of each step, in a new order in each round through all of them."""
        windows = self._windows()
        batch = min(self._settings.batch, len(windows))
        order: list[int] = []
        for _ in range(self._settings.steps):
            if len(order) < batch:
                order += rng.permutation(len(windows)).tolist()
            yield [windows[index] for index in order[:batch]]
            del order[:batch]

    def _windows(self) -> list[Window]:
        """The samples to draw from; with a state, frames in a row."""
        long = self._settings.frames
        spans = _windows(self._prefix.samples, bool(self._state))
        return [span[at : at + long] for span in spans for at in range(0, len(span), long)]

    def _loss(self, windows: Sequence[Window], maps: Maps, spare: Spare | None) -> Tensor:
        """The mean relative error over outputs and frames of ``windows``, run as one batch."""
        state: Tensors = {}
        losses: list[Tensor] = []
        frames = list(zip(*windows, strict=True))
        results: list[Tensors] = []
        for numbers in frames:
            feeds = self._read(numbers, spare) | state
            found = self._part(feeds, *maps)
            wanted = self._wanted(numbers, feeds)
            for name in self._outputs:
                noise, power = self._powers(name, found, wanted, numbers, self._prefix)
                losses.append(noise / torch.clamp(power, min=1e-30))
            state = {taken: found[given] for taken, given in self._state.items()}
            results.append(found)
        loss = torch.stack(losses).mean()
        return loss if self._engine.term is None else loss + self._engine.term(frames, results)

    def _error(self) -> float:
        """The relative error of the block as it is rounded now, on the samples apart."""
        maps, apart = self._quantized.maps(self._block), self._engine.apart
        noises = dict.fromkeys(self._outputs, 0.0)
        powers = dict.fromkeys(self._outputs, 0.0)
        with torch.no_grad():
            for span in _windows(apart.samples, bool(self._state)):
                state: Tensors = {}
                for number in span:
                    feeds = apart.tensors(apart.feeds(self._block, number)) | state
                    found = self._part(feeds, *maps)
                    floats = apart.float.value
                    wanted = apart.tensors({name: floats(name, number) for name in self._outputs})
                    for name in self._outputs:
                        noise, power = self._powers(name, found, wanted, [number], apart)
                        noises[name] += float(noise)
                        powers[name] += float(power)
                    state = {taken: found[given] for taken, given in self._state.items()}
        return float(np.mean([noises[name] / max(powers[name], 1e-30) for name in self._outputs]))

    def _read(self, numbers: Sequence[int], spare: Spare | None) -> Tensors:
        """What the block reads of samples, as one batch; states are those of the float model."""
        prefix, block = self._prefix, self._block
        given = self._batch("float", numbers, lambda n: prefix.float.feeds(block.inputs, n))
        if not self._settings.prefix:
            return given
        rounded = self._batch("rounded", numbers, lambda n: prefix.feeds(block, n))
        if spare is not None:
            for name in rounded.keys() - prefix.entered:
                if rounded[name].is_floating_point():
                    rounded[name] = spare(given[name], rounded[name])
        return rounded

    def _wanted(self, numbers: Sequence[int], feeds: Tensors) -> Tensors:
        if self._settings.target == "float":
            value = self._prefix.float.value
            return self._batch(
                "wanted", numbers, lambda n: {name: value(name, n) for name in self._outputs}
            )
        with torch.no_grad():
            return self._part(feeds)

    def _batch(self, what: str, numbers: Sequence[int], read: Callable[[int], Sample]) -> Tensors:
        """What ``read`` gives of samples, as one batch; kept on the device where it has room."""
        found: list[Tensors] = []
        for number in numbers:
            sample = self._held.get((what, number))
            if sample is None:
                sample = self._prefix.tensors(read(number))
                taken = sum(tensor.nbytes for tensor in sample.values())
                if taken <= self._room:
                    self._held[what, number] = sample
                    self._room -= taken
            found.append(sample)
        return joined(found)

    def _powers(
        self, name: str, found: Tensors, wanted: Tensors, numbers: Sequence[int], prefix: Prefix
    ) -> tuple[Tensor, Tensor]:
        return prefix.powers(name, found, wanted, numbers, self._settings.weighed)

    def _shapes(self, window: Window) -> tuple[Any, ...]:
        """What must be alike in windows that are run as one batch."""
        feeds = self._prefix.float.feeds(self._block.inputs, window[0])
        return len(window), *(array.shape for array in feeds.values())

    def _may_be_joined(self) -> bool:
        """Whether the block gives of two samples as one batch what it gives of each.

        Tried, since a graph may say so nowhere: it has batches if the first axis is one.
        """
        windows = self._windows()
        pairs = [g for g in _alike(windows, self._shapes) if len(g) > 1]
        if not pairs or any(len(shape) == 0 for shape in self._shapes(pairs[0][0])[1:]):
            return False
        numbers = [window[0] for window in pairs[0][:2]]
        float_feeds = self._prefix.float.feeds
        feeds = [self._prefix.tensors(float_feeds(self._block.inputs, n)) for n in numbers]
        with torch.no_grad():
            try:
                whole = self._part(joined(feeds))
            except (RuntimeError, ValueError, IndexError):  # a shape that holds one sample alone
                return False
            each = [self._part(sample) for sample in feeds]
        return all(
            all(part[name].dim() > 0 for part in each)
            and whole[name].shape == (alone := torch.cat([part[name] for part in each])).shape
            and torch.allclose(whole[name], alone, rtol=1e-3, atol=1e-5 * float(alone.abs().max()))
            for name in self._block.outputs
        )


def _windows(samples: Samples, state: bool) -> list[range]:
    """The numbers of ``samples``, each alone, or with ``state`` those of a sequence in a row."""
    return samples.spans() if state else [range(n, n + 1) for n in range(len(samples))]


def _add_gradient(loss: Tensor) -> None:
    library: Any = loss  # partly untyped
    library.backward()


def _alike(
    windows: Iterable[Window], shapes: Callable[[Window], tuple[Any, ...]]
) -> list[list[Window]]:
    """``windows`` in groups of equal shapes, in the order in which they come first."""
    groups: dict[tuple[Any, ...], list[Window]] = {}
    for window in windows:
        groups.setdefault(shapes(window), []).append(window)
    return list(groups.values())
