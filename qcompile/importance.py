"""How much an error at each element of a value is felt at the outputs of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompile import blocks
from qcompile.prefix import Prefix, Tensors
from qcompile.quantized import Map
from qcompile.sequences import Sample
from qcompile.spill import Spill
from qcompile.torch_exec import TorchGraph

# Draws of signs, for each sample. The mean over more of them is no better known than over samples.
DRAWS = 4


def importance(prefix: Prefix, rng: np.random.Generator, draws: int = DRAWS) -> Sequence[Sample]:
    """What an error at each element of what blocks write counts, for each sample.

    The diagonal of ``J^T J``, with ``J`` the derivatives of the outputs, each over the root of its
    power, by that element: the mean of ``(v^T J)^2`` over ``draws`` vectors ``v`` of random signs.
    That is Gauss-Newton for squared errors, and stands for the squared gradients of a loss with
    labels in BRECQ (Li et al., arXiv 2102.05426, equation 10). The float model is differentiated,
    within a frame. The mean over each value is 1; it is 1 everywhere if no output depends on the
    value.
    """
    model, device = prefix.quantized.model, prefix.quantized.device
    whole = blocks.whole(model)
    function = TorchGraph(model, whole.inputs, whole.outputs, device)
    names = {name for block in prefix.blocks for name in block.outputs}
    signs = torch.Generator(device)
    signs.manual_seed(int(rng.integers(1 << 62)))
    spill, state = Spill(), Sample()
    for number in range(len(prefix.samples)):
        values: Tensors = {}

        def kept(name: str, values: Tensors = values) -> Map:
            def keep(x: Tensor) -> Tensor:
                if x.is_floating_point():
                    values[name] = x = x if x.requires_grad else x.requires_grad_()
                return x

            return keep

        results = function(
            prefix.tensors({**state, **prefix.samples[number]}), after={n: kept(n) for n in names}
        )
        state = {
            taken: results[given].detach().cpu().numpy()
            for taken, given in prefix.samples.state.items()
        }
        outputs = [y for y in results.values() if y.requires_grad and y.numel()]
        spill.append(_squared(outputs, values, signs, draws))
    return spill


def _squared(
    outputs: Sequence[Tensor], values: Tensors, signs: torch.Generator, draws: int
) -> Sample:
    """The mean over draws of the squared gradient of a sum of ``outputs`` with random signs."""
    total = {name: torch.zeros_like(x) for name, x in values.items()}
    scales = [1 / torch.clamp(y.detach().square().sum().sqrt(), min=1e-30) for y in outputs]
    for _ in range(draws if outputs else 0):
        drawn = [
            scale * (torch.randint(0, 2, y.shape, generator=signs, device=y.device) * 2 - 1)
            for y, scale in zip(outputs, scales, strict=True)
        ]
        library: Any = torch.autograd  # of which the types know no allow_unused
        gradients: Sequence[Tensor | None] = library.grad(
            outputs, list(values.values()), drawn, retain_graph=draws > 1, allow_unused=True
        )
        for name, gradient in zip(values, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient**2
    found: Sample = {}
    for name, squares in total.items():
        mean = squares.mean()
        even = squares / mean if mean > 0 else torch.ones_like(squares)
        found[name] = even.cpu().numpy()
    return found
