"""A model run twice, in float and as it is quantized so far, block after block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qcompile import ports, rounding
from qcompile.blocks import Block
from qcompile.errors import PassError
from qcompile.quantized import Maps, Quantized
from qcompile.sequences import Sample, Samples
from qcompile.torch_exec import TorchGraph
from qcompile.trajectory import Trajectory

Tensors = dict[str, Tensor]


def joined(samples: Sequence[Tensors]) -> Tensors:
    """``samples`` as one batch."""
    if len(samples) == 1:
        return dict(samples[0])
    return {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}


class Prefix:
    """The float and the rounded trajectory of ``samples`` through ``blocks``.

    A block is entered (its float outputs are computed), fitted by the caller, who changes what
    ``quantized`` holds, and left (its rounded outputs are computed).

    Args:
        quantized: the model, and where what is found is kept.
        blocks: see ``blocks.partition``.
        samples: what to run.
        mask: the input that is 0 where a position does not count, or None.
        captured: the model as captured. The float trajectory through a block in which one of its
            layers became two of low rank is that of the whole layer, if all that the block reads
            and writes has a name there: fits make good for what was cut off.
        outputs: whether what the model gives is kept, which ``error`` is of. The logits of a
            language model take more room than all else.

    An operator that torch lacks is run by ONNX Runtime, and stops gradients.
    """

    def __init__(
        self,
        quantized: Quantized,
        blocks: Sequence[Block],
        samples: Samples,
        mask: str | None = None,
        captured: ir.Model | None = None,
        outputs: bool = True,
    ) -> None:
        self.captured = captured
        given = quantized.model.graph.outputs if outputs else ()
        self._outputs = {value.name or "" for value in given}
        self.quantized = quantized
        self.blocks = blocks
        # The number of the last block that reads a value.
        self._last = {name: number for number, block in enumerate(blocks) for name in block.inputs}
        self.samples = samples
        self.mask = mask
        self.lined = ports.lined_up(quantized.model, mask) if mask else set[str]()
        self.float = Trajectory(samples)
        self.rounded = Trajectory(samples)
        self.entered = {value.name or "" for value in quantized.model.graph.inputs}
        # What an error at each element of what a block writes counts, of each sample.
        self.importance: Sequence[Sample] | None = None

    def enter(self, number: int) -> TorchGraph:
        """Run block ``number`` in float, and return it as a function."""
        block = self.blocks[number]
        part = self.function(block, block.outputs)
        call = self._runs(self._whole(block) or part, ({}, {}))
        self.float.run(block, call, [n for n in block.outputs if self._needed(n, number)])
        return part

    def leave(self, number: int, part: TorchGraph) -> None:
        """Run block ``number`` as it is rounded now, and forget what no later block reads."""
        block = self.blocks[number]
        call = self._runs(part, self.quantized.maps(block))
        self.rounded.run(block, call, [n for n in block.outputs if self._needed(n, number)])
        for trajectory in (self.float, self.rounded):
            trajectory.keep(lambda name: self._needed(name, number))

    def _needed(self, name: str, number: int) -> bool:
        """Whether ``name`` is read when block ``number`` has been left, or a frame later."""
        carried = [taken for taken, given in self.samples.state.items() if given == name]
        later = any(self._last.get(taken, -1) >= number for taken in carried)
        return later or name in self._outputs or self._last.get(name, -1) > number

    def function(self, block: Block, outputs: Sequence[str]) -> TorchGraph:
        """``outputs``, computed of what ``block`` reads."""
        quantized = self.quantized
        return TorchGraph(quantized.model, block.inputs, outputs, quantized.device, elsewhere=True)

    def _whole(self, block: Block) -> TorchGraph | None:
        """``block`` before layers in it became two; None if none did, or it is not found."""
        if self.captured is None or not block.factored:
            return None
        device = self.quantized.device
        try:
            return TorchGraph(self.captured, block.inputs, block.outputs, device, elsewhere=True)
        except PassError:  # a value that has another name
            return None

    def run(self) -> None:
        """Run all blocks, in float and as they are rounded now."""
        for number in range(len(self.blocks)):
            self.leave(number, self.enter(number))

    def error(self) -> float:
        """The relative error of the outputs of the model, of blocks that have all been left.

        The power of the error over that of the float output, the mean over floats that are no
        states; 0 if there are none.
        """
        given = {name for block in self.blocks for name in block.outputs}
        names = [v.name or "" for v in self.quantized.model.graph.outputs if v.name in given]
        names = [name for name in names if name not in self.samples.state.values()] or names
        names = [name for name in names if self.float.value(name, 0).dtype.kind == "f"]
        totals = np.zeros((len(names), 2))
        for number in range(len(self.samples)):
            found, wanted = (
                self.tensors({name: trajectory.value(name, number) for name in names})
                for trajectory in (self.rounded, self.float)
            )
            for row, name in enumerate(names):
                if found[name].shape == wanted[name].shape:
                    totals[row] += list(map(float, self.powers(name, found, wanted, [number])))
        return float(np.mean(totals[:, 0] / np.maximum(totals[:, 1], 1e-30))) if names else 0.0

    def powers(
        self,
        name: str,
        found: Tensors,
        wanted: Tensors,
        numbers: Sequence[int],
        weighed: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The power of the error of ``name`` and of what is wanted, where positions count.

        Both are sums of squares over the samples ``numbers``, times the importance if ``weighed``.
        """
        noise, power = (found[name] - wanted[name]) ** 2, wanted[name] ** 2
        if self.mask is not None and name in self.lined:
            mask = self.mask
            counted = self._batch(mask, self.samples, numbers).to(noise)
            counted = counted.reshape(counted.shape + (1,) * (noise.dim() - 2))
            noise, power = noise * counted, power * counted
        known = self.importance if weighed else None
        if known is not None and name in known[numbers[0]]:  # or no output of the model reads it
            weight = self._batch(name, known, numbers)
            noise, power = noise * weight, power * weight
        return noise.sum(), power.sum()

    def feeds(self, block: Block, number: int) -> Sample:
        """What ``block`` reads of sample ``number``, rounded; a state is that of the float model.

        Its own state is known only when it has been left.
        """
        state = self.samples.state
        plain = [name for name in block.inputs if name not in state]
        carried = [name for name in block.inputs if name in state]
        return self.rounded.feeds(plain, number) | self.float.feeds(carried, number)

    def tensors(self, feeds: Mapping[str, Any]) -> Tensors:
        """``feeds`` as tensors on the device."""
        device = self.quantized.device
        return {name: rounding.tensor(array, device) for name, array in feeds.items()}

    def _batch(self, name: str, samples: Sequence[Sample], numbers: Sequence[int]) -> Tensor:
        return joined([self.tensors({name: samples[n][name]}) for n in numbers])[name]

    def _runs(self, part: TorchGraph, maps: Maps) -> Callable[[Sample], Sample]:
        def call(feeds: Sample) -> Sample:
            with torch.no_grad():
                found = part(self.tensors(feeds), *maps)
            return {name: tensor.cpu().numpy() for name, tensor in found.items()}

        return call
