"""Operators that move, select or make elements: shapes, slices, gathers, pads, casts."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.torch_table import Call, Table, integers

TABLE = Table()


# -- shapes -------------------------------------------------------------------------------------


@TABLE.entry("Shape")
def shape(call: Call, x: Tensor) -> Tensor:
    """The sizes from ``start`` to ``end``, on the CPU."""
    end = call.int("end", x.dim())
    return torch.tensor(list(x.shape[slice(call.int("start", 0), end)]), dtype=torch.int64)


@TABLE.entry("Size")
def size(_: Call, x: Tensor) -> Tensor:
    """The number of elements, on the CPU."""
    return torch.tensor(x.numel(), dtype=torch.int64)


@TABLE.entry("Reshape", host=(1,))
def reshape(call: Call, x: Tensor, target: Tensor) -> Tensor:
    """A size of 0 stays as it was, unless ``allowzero``."""
    sizes = integers(target) or []
    if not call.int("allowzero", 0):
        sizes = [x.shape[i] if wanted == 0 else wanted for i, wanted in enumerate(sizes)]
    return x.reshape(sizes)


@TABLE.entry("Flatten")
def flatten(call: Call, x: Tensor) -> Tensor:
    """A matrix: the axes before ``axis``, and the others."""
    axis = call.int("axis", 1)
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@TABLE.entry("Squeeze", host=(1,))
def squeeze(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Without the axes named, or without all of size 1."""
    chosen = integers(axes)
    if chosen is None:
        chosen = call.ints("axes")
    return x.squeeze() if chosen is None else x.squeeze(chosen)


@TABLE.entry("Unsqueeze", host=(1,))
def unsqueeze(_: Call, x: Tensor, axes: Tensor) -> Tensor:
    """With axes of size 1 at these places of the result."""
    chosen = integers(axes) or []
    for axis in sorted(axis % (x.dim() + len(chosen)) for axis in chosen):
        x = x.unsqueeze(axis)
    return x


@TABLE.entry("Transpose")
def transpose(call: Call, x: Tensor) -> Tensor:
    """The axes in the order ``perm``, or in reverse."""
    order = call.ints("perm")
    return x.permute(list(reversed(range(x.dim()))) if order is None else order)


@TABLE.entry("Expand", host=(1,))
def expand(_: Call, x: Tensor, target: Tensor) -> Tensor:
    """Broadcast with a shape, both ways."""
    library: Any = torch  # partly untyped
    return x.expand(library.broadcast_shapes(x.shape, integers(target) or []))


@TABLE.entry("Tile", host=(1,))
def tile(_: Call, x: Tensor, repeats: Tensor) -> Tensor:
    """Each axis so often."""
    return x.tile(integers(repeats) or [])


@TABLE.entry("Concat")
def concat(call: Call, *inputs: Tensor) -> Tensor:
    """Along one axis."""
    return torch.cat(inputs, call.int("axis", 0))


@TABLE.entry("Split", host=(1,))
def split(call: Call, x: Tensor, sizes: Tensor | None = None):
    """Into sizes that are given, or equal ones of which the last may be smaller."""
    axis = call.int("axis", 0)
    chosen = integers(sizes)
    if chosen is None:
        count = call.int("num_outputs", len(call.node.outputs))
        each = -(-x.shape[axis] // count)
        chosen = [each] * (count - 1) + [x.shape[axis] - each * (count - 1)]
    return torch.split(x, chosen, axis)


@TABLE.entry("DepthToSpace")
def depth_to_space(call: Call, x: Tensor) -> Tensor:
    """Channels to blocks of pixels; a channel stands behind its block, or before (CRD)."""
    b = call.int("blocksize", 1)
    n, c, h, w = x.shape
    c //= b * b
    if call.text("mode", "DCR") == "CRD":
        return x.reshape(n, c, b, b, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c, h * b, w * b)
    return x.reshape(n, b, b, c, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c, h * b, w * b)


@TABLE.entry("SpaceToDepth")
def space_to_depth(call: Call, x: Tensor) -> Tensor:
    """Blocks of pixels to channels."""
    b = call.int("blocksize", 1)
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4)
    return blocks.reshape(n, c * b * b, h // b, w // b)


# -- selections ---------------------------------------------------------------------------------


@TABLE.entry("Slice", host=(1, 2, 3, 4))
def slices(
    _: Call,
    x: Tensor,
    starts: Tensor,
    ends: Tensor,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """As Python slices; but one that goes backwards from before the first element has that one."""
    begin, end = integers(starts) or [], integers(ends) or []
    chosen = integers(axes) or list(range(len(begin)))
    stride = integers(steps) or [1] * len(begin)
    forward = [slice(None)] * x.dim()
    for axis, first, last, step in zip(chosen, begin, end, stride, strict=True):
        first = max(first, -x.shape[axis]) if step < 0 else first
        places = range(x.shape[axis])[first:last:step]
        if step > 0:
            forward[axis] = slice(places.start, max(places.stop, places.start), step)
        else:
            x = x.index_select(axis, torch.tensor(places, dtype=torch.int64, device=x.device))
    return x[tuple(forward)]


def _from_front(indices: Tensor, size: int) -> Tensor:
    """Indices of which the negative ones count from the end of ``size``, as int64."""
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


@TABLE.entry("Gather")
def gather(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    """Slices along one axis, in the shape of the indices."""
    axis = call.int("axis", 0) % x.dim()
    chosen = x.index_select(axis, _from_front(indices, x.shape[axis]).reshape(-1))
    return chosen.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


@TABLE.entry("GatherElements")
def gather_elements(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    """One element for each index."""
    axis = call.int("axis", 0)
    return torch.gather(x, axis, _from_front(indices, x.shape[axis]))


def _rows(indices: Tensor, sizes: torch.Size) -> Tensor:
    """Tuples of indices, along the last axis, as one index into axes of ``sizes`` in one."""
    found = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=indices.device)
    for number, each in enumerate(sizes):
        found = found * each + _from_front(indices[..., number], each)
    return found


@TABLE.entry("GatherND")
def gather_nd(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    """Slices at tuples of indices, in each of the batches."""
    batch, depth = call.int("batch_dims", 0), indices.shape[-1]
    inner = x.shape[batch + depth :]
    count, wide = math.prod(x.shape[:batch]), math.prod(inner)
    rows = _rows(indices, x.shape[batch : batch + depth]).reshape(count, -1, 1)
    flat = x.reshape(count, math.prod(x.shape[batch : batch + depth]), wide)
    chosen = torch.gather(flat, 1, rows.expand(-1, -1, wide))
    return chosen.reshape([*indices.shape[:-1], *inner])


_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _scatter(call: Call, x: Tensor, axis: int, indices: Tensor, updates: Tensor) -> Tensor:
    reduction = call.text("reduction", "none")
    if reduction == "none":
        return x.scatter(axis, indices, updates)
    return x.scatter_reduce(axis, indices, updates, _REDUCTIONS[reduction])


@TABLE.entry("ScatterElements")
def scatter_elements(call: Call, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """One element written, or reduced into, for each index."""
    axis = call.int("axis", 0)
    return _scatter(call, x, axis, _from_front(indices, x.shape[axis]), updates)


@TABLE.entry("ScatterND")
def scatter_nd(call: Call, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """Slices written, or reduced into, at tuples of indices."""
    depth = indices.shape[-1]
    wide = math.prod(x.shape[depth:])
    rows = _rows(indices, x.shape[:depth]).reshape(-1, 1).expand(-1, wide)
    flat = x.reshape(math.prod(x.shape[:depth]), wide)
    return _scatter(call, flat, 0, rows, updates.reshape(-1, wide)).reshape(x.shape)


@TABLE.entry("NonZero")
def non_zero(_: Call, x: Tensor) -> Tensor:
    """The indices of what is not zero, an axis a row."""
    return torch.nonzero(x).t()


@TABLE.entry("Compress", host=(1,))
def compress(call: Call, x: Tensor, condition: Tensor) -> Tensor:
    """Slices along the axis, or elements, where the condition holds."""
    kept = torch.nonzero(condition).reshape(-1).to(x.device)
    return x.index_select(call.int("axis", 0), kept) if call.has("axis") else x.reshape(-1)[kept]


@TABLE.entry("ReverseSequence", host=(1,))
def reverse_sequence(call: Call, x: Tensor, lengths: Tensor) -> Tensor:
    """Each sequence of the batch, up to its length, from its end."""
    time, batch = call.int("time_axis", 0), call.int("batch_axis", 1)
    steps = torch.arange(x.shape[time]).unsqueeze(1)
    ends = lengths.long().unsqueeze(0)
    places = torch.where(steps < ends, ends - 1 - steps, steps)
    places = places if time < batch else places.t()
    sizes = [1] * x.dim()
    sizes[time], sizes[batch] = x.shape[time], x.shape[batch]
    return torch.gather(x, time, places.reshape(sizes).to(x.device).expand(x.shape))


@TABLE.entry("Trilu", host=(1,))
def triangle(call: Call, x: Tensor, k: Tensor | None = None) -> Tensor:
    """The upper or lower triangle of each matrix; zero elsewhere."""
    diagonal = 0 if k is None else int(k)
    return torch.triu(x, diagonal) if call.int("upper", 1) else torch.tril(x, diagonal)


@TABLE.entry("Pad", host=(1, 2, 3))
def pad(
    call: Call,
    x: Tensor,
    pads: Tensor,
    value: Tensor | None = None,
    axes: Tensor | None = None,
) -> Tensor:
    """With a constant, or with elements of ``x``; a negative number crops."""
    widths = integers(pads) or []
    chosen = [axis % x.dim() for axis in integers(axes) or range(x.dim())]
    half = len(chosen)
    around = {axis: (widths[i], widths[half + i]) for i, axis in enumerate(chosen)}
    mode = call.text("mode", "constant")
    if mode == "constant":
        order = [n for axis in reversed(range(x.dim())) for n in around.get(axis, (0, 0))]
        while len(order) > 2 and order[-2:] == [0, 0]:  # axes that stay cost torch a copy each
            del order[-2:]
        return F.pad(x, order, value=0 if value is None else value.item())
    for axis, (before, after) in around.items():
        last = x.shape[axis] - 1
        places = torch.arange(-before, last + 1 + after)
        if mode == "edge":
            places = places.clamp(0, last)
        elif mode == "wrap":
            places = places % (last + 1)
        else:  # reflect: there and back
            places = (places + last) % max(2 * last, 1) - last
            places = places.abs()
        x = x.index_select(axis, places.to(x.device))
    return x


# -- new values ---------------------------------------------------------------------------------


@TABLE.entry("ConstantOfShape", host=(0,))
def constant_of_shape(call: Call, target: Tensor) -> Tensor:
    """The value, float 0 if there is none, in every place."""
    value = call.tensor("value")
    fill = torch.zeros(()) if value is None else value.reshape(())
    return fill.expand(integers(target) or [])


@TABLE.entry("Range", host=(0, 1, 2))
def number_range(_: Call, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """Numbers from ``start`` to before ``limit``."""
    first, step = start.reshape(()), delta.reshape(())
    count = max(math.ceil((limit.item() - first.item()) / step.item()), 0)
    return (first + torch.arange(count).to(first.dtype) * step).to(first.dtype)


@TABLE.entry("OneHot", host=(1,))
def one_hot(call: Call, indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    """``values[1]`` at the index along a new axis, else ``values[0]``."""
    count = int(depth)
    axis = call.int("axis", -1) % (indices.dim() + 1)
    places = torch.arange(count, device=indices.device)
    sizes = [1] * (indices.dim() + 1)
    sizes[axis] = count
    hot = _from_front(indices, count).unsqueeze(axis) == places.reshape(sizes)
    return torch.where(hot, values[1], values[0])


@TABLE.entry("EyeLike")
def eye_like(call: Call, x: Tensor) -> Tensor:
    """Ones on the diagonal ``k`` of a matrix of the size of ``x``."""
    ones = torch.ones(x.shape, dtype=call.dtype("dtype", x.dtype), device=x.device)
    k = call.int("k", 0)
    return torch.tril(torch.triu(ones, k), k)


@TABLE.entry("Cast")
def cast(call: Call, x: Tensor) -> Tensor:
    """To another type. Float is truncated to integers, and clamped to float8 if ``saturate``."""
    return _to(call, x, call.dtype("to", x.dtype))


@TABLE.entry("CastLike")
def cast_like(call: Call, x: Tensor, like: Tensor) -> Tensor:
    """To the type of the second input."""
    return _to(call, x, like.dtype)


def _to(call: Call, x: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point and dtype.itemsize == 1 and call.int("saturate", 1):
        largest = torch.finfo(dtype).max
        return x.float().clamp(-largest, largest).to(dtype)
    return x.to(dtype)
