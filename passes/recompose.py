"""Recognise LayerNormalization, Gelu and HardSwish in the arithmetic that exporters make of them.

Our own housekeeping, no paper. As one node they keep their kernel: Q/DQ around a neighbour would
hide the parts from the pattern that a runtime looks for.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile import graph, opset
from qcompile.pipeline import Context, Pass, Stats

# The opset that has Gelu as an operator.
_GELU_OPSET = 20


@dataclasses.dataclass(frozen=True)
class Recompose(Pass):
    """Keep the function, up to the order in which sums are taken.

    * ``(x - m) / sqrt(mean((x - m)^2) + eps)`` with ``m = mean(x)`` over the last axes, and a gain
      and shift of their shape behind it where there are any, becomes LayerNormalization.
    * ``x * (1 + erf(x / sqrt(2))) / 2``, in any order of the products, becomes Gelu; the opset is
      raised to 20, the first that has it.
    * ``x * clip(x + 3, 0, 6) / 6`` becomes HardSwish.
    * ``x * (1 / sqrt(y))`` becomes ``x / sqrt(y)``, in which runtimes look for an RMS norm.

    A part that anything else reads keeps its pattern as it is.
    """

    name: ClassVar[str] = "recompose"
    invalidates: ClassVar[frozenset[str]] = frozenset({"ranges", "specs"})
    keeps_float: ClassVar[bool] = True

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        inverses = sum(_divided_by(model, n) for n in list(model.graph) if n.op_type == "Mul")
        norms = sum(_layer_norm(model, node) for node in list(model.graph))
        swishes = sum(_hard_swish(model, n) for n in list(model.graph) if n.op_type == "Clip")
        graph.remove_dead(model)
        gelus = sum(_gelu(model, node) for node in list(model.graph) if node.op_type == "Erf")
        if gelus:
            graph.remove_dead(model)
            opset.raise_to(model, _GELU_OPSET, opset.NEWEST)
        return {"layer norms": norms, "gelus": gelus, "hard swishes": swishes, "inverses": inverses}


def _is(value: ir.Value | None, *kinds: str) -> ir.Node | None:
    """The node that writes ``value`` if it is one of ``kinds``."""
    node = value.producer() if value is not None else None
    standard = node is not None and node.domain in ("", "ai.onnx")
    return node if node is not None and standard and node.op_type in kinds else None


def _reader(value: ir.Value, *kinds: str) -> ir.Node | None:
    """The only reader of ``value`` if it is one of ``kinds``."""
    read = graph.readers(value)
    if len(read) != 1 or value.is_graph_output() or value.producer() is None:
        return None
    node = read[0].node
    return node if node.op_type in kinds and node.domain in ("", "ai.onnx") else None


def _scalar(value: ir.Value | None) -> float | None:
    """The number that ``value`` is, if it is constant and one."""
    if value is None or not graph.is_constant(value) or not graph.is_float(value):
        return None
    array = graph.constant(value)
    return float(array.reshape(())) if array.size == 1 else None


def _near(value: ir.Value | None, number: float) -> bool:
    found = _scalar(value)
    return found is not None and math.isclose(found, number, rel_tol=1e-3)


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The other operand of a node with two, of which ``value`` is one."""
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


# -- LayerNormalization -------------------------------------------------------------------------


def _layer_norm(model: ir.Model, divide: ir.Node) -> bool:
    if divide.op_type != "Div" or divide.domain not in ("", "ai.onnx"):
        return False
    centre = _is(divide.inputs[0], "Sub")
    found = _variance(divide.inputs[1])
    x = centre.inputs[0] if centre is not None else None
    if centre is None or x is None or found is None or not graph.is_float(x):
        return False
    variance, epsilon = found
    mean = _is(centre.inputs[1], "ReduceMean")
    squared = _is(variance.inputs[0], "Pow", "Mul")
    if mean is None or squared is None or mean.inputs[0] is not x:
        return False
    axis, rank, shape = _axes(mean, x), graph.rank_of(x), x.shape
    alike = _squares(squared, centre) and _axes(variance, x) == axis
    if axis is None or rank is None or shape is None or not alike:
        return False
    normal = [d for d in list(shape)[axis:] if isinstance(d, int)]
    if len(normal) < rank - axis or not (_keeps(mean) and _keeps(variance)):
        return False
    _replace_norm(model, divide, x, axis - rank, normal, epsilon)
    return True


def _variance(deviation: ir.Value | None) -> tuple[ir.Node, float] | None:
    """The ReduceMean and the epsilon below the square root that ``deviation`` is."""
    root = _is(deviation, "Sqrt", "Pow")
    if root is None or (root.op_type == "Pow" and not _near(root.inputs[1], 0.5)):
        return None
    added = _is(root.inputs[0], "Add")
    for index in (0, 1) if added is not None else ():
        assert added is not None
        variance, epsilon = _is(added.inputs[index], "ReduceMean"), _scalar(added.inputs[1 - index])
        if variance is not None and epsilon is not None and epsilon > 0:
            return variance, epsilon
    return None


def _squares(node: ir.Node, centre: ir.Node) -> bool:
    """Whether ``node`` is the square of ``centre``, or of another node that computes the same."""
    twin = _is(node.inputs[0], "Sub")
    same = twin is centre or (twin is not None and list(twin.inputs) == list(centre.inputs))
    if node.op_type == "Pow":
        return same and _near(node.inputs[1], 2.0)
    return same and node.inputs[0] is node.inputs[1]


def _axes(mean: ir.Node, x: ir.Value) -> int | None:
    """The first of the last axes that ``mean`` goes over, if it goes over those; else None."""
    rank = graph.rank_of(x)
    given = mean.inputs[1] if len(mean.inputs) > 1 else None
    axes = graph.attribute(mean, "axes", None)
    if given is not None and graph.is_constant(given):
        axes = graph.constant(given).reshape(-1)
    if axes is None or rank is None or not len(axes):
        return None
    found = sorted(int(a) % rank for a in axes)
    return found[0] if found == list(range(found[0], rank)) else None


def _keeps(mean: ir.Node) -> bool:
    return graph.attribute(mean, "keepdims", 1) == 1


def _replace_norm(
    model: ir.Model, divide: ir.Node, x: ir.Value, axis: int, normal: list[int], epsilon: float
) -> None:
    last = divide.outputs[0]
    scaled = _reader(last, "Mul")
    gain = _vector(_other(scaled, last), normal) if scaled is not None else None
    if scaled is not None and gain is not None:
        last = scaled.outputs[0]
    added = _reader(last, "Add")
    shift = _vector(_other(added, last), normal) if added is not None else None
    if added is not None and shift is not None:
        last = added.outputs[0]
    assert x.dtype is not None
    name, dtype = last.name or "norm", x.dtype.numpy()
    gain = np.ones(normal) if gain is None else gain
    inputs = [x, graph.add_constant(model, f"{name}/gain", gain.astype(dtype))]
    if shift is not None:
        inputs.append(graph.add_constant(model, f"{name}/shift", shift.astype(dtype)))
    normed = graph.insert(
        model, "LayerNormalization", inputs, {"axis": axis, "epsilon": epsilon},
        output=f"{name}/norm", before=last.producer(), like=last,
    )  # fmt: skip
    graph.replace(model, last, normed)


def _vector(value: ir.Value | None, normal: list[int]) -> npt.NDArray[Any] | None:
    """A constant with the shape of the normalised axes, or one number for all of them."""
    if value is None or not graph.is_constant(value):
        return None
    array = graph.constant(value)
    if array.size == 1 and array.ndim <= len(normal):
        return np.full(normal, array.reshape(()))
    leading = array.shape[: max(array.ndim - len(normal), 0)]
    if list(array.shape[len(leading) :]) != normal or any(d != 1 for d in leading):
        return None
    return array.reshape(normal)


# -- Gelu ---------------------------------------------------------------------------------------


def _gelu(model: ir.Model, erf: ir.Node) -> bool:
    scaled = _is(erf.inputs[0], "Div", "Mul")
    if scaled is None:
        return False
    x = _scaled_by_root(scaled)
    plus = _reader(erf.outputs[0], "Add")
    if x is None or plus is None or not _near(_other(plus, erf.outputs[0]), 1.0):
        return False
    first = _reader(plus.outputs[0], "Mul")
    if first is None:
        return False
    factor = _other(first, plus.outputs[0])
    last = _divided(first.outputs[0], 2) if factor is x else None
    if last is None and factor is not None and _halves(factor, x):
        last = first.outputs[0]
    if last is None and _near(factor, 0.5):
        second = _reader(first.outputs[0], "Mul")
        if second is not None and _other(second, first.outputs[0]) is x:
            last = second.outputs[0]
    if last is None:
        return False
    gelu = graph.insert(
        model, "Gelu", [x], output=f"{last.name}/gelu", before=last.producer(), like=last
    )
    graph.replace(model, last, gelu)
    return True


def _scaled_by_root(node: ir.Node) -> ir.Value | None:
    """``x`` of ``x / sqrt(2)``, however it is written."""
    for index in (0, 1) if node.op_type == "Mul" else (0,):
        number = 1 / math.sqrt(2) if node.op_type == "Mul" else math.sqrt(2)
        if _near(node.inputs[1 - index], number):
            return node.inputs[index]
    return None


def _divided(value: ir.Value, number: float) -> ir.Value | None:
    """What the only reader of ``value`` writes, if it divides it by ``number``."""
    node = _reader(value, "Mul", "Div")
    if node is None:
        return None
    by = 1 / number if node.op_type == "Mul" else number
    numerator = node.inputs[0] is value or node.op_type == "Mul"
    return node.outputs[0] if numerator and _near(_other(node, value), by) else None


def _halves(value: ir.Value, x: ir.Value) -> bool:
    """Whether ``value`` is half of ``x``."""
    node = _is(value, "Mul", "Div")
    if node is None or x not in node.inputs:
        return False
    if node.op_type == "Mul":
        return _near(_other(node, x), 0.5)
    return node.inputs[0] is x and _near(node.inputs[1], 2.0)


# -- RMS norm -----------------------------------------------------------------------------------


def _divided_by(model: ir.Model, product: ir.Node) -> bool:
    for index in (0, 1):
        inverse = _is(product.inputs[index], "Reciprocal")
        if inverse is None or _is(inverse.inputs[0], "Sqrt") is None:
            continue
        if _reader(inverse.outputs[0], "Mul") is not product:
            continue
        last = product.outputs[0]
        quotient = graph.insert(
            model, "Div", [product.inputs[1 - index], inverse.inputs[0]],
            output=f"{last.name}/quotient", before=product, like=last,
        )  # fmt: skip
        graph.replace(model, last, quotient)
        return True
    return False


# -- HardSwish ----------------------------------------------------------------------------------


def _hard_swish(model: ir.Model, clip: ir.Node) -> bool:
    bounds = [*clip.inputs, None, None][1:3]
    plus = _is(clip.inputs[0], "Add")
    if plus is None or not (_near(bounds[0], 0.0) and _near(bounds[1], 6.0)):
        return False
    x = next((v for v in plus.inputs if v is not None and _near(_other(plus, v), 3.0)), None)
    clipped = clip.outputs[0]
    product = _reader(clipped, "Mul")
    last = None
    if product is not None and x is not None and _other(product, clipped) is x:
        last = _divided(product.outputs[0], 6)
    elif (divided := _divided(clipped, 6)) is not None:
        product = _reader(divided, "Mul")
        if product is not None and x is not None and _other(product, divided) is x:
            last = product.outputs[0]
    if last is None:
        return False
    swish = graph.insert(
        model, "HardSwish", [x], output=f"{last.name}/swish", before=last.producer(), like=last
    )
    graph.replace(model, last, swish)
    return True
