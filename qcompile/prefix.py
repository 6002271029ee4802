"""A model run twice, in float and as it is quantized so far, block after block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile import ports, rounding
from qcompile.blocks import Block
from qcompile.quantized import Maps, Quantized
from qcompile.sequences import Sample, Samples
from qcompile.torch_exec import TorchGraph
from qcompile.trajectory import Trajectory

Tensors = dict[str, Tensor]


class Prefix:
    """The float and the rounded trajectory of ``samples`` through ``blocks``.

    A block is entered (its float outputs are computed), fitted by the caller, who changes what
    ``quantized`` holds, and left (its rounded outputs are computed).

    Args:
        quantized: the model, and where what is found is kept.
        blocks: see ``blocks.partition``.
        samples: what to run.
        mask: the input that is 0 where a position does not count, or None.
    """

    def __init__(
        self,
        quantized: Quantized,
        blocks: Sequence[Block],
        samples: Samples,
        mask: str | None = None,
    ) -> None:
        self.quantized = quantized
        self.blocks = blocks
        self.samples = samples
        self.mask = mask
        self.lined = ports.lined_up(quantized.model, mask) if mask else set[str]()
        self.float = Trajectory(samples)
        self.rounded = Trajectory(samples)
        self.entered = {value.name or "" for value in quantized.model.graph.inputs}

    def enter(self, number: int) -> TorchGraph:
        """Run block ``number`` in float, and return it as a function."""
        block = self.blocks[number]
        part = self.function(block, block.outputs)
        self.float.run(block, self._runs(part, ({}, {})))
        return part

    def leave(self, number: int, part: TorchGraph) -> None:
        """Run block ``number`` as it is rounded now, and forget what no later block reads."""
        block = self.blocks[number]
        self.rounded.run(block, self._runs(part, self.quantized.maps(block)))
        outputs = [value.name or "" for value in self.quantized.model.graph.outputs]
        for trajectory in (self.float, self.rounded):
            trajectory.release(self.blocks[number + 1 :], outputs)

    def function(self, block: Block, outputs: Sequence[str]) -> TorchGraph:
        """``outputs``, computed of what ``block`` reads."""
        quantized = self.quantized
        return TorchGraph(quantized.model, block.inputs, outputs, quantized.device)

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

    def _runs(self, part: TorchGraph, maps: Maps) -> Callable[[Sample], Sample]:
        def call(feeds: Sample) -> Sample:
            with torch.no_grad():
                found = part(self.tensors(feeds), *maps)
            return {name: tensor.cpu().numpy() for name, tensor in found.items()}

        return call
