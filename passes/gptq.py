"""Round weights one column after the other, so that later columns make good for earlier ones.

Source: GPTQ (Frantar et al., arXiv 2210.17323), with the scales that are decided already ("static
groups") and columns in the order of their energy ("activation order"). Where we differ: a row for
which the result is worse than rounding to the nearest is rounded to the nearest.
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
from qcompile.numerics import Codes, Floats
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

    The codes are written beside the weight, whose scale stays as it was decided. No row is worse
    than rounded to the nearest, on the samples seen. Layers without a decided weight, of another
    kind than Conv and linear, above 8192 columns, or with a zero point are left alone and counted.

    * ``damping``: share of the mean of the diagonal that is added to it, above 0.
    * ``samples``: how many calibration samples are used at most.
    * ``rows``: rows of ``X`` of each sample that are used at most; about 50 a column in all.
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
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.is_above(0, "damping")
        self.starts_at(1, "samples", "rows")

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        excluded = {layer.node for layer in graph.select(model, self.exclude, "exclude")}
        decided = [layer for layer in graph.layers(model) if layer.weight.spec is not None]
        chosen = [layer for layer in decided if layer.node not in excluded and fits(layer)]
        shared: dict[tuple[ir.Value, TensorSpec | None], list[Layer]] = {}
        for layer in chosen:
            shared.setdefault((layer.weight.value, layer.weight.spec), []).append(layer)
        fit = functools.partial(fitted, damping=self.damping)
        rows = nearest = 0
        for part in _portions(list(shared.values())):
            layers = [layer for readers in part for layer in readers]
            grams = ctx.data().grams(model, layers, self.samples, self.rows)
            jobs = (_job(model, readers, grams) for readers in part)
            done = ctx.map(fit, jobs, "gptq", len(part))
            for readers, (codes, kept) in zip(part, done, strict=True):
                decisions.write_codes(model, readers, patches.from_matrix(readers[0], codes))
                nearest += kept
                rows += codes.shape[0] * codes.shape[1]
        return {
            "layers": len(chosen),
            "rows": rows,
            "rows kept nearest": nearest,
            "left alone": len(decided) - len(chosen),
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
    """``weight`` and ``scale`` [groups, N, K], ``gram`` [groups, K, K], of a grid low to high."""

    weight: Floats
    scale: Floats
    gram: Doubles
    low: int
    high: int


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
    return Job(
        patches.to_matrix(layer, weight), patches.to_matrix(layer, scale), gram,
        grid.format.low, grid.format.high,
    )  # fmt: skip


def fitted(job: Job, damping: float) -> tuple[Codes, int]:
    """Codes [groups, N, K], and how many rows are rounded to the nearest."""
    weight, scale = job.weight.astype(np.float64), job.scale.astype(np.float64)
    nearest = np.clip(np.rint(weight / scale), job.low, job.high)
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
    fitted, plain = (_power(weight - c * scale, job.gram) for c in (codes, nearest))
    kept = fitted >= plain
    codes[kept] = nearest[kept]
    return codes.astype(np.int32), int(kept.sum())


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


def _power(error: Doubles, gram: Doubles) -> Doubles:
    """``e H e^T`` of each row ``e``, [groups, N]."""
    return np.einsum("gnk,gnk->gn", error @ gram, error)
