"""Rounding as torch functions with a gradient, and the parameters that fits find.

torch is imported here: only what fits by gradients imports this module.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qcompile.numerics import Codes, Floats, Grid

# The stretch of the rectified sigmoid: AdaRound (Nagel et al., arXiv 2004.10568), equation 23.
_GAMMA, _ZETA = -0.1, 1.1


def tensor(array: npt.NDArray[Any], device: str) -> Tensor:
    """``array`` on ``device``."""
    library: Any = torch  # partly untyped
    return library.from_numpy(np.require(array, requirements=["C", "W"])).to(device)


class Activation:
    """Rounds an activation on a grid whose range is ``exp(log_factor)`` times the calibrated one.

    ``y = s (clip(round((x - m) / s) + z, low, high) - z) + m``, with ``s`` and ``m`` the scale and
    the middle times the factor.
    """

    def __init__(self, grid: Grid, middle: float, log_factor: Tensor) -> None:
        low, high = grid.format.low - int(grid.zero_point), grid.format.high - int(grid.zero_point)
        self._bounds = float(low), float(high)
        self._scale, self._middle = float(grid.scale), middle
        self._log_factor = log_factor

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` of any shape, rounded."""
        library: Any = _Rounded  # untyped
        return library.apply(x, self._log_factor, self._scale, self._middle, *self._bounds)


class _Rounded(torch.autograd.Function):
    """The gradient passes straight through where nothing is clipped, and is 0 where it is.

    To the logarithm of the factor it is ``y - x`` where nothing is clipped, else ``y``: that of LSQ
    (Esser et al., arXiv 1902.08153) in ``s`` and ``m`` together. LSQ scales it by the number of
    elements, which Adam does not see.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, log: Tensor, scale: float, middle: float, low: float, high: float
    ) -> Tensor:
        factor = float(torch.exp(log.detach()))
        scale, middle = scale * factor, middle * factor
        codes = torch.round((x - middle) / scale) if middle else torch.round(x / scale)
        inside = (codes >= low) & (codes <= high)
        y = codes.clamp_(low, high).mul_(scale)
        y = y.add_(middle) if middle else y
        ctx.save_for_backward(inside, x, y) if log.requires_grad else ctx.save_for_backward(inside)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        inside, *rest = ctx.saved_tensors
        through = gradients[0] * inside
        if not rest:
            return through, None, None, None, None, None
        x, y = rest
        log = (gradients[0] * y).sum() - (through * x).sum()
        return through, log, None, None, None, None


class Weight:
    """A weight ``w`` that is rounded down or up as ``logits`` say, on steps of ``scale``.

    Soft: ``s clip(floor(w / s) + h(V), low, high)`` with ``h(V) = clip(1.2 sigmoid(V) - 0.1, 0,
    1)`` (AdaRound). Hard: ``h`` is 1 where ``V >= 0``, else 0. It starts where ``soft`` is ``w``
    itself; where ``codes`` differ from the nearest, on their side of the middle.
    """

    def __init__(
        self, weight: Floats, scale: Floats, codes: Codes, low: int, high: int, device: str
    ) -> None:
        units = weight.astype(np.float64) / scale
        # Codes that moved by more than a step to make good for others stay one of the two.
        base = np.where(codes > units, codes - 1, codes)
        part = np.clip(units - base, 0.0, 1.0)
        up = codes > base
        part = np.where(up, np.maximum(part, 0.51), np.minimum(part, 0.49))
        inner = np.clip((part - _GAMMA) / (_ZETA - _GAMMA), 1e-4, 1 - 1e-4)
        self._scale = tensor(scale, device)
        self._base = tensor(base.astype(np.float32), device)
        self._low, self._high = low, high
        logits = np.log(inner / (1 - inner)).astype(np.float32)
        self.logits = tensor(logits, device).requires_grad_()

    def part(self) -> Tensor:
        """``h(V)``: 0 is down, 1 is up."""
        return torch.clamp(torch.sigmoid(self.logits) * (_ZETA - _GAMMA) + _GAMMA, 0.0, 1.0)

    def soft(self) -> Tensor:
        """The weight with a gradient to the logits."""
        return self._scale * torch.clamp(self._base + self.part(), self._low, self._high)

    def undecided(self, exponent: float) -> Tensor:
        """The mean of ``1 - |2 h - 1| ** exponent``: 0 where every element is down or up."""
        return torch.mean(1 - torch.abs(2 * self.part() - 1) ** exponent)

    def codes(self) -> Codes:
        """The codes of the weight, hard."""
        with torch.no_grad():
            up = (self.logits >= 0).to(self._base.dtype)
            found = torch.clamp(self._base + up, self._low, self._high)
        return found.cpu().numpy().astype(np.int32)


class Scaled:
    """A weight with ``exp(log)`` times its scales, a number for each; ``codes`` stay."""

    def __init__(self, grid: Grid, codes: Codes, device: str) -> None:
        self.codes = codes
        self._each, _ = grid.each(codes.shape)
        self._blocks = grid.blocks(codes.shape)
        self._rounded = tensor(grid.dequantize(codes), device)
        scales = grid.spread(grid.scale, codes.ndim)
        self.log = torch.zeros(scales.shape, device=device).requires_grad_()

    def soft(self) -> Tensor:
        """The weight with a gradient to the logarithms."""
        blocks = self._rounded.reshape(self._blocks) * torch.exp(self.log)
        return blocks.reshape(self._rounded.shape)

    def scale(self) -> Floats:
        """The scale of each element of the weight."""
        factor = np.exp(self.log.detach().cpu().numpy())
        each = np.broadcast_to(factor, self._blocks).reshape(self.codes.shape)
        return (self._each * each).astype(np.float32)


def cosine(progress: float) -> float:
    """From 1 to 0 along half a cosine, for ``progress`` from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))
