"""Number formats: grids, range search, quantize, dequantize, pack.

Every format of qcompile lives here; simulation and packing use these functions, so that what is
measured is what is written. The grid is that of the ONNX operators QuantizeLinear and
DequantizeLinear: ``code = clip(rint(x / scale) + zero_point, low, high)`` with ties to even, in
float32, and ``value = (code - zero_point) * scale``.

Scales and zero points have the shape that the operators want: ``()`` for one a tensor, ``[C]``
along ``axis`` for one a channel, and the shape of the array with ``axis`` divided by ``block`` for
one a block.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.errors import PassError

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int32]
Number = TypeVar("Number", np.float32, np.int32)
RangeMethod = Literal["minmax", "percentile", "mse", "pnorm", "output"]
RANGE_METHODS: tuple[str, ...] = get_args(RangeMethod)
# Activations have histograms; entropy needs one.
ActivationMethod = Literal["minmax", "percentile", "mse", "pnorm", "entropy"]
ACTIVATION_METHODS: tuple[str, ...] = get_args(ActivationMethod)

# The smallest normal float32: a smaller scale would turn a division into infinities.
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
# The shrink factors that the range searches try; 1 first, so that a tie keeps the full range.
SHRINKS = tuple(float(s) for s in np.linspace(1.0, 0.3, 71))
# Numbers that stay in a cache while all shrinks are tried: three times as fast as all at once.
_CACHED = 1 << 16


@dataclasses.dataclass(frozen=True)
class IntFormat:
    """A grid of whole numbers of ``bits`` (2 to 8, 16), signed (two's complement) or unsigned."""

    bits: int
    signed: bool

    @property
    def name(self) -> str:
        """The text form, such as ``int8`` or ``uint4``."""
        return f"{'' if self.signed else 'u'}int{self.bits}"

    @property
    def low(self) -> int:
        """The smallest code."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        """The largest code."""
        return (1 << (self.bits - (1 if self.signed else 0))) - 1

    @property
    def stored(self) -> IntFormat:
        """The format that holds these codes in a file: 4 bits up to 4, 8 up to 8, else 16."""
        return IntFormat(next(b for b in (4, 8, 16) if self.bits <= b), self.signed)

    @property
    def dtype(self) -> ir.DataType:
        """The ONNX type that the codes are stored in."""
        return ir.DataType[self.stored.name.upper()]

    def __str__(self) -> str:
        return self.name


def parse_format(text: str) -> IntFormat:
    """Read ``int2`` to ``int8``, ``int16``, or those of ``uint``; raise PassError for the rest."""
    match = re.fullmatch(r"(u?)int([2-8]|16)", text)
    if match is None:
        raise PassError(
            f"unknown format {text!r}; known are int2 to int8 and int16, and those of uint"
        )
    return IntFormat(int(match[2]), not match[1])


@dataclasses.dataclass(frozen=True)
class Grid:
    """An affine grid: a format with its scale, zero point and granularity."""

    format: IntFormat
    scale: Floats
    zero_point: Codes
    axis: int | None = None
    block: int | None = None

    def quantize(self, array: Floats) -> Codes:
        """The codes of ``array``, in its shape, as int32."""
        # In place, because one weight of a large model is most of the memory there is.
        blocks = self.blocks(array.shape)
        with np.errstate(over="ignore"):
            codes = array.astype(np.float32, copy=False).reshape(blocks) / self.spread(
                self.scale, array.ndim
            )
        np.rint(codes, out=codes)
        if self.zero_point.any():
            codes += self.spread(self.zero_point, array.ndim)
        np.clip(codes, self.format.low, self.format.high, out=codes)
        return codes.astype(np.int32).reshape(array.shape)

    def dequantize(self, codes: Codes) -> Floats:
        """The values that ``codes`` stand for, as float32."""
        split = codes.reshape(self.blocks(codes.shape))
        centred = (
            split - self.spread(self.zero_point, codes.ndim) if self.zero_point.any() else split
        )
        values = centred.astype(np.float32)
        values *= self.spread(self.scale, codes.ndim)
        return values.reshape(codes.shape)

    def round_trip(self, array: Floats) -> Floats:
        """``array`` after quantize and dequantize."""
        return self.dequantize(self.quantize(array))

    def each(self, shape: tuple[int, ...]) -> tuple[Floats, Codes]:
        """Scale and zero point of each element of an array of ``shape``, as views."""
        blocks = self.blocks(shape)
        scale = np.broadcast_to(self.spread(self.scale, len(shape)), blocks)
        zero = np.broadcast_to(self.spread(self.zero_point, len(shape)), blocks)
        return scale.reshape(shape), zero.reshape(shape)

    def rescaled(self, each: Floats) -> Grid:
        """This grid with the scale of each element of an array, which ``each`` would give."""
        rows, shape = to_rows(each, self.axis, self.block)
        return dataclasses.replace(self, scale=np.ascontiguousarray(rows[:, 0]).reshape(shape))

    def blocks(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """``shape`` with the axis of the blocks split into their number and ``block``."""
        if self.axis is None or self.block is None:
            return shape
        axis = self.axis % len(shape)
        return (*shape[:axis], shape[axis] // self.block, self.block, *shape[axis + 1 :])

    def spread(self, each: npt.NDArray[Number], rank: int) -> npt.NDArray[Number]:
        """A number for each tensor, channel or block so that it broadcasts against ``_blocks``."""
        if self.axis is None:
            return each
        if self.block is None:
            axis = self.axis % rank
            return each.reshape([-1 if i == axis else 1 for i in range(rank)])
        return np.expand_dims(each, self.axis % rank + 1)


def to_rows(array: Floats, axis: int | None, block: int | None) -> tuple[Floats, tuple[int, ...]]:
    """The elements that share a scale as rows [groups, n], and the shape of the scales."""
    if axis is None:
        return array.reshape(1, -1), ()
    axis %= array.ndim
    if block is None:
        return np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1), (array.shape[axis],)
    if block < 1 or array.shape[axis] % block:
        raise PassError(
            f"block {block} does not divide axis {axis} of a weight of shape {list(array.shape)}"
        )
    shape = list(array.shape)
    shape[axis] //= block
    split = array.reshape(*array.shape[:axis], shape[axis], block, *array.shape[axis + 1 :])
    return np.moveaxis(split, axis + 1, -1).reshape(-1, block), tuple(shape)


def affine(
    low: npt.ArrayLike, high: npt.ArrayLike, form: IntFormat, symmetric: bool
) -> tuple[Floats, Codes]:
    """Scale and zero point of a grid that covers [low, high] and holds zero exactly.

    Symmetric: zero point 0, and the scale is the larger magnitude over the largest code (so an
    int8 grid uses -127 to 127). Otherwise the whole range of codes is used. ``low`` and ``high``
    have any one shape, which is that of the result.
    """
    low = np.minimum(np.asarray(low, np.float64), 0.0)
    high = np.maximum(np.asarray(high, np.float64), 0.0)
    span = np.maximum(-low, high) if symmetric else high - low
    steps = form.high if symmetric else form.high - form.low
    # A constant zero has no range; any scale represents it, and 1 keeps later divisions tame.
    scale = np.where(span > 0, np.maximum(span / steps, SMALLEST_SCALE), 1.0).astype(np.float32)
    if symmetric:
        return scale, np.zeros(scale.shape, np.int32)
    zero = np.clip(form.low - np.rint(low / scale.astype(np.float64)), form.low, form.high)
    return scale, zero.astype(np.int32)


def search_range(
    rows: Floats,
    form: IntFormat,
    symmetric: bool,
    method: RangeMethod = "minmax",
    percentile: float = 99.99,
    power: float = 2.4,
    importance: Floats | None = None,
) -> tuple[Floats, Floats]:
    """The range of each row of ``rows`` [groups, n] as (low [groups], high [groups]).

    * ``minmax``: the extremes.
    * ``percentile``: the two-sided ``percentile``.
    * ``mse``: the extremes shrunk by the factor that minimises the mean squared rounding error.
    * ``pnorm``: as ``mse``, for the mean of ``|error| ** power`` (2.4 as in LAPQ, Nahshan et al.,
      arXiv 1911.07190, who search the exponent; 2.4 is our choice).
    * ``output``: as ``mse``, each squared error times its ``importance`` [groups, n].
    """
    if rows.size == 0:
        zeros = np.zeros(rows.shape[0], np.float32)
        return zeros, zeros
    if method == "percentile":
        low, high = np.percentile(rows, [100.0 - percentile, percentile], axis=1)
        return low.astype(np.float32), high.astype(np.float32)
    if method == "minmax":
        return rows.min(axis=1), rows.max(axis=1)
    exponent = power if method == "pnorm" else 2.0
    count = max(1, _CACHED // rows.shape[1])
    weights = importance if method == "output" else None
    parts = [
        _shrunk(
            rows[start : start + count], form, symmetric, exponent,
            None if weights is None else weights[start : start + count],
        )
        for start in range(0, len(rows), count)
    ]  # fmt: skip
    low, high = zip(*parts, strict=True)
    return np.concatenate(low), np.concatenate(high)


def _shrunk(
    rows: Floats,
    form: IntFormat,
    symmetric: bool,
    exponent: float,
    importance: Floats | None,
) -> tuple[Floats, Floats]:
    """The extremes of each row, shrunk by the factor with the least ``|error| ** exponent``."""
    low, high = rows.min(axis=1), rows.max(axis=1)
    best = np.full(rows.shape[0], np.inf)
    best_low, best_high = low.copy(), high.copy()
    for shrink in SHRINKS:
        scale, zero = affine(low * shrink, high * shrink, form, symmetric)
        error = np.abs(Grid(form, scale, zero, axis=0).round_trip(rows) - rows)
        losses = error.astype(np.float64) ** exponent
        loss = np.mean(losses if importance is None else losses * importance, axis=1)
        better = loss < best
        best[better] = loss[better]
        best_low[better] = low[better] * np.float32(shrink)
        best_high[better] = high[better] * np.float32(shrink)
    return best_low, best_high


def weight_grid(
    weight: Floats,
    form: IntFormat,
    axis: int | None,
    block: int | None = None,
    symmetric: bool = True,
    method: RangeMethod = "minmax",
    importance: Floats | None = None,
) -> Grid:
    """The grid of a weight, one scale a tensor (``axis`` None), channel or block of ``axis``.

    ``importance``, for ``method=output``, broadcasts to the weight.

    Raises PassError if ``block`` does not divide the axis.
    """
    rows, shape = to_rows(weight, axis, block)
    counts: Floats | None = None
    if importance is not None:
        counts, _ = to_rows(np.broadcast_to(importance, weight.shape), axis, block)
    low, high = search_range(rows, form, symmetric, method, importance=counts)
    scale, zero = affine(low, high, form, symmetric)
    return Grid(form, scale.reshape(shape), zero.reshape(shape), axis, block)


def histogram_range(
    counts: npt.NDArray[np.int64],
    edges: npt.NDArray[np.float64],
    form: IntFormat,
    method: ActivationMethod,
    percentile: float = 99.99,
    power: float = 2.4,
) -> tuple[float, float]:
    """The range of an activation from a histogram with ``counts`` [n] and ``edges`` [n + 1].

    The first and last edges are the extremes seen. ``mse`` and ``pnorm`` shrink each end on its own
    (two rounds of coordinate search) on an asymmetric grid of ``form``; bins stand for their
    centres. ``entropy`` is ``entropy_threshold`` on either side of zero.
    """
    filled = np.flatnonzero(counts)
    if filled.size == 0:
        return 0.0, 0.0
    low, high = float(edges[filled[0]]), float(edges[filled[-1] + 1])
    if method == "minmax":
        return low, high
    if method == "percentile":
        below = np.cumsum(counts) / counts.sum()
        first = int(np.searchsorted(below, 1.0 - percentile / 100.0))
        last = int(np.searchsorted(below, percentile / 100.0))
        return float(edges[first]), float(edges[min(last, counts.size - 1) + 1])
    centres = ((edges[:-1] + edges[1:]) / 2)[filled]
    weights = counts[filled].astype(np.float64)
    if method == "entropy":
        # Not more bins than there are, however far from zero they lie.
        width = max(float(edges[1] - edges[0]), max(-low, high) / counts.size)
        bins = np.floor(np.abs(centres) / width).astype(np.int64)
        magnitudes = np.bincount(bins, weights).astype(np.float64)
        threshold = width * entropy_threshold(magnitudes, (form.high - form.low + 1) // 2)
        return max(low, -threshold), min(high, threshold)
    exponent = 2.0 if method == "mse" else power

    def loss(low: float, high: float) -> float:
        scale, zero = affine(low, high, form, symmetric=False)
        codes = np.clip(np.rint(centres / scale) + zero, form.low, form.high)
        return float(weights @ np.abs((codes - zero) * scale - centres) ** exponent)

    def ends(extreme: float) -> Iterable[float]:
        return (extreme * shrink for shrink in SHRINKS)

    best_low, best_high = low, high
    for _ in range(2):
        best_high = min(ends(high), key=lambda end: loss(best_low, end))
        best_low = min(ends(low), key=lambda end: loss(end, best_high))
    return best_low, best_high


def entropy_threshold(counts: npt.NDArray[np.float64], levels: int) -> int:
    """How many of the first bins of magnitudes, ``counts`` [n], to keep for a grid of ``levels``.

    Our reconstruction of the search in Migacz, "8-bit Inference with TensorRT" (GTC 2017): for each
    ``i`` the first ``i`` bins, what is clipped added to the last of them, are ``P``; the same bins
    merged into ``levels`` of equal width, each spread evenly over its bins that are not empty, are
    ``Q``; the ``i`` of the least ``KL(P || Q)`` is taken, the largest of equal ones. Where we
    differ: the first bin counts no more than the second, because zero is on every grid and its
    spike (behind a Relu) would favour the narrowest range; and ``i`` ends at a bin that is not
    empty, because an empty one has no ``Q`` to stand for what is clipped.

    All ``i`` are computed at once, from running sums.
    """
    if counts.size <= levels:
        return counts.size
    counts = counts.astype(np.float64)
    counts[0] = min(counts[0], counts[1])
    total = counts.sum()
    kept = np.arange(levels, counts.size + 1)
    kept = kept[counts[kept - 1] > 0]
    if total == 0 or kept.size == 0:
        return counts.size
    mass = _running(counts)
    filled = _running(counts > 0)
    terms = _running(counts * np.log(np.where(counts > 0, counts, 1.0)))
    # The first bin of each level, [candidates, levels + 1].
    starts = -(-np.arange(levels + 1) * kept[:, None] // levels)
    merged = np.diff(mass[starts], axis=1)
    spread = np.diff(filled[starts], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        heights = np.where(merged > 0, np.log(merged / spread), 0.0)  # log Q, but for its sum
    last = counts[kept - 1]
    clipped = total - mass[kept]
    own = terms[kept - 1] + (last + clipped) * np.log(last + clipped)
    other = (merged * heights).sum(axis=1) + clipped * heights[:, -1]
    divergence = (own - other) / total - np.log(total) + np.log(mass[kept])
    best = np.flatnonzero(divergence <= divergence.min() + 1e-12)
    return int(kept[best[-1]])


def _running(numbers: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Sums of the first 0, 1, ... of ``numbers``."""
    return np.concatenate([[0.0], np.cumsum(numbers, dtype=np.float64)])


def pack(codes: Codes, form: IntFormat, name: str) -> ir.TensorProtocol:
    """``codes`` as an ONNX tensor of the stored type, two codes a byte up to 4 bits."""
    array: Any = codes.astype(form.dtype.numpy())
    return ir.Tensor(array, dtype=form.dtype, name=name)


def unpack(tensor: ir.TensorProtocol) -> Codes:
    """The codes of a packed tensor as int32."""
    return tensor.numpy().astype(np.int32)
