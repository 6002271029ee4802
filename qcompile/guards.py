"""What must stay float32 where the rest of a model computes in half floats, and why.

float16 ends at 65504 and is coarse below 6e-5; bfloat16 ends where float32 does, but has eight bits
of precision. So sums, powers and denominators stay float32 unless data proves that they fit, and so
does what reads or writes a number that is too large, such as an attention mask of -1e9. Nothing is
clamped but the bounds of Clip, Min and Max, where that changes nothing.

After the lists of AMP (Micikevicius et al., arXiv 1710.03740, section 3) and of Model-Optimizer's
AutoCast; the proofs are ours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile import graph
from qcompile.calibrate import Magnitude
from qcompile.halves import Half

# Sums, by the power of their terms; the number of terms is that of ``_terms``.
_SUMS = {
    "ReduceSum": 1, "ReduceMean": 1, "ReduceL1": 1, "ReduceSumSquare": 2, "ReduceL2": 2,
    "GlobalAveragePool": 1, "AveragePool": 1, "CumSum": 1, "Mean": 1, "Sum": 1,
    "Softmax": 0, "LogSoftmax": 0, "LayerNormalization": 2, "RMSNormalization": 2,
    "InstanceNormalization": 2, "GroupNormalization": 2, "LpNormalization": 2, "LpPool": 2,
    "GlobalLpPool": 2, "MeanVarianceNormalization": 2, "BatchNormalization": 1,
}  # fmt: skip
# What grows fast; its output tells whether it fits.
_POWERS = frozenset(("Pow", "Exp", "ReduceProd", "ReduceLogSum", "ReduceLogSumExp", "Sinh", "Cosh",
                     "Tan", "Softplus"))  # fmt: skip
# What divides by, or is steep at, small numbers: the index of that input.
_STEEP = {"Div": 1, "Reciprocal": 0, "Sqrt": 0, "Log": 0}
# What turns a rounding into a whole unit.
_STEPS = frozenset(("Floor", "Ceil", "Round", "Sign", "Mod", "ArgMax", "ArgMin", "TopK"))
# What writes small numbers whatever it reads.
_BOUNDED = frozenset(("Softmax", "Sigmoid", "HardSigmoid", "Tanh", "Erf", "Softsign", "Sin", "Cos",
                      "LayerNormalization", "RMSNormalization", "InstanceNormalization",
                      "GroupNormalization", "LpNormalization"))  # fmt: skip
# Constants that only bound what passes through.
BOUNDS = {"Clip": (1, 2), "Min": (0, 1), "Max": (0, 1)}


@dataclasses.dataclass(frozen=True)
class Guard:
    """Decides for each node whether it may compute in ``half``.

    ``measured`` are magnitudes by the name of the value, and may be empty; what data has not shown
    may be ``margin`` times as large.
    """

    half: Half
    margin: float
    measured: Mapping[str, Magnitude]

    def reasons(self, model: ir.Model) -> dict[ir.Node, str]:
        """Why each node of the main graph that must stay float32 must."""
        found: dict[ir.Node, str] = {}
        large: set[ir.Value] = set()  # what may be too large, as far as is known
        for node in model.graph:
            reason = self._reason(node, large)
            if reason:
                found[node] = reason
            if node.op_type in _BOUNDED:
                continue
            if any(v in large for v in _floats(node)) or self._large_constant(node):
                large |= {v for v in node.outputs if v.name not in self.measured}
        return found

    def _reason(self, node: ir.Node, large: set[ir.Value]) -> str:
        if node.op_type in _STEPS:
            return "a step makes a whole unit of a rounding"
        constant = self._large_constant(node)
        if constant:
            return constant
        if any(v in large for v in _floats(node)):
            return f"what it reads may be beyond {self.half.dtype.name.lower()}"
        for value in (*_floats(node), *node.outputs):
            seen = self.measured.get(value.name or "")
            if seen is not None and seen.largest > self.limit:
                return f"{value.name!r} reaches {seen.largest:.3g}"
        if node.op_type in (*_SUMS, *_POWERS, *_STEEP) and not self._proven(node):
            return f"nothing proves that {node.op_type} fits {self.half.dtype.name.lower()}"
        return ""

    @property
    def limit(self) -> float:
        """What a measured number may reach."""
        return self.half.largest / self.margin

    def _large_constant(self, node: ir.Node) -> str:
        """What is wrong with a constant that ``node`` reads; "" if nothing is."""
        layer = graph.layer_of(node)
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype != ir.DataType.FLOAT or not value.is_initializer():
                continue
            largest = largest_of(value)
            if largest > self.limit and index not in BOUNDS.get(node.op_type, ()):
                return f"{value.name!r} has {largest:.3g} in it"
            if 0 < largest < self.half.normal and not (layer and index >= 2):
                return f"{value.name!r} is at most {largest:.3g}"
        return ""

    def _proven(self, node: ir.Node) -> bool:
        """Whether the measured magnitudes prove that no sum, power or quotient leaves the type."""
        if self.half.dtype == ir.DataType.BFLOAT16:
            return _STEEP.get(node.op_type) == 1 and self._divides_by_constant(node)
        seen = [self._seen(v) for v in (*_floats(node), *node.outputs) if v.dtype is not None]
        known = [m for m in seen if m is not None]
        if node.op_type in _STEEP:
            if self._divides_by_constant(node):
                return True
            below = self._seen(node.inputs[_STEEP[node.op_type]])
            return len(known) == len(seen) and below is not None and below.least > self.half.normal
        if len(known) < len(seen):
            return False
        if node.op_type in _SUMS:
            terms = _terms(node, known[0].shape, known[-1].shape)
            return terms * max(known[0].largest, 1.0) ** _SUMS[node.op_type] <= self.limit
        return True

    def _divides_by_constant(self, node: ir.Node) -> bool:
        """Whether a Div has a constant below; one that is too small has been refused before."""
        return node.op_type == "Div" and node.inputs[1] is not None and _constant(node.inputs[1])

    def _seen(self, value: ir.Value | None) -> Magnitude | None:
        if value is None or not _constant(value):
            return None if value is None else self.measured.get(value.name or "")
        array = graph.constant(value)
        return Magnitude(largest_of(value), float(np.abs(array).min(initial=np.inf)), array.shape)


def _constant(value: ir.Value) -> bool:
    return value.is_initializer() and not value.is_graph_input()


def largest_of(value: ir.Value) -> float:
    """The largest finite magnitude in an initializer; 0 if there is none."""
    assert value.const_value is not None
    meta: Any = getattr(value.const_value, "meta", {})
    if "qcompile.largest" not in meta:
        array = graph.read_tensor(value.const_value)
        meta["qcompile.largest"] = float(np.abs(array[np.isfinite(array)]).max(initial=0.0))
    return float(meta["qcompile.largest"])


def _floats(node: ir.Node) -> Iterator[ir.Value]:
    for value in node.inputs:
        if value is not None and value.dtype == ir.DataType.FLOAT:
            yield value


def _terms(node: ir.Node, entered: tuple[int, ...], written: tuple[int, ...]) -> float:
    """How many numbers are added up, at most."""
    if node.op_type in ("Softmax", "LogSoftmax", "LayerNormalization", "RMSNormalization"):
        axis = int(graph.attribute(node, "axis", -1))
        return entered[axis] if "Softmax" in node.op_type else math.prod(entered[axis:])
    if math.prod(written) < math.prod(entered):
        return math.prod(entered) / max(math.prod(written), 1)
    return math.prod(entered[1:])
