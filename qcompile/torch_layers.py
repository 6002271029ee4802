"""Layers: convolution, pooling, normalization, resizing, sampling."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.torch_table import Call, Table, along, from_array, integers, norm, numbers, wide

TABLE = Table()

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d
}  # fmt: skip
_MAX_POOL: dict[int, Callable[..., tuple[Tensor, Tensor]]] = {
    1: F.max_pool1d_with_indices, 2: F.max_pool2d_with_indices, 3: F.max_pool3d_with_indices
}  # fmt: skip
_MEAN_POOL: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


# -- windows ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Window:
    """A window over spatial axes: its kernel, steps, and how far it reaches around the input.

    ``extra`` is what ``ceil_mode`` adds behind the padding, so that the last window fits.
    """

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    before: list[int]
    after: list[int]
    extra: list[int]

    @staticmethod
    def of(call: Call, sizes: Sequence[int], kernel: Sequence[int]) -> Window:
        """The window that the attributes say for an input of spatial ``sizes``."""
        rank = len(sizes)
        strides = call.ints("strides") or [1] * rank
        dilations = call.ints("dilations") or [1] * rank
        spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        pads = call.ints("pads") or [0] * (2 * rank)
        before, after = pads[:rank], pads[rank:]
        auto = call.text("auto_pad", "NOTSET")
        pool = "Pool" in call.node.op_type
        if auto.startswith("SAME") and pool and set(dilations) != {1}:
            call.refuse(f"auto_pad {auto} with dilations")  # runtimes pad otherwise than ONNX says
        if auto == "VALID":
            before = after = [0] * rank
        elif auto.startswith("SAME"):
            totals = [
                (-(-size // step) - 1) * step + span - size
                for size, step, span in zip(sizes, strides, spans, strict=True)
            ]
            # Windows with room between them let a pool skip what is before the first.
            before, after = _halves(totals if pool else [max(t, 0) for t in totals], auto)
        extra = [0] * rank
        if call.int("ceil_mode", 0):
            for i, (size, step, span) in enumerate(zip(sizes, strides, spans, strict=True)):
                room = size + before[i] + after[i] - span
                count = -(-room // step) + 1
                if (count - 1) * step >= size + before[i]:  # it would begin behind the input
                    count -= 1
                extra[i] = max((count - 1) * step - room, 0)
        return Window(list(kernel), strides, dilations, before, after, extra)

    @property
    def even(self) -> bool:
        """Whether torch pads so by itself: as much before as after, and nothing less."""
        return self.before == self.after and not any(self.extra) and min(self.before) >= 0

    def pad(self, x: Tensor, value: float, extra: bool = True) -> Tensor:
        """``x`` with ``value`` around."""
        order: list[int] = []
        for first, last, more in zip(
            reversed(self.before), reversed(self.after), reversed(self.extra), strict=True
        ):
            order += [first, last + (more if extra else 0)]
        return F.pad(x, order, value=value) if any(order) else x


def _halves(totals: Sequence[int], auto: str) -> tuple[list[int], list[int]]:
    """Padding before and after; the odd one goes before for SAME_LOWER."""
    before = [int((total + (auto == "SAME_LOWER")) / 2) for total in totals]
    return before, [total - first for total, first in zip(totals, before, strict=True)]


@TABLE.entry("Conv")
def conv(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """In one to three dimensions, in groups."""
    rank = x.dim() - 2
    if rank not in _CONV:
        call.refuse(f"{rank} spatial dimensions")
    window = Window.of(call, x.shape[2:], weight.shape[2:])
    padded, padding = (x, window.before) if window.even else (window.pad(x, 0.0), 0)
    group = call.int("group", 1)
    return _CONV[rank](padded, weight, bias, window.strides, padding, window.dilations, group)


@TABLE.entry("ConvTranspose")
def conv_transpose(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The transposed convolution without padding, of which the padding is cropped."""
    rank = x.dim() - 2
    if rank not in _TRANSPOSED:
        call.refuse(f"{rank} spatial dimensions")
    strides = call.ints("strides") or [1] * rank
    dilations = call.ints("dilations") or [1] * rank
    more = call.ints("output_padding") or [0] * rank
    pads = call.ints("pads") or [0] * (2 * rank)
    before, after = pads[:rank], pads[rank:]
    full = [
        (size - 1) * step + (k - 1) * d + 1
        for size, step, k, d in zip(x.shape[2:], strides, weight.shape[2:], dilations, strict=True)
    ]
    auto, wanted = call.text("auto_pad", "NOTSET"), call.ints("output_shape")
    if auto == "VALID":
        before = after = [0] * rank
    elif auto.startswith("SAME") and wanted is None:
        wanted = [
            min(size * step, f + m)
            for size, step, f, m in zip(x.shape[2:], strides, full, more, strict=True)
        ]
    if wanted is None:
        wanted = [f + m - b - a for f, m, b, a in zip(full, more, before, after, strict=True)]
    else:
        wanted = wanted[-rank:]
        totals = [max(f + m - w, 0) for f, m, w in zip(full, more, wanted, strict=True)]
        before, after = _halves(totals, auto if auto == "SAME_UPPER" else "SAME_LOWER")
    group = call.int("group", 1)
    out = _TRANSPOSED[rank](x, weight, None, strides, 0, 0, group, dilations)
    order = [
        n for i in reversed(range(rank)) for n in (-before[i], wanted[i] + before[i] - full[i])
    ]
    out = F.pad(out, order) if any(order) else out
    return out if bias is None else out + along(out, bias, 1)


# -- pooling ------------------------------------------------------------------------------------


@TABLE.entry("MaxPool")
def max_pool(call: Call, x: Tensor):
    """The maximum of each window, and its place in the whole input if asked for."""
    kernel = call.ints("kernel_shape") or []
    rank = len(kernel)
    window = Window.of(call, x.shape[2:], kernel)
    native = window.even and all(2 * p <= k for p, k in zip(window.before, kernel, strict=True))
    padded, padding = (x, window.before) if native else (window.pad(x, -math.inf), [0] * rank)
    values, places = _MAX_POOL[rank](padded, kernel, window.strides, padding, window.dilations)
    if not call.wants(1):
        return values, None
    if call.int("storage_order", 0):
        call.refuse("storage_order 1")
    # torch counts within one plane, of what was padded by hand.
    index, scale = torch.zeros_like(places), 1
    for axis in reversed(range(rank)):
        size = padded.shape[2 + axis]
        shift = 0 if native else window.before[axis]
        index, places = index + (places % size - shift) * scale, places // size
        scale *= x.shape[2 + axis]
    planes = torch.arange(x.shape[0] * x.shape[1], device=x.device) * scale
    return values, index + planes.reshape(*x.shape[:2], *[1] * rank)


def _window_sums(window: Window, x: Tensor) -> Tensor:
    """The sum of each window of each channel of ``x``, which is padded already."""
    rank = len(window.kernel)
    planes = x.reshape(-1, 1, *x.shape[2:])
    ones = torch.ones(1, 1, *window.kernel, dtype=x.dtype, device=x.device)
    summed = _CONV[rank](planes, ones, None, window.strides, 0, window.dilations)
    return summed.reshape(*x.shape[:2], *summed.shape[2:])


@TABLE.entry("AveragePool")
def average_pool(call: Call, x: Tensor) -> Tensor:
    """The mean of each window, of the input alone or with its padding."""
    return _average(call, wide(x)).to(x.dtype)  # torch has no pool3d in float16 on a CPU


def _average(call: Call, x: Tensor) -> Tensor:
    kernel = call.ints("kernel_shape") or []
    window = Window.of(call, x.shape[2:], kernel)
    padded = bool(call.int("count_include_pad", 0))
    halves = all(2 * p <= k for p, k in zip(window.before, kernel, strict=True))
    if window.even and halves and set(window.dilations) == {1}:
        pool = _MEAN_POOL[len(kernel)]
        return pool(x, kernel, window.strides, window.before, False, padded)
    counted = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype, device=x.device)
    if padded:  # what ceil_mode adds is never counted
        behind = dataclasses.replace(window, before=[0] * len(kernel), after=[0] * len(kernel))
        counted = behind.pad(window.pad(counted, 1.0, extra=False), 0.0)
    else:
        counted = window.pad(counted, 0.0)
    return _window_sums(window, window.pad(x, 0.0)) / _window_sums(window, counted)


@TABLE.entry("LpPool")
def lp_pool(call: Call, x: Tensor) -> Tensor:
    """The p-norm of each window."""
    window = Window.of(call, x.shape[2:], call.ints("kernel_shape") or [])
    p = call.int("p", 2)
    return _window_sums(window, window.pad(x.abs() ** p, 0.0)) ** (1.0 / p)


def _spatial(x: Tensor) -> list[int]:
    return list(range(2, x.dim()))


@TABLE.entry("GlobalAveragePool")
def global_average_pool(_: Call, x: Tensor) -> Tensor:
    """The mean of each channel."""
    return x.mean(_spatial(x), keepdim=True)


@TABLE.entry("GlobalMaxPool")
def global_max_pool(_: Call, x: Tensor) -> Tensor:
    """The maximum of each channel."""
    return x.amax(_spatial(x), keepdim=True)


@TABLE.entry("GlobalLpPool")
def global_lp_pool(call: Call, x: Tensor) -> Tensor:
    """The p-norm of each channel."""
    p = call.int("p", 2)
    return (x.abs() ** p).sum(_spatial(x), keepdim=True) ** (1.0 / p)


# -- normalization ------------------------------------------------------------------------------


@TABLE.entry("BatchNormalization")
def batch_norm(
    call: Call, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    """scale (x - mean) / sqrt(variance + epsilon) + bias, with gradients to all five."""
    if call.int("training_mode", 0):
        call.refuse("training_mode")
    factor = scale * torch.rsqrt(variance + call.float("epsilon", 1e-5))
    shift = bias - mean * factor
    if x.dim() == 1:  # one channel
        return (x * factor + shift).to(x.dtype)
    return torch.addcmul(along(x, shift, 1), x, along(x, factor, 1)).to(x.dtype)


@TABLE.entry("InstanceNormalization")
def instance_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Each channel of each sample by its own mean and variance."""
    return F.group_norm(x, x.shape[1], scale, bias, call.float("epsilon", 1e-5))


@TABLE.entry("GroupNormalization")
def group_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Groups of channels by their own mean and variance."""
    groups = call.int("num_groups", 1)
    if call.opset < 21:  # one scale a group
        each = x.shape[1] // groups
        scale, bias = scale.repeat_interleave(each), bias.repeat_interleave(each)
    return F.group_norm(x, groups, scale, bias, call.float("epsilon", 1e-5))


@TABLE.entry("LayerNormalization")
def layer_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor | None = None):
    """The axes from ``axis`` on by their own mean and variance, scaled and shifted."""
    axes = _last_axes(call, x)
    epsilon, sizes = call.float("epsilon", 1e-5), x.shape[axes[0] :]
    fits = scale.shape == sizes and (bias is None or bias.shape == sizes)
    if fits and scale.dtype == x.dtype and not (call.wants(1) or call.wants(2)):
        return F.layer_norm(x, sizes, scale, bias, epsilon), None, None
    stashed = wide(x)
    mean = stashed.mean(axes, keepdim=True)
    centred = stashed - mean
    inverse = torch.rsqrt(centred.square().mean(axes, keepdim=True) + epsilon)
    normal = centred * inverse * scale
    return (normal if bias is None else normal + bias).to(x.dtype), mean, inverse


@TABLE.entry("RMSNormalization")
def rms_norm(call: Call, x: Tensor, scale: Tensor) -> Tensor:
    """The axes from ``axis`` on by the root of their mean square."""
    axes = _last_axes(call, x)
    stashed = wide(x)
    power = stashed.square().mean(axes, keepdim=True) + call.float("epsilon", 1e-5)
    return (stashed * torch.rsqrt(power)).to(x.dtype) * scale


def _last_axes(call: Call, x: Tensor) -> list[int]:
    return list(range(call.int("axis", -1) % x.dim(), x.dim()))


@TABLE.entry("LpNormalization")
def lp_norm(call: Call, x: Tensor) -> Tensor:
    """Along one axis by its p-norm; zero where that is zero."""
    size = norm(x, [call.int("axis", -1)], True, call.int("p", 2))
    return x / torch.where(size == 0, torch.ones_like(size), size)


@TABLE.entry("MeanVarianceNormalization")
def mean_variance_norm(call: Call, x: Tensor) -> Tensor:
    """The axes by their own mean and standard deviation."""
    axes = call.ints("axes") or [0, 2, 3]
    centred = x - x.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True).sqrt() + 1e-9)


@TABLE.entry("LRN")
def local_response_norm(call: Call, x: Tensor) -> Tensor:
    """Each element by the power of the channels around."""
    size = call.int("size", 1)
    around = [0, 0] * (x.dim() - 2) + [(size - 1) // 2, size // 2]
    power = F.pad(x.square(), around).unfold(1, size, 1).sum(-1)
    alpha, beta = call.float("alpha", 1e-4), call.float("beta", 0.75)
    return x / (call.float("bias", 1.0) + alpha / size * power) ** beta


# -- resizing and sampling ----------------------------------------------------------------------

Floats = npt.NDArray[np.float32]


@TABLE.entry("Resize", host=(1, 2, 3))
def resize(
    call: Call,
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Tensor:
    """One axis after the other: a weighted sum of a few elements for each place."""
    chosen = call.ints("axes") or list(range(x.dim()))
    chosen = [axis % x.dim() for axis in chosen]
    entered = [x.shape[axis] for axis in chosen]
    if sizes is not None and sizes.numel():
        wanted = integers(sizes) or []
        factors = [w / e for w, e in zip(wanted, entered, strict=True)]
        policy = call.text("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            factor = min(factors) if policy == "not_larger" else max(factors)
            factors = [factor] * len(factors)
            wanted = [math.floor(factor * e + 0.5) for e in entered]
    elif scales is not None:
        factors = numbers(scales) or []
        wanted = [math.floor(f * e) for f, e in zip(factors, entered, strict=True)]
    else:
        call.refuse("neither scales nor sizes")
    crop = None if roi is None or not roi.numel() else numbers(roi)
    smooth = call.int("antialias", 0)
    if wanted == entered and crop is None:
        return x  # whatever the scales say, which may be 1.1
    for i, axis in enumerate(chosen):
        if wanted[i] == entered[i] and crop is None and (factors[i] == 1.0 or smooth):
            continue
        ends = (0.0, 1.0) if crop is None else (crop[i], crop[len(chosen) + i])
        places = _coordinates(call, entered[i], wanted[i], factors[i], ends)
        outside = (places < 0) | (places > entered[i] - 1)
        if call.text("mode", "nearest") == "nearest":
            x = x.index_select(axis, _nearest(call, places, entered[i]).to(x.device))
        else:
            x = _interpolate(call, x, axis, places, factors[i])
        if call.text("coordinate_transformation_mode", "") == "tf_crop_and_resize":
            beyond = along(x, from_array(outside).to(x.device), axis)
            x = torch.where(beyond, call.float("extrapolation_value", 0.0), x)
    return x


def _coordinates(
    call: Call, entered: int, wanted: int, factor: float, ends: tuple[float, float]
) -> Floats:
    """Where the places of the output lie in the input, in float32 as runtimes compute it."""
    mode = call.text("coordinate_transformation_mode", "half_pixel")
    place, scale = np.arange(wanted, dtype=np.float32), np.float32(factor)
    half = np.float32(0.5)
    if mode == "asymmetric":
        return place / scale
    if mode == "align_corners":
        if wanted == 1:
            return np.zeros_like(place)
        return place * np.float32(entered - 1) / np.float32(wanted - 1)
    if mode == "pytorch_half_pixel" and wanted == 1:
        return np.zeros_like(place)
    if mode == "half_pixel_symmetric":
        # The shift is in float32, the rest in float64, to the bit as the runtime has it.
        reached = np.float32(wanted) / (scale * np.float32(entered))
        shift = np.float32(entered) / np.float32(2) * (np.float32(1) - reached)
        exact = (place.astype(np.float64) + 0.5) / float(scale)
        return (float(shift) + exact - 0.5).astype(np.float32)
    if mode == "tf_crop_and_resize":
        start, end = np.float32(ends[0]), np.float32(ends[1])
        last = np.float32(entered - 1)
        if wanted == 1:
            return (half * (start + end) * last).reshape(1).astype(np.float32)
        return start * last + place * (end - start) * last / np.float32(wanted - 1)
    return (place + half) / scale - half


def _nearest(call: Call, places: Floats, entered: int) -> Tensor:
    mode = call.text("nearest_mode", "round_prefer_floor")
    if mode == "floor":
        found = np.floor(places)
    elif mode == "ceil":
        found = np.ceil(places)
    elif mode == "round_prefer_ceil":
        found = np.floor(places + np.float32(0.5))
    else:
        found = np.ceil(places - np.float32(0.5))
    return from_array(np.clip(found, 0, entered - 1).astype(np.int64))


def _interpolate(call: Call, x: Tensor, axis: int, places: Floats, factor: float) -> Tensor:
    """A sum over the elements within the reach of the filter, of which the weights sum to 1."""
    size = x.shape[axis]
    cubic = call.text("mode", "") == "cubic"
    shrink = min(factor, 1.0) if call.int("antialias", 0) else 1.0
    reach = math.ceil((2 if cubic else 1) / shrink)
    floor = np.floor(places).astype(np.int64)
    around = floor + np.arange(1 - reach, 1 + reach)[:, None]  # [taps, places]
    distance = np.abs(around - places.astype(np.float64)) * shrink
    weights = _cubic(distance, call.float("cubic_coeff_a", -0.75)) if cubic else 1.0 - distance
    weights = np.where(distance < (2 if cubic else 1), weights, 0.0)
    if call.int("exclude_outside", 0):
        weights = np.where((around >= 0) & (around < size), weights, 0.0)
    weights = weights / weights.sum(0)
    around = np.clip(around, 0, size - 1)
    return functools.reduce(
        torch.add,
        (
            x.index_select(axis, from_array(index).to(x.device))
            * along(x, from_array(weight).to(x), axis)
            for index, weight in zip(around, weights, strict=True)
        ),
    )


def _cubic(t: npt.NDArray[np.float64], a: float) -> npt.NDArray[np.float64]:
    """The cubic convolution kernel at distances below 2 (Keys, 1981)."""
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return np.where(t <= 1, near, far)


_SAMPLING = {"linear": "bilinear", "cubic": "bicubic"}


@TABLE.entry("GridSample")
def grid_sample(call: Call, x: Tensor, grid: Tensor) -> Tensor:
    """Elements at real coordinates between -1 and 1."""
    mode = call.text("mode", "bilinear")
    corners = bool(call.int("align_corners", 0))
    padding = call.text("padding_mode", "zeros")
    method = _SAMPLING.get(mode, mode)
    return F.grid_sample(wide(x), wide(grid), method, padding, corners).to(x.dtype)
