"""The errors that video matting is judged by: MAD, MSE, Grad and dtSSD.

MAD and MSE are over all pixels of all frames. Grad is Rhemann et al., "A Perceptually Motivated
Online Benchmark for Image Matting" (CVPR 2009), and dtSSD Erofeev et al., "Perceptually Motivated
Benchmark for Video Matting" (BMVC 2015), both in the form that Robust Video Matting reports (Lin et
al., arXiv 2108.11515) but for its stretch of alpha to 0..1 before Grad, which would hide errors of
contrast. Tables print MAD and MSE times 1e3, Grad divided by 1e3 and dtSSD times 1e2; what the
functions return is not scaled.

Alphas are [T, ..., H, W] in 0..1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from qcompile.sequences import Sample

Alpha: TypeAlias = npt.NDArray[np.float32]
Float: TypeAlias = npt.NDArray[np.float64]

SIGMA = 1.4  # of the Gaussian that is differentiated, in pixels


@dataclasses.dataclass(frozen=True)
class Errors:
    """The four errors of one clip, or their means over clips."""

    mad: float
    mse: float
    grad: float
    dtssd: float

    def __str__(self) -> str:
        """In the units of the literature's tables."""
        return (
            f"MAD {1e3 * self.mad:.2f}, MSE {1e3 * self.mse:.2f}, Grad {self.grad / 1e3:.3f}, "
            f"dtSSD {1e2 * self.dtssd:.2f}"
        )


def errors(alpha: Alpha, truth: Alpha) -> Errors:
    """All errors of a clip's ``alpha`` against ``truth``, of one shape."""
    return Errors(mad(alpha, truth), mse(alpha, truth), grad(alpha, truth), dtssd(alpha, truth))


def mean(clips: Iterable[Errors]) -> Errors:
    """The mean of each error over ``clips``, of which there must be one."""
    rows = np.array([dataclasses.astuple(each) for each in clips])
    return Errors(*map(float, rows.mean(0)))


def mad(alpha: Alpha, truth: Alpha) -> float:
    """The mean of ``|alpha - truth|``."""
    return float(np.abs(_difference(alpha, truth)).mean())


def mse(alpha: Alpha, truth: Alpha) -> float:
    """The mean of ``(alpha - truth)^2``."""
    return float(np.square(_difference(alpha, truth)).mean())


def grad(alpha: Alpha, truth: Alpha) -> float:
    """The sum over pixels of ``(|G * alpha| - |G * truth|)^2``, averaged over frames.

    ``|G * a|`` is the length of the gradient by two filters, the derivative of a Gaussian in one
    direction and the Gaussian in the other, each of norm 1; edges are repeated.
    """
    _difference(alpha, truth)
    frames = zip(_frames(alpha), _frames(truth), strict=True)
    return float(np.mean([np.square(_steepness(a) - _steepness(b)).sum() for a, b in frames]))


def dtssd(alpha: Alpha, truth: Alpha) -> float:
    """The root mean square of ``d alpha/dt - d truth/dt``, averaged over pairs of frames.

    0 for a single frame.
    """
    change = np.diff(_difference(alpha, truth), axis=0)
    if not len(change):
        return 0.0
    return float(np.sqrt(np.square(change).reshape(len(change), -1).mean(1)).mean())


def mad_of_runs(runs: Iterable[tuple[Sample, Sample]]) -> float:
    """The MAD of the output ``alpha`` against the ``labels`` of each sample, for ``--metric``."""
    found = [mad(outputs["alpha"], sample["labels"]) for sample, outputs in runs]
    return float(np.mean(found))


mad_of_runs.lower_is_better = True  # pyright: ignore[reportFunctionMemberAccess]


def _difference(alpha: Alpha, truth: Alpha) -> Float:
    if alpha.shape != truth.shape:
        raise ValueError(f"alpha has shape {alpha.shape}, but the truth {truth.shape}")
    return alpha.astype(np.float64) - truth


def _frames(alpha: Alpha) -> Float:
    return alpha.reshape(-1, *alpha.shape[-2:]).astype(np.float64)


def _steepness(frame: Float) -> Float:
    """The length of the gradient of ``frame`` [H, W]."""
    # Beyond this distance the Gaussian is below a hundredth.
    reach = math.ceil(SIGMA * math.sqrt(-2 * math.log(math.sqrt(2 * math.pi) * SIGMA * 0.01)))
    at = np.arange(-reach, reach + 1)
    smooth = np.exp(-np.square(at) / (2 * SIGMA**2))
    slope = at * smooth
    smooth, slope = (each / np.linalg.norm(each) for each in (smooth, slope))
    filters: Any = ndimage  # partly untyped

    def along(values: Float, weights: Float, axis: int) -> Float:
        return filters.correlate1d(values, weights, axis, mode="nearest")

    down = along(along(frame, slope, 0), smooth, 1)
    right = along(along(frame, smooth, 0), slope, 1)
    return np.hypot(down, right)
