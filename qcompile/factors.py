"""A weight as the product of two of low rank: the factors, and the two layers in the graph.

Source: MLoRQ (arXiv 2507.09616), steps 0 to 2. With ``W`` [N, K] (rows are output channels),
``L = diag(left)`` and ``R = diag(right)``: ``L W R = U S V^T``, and for rank ``r``

    A = L^-1 U[:, :r]  [N, r],    B = S[:r] V[:, :r]^T R^-1  [r, K],

which makes ``|L (W - A B) R|`` least. ``left`` is the square root of the label-free Hessian of each
output channel (the paper), ``right`` that of the mean square of each input (our variant, which
needs no gradient).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile import graph, noise, patches
from qcompile.errors import PassError
from qcompile.graph import Layer

if TYPE_CHECKING:
    from qcompile.pipeline import Context

Doubles = npt.NDArray[np.float64]
Weigh = Literal["hessian", "input", "both", "none"]

# Samples and draws of the Hessian: the paper's 32 images, with a tenth of its 100 draws, at which
# it may stop.
_SAMPLES, _DRAWS = 32, 10
# Above this many rows and columns only the first half of the spectrum is computed, at random.
_LARGE = 2048
# Columns beyond the rank, and rounds, of the range finder.
_MORE, _ROUNDS = 16, 2
# Where a Conv looks.
_PLACED = ("strides", "pads", "auto_pad", "dilations")


@dataclasses.dataclass(frozen=True)
class Factors:
    """``a`` [N, r] and ``b`` [r, K], and what errors of rows and columns weigh."""

    a: Doubles
    b: Doubles
    left: Doubles
    right: Doubles

    @property
    def rank(self) -> int:
        """The number of columns of ``a``."""
        return self.a.shape[1]

    def cut(self, rank: int) -> Factors:
        """The first ``rank`` columns and rows."""
        return dataclasses.replace(self, a=self.a[:, :rank], b=self.b[:rank])


def factorable(layer: Layer) -> bool:
    """Whether ``layer`` can become two: linear, or a Conv of one group whose kernel is 1."""
    shape = graph.shape_of(layer.weight.value)
    if shape is None or layer.input is None or not graph.is_constant(layer.weight.value):
        return False
    if layer.kind == "linear":
        return not graph.attribute(layer.node, "transA", 0)
    one = all(size == 1 for size in shape[2:])
    return layer.kind == "conv" and one and graph.attribute(layer.node, "group", 1) == 1


def matrix(layer: Layer) -> Doubles:
    """The weight of ``layer`` as ``W`` [N, K]."""
    return patches.to_matrix(layer, graph.finite_weight(layer))[0].astype(np.float64)


def decompose(
    weight: Doubles, left: Doubles, right: Doubles, rng: np.random.Generator, most: int = 0
) -> Factors:
    """The factors of ``weight`` [N, K] at rank ``most``, at the largest if 0.

    Of a large weight no more than half of the spectrum, unless more is asked for.
    """
    scaled = left[:, None] * weight * right
    full = min(scaled.shape)
    rank = min(most or (full if full <= _LARGE else full // 2), full)
    if full > _LARGE and rank <= full // 2:
        u, s, v = _randomized(scaled, rank, rng)
    else:
        u, s, v = np.linalg.svd(scaled, full_matrices=False)
    return Factors(u[:, :rank] / left[:, None], s[:rank, None] * v[:rank] / right, left, right)


def _randomized(
    matrix: Doubles, rank: int, rng: np.random.Generator
) -> tuple[Doubles, Doubles, Doubles]:
    """The first singular values and vectors (Halko, Martinsson and Tropp, arXiv 0909.4061)."""
    span = matrix @ rng.standard_normal((matrix.shape[1], rank + _MORE))
    for _ in range(_ROUNDS):
        span = matrix @ (matrix.T @ np.linalg.qr(span)[0])
    basis = np.linalg.qr(span)[0]
    u, s, v = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, s, v


def weights(
    model: ir.Model, layers: Sequence[Layer], weigh: Weigh, ctx: Context
) -> dict[str, tuple[Doubles, Doubles]]:
    """``left`` [N] and ``right`` [K] of each layer, by name; all ones where they do not weigh.

    Raises PassError if the Hessian is asked for and torch cannot run the model.
    """
    shapes = {layer.name: matrix(layer).shape for layer in layers}
    found = {name: (np.ones(n), np.ones(k)) for name, (n, k) in shapes.items()}
    if not layers:
        return found
    if weigh in ("hessian", "both"):
        for name, rows in hessian(model, layers, ctx).items():
            # Rows that nothing depends on keep a weight, or they could not be divided by it.
            left = np.sqrt(rows)
            left = np.maximum(left / max(float(left.max()), 1e-300), 1e-4)
            found[name] = left, found[name][1]
    if weigh in ("input", "both"):
        axes = {
            layer.input.value.name or "": noise.channel_axis(layer)
            for layer in layers
            if layer.input is not None
        }
        seen = ctx.data().moments(model, axes, _SAMPLES)
        for layer in layers:
            if layer.input is not None:
                right = np.sqrt(seen[layer.input.value.name or ""].power)
                right = np.maximum(right / max(float(right.max()), 1e-300), 1e-4)
                found[layer.name] = found[layer.name][0], right
    return found


def hessian(model: ir.Model, layers: Sequence[Layer], ctx: Context) -> dict[str, Doubles]:
    """``sum_j H[c, j]`` of each output channel ``c`` of each layer, by name, [N].

    ``H = E[(d mean(y v) / dW)^2]`` over samples and draws of ``v`` ~ N(0, 1), which is the diagonal
    of the Gauss-Newton matrix of the squared error at the outputs, up to a factor. A state that a
    sample lacks is that of the float model.
    """
    if importlib.util.find_spec("torch") is None:
        raise PassError("weigh=hessian needs torch (pip install 'qcompile[torch]'); or weigh=input")
    import torch

    from qcompile import rounding, sequences
    from qcompile.execute import Session
    from qcompile.torch_exec import TorchGraph

    library: Any = torch  # partly untyped
    inputs = [value.name or "" for value in model.graph.inputs]
    outputs = [v.name or "" for v in model.graph.outputs if graph.is_float(v)]
    whole = TorchGraph(model, inputs, outputs)
    rng = ctx.rng("hessian")
    places: dict[tuple[str, int], Any] = {
        (layer.node.name or "", layer.weight.index): rounding.tensor(
            np.ascontiguousarray(graph.finite_weight(layer)), "cpu"
        ).requires_grad_()
        for layer in layers
    }
    at: dict[tuple[str, int], Any] = {
        place: functools.partial(_given, tensor) for place, tensor in places.items()
    }
    totals: dict[tuple[str, int], Any] = {
        place: torch.zeros_like(tensor) for place, tensor in places.items()
    }
    samples = ctx.data().samples.some(_SAMPLES)
    session = Session(model)
    runs = sequences.carry(session, samples, samples.state)
    for feeds, _ in ctx.progress(runs, "hessian", len(samples)):
        tensors = {name: rounding.tensor(array, "cpu") for name, array in feeds.items()}
        found = whole(tensors, at)
        for _ in range(_DRAWS):
            total: Any = 0.0
            for name in outputs:
                drawn = rng.standard_normal(tuple(found[name].shape)).astype(np.float32)
                total = total + (found[name] * rounding.tensor(drawn, "cpu")).mean()
            slopes = library.autograd.grad(
                total, list(places.values()), retain_graph=True, allow_unused=True
            )
            for place, slope in zip(places, slopes, strict=True):
                if slope is not None:
                    totals[place] += slope**2
    return {
        layer.name: patches.to_matrix(
            layer, totals[layer.node.name or "", layer.weight.index].numpy()
        )[0].sum(axis=1, dtype=np.float64)
        for layer in layers
    }


def _given(tensor: Any, _: Any) -> Any:
    return tensor


def split(model: ir.Model, layer: Layer, factors: Factors) -> Layer:
    """Put ``factors`` in place of the weight of ``layer``; the layer in front, that of ``b``.

    ``layer`` keeps its name, its bias and what reads it, and multiplies with ``a``; a Conv leaves
    strides and padding to the layer in front, which has no bias, so padded places stay zero.
    """
    assert layer.input is not None
    z = _inner(model, layer, factors, f"{layer.name}/inner")
    node = z.producer()
    assert node is not None
    graph.set_origins(node, graph.origins(layer.node))
    for name in _PLACED if layer.kind == "conv" else ():
        layer.node.attributes.pop(name, None)
    flip = layer.kind == "linear" and layer.channel_axis != 0
    a = _constant(model, layer, "outer", factors.a.T if flip else factors.a)
    layer.input.read_from(z)
    layer.weight.read_from(a)
    made = graph.layer_of(node)
    assert made is not None
    return made


def branch(model: ir.Model, layer: Layer, factors: Factors) -> None:
    """Take ``factors`` out of the weight of ``layer``, and add what they give behind its bias.

    The two products are no layers, as their role says. The sum takes the name of the output.
    """
    whole, conv, y = graph.constant(layer.weight.value), layer.kind == "conv", layer.biased_output
    a, b = (each.astype(whole.dtype).astype(np.float64) for each in (factors.a, factors.b))
    rest = patches.from_matrix(layer, (matrix(layer) - a @ b)[None]).astype(whole.dtype)
    z = _inner(model, layer, factors, f"{layer.name}/branch/inner", "branch")
    a = a * graph.attribute(layer.node, "alpha", 1.0)
    outer = _constant(model, layer, "outer", a if conv else a.T)
    t = graph.insert(
        model, "Conv" if conv else "MatMul", [z, outer],
        output=f"{layer.name}/branch/outer", before=layer.node, like=y, role="branch",
    )  # fmt: skip
    name = f"{layer.weight.value.name}/residual"
    layer.weight.read_from(graph.add_constant(model, name, np.ascontiguousarray(rest)))
    total = graph.insert(model, "Add", [y, t], output=f"{y.name}/whole", behind=y, like=y)
    graph.replace(model, y, total, keep=lambda use: use.node is total.producer())


def _constant(model: ir.Model, layer: Layer, name: str, factor: Doubles) -> ir.Value:
    """A factor as a weight in the type of that of ``layer``; of a Conv with a kernel of one."""
    value = layer.weight.value
    assert value.dtype is not None
    rank = len(graph.shape_of(value) or ())
    array = factor.astype(value.dtype.numpy()).reshape(*factor.shape, *(1,) * (rank - 2))
    return graph.add_constant(model, f"{value.name}/{name}", np.ascontiguousarray(array))


def _inner(model: ir.Model, layer: Layer, factors: Factors, name: str, role: str = "") -> ir.Value:
    """``x B^T`` of what ``layer`` reads, called ``name``; a Conv where that of ``layer`` looks."""
    assert layer.input is not None
    conv = layer.kind == "conv"
    b = _constant(model, layer, "inner", factors.b if conv else factors.b.T)
    moved = [n for n in (*_PLACED, "kernel_shape") if conv and n in layer.node.attributes]
    return graph.insert(
        model, "Conv" if conv else "MatMul", [layer.input.value, b],
        {n: layer.node.attributes[n].value for n in moved},
        output=name, before=layer.node, like=_between(layer, factors.rank), role=role,
    )  # fmt: skip


def _between(layer: Layer, rank: int) -> ir.Value:
    """Type and shape of what lies between the two factors."""
    assert layer.input is not None
    x, y = layer.input.value, layer.output
    if layer.kind == "conv" and y.shape is not None:
        dims = [*y.shape]
        shape = ir.Shape([dims[0], rank, *dims[2:]])
    elif layer.kind != "conv" and x.shape is not None:
        shape = ir.Shape([*list(x.shape)[:-1], rank])
    else:
        shape = None
    return ir.Value(type=x.type, shape=shape)
