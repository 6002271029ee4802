"""Round weights one column after the other, so that later columns make good for earlier ones.

Source: GPTQ (Frantar et al., arXiv 2210.17323), with the scales that are decided already ("static
groups") and columns in the order of their energy ("activation order"). Where we differ: a row for
which the result is worse than rounding to the nearest is rounded to the nearest, and scales may be
searched with the rounding (our reconstruction).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import scipy.linalg

from qcompile import decisions, graph, patches
from qcompile.calibrate import GRAM_BYTES, LARGEST_GRAM, Gram
from qcompile.graph import Layer
from qcompile.numerics import Codes, Floats, Grid
from qcompile.pipeline import Context, Pass, Stats
from qcompile.spec import TensorSpec

Doubles = npt.NDArray[np.float64]

# Columns that are rounded before the rest of the matrix is brought up to date, in one product.
_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Gptq(Pass):
    """Codes ``Q`` [N, K] that make ``tr((W - sQ) H (W - sQ)^T)`` small, the squared output error.

    ``H = X^T X / rows + damping mean(diag) I`` [K, K] of the float input ``X`` [rows, K]; of a Conv
    the columns are those of a patch, and each group has an ``H`` of its own. With ``U`` upper and
    ``H^-1 = U^T U``: column ``k`` is rounded, and ``(w_k - s q_k) U[k, j] / U[k, k]`` is taken from
    each column ``j`` behind it. Columns are taken in the order of falling ``H[k, k]``.

    The codes are written beside the weight, whose scale stays as it was decided, or is searched
    with the rounding: ``s`` times 0.75, 0.85, 0.95 and 1.05 gives codes ``Q``, these the scales, of
    a channel or of each of its blocks, for which ``tr((W - sQ) H (W - sQ)^T)`` is least. No row is
    worse than with the scale that was decided, and none worse than rounded to the nearest, on the
    samples seen. Layers without a decided weight, of another kind than Conv and linear, above 8192
    columns, or with a zero point are left alone and counted.

    * ``damping``: share of the mean of the diagonal that is added to it, above 0.
    * ``samples``: how many calibration samples are used at most.
    * ``rows``: rows of ``X`` of each sample that are used at most; about 50 a column in all.
    * ``rescale``: whether scales are searched, where they are of channels or blocks.
    * ``exclude``: globs over the names and operator types of layers.
    """

    name: ClassVar[str] = "gptq"
    requires: ClassVar[frozenset[str]] = frozenset({"specs"})
    produces: ClassVar[frozenset[str]] = frozenset({"specs"})
    keeps_float: ClassVar[bool] = True
    reads_data: ClassVar[bool] = True
    source: ClassVar[str] = "GPTQ, arXiv 2210.17323"

    damping: float = 0.01
    samples: int = 64
    rows: int = 128
    rescale: bool = False
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.is_above(0, "damping")
        self.starts_at(1, "samples", "rows")

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        excluded = {layer.node for layer in graph.select(model, self.exclude, "exclude")}
        layers = [layer for layer in graph.layers(model) if layer.weight.spec is not None]
        chosen = [layer for layer in layers if layer.node not in excluded and fits(layer)]
        shared: dict[tuple[ir.Value, TensorSpec | None], list[Layer]] = {}
        for layer in chosen:
            shared.setdefault((layer.weight.value, layer.weight.spec), []).append(layer)
        fit = functools.partial(fitted, damping=self.damping, rescale=self.rescale)
        rows = nearest = 0
        for part in _portions(list(shared.values())):
            asked = [layer for readers in part for layer in readers]
            grams = ctx.data().grams(model, asked, self.samples, self.rows)
            jobs = (_job(model, readers, grams) for readers in part)
            done = ctx.map(fit, jobs, "gptq", len(part))
            for readers, found in zip(part, done, strict=True):
                decided = readers[0].weight.spec
                if found.scale is not None and decided is not None:
                    scale = patches.from_matrix(readers[0], found.scale)
                    grid = decisions.grid(model, decided).rescaled(scale)
                    decisions.write_grid(model, readers, grid)
                decisions.write_codes(model, readers, patches.from_matrix(readers[0], found.codes))
                nearest += found.nearest
                rows += math.prod(found.codes.shape[:2])
        graph.remove_dead(model)  # scales that others took the place of
        return {
            "layers": len(chosen),
            "rows": rows,
            "rows kept nearest": nearest,
            "left alone": len(layers) - len(chosen),
        }


def fits(layer: Layer) -> bool:
    """Whether the codes of the weight of ``layer`` can be fitted."""
    kind = patches.of(layer)
    decided = layer.weight.spec
    small = kind is not None and kind.columns <= LARGEST_GRAM
    return small and decided is not None and not decided.zero_point and graph.is_float(layer.output)


def _portions(shared: Sequence[list[Layer]]) -> Iterator[list[list[Layer]]]:
    """``shared`` in parts whose grams fit into memory together."""
    part: list[list[Layer]] = []
    size = 0
    for readers in shared:
        kinds = [kind for layer in readers if (kind := patches.of(layer)) is not None]
        needed = sum(8 * math.prod(kind.shape) for kind in kinds)
        if part and size + needed > GRAM_BYTES:
            yield part
            part, size = [], 0
        part.append(readers)
        size += needed
    if part:
        yield part


@dataclasses.dataclass(frozen=True)
class Job:
    """``weight`` and ``scale`` [groups, N, K], ``gram`` [groups, K, K], of a grid low to high.

    ``block`` columns of a row share a scale; None if rows share theirs. Where scales are searched,
    those that are ``signed`` may be below zero.
    """

    weight: Floats
    scale: Floats
    gram: Doubles
    low: int
    high: int
    block: int | None
    signed: bool = False


@dataclasses.dataclass(frozen=True)
class Fitted:
    """``codes`` [groups, N, K], ``scale`` likewise if it is another, and rows kept ``nearest``."""

    codes: Codes
    scale: Floats | None
    nearest: int


def _job(model: ir.Model, readers: Sequence[Layer], grams: Mapping[str, Gram]) -> Job:
    gram = sum((grams[reader.name].matrix for reader in readers), np.float64(0))
    seen = sum(grams[reader.name].rows for reader in readers)
    gram = np.asarray(gram, np.float64).reshape(-1, *grams[readers[0].name].matrix.shape[-2:])
    return job(model, readers[0], gram / max(seen, 1))


def job(model: ir.Model, layer: Layer, gram: Doubles) -> Job:
    """What there is to fit of ``layer``, with ``gram`` [groups, K, K] a row."""
    assert layer.weight.spec is not None
    weight = graph.finite_weight(layer).astype(np.float32, copy=False)
    grid = decisions.grid(model, layer.weight.spec, layer.weight.value.dtype)
    scale, _ = grid.each(weight.shape)
    matrix = patches.to_matrix(layer, weight)
    return Job(
        matrix, patches.to_matrix(layer, scale), gram, grid.format.low, grid.format.high,
        _columns_a_scale(layer, grid, weight, matrix.shape[2]),
    )  # fmt: skip


def _columns_a_scale(layer: Layer, grid: Grid, weight: Floats, columns: int) -> int | None:
    """How many columns of a row share a scale; None if rows share theirs."""
    if grid.axis is None:
        return None
    axis = grid.axis % weight.ndim
    if grid.block is None:
        return columns if axis == layer.channel_axis % weight.ndim else None
    return grid.block if axis == layer.reduce_axis % weight.ndim else None


# What scales are multiplied with, before they become the best for the codes that come of it.
RESCALED = (0.75, 0.85, 0.95, 1.05)


def fitted(job: Job, damping: float, rescale: bool = False) -> Fitted:
    """The codes of ``job``, with the scales as they are or as good as are found for each row."""
    codes = _codes(job, damping)
    plain = _nearest(job)
    best = power(job.weight - codes * job.scale.astype(np.float64), job.gram)
    kept = best >= power(job.weight - plain * job.scale.astype(np.float64), job.gram)
    codes[kept] = plain[kept]
    if not (rescale and job.block):
        return Fitted(codes, None, int(kept.sum()))
    scale, start = job.scale.copy(), job.scale * _signs(job)
    for factor in RESCALED:
        goal = dataclasses.replace(job, scale=start * np.float32(factor))
        found = _codes(goal, damping)
        scales = projected(goal, found)
        lost = power(job.weight - found * scales.astype(np.float64), job.gram)
        better = lost < best
        best[better], kept[better] = lost[better], False
        codes[better], scale[better] = found[better], scales[better]
    return Fitted(codes, scale, int(kept.sum()))


def _signs(job: Job) -> Floats:
    """-1 for each column of a block that reaches further above zero than below, else 1.

    Codes reach one further below zero than above; with a scale below zero it is the other way.
    """
    assert job.block is not None
    if not job.signed:
        return np.ones_like(job.scale)
    blocks = job.weight.reshape(*job.weight.shape[:2], -1, job.block)
    above = blocks.max(axis=3) > -blocks.min(axis=3)
    return np.repeat(np.where(above, np.float32(-1), np.float32(1)), job.block, axis=2)


def _nearest(job: Job) -> Codes:
    codes = np.rint(job.weight.astype(np.float64) / job.scale)
    return np.clip(codes, job.low, job.high).astype(np.int32)


def _codes(job: Job, damping: float) -> Codes:
    """Codes [groups, N, K], column after column."""
    weight, scale = job.weight.astype(np.float64), job.scale.astype(np.float64)
    diagonal = np.einsum("gkk->gk", job.gram)
    mean = diagonal.mean(axis=1)[:, None, None]
    mean[mean == 0] = 1.0  # an input that is always zero: no error shows, and the nearest is kept
    order = np.argsort(-diagonal, axis=1, kind="stable")[:, None, :]
    damped = np.take_along_axis(job.gram, order, 2)
    damped = np.take_along_axis(damped, order.swapaxes(1, 2), 1)
    factor = _inverse_factor(damped + damping * mean * np.eye(weight.shape[2]))
    left, steps = np.take_along_axis(weight, order, 2), np.take_along_axis(scale, order, 2)
    codes = np.empty_like(left)
    np.put_along_axis(codes, order, _rounded(left, steps, factor, job.low, job.high), 2)
    return codes.astype(np.int32)


# Of the diagonal of what is solved, towards scales as they are; and how far these may move.
_RIDGE, _FURTHEST = 0.01, 2.0
# Numbers of an array for the rows that are solved at once.
_AT_ONCE = 1 << 22


def projected(job: Job, codes: Codes) -> Floats:
    """The scales for which ``codes`` are nearest to the weight, each of ``job.block`` columns.

    With ``q_b`` what block ``b`` of a row multiplies to: the ``f`` of ``(w - sum_b f_b q_b) H (w -
    sum_b f_b q_b)^T``, which solve ``(Q H Q^T) f = Q H w^T`` with the ``q_b`` as rows of ``Q``.
    """
    groups, rows, columns = job.weight.shape
    assert job.block is not None
    blocks = columns // job.block
    scale = np.empty_like(job.scale)
    gram = job.gram.reshape(groups, blocks, job.block, columns)
    step = max(_AT_ONCE // (groups * blocks * columns), 1)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        rounded = codes[:, part] * job.scale[:, part].astype(np.float64)
        split = rounded.reshape(groups, -1, blocks, job.block)
        tilted: Doubles = np.einsum("gnbk,gbkj->gnbj", split, gram, optimize=True)
        goal = np.einsum("gnbj,gnj->gnb", tilted, job.weight[:, part].astype(np.float64))
        square = np.einsum(
            "gnbck,gnck->gnbc", tilted.reshape(*split.shape[:3], *split.shape[2:]), split
        )
        diagonal = np.einsum("gnbb->gnb", square).copy()
        diagonal[diagonal <= 0] = 1.0  # codes of zeros, for which any scale does
        square += _RIDGE * diagonal[..., None] * np.eye(blocks)
        library: Any = np.linalg  # partly untyped
        found: Doubles = library.solve(square, (goal + _RIDGE * diagonal)[..., None])[..., 0]
        moved = np.repeat(np.clip(found, 1 / _FURTHEST, _FURTHEST), job.block, axis=2)
        scale[:, part] = job.scale[:, part] * moved
    return scale


def _rounded(left: Doubles, scale: Doubles, factor: Doubles, low: int, high: int) -> Doubles:
    """Codes of ``left`` [groups, N, K], which is used up, with ``factor`` [groups, K, K]."""
    codes = np.empty_like(left)
    columns = left.shape[2]
    for first in range(0, columns, _BATCH):
        last = min(first + _BATCH, columns)
        errors = np.empty((*left.shape[:2], last - first))
        for k in range(first, last):
            codes[..., k] = np.clip(np.rint(left[..., k] / scale[..., k]), low, high)
            error = (left[..., k] - codes[..., k] * scale[..., k]) / factor[:, k, k, None]
            left[..., k + 1 : last] -= error[..., None] * factor[:, k, None, k + 1 : last]
            errors[..., k - first] = error
        left[..., last:] -= errors @ factor[:, first:last, last:]
    return codes


def _inverse_factor(matrix: Doubles) -> Doubles:
    """``U`` upper triangular with ``U^T U`` the inverse of positive definite ``matrix`` [.., K, K].

    ``matrix = M M^T`` with ``M`` upper, which is its Cholesky factor from the last row upwards;
    ``U`` is the inverse of ``M``.
    """
    upper = np.linalg.cholesky(matrix[..., ::-1, ::-1])[..., ::-1, ::-1]
    if len(upper) > 1:  # small ones, of a Conv with groups
        return np.triu(np.linalg.inv(upper)).astype(np.float64, copy=False)
    lapack: Any = scipy.linalg.lapack  # untyped
    factor, _ = lapack.dtrtri(upper[0], lower=0)
    return np.triu(factor)[None]


def power(error: Doubles, gram: Doubles) -> Doubles:
    """``e H e^T`` of each row ``e``, [groups, N]."""
    return np.einsum("gnk,gnk->gn", error @ gram, error)
