"""Optical flow: where what a frame shows is in the next one, and images warped by it.

Flows are float32 [..., 2, H, W]: the displacement (x, y) in pixels of what is at the centre of each
pixel, and the centre of the pixel in column i and row j is at (i, j). So a flow of zero moves
nothing, which the normalized coordinates of ``grid_sample`` do not hold to the last bit.
"""

# pyright: basic, reportMissingImports=false
# The reason: torch and OpenCV are only partly typed, and OpenCV is in the extra ``flow``.

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import CalibrationError


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """What ``image`` [n, c, H, W] shows where ``flow`` [n, 2, H, W] leads to, bilinear.

    With the flow from frame t to t + 1 and an image of frame t + 1, this is an image of frame t.
    Beyond its edge an image repeats its outermost pixels. Differentiable in both.
    """
    height, width = image.shape[-2:]
    columns = torch.arange(width, dtype=flow.dtype, device=flow.device)
    rows = torch.arange(height, dtype=flow.dtype, device=flow.device)
    x = (flow[:, 0] + columns).clamp(0, width - 1)
    y = (flow[:, 1] + rows[:, None]).clamp(0, height - 1)
    left, top = (at.detach().floor() for at in (x, y))
    across, down = (x - left)[:, None], (y - top)[:, None]
    pixels = image.flatten(2)

    def at(column: Tensor, row: Tensor) -> Tensor:
        column, row = column.clamp(max=width - 1), row.clamp(max=height - 1)
        place = (row * width + column).long().flatten(1)[:, None]
        return pixels.gather(2, place.expand(-1, image.shape[1], -1)).unflatten(2, x.shape[1:])

    above = (1 - across) * at(left, top) + across * at(left + 1, top)
    below = (1 - across) * at(left, top + 1) + across * at(left + 1, top + 1)
    return (1 - down) * above + down * below


def consistent(forward: Tensor, backward: Tensor) -> Tensor:
    """Where the way there and back ends at its start: 1 or 0, [n, 1, H, W].

    ``|f(x) + b(x + f(x))|^2 < 0.01 (|f(x)|^2 + |b(x + f(x))|^2) + 0.5``, and x + f(x) is in the
    image. Source: Sundaram, Brox and Keutzer, "Dense Point Trajectories by GPU-Accelerated Large
    Displacement Optical Flow" (ECCV 2010), section 4.
    """
    height, width = forward.shape[-2:]
    back = warp(backward, forward)
    gap, length = ((forward + back).square().sum(1), forward.square().sum(1) + back.square().sum(1))
    x = forward[:, 0] + torch.arange(width, device=forward.device)
    y = forward[:, 1] + torch.arange(height, device=forward.device)[:, None]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    return (inside & (gap < 0.01 * length + 0.5))[:, None].to(forward.dtype)


def dis(frames: Tensor) -> tuple[Tensor, Tensor]:
    """The flow [T - 1, 2, H, W] of each of ``frames`` [T, 3, H, W] to the next, and confidence.

    ``frames`` are RGB in 0..1. The confidence [T - 1, 1, H, W] is 1 where the flow back agrees (see
    consistent), else 0. For the flow to the frame before, give the frames in reverse.

    Source: Kroeger et al., "Fast Optical Flow using Dense Inverse Search" (ECCV 2016), by OpenCV.

    Raises:
        CalibrationError: OpenCV is not installed, or ``frames`` are not at least two colour images
            of 16 pixels a side.
    """
    if frames.ndim != 4 or frames.shape[1] != 3 or len(frames) < 2 or min(frames.shape[2:]) < 16:
        raise CalibrationError(
            "optical flow needs two or more frames [T, 3, H, W] of at least 16x16 pixels, got "
            f"{list(frames.shape)}"
        )
    try:
        import cv2
    except ImportError as error:
        raise CalibrationError("optical flow needs OpenCV: pip install 'qcompile[flow]'") from error
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    grey = ((frames.cpu() * weights).sum(1) * 255).round().clamp(0, 255).byte().numpy()
    method: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    # Each pair from nothing, so that a flow does not depend on those before it.
    pairs = [
        (method.calc(a, b, None), method.calc(b, a, None)) for a, b in itertools.pairwise(grey)
    ]
    forward, backward = (
        torch.stack([torch.from_numpy(pair[i]).permute(2, 0, 1) for pair in pairs]).contiguous()
        for i in (0, 1)
    )
    return forward.to(frames.device), consistent(forward, backward).to(frames.device)
