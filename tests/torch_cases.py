"""One-node graphs for the operator table of ``torch_exec``: at least one for each operator."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

Array = npt.NDArray[Any]

_rng = np.random.default_rng(7)


@dataclasses.dataclass(frozen=True)
class Case:
    """A node with arrays for its inputs; None is an input that is left out."""

    operator: str
    inputs: tuple[Array | None, ...]
    attributes: dict[str, Any]
    outputs: int = 1
    opset: int = 21
    note: str = ""

    @property
    def feeds(self) -> dict[str, Array]:
        """The inputs by name."""
        return {f"x{i}": array for i, array in enumerate(self.inputs) if array is not None}

    def model(self) -> onnx.ModelProto:
        """The node as a model of which every input is fed, and of no known shapes."""
        names = [f"x{i}" if array is not None else "" for i, array in enumerate(self.inputs)]
        outputs = [f"y{i}" for i in range(self.outputs)]
        node = helper.make_node(self.operator, names, outputs, name="node", **self.attributes)
        entered = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), None)
            for name, a in self.feeds.items()
        ]
        left = [onnx.ValueInfoProto(name=name) for name in outputs]
        opsets = [helper.make_opsetid("", self.opset)]
        graph = helper.make_graph([node], "case", entered, left)
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def astype(self, dtype: type[np.floating[Any]]) -> Case:
        """The case with its float32 inputs in ``dtype``; Resize has only its first in it."""
        first = 1 if self.operator == "Resize" else len(self.inputs)
        cast = [
            a.astype(dtype) if number < first and a is not None and a.dtype == np.float32 else a
            for number, a in enumerate(self.inputs)
        ]
        return dataclasses.replace(self, inputs=tuple(cast))


def assert_close(found: Array, wanted: Array, tolerance: float, say: str = "") -> None:
    """Floats within ``tolerance`` of the largest element, all else alike."""
    if wanted.dtype.kind == "f":
        finite = np.abs(wanted[np.isfinite(wanted)].astype(np.float64))
        scale = max(float(finite.max(initial=0.0)), 1.0)
        np.testing.assert_allclose(
            found.astype(np.float64), wanted.astype(np.float64), 0.0, tolerance * scale, err_msg=say
        )
    else:
        np.testing.assert_array_equal(found, wanted, err_msg=say)


def f(*shape: int) -> Array:
    """Normal numbers."""
    return _rng.standard_normal(shape).astype(np.float32)


def u(low: float, high: float, *shape: int) -> Array:
    """Numbers between two."""
    return _rng.uniform(low, high, shape).astype(np.float32)


def n(*values: Any, dtype: Any = np.int64) -> Array:
    """A list of numbers."""
    return np.array(values, dtype)


def s(value: Any, dtype: Any = np.float32) -> Array:
    """A scalar."""
    return np.array(value, dtype)


def i(low: int, high: int, *shape: int, dtype: Any = np.int64) -> Array:
    """Integers from ``low`` to before ``high``."""
    return _rng.integers(low, high, shape).astype(dtype)


def b(*shape: int) -> Array:
    """Booleans."""
    return _rng.integers(0, 2, shape).astype(bool)


def case(operator: str, *inputs: Array | None, to: int = 1, opset: int = 21, **attributes: Any):
    """A case with ``to`` outputs."""
    return Case(operator, inputs, attributes, to, opset)


def each(operators: str, *inputs: Array | None, **attributes: Any) -> Iterator[Case]:
    """The same case for several operators."""
    for operator in operators.split():
        yield Case(operator, inputs, attributes)


def pointwise() -> Iterator[Case]:
    yield from each("Abs Neg Exp Sin Cos Tan Sinh Cosh Tanh Atan Asinh Erf Sigmoid Relu", f(3, 4))
    yield from each("Softsign Softplus HardSwish Mish Gelu Elu Selu Celu LeakyRelu", 3 * f(3, 4))
    yield from each("ThresholdedRelu Shrink HardSigmoid Sign Floor Ceil Identity", 2 * f(2, 3, 4))
    yield from each("Log Sqrt Reciprocal", u(0.2, 3, 5))
    yield from each("Asin Acos Atanh", u(-0.9, 0.9, 5))
    yield case("Acosh", u(1.1, 3, 5))
    yield from each("Softplus Mish Sigmoid", n(-90.0, -30.0, 0.0, 25.0, 90.0, dtype=np.float32))
    yield from each("Abs Neg Sign Relu", i(-4, 5, 6, dtype=np.int32))
    yield case("Round", n(-2.5, -1.5, -0.5, 0.5, 1.5, 2.4, dtype=np.float32))
    yield case("Gelu", 2 * f(3, 4), approximate="tanh")
    yield case("Elu", f(3, 4), alpha=0.3)
    yield case("Selu", f(3, 4), alpha=1.3, gamma=0.9)
    yield case("Celu", f(3, 4), alpha=2.0)
    yield case("LeakyRelu", f(3, 4), alpha=0.2)
    yield case("ThresholdedRelu", f(3, 4), alpha=0.2)
    yield case("Shrink", f(3, 4), lambd=0.3, bias=0.2)
    yield case("HardSigmoid", 3 * f(3, 4), alpha=0.3, beta=0.4)
    yield case("Swish", f(3, 4), opset=24, alpha=1.7)
    yield case("Not", b(2, 3))
    yield case("BitwiseNot", i(-9, 9, 5, dtype=np.int32))
    odd = n(np.nan, np.inf, -np.inf, 0.0, 1.0, dtype=np.float32)
    yield from each("IsNaN IsInf", odd)
    yield case("IsInf", odd, detect_negative=0)
    yield case("IsInf", odd, detect_positive=0)
    yield case("Dropout", f(3, 4))
    yield case("Dropout", f(3, 4), s(0.5), s(False, bool), to=2)
    yield case("Clip", 2 * f(3, 4), s(-0.5), s(1.0))
    yield case("Clip", 2 * f(3, 4), None, s(1.0))
    yield case("Clip", 2 * f(3, 4), s(-0.5))
    yield case("Clip", 2 * f(3, 4))
    yield case("Clip", i(-9, 9, 6), s(-2, np.int64), s(3, np.int64))
    for axis in (-1, 0, 1):
        yield from each("Softmax LogSoftmax Hardmax", f(2, 3, 4), axis=axis)
    yield from each("Softmax LogSoftmax Hardmax", f(2, 3))


def several() -> Iterator[Case]:
    for one, other in ((f(3, 4), f(3, 4)), (f(2, 1, 4), f(3, 1)), (f(), f(2, 3))):
        yield from each("Add Sub Mul Div", one, other)
    yield from each("Add Sub Mul Div", i(-9, 9, 2, 3), i(1, 5, 3))
    yield from each("Add Sub Mul Div", i(-9, 9, 2, 3, dtype=np.int32), i(1, 5, 3, dtype=np.int32))
    for dtype in (np.int64, np.int32, np.float32):
        yield from each(
            "Equal Greater GreaterOrEqual Less LessOrEqual",
            i(0, 3, 2, 4, dtype=dtype), i(0, 3, 4, dtype=dtype),
        )  # fmt: skip
    yield from each("Equal And Or Xor", b(2, 4), b(4))
    yield from each(
        "BitwiseAnd BitwiseOr BitwiseXor", i(-99, 99, 5, dtype=np.int32), i(0, 9, 5, dtype=np.int32)
    )
    for direction in ("LEFT", "RIGHT"):
        for dtype in (np.uint8, np.uint32):
            yield case(
                "BitShift", i(1, 99, 6, dtype=dtype), i(0, 4, 6, dtype=dtype), direction=direction
            )
    yield case("Pow", u(0.3, 2, 3, 4), f(4))
    yield case("Pow", f(3, 4), s(2.0))
    yield case("Pow", f(3, 4), s(3, np.int64))
    yield case("Pow", i(1, 5, 4), n(2, 3, 1, 2))
    yield case("Mod", i(-9, 9, 8), n(4, -4, 3, -3, 2, -2, 5, -5))
    yield case("Mod", i(-9, 9, 8), n(4, -4, 3, -3, 2, -2, 5, -5), fmod=1)
    yield case("Mod", 3 * f(8), u(0.5, 2, 8), fmod=1)
    yield case("PRelu", f(2, 3, 4), u(0.1, 0.5, 3, 1))
    yield case("PRelu", f(2, 3, 4), s(0.2).reshape(1))
    yield case("Where", b(3, 4), f(3, 4), f(4))
    yield case("Where", b(4), i(0, 9, 2, 4), s(7, np.int64))
    for count in (1, 2, 3):
        yield from each("Max Min Sum Mean", *[f(2, 4), f(4), f(2, 1)][:count])
    yield from each("Max Min", i(-9, 9, 3), i(-9, 9, 2, 3))
    for one, other in (
        (f(3, 4), f(4, 5)), (f(2, 3, 4), f(4, 5)), (f(4), f(4, 5)), (f(3, 4), f(4)),
        (f(2, 1, 3, 4), f(5, 4, 2)), (f(4), f(4)),
    ):  # fmt: skip
        yield case("MatMul", one, other)
    yield case("MatMul", i(-9, 9, 2, 3, dtype=np.int32), i(-9, 9, 3, 2, dtype=np.int32))
    yield case("Gemm", f(3, 4), f(4, 5), f(5))
    yield case("Gemm", f(4, 3), f(5, 4), f(3, 1), transA=1, transB=1, alpha=0.5, beta=2.0)
    yield case("Gemm", f(3, 4), f(4, 5), alpha=0.5)
    yield case("Gemm", f(3, 4), f(5, 4), s(0.5), transB=1)
    for equation in ("bij,bjk->bik", "...ij,...kj->...ik"):
        second = f(2, 4, 5) if "bjk" in equation else f(2, 5, 4)
        yield case("Einsum", f(2, 3, 4), second, equation=equation)
    yield case("Einsum", f(3, 3), equation="ii->i")
    yield case("Einsum", f(2, 3), f(3), f(2), equation="i j, j, i -> j")


def reductions() -> Iterator[Case]:
    names = "ReduceSum ReduceMean ReduceProd ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceSumSquare"
    names += " ReduceLogSum ReduceLogSumExp"
    x = u(0.3, 2, 2, 3, 4)
    yield from each(names, x, n(1))
    yield from each(names, x, n(-1, 0), keepdims=0)
    yield from each(names, x)
    yield from each(names, x, keepdims=0)
    yield from each(names, x, n(), noop_with_empty_axes=1)
    yield from each(names, x, n(), noop_with_empty_axes=0)
    yield from each("ReduceSum ReduceMean ReduceMax ReduceL2", s(-1.5), keepdims=0)
    yield from each("ReduceSum ReduceL1 ReduceL2", f(2, 3), n(), noop_with_empty_axes=1)
    whole = i(-9, 9, 2, 3, dtype=np.int32)
    yield from each("ReduceSum ReduceMean ReduceProd ReduceMax ReduceMin", whole, n(1))
    yield from each("ReduceSum ReduceMax ReduceMin ReduceProd", whole.astype(np.int64), n(0))
    ties = n(1, 3, 3, 2, 0, 0, dtype=np.float32).reshape(2, 3)
    for options in (
        {},
        {"axis": 1},
        {"axis": -1, "keepdims": 0},
        {"axis": 1, "select_last_index": 1},
    ):
        yield from each("ArgMax ArgMin", ties, **options)
        yield from each("ArgMax ArgMin", ties.astype(np.int32), **options)
    for options in ({}, {"exclusive": 1}, {"reverse": 1}, {"exclusive": 1, "reverse": 1}):
        yield case("CumSum", f(3, 4), s(1, np.int64), **options)
        yield case("CumSum", i(0, 9, 3, 4), s(-2, np.int32), **options)
    yield case("TopK", f(3, 5), n(2), to=2)
    yield case("TopK", f(3, 5), n(2), to=2, axis=0, largest=0)
    yield case("TopK", i(0, 3, 12), n(9), to=2)
    yield case("TopK", i(0, 3, 12), n(9), to=2, largest=0)


def shapes() -> Iterator[Case]:
    x = f(2, 3, 4)
    yield case("Shape", x)
    yield case("Shape", x, start=1)
    yield case("Shape", x, start=-2, end=-1)
    yield case("Shape", x, start=-9, end=9)
    yield case("Size", x)
    yield case("Reshape", x, n(4, -1))
    yield case("Reshape", x, n(0, 0, 2, 2))
    yield case("Reshape", f(0, 3), n(3, 0), allowzero=1)
    yield case("Reshape", i(0, 9, 6), n(2, 3))
    yield case("Reshape", f(1), n())
    for axis in (0, 1, 2, 3, -1):
        yield case("Flatten", x, axis=axis)
    yield case("Squeeze", f(1, 3, 1), n(0))
    yield case("Squeeze", f(1, 3, 1), n(-1, 0))
    yield case("Squeeze", f(1, 3, 1))
    yield case("Unsqueeze", f(3), n(0, 2))
    yield case("Unsqueeze", f(3, 2), n(-1, 1))
    yield case("Transpose", x)
    yield case("Transpose", x, perm=[1, 2, 0])
    yield case("Expand", f(3, 1), n(2, 1, 4))
    yield case("Expand", f(2, 3, 4), n(1))
    yield case("Tile", f(2, 3), n(2, 2))
    yield case("Concat", f(2, 3), f(2, 1), f(2, 2), axis=1)
    yield case("Concat", n(1), n(2, 3), axis=-1)
    yield case("Split", f(2, 6), to=3, axis=1, num_outputs=3)
    yield case("Split", f(2, 7), to=3, axis=-1, num_outputs=3)
    yield case("Split", f(5, 2), n(1, 4), to=2)
    for operator, sizes in (("DepthToSpace", (2, 8, 2, 3)), ("SpaceToDepth", (2, 2, 4, 6))):
        yield case(operator, f(*sizes), blocksize=2)
    yield case("DepthToSpace", f(2, 8, 2, 3), blocksize=2, mode="CRD")
    yield case("ConstantOfShape", n(2, 3))
    yield case("ConstantOfShape", n(), value=onnx.helper.make_tensor("v", 7, [1], [5]))
    yield case("Range", s(1, np.int64), s(10, np.int64), s(4, np.int64))
    yield case("Range", s(5, np.int64), s(0, np.int64), s(-2, np.int64))
    yield case("Range", s(0.5), s(2.0), s(0.5))
    yield case("Range", s(3, np.int64), s(3, np.int64), s(1, np.int64))
    for axis in (-1, 0, 1):
        yield case("OneHot", n(0, 2, -1, 7), s(3, np.int64), n(2, 5, dtype=np.float32), axis=axis)
    yield case("OneHot", i(0, 3, 2, 2), n(3), n(0, 1))
    yield case("EyeLike", f(3, 4))
    yield case("EyeLike", f(3, 4), k=1, dtype=7)
    yield case("Trilu", f(2, 3, 4))
    yield case("Trilu", f(3, 4), s(1, np.int64), upper=0)
    yield case("Trilu", i(0, 9, 3, 4), s(-1, np.int64))
    for source in (2 * f(6), i(-3, 4, 6), i(-3, 4, 6, dtype=np.int32), b(6)):
        for to in (1, 7, 6, 9, 10, 11):
            yield Case("Cast", (source,), {"to": to})
    yield case("CastLike", f(4), n(1))


def selections() -> Iterator[Case]:
    x = f(4, 5, 3)
    yield case("Slice", x, n(1), n(3))
    yield case("Slice", x, n(0, 1), n(-1, 99), n(1, 0), n(2, 1))
    yield case("Slice", x, n(-1), n(-99), n(1), n(-1))
    yield case("Slice", x, n(3, -2), n(0, -5), n(0, 1), n(-2, -1))
    yield case("Slice", x, n(3), n(1), n(0))
    yield case("Slice", n(1, 2, 3, 4), n(1), n(np.iinfo(np.int64).max))
    yield case("Slice", n(1, 2, 3, 4), n(3), n(np.iinfo(np.int64).min), n(0), n(-1))
    yield case("Gather", x, n(0, 2, -1))
    yield case("Gather", x, i(-5, 5, 2, 3), axis=1)
    yield case("Gather", x, s(1, np.int64), axis=-1)
    yield case("Gather", n(4, 5, 6), s(-1, np.int32))
    yield case("GatherElements", x, i(-4, 4, 2, 5, 3))
    yield case("GatherElements", x, i(-3, 3, 4, 5, 2, dtype=np.int32), axis=2)
    yield case("GatherND", x, i(-4, 4, 2, 3, 1))
    yield case("GatherND", x, i(-3, 3, 2, 3))
    yield case("GatherND", f(2, 4, 3), i(0, 3, 2, 5, 1), batch_dims=1)
    yield case("GatherND", f(2, 4, 3), i(0, 3, 2, 2), batch_dims=1)
    yield case("ScatterND", x, n(0, 2).reshape(2, 1), f(2, 5, 3))
    yield case("ScatterND", x, n(0, 1, -1, 2).reshape(2, 2), f(2, 3))
    places = n(0, 2, 1, 1, 0, 2).reshape(2, 3)
    yield case("ScatterElements", f(3, 3), places, f(2, 3))
    yield case("ScatterElements", f(2, 5), n(1, -1).reshape(1, 2), f(1, 2), axis=1)
    for reduction in ("add", "mul", "max", "min"):
        yield case("ScatterND", f(4, 2), n(1, 1, 0).reshape(3, 1), f(3, 2), reduction=reduction)
        yield case(
            "ScatterElements", f(3, 3), n(0, 0, 1).reshape(1, 3), f(1, 3), reduction=reduction
        )
    yield case("NonZero", i(0, 2, 3, 4))
    yield case("NonZero", f(3) * n(1, 0, 1).astype(np.float32))
    yield case("Compress", x, n(1, 0, 1, dtype=bool), axis=1)
    yield case("Compress", f(2, 3), n(0, 1, 1, 0, 1, dtype=bool))
    yield case("ReverseSequence", f(4, 3, 2), n(1, 4, 2))
    yield case("ReverseSequence", f(3, 4), n(1, 4, 2), time_axis=1, batch_axis=0)
    pads = n(0, 1, 2, 0, 1, 1)
    yield case("Pad", f(2, 3, 4), pads)
    yield case("Pad", f(2, 3, 4), pads, s(1.5))
    yield case("Pad", f(2, 3, 4), n(0, -1, 2, 0, 1, -2), s(0.5))
    yield case("Pad", f(2, 3, 4), n(2, 1), s(0.5), n(-1))
    yield case("Pad", i(0, 9, 2, 3), n(1, 0, 0, 2), s(7, np.int64))
    for mode in ("reflect", "edge", "wrap"):
        yield case("Pad", f(2, 3, 4), pads, mode=mode)
        yield case("Pad", f(2, 3, 4), n(1, 3), None, n(2), mode=mode)


def convolutions() -> Iterator[Case]:
    yield case("Conv", f(2, 3, 6, 7), f(4, 3, 3, 3), f(4))
    yield case("Conv", f(2, 3, 6, 7), f(4, 3, 3, 2), pads=[1, 1, 1, 1], strides=[2, 1])
    yield case("Conv", f(2, 3, 6, 7), f(4, 3, 3, 3), pads=[0, 1, 2, 0], dilations=[2, 1])
    yield case("Conv", f(2, 4, 6, 7), f(4, 1, 3, 3), f(4), group=4, pads=[1, 1, 1, 1])
    yield case("Conv", f(1, 4, 5, 5), f(6, 2, 1, 1), group=2, auto_pad="VALID")
    yield case("Conv", f(2, 3, 9), f(4, 3, 3), f(4), pads=[1, 2])
    yield case("Conv", f(1, 2, 4, 5, 4), f(3, 2, 2, 3, 2), f(3), strides=[1, 2, 1])
    for auto in ("SAME_UPPER", "SAME_LOWER"):
        for kernel, strides in ((3, 2), (2, 1), (4, 3)):
            weight = f(2, 3, kernel, kernel)
            yield case("Conv", f(1, 3, 7, 8), weight, strides=[strides] * 2, auto_pad=auto)
        yield case(
            "ConvTranspose", f(1, 3, 4, 5), f(3, 2, 3, 3), f(2), strides=[2, 2], auto_pad=auto
        )
    x, weight = f(2, 4, 3, 4), f(4, 3, 3, 2)
    yield case("ConvTranspose", x, weight, f(3))
    yield case("ConvTranspose", x, weight, strides=[2, 3], auto_pad="SAME_UPPER")
    yield case("ConvTranspose", x, weight, f(3), strides=[2, 3], pads=[1, 0, 0, 1])
    yield case("ConvTranspose", x, weight, strides=[2, 3], output_padding=[1, 2])
    yield case("ConvTranspose", x, weight, strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 0])
    yield case("ConvTranspose", x, weight, f(3), strides=[2, 2], output_shape=[6, 8])
    yield case("ConvTranspose", x, weight, strides=[2, 2], output_shape=[8, 9])
    yield case("ConvTranspose", x, f(4, 2, 3, 3), f(4), group=2, dilations=[2, 1])
    yield case("ConvTranspose", x, weight, strides=[2, 2], auto_pad="VALID")
    yield case("ConvTranspose", f(1, 2, 5), f(2, 3, 4), f(3), strides=[3], pads=[1, 2])
    yield case("ConvTranspose", f(1, 2, 2, 3, 2), f(2, 1, 2, 2, 2), strides=[2, 1, 2])


def pools() -> Iterator[Case]:
    x = f(2, 3, 7, 8)
    windows: list[dict[str, Any]] = [
        {"kernel_shape": [3, 3]},
        {"kernel_shape": [2, 3], "strides": [2, 2]},
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 1, 1, 0]},
        {"kernel_shape": [3, 2], "strides": [2, 3], "pads": [2, 1, 2, 1]},
        {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
        {"kernel_shape": [2, 2], "strides": [3, 3], "ceil_mode": 1},
        {"kernel_shape": [3, 3], "strides": [2, 3], "pads": [1, 1, 1, 1], "ceil_mode": 1},
        {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1},
        {"kernel_shape": [2, 3], "dilations": [2, 2], "strides": [1, 2]},
        {"kernel_shape": [2, 3], "dilations": [2, 3], "pads": [1, 2, 1, 1]},
        {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
        {"kernel_shape": [2, 3], "strides": [2, 3], "auto_pad": "SAME_LOWER"},
        {"kernel_shape": [2, 3], "strides": [2, 3], "auto_pad": "VALID"},
    ]
    for window in windows:
        yield case("MaxPool", x, **window)
        yield case("MaxPool", x, to=2, **window)
        for counted in (0, 1):
            yield case("AveragePool", x, count_include_pad=counted, **window)
        yield case("LpPool", x, **window)
    for operator in ("MaxPool", "AveragePool", "LpPool"):
        yield case(operator, f(1, 2, 9), kernel_shape=[3], strides=[2], pads=[1, 1])
        yield case(operator, f(1, 2, 4, 5, 4), kernel_shape=[2, 2, 3], strides=[2, 1, 1])
    yield case("LpPool", x, kernel_shape=[2, 2], p=3)
    for auto in ("SAME_UPPER", "SAME_LOWER"):  # windows with room between them
        room: dict[str, Any] = {"kernel_shape": [1, 1], "strides": [3, 2], "auto_pad": auto}
        yield from each("AveragePool LpPool", x, **room)
    for sizes in ((2, 3, 4, 5), (2, 3, 4), (1, 2, 2, 3, 2)):
        yield from each("GlobalAveragePool GlobalMaxPool GlobalLpPool", f(*sizes))
    yield case("GlobalLpPool", f(2, 3, 4, 5), p=1)


def norms() -> Iterator[Case]:
    for sizes in ((2, 3, 4, 5), (4, 3), (2, 3, 4), (1, 3, 2, 2, 2)):
        yield case("BatchNormalization", f(*sizes), f(3), f(3), f(3), u(0.5, 2, 3), epsilon=1e-3)
        if len(sizes) > 2:
            yield case("InstanceNormalization", f(*sizes), f(3), f(3))
    yield case("GroupNormalization", f(2, 6, 4, 5), f(6), f(6), num_groups=3)
    yield case("GroupNormalization", f(2, 4, 3), f(4), f(4), num_groups=2, epsilon=0.1)
    yield case("LayerNormalization", f(2, 3, 4), f(4), f(4))
    yield case("LayerNormalization", f(2, 3, 4), f(4), epsilon=0.1)
    yield case("LayerNormalization", f(2, 3, 4), f(3, 4), f(3, 4), axis=1)
    yield case("LayerNormalization", f(2, 3, 4), f(4), f(4), axis=-1, to=3)
    yield case("RMSNormalization", f(2, 3, 4), f(4), opset=23)
    yield case("RMSNormalization", f(2, 3, 4), f(3, 4), axis=1, epsilon=0.1, opset=23)
    for axis in (-1, 0, 1):
        for p in (1, 2):
            yield case("LpNormalization", f(2, 3, 4), axis=axis, p=p)
    yield case("LpNormalization", np.zeros((2, 3), np.float32))
    yield case("MeanVarianceNormalization", f(2, 3, 4, 5))
    yield case("MeanVarianceNormalization", f(2, 3, 4, 5), axes=[2, 3])
    yield case("LRN", f(2, 6, 3, 3), size=3)
    yield case("LRN", f(2, 6, 3, 3), size=5, alpha=0.5, beta=0.6, bias=1.5)


def resizes() -> Iterator[Case]:
    x, up, down = f(1, 2, 4, 5), n(1, 2, 7, 9), n(1, 2, 3, 2)
    modes = [
        "half_pixel",
        "align_corners",
        "asymmetric",
        "pytorch_half_pixel",
        "half_pixel_symmetric",
    ]
    for transform in modes:
        for sizes in (up, down, n(1, 2, 1, 1)):
            for mode in ("nearest", "linear", "cubic"):
                options: dict[str, Any] = {
                    "mode": mode,
                    "coordinate_transformation_mode": transform,
                }
                yield case("Resize", x, None, None, sizes, **options)
        for factor in (2.0, 1.3, 0.6):
            scales = n(1, 1, factor, factor, dtype=np.float32)
            options: dict[str, Any] = {
                "mode": "linear",
                "coordinate_transformation_mode": transform,
            }
            yield case("Resize", x, None, scales, **options)
    for nearest in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil"):
        for transform in ("asymmetric", "half_pixel"):
            options: dict[str, Any] = {
                "nearest_mode": nearest,
                "coordinate_transformation_mode": transform,
            }
            for factor in (2.0, 0.5, 1.7):
                yield case("Resize", x, None, n(1, 1, factor, factor, dtype=np.float32), **options)
    for mode in ("linear", "cubic"):
        yield case("Resize", x, None, None, down, mode=mode, antialias=1)
        yield case("Resize", x, None, None, n(1, 2, 8, 2), mode=mode, antialias=1)
    yield case("Resize", x, None, n(1, 1, 1.1, 1.1, dtype=np.float32), mode="linear")
    for factor in (0.6, 1.07, 1.55):  # the middle falls on an element but for rounding
        scales = n(1, 1, factor, factor, dtype=np.float32)
        options = {"coordinate_transformation_mode": "half_pixel_symmetric"}
        yield case("Resize", f(1, 1, 5, 7), None, scales, nearest_mode="floor", **options)
    yield case("Resize", x, None, None, up, mode="cubic", cubic_coeff_a=-0.5)
    yield case("Resize", x, None, None, up, mode="cubic", exclude_outside=1)
    yield case("Resize", f(2, 3, 6), None, None, n(2, 3, 9), mode="linear")
    yield case("Resize", f(1, 2, 3, 4, 3), None, None, n(1, 2, 4, 5, 6), mode="linear")
    yield case("Resize", x, None, None, n(8, 10), axes=[2, 3], mode="linear")
    for policy in ("not_larger", "not_smaller"):
        options: dict[str, Any] = {
            "axes": [2, 3],
            "keep_aspect_ratio_policy": policy,
            "mode": "linear",
        }
        yield case("Resize", x, None, None, n(7, 7), **options)
    roi = n(0, 0, 0.2, 0.1, 1, 1, 0.8, 1.3, dtype=np.float32)
    crop: dict[str, Any] = {
        "coordinate_transformation_mode": "tf_crop_and_resize",
        "mode": "linear",
    }
    yield case("Resize", x, roi, None, n(1, 2, 3, 4), extrapolation_value=9.0, **crop)
    grid = u(-1.2, 1.2, 2, 3, 4, 2)
    for mode in ("linear", "nearest", "cubic"):
        for padding in ("zeros", "border", "reflection"):
            for corners in (0, 1):
                options: dict[str, Any] = {
                    "mode": mode,
                    "padding_mode": padding,
                    "align_corners": corners,
                }
                yield case("GridSample", f(2, 3, 5, 4), grid, **options)
    yield case("GridSample", f(1, 2, 3, 4, 3), u(-1, 1, 1, 2, 2, 2, 3), mode="linear")


def recurrent() -> Iterator[Case]:
    steps, batch, width, hidden = 5, 3, 4, 2
    x, lengths = f(steps, batch, width), n(5, 2, 4, dtype=np.int32)
    for operator, gates in (("RNN", 1), ("GRU", 3), ("LSTM", 4)):
        states = 2 if operator == "LSTM" else 1
        full = states + 1
        for direction, count in (("forward", 1), ("reverse", 1), ("bidirectional", 2)):
            w, r = f(count, gates * hidden, width), f(count, gates * hidden, hidden)
            bias, starts = f(count, 2 * gates * hidden), [f(count, batch, hidden)] * states
            options: dict[str, Any] = {"direction": direction, "hidden_size": hidden}
            yield case(operator, x, w, r, to=full, **options)
            yield case(operator, x, w, r, bias, lengths, *starts, to=full, **options)
            if operator == "GRU":
                yield case(
                    operator, x, w, r, bias, None, *starts, to=2, linear_before_reset=1, **options
                )
            yield case(operator, x, w, r, bias, None, *starts, to=full, clip=0.4, **options)
        w, r = f(1, gates * hidden, width), f(1, gates * hidden, hidden)
        names = {"RNN": ["Relu"], "GRU": ["HardSigmoid", "Softsign"]}.get(
            operator, ["HardSigmoid", "Relu", "ScaledTanh"]
        )
        values: dict[str, Any] = {"activations": names, "hidden_size": hidden}
        if operator == "LSTM":
            values |= {"activation_alpha": [0.3, 0.9], "activation_beta": [0.4, 1.1]}
        yield case(operator, x, w, r, to=full, **values)
    w, r, peepholes = f(1, 8, width), f(1, 8, hidden), f(1, 6)
    parts = (f(1, 16), None, f(1, batch, hidden), f(1, batch, hidden), peepholes)
    yield case("LSTM", x, w, r, *parts, to=3, hidden_size=hidden)
    yield case("LSTM", x, w, r, *parts[:4], to=3, hidden_size=hidden, input_forget=1)


def attentions() -> Iterator[Case]:
    q, k, v = f(2, 4, 3, 6), f(2, 2, 5, 6), f(2, 2, 5, 7)
    yield case("Attention", q, f(2, 4, 5, 6), f(2, 4, 5, 7), opset=23)
    yield case("Attention", q, k, v, f(3, 5), opset=23, scale=0.3)
    yield case("Attention", q, k, v, b(2, 1, 3, 5) | True, opset=23)
    yield case("Attention", q, k, v, np.tri(3, 5, 2, dtype=bool), opset=23)
    yield case("Attention", q, k, v, opset=23, is_causal=1)
    yield case("Attention", q, k, v, f(3, 5), opset=23, softcap=0.8)
    past = (f(2, 2, 4, 6), f(2, 2, 4, 7))
    yield case("Attention", q, k, v, f(2, 4, 3, 9), *past, to=3, opset=23)
    yield case("Attention", q, k, v, None, *past, to=3, opset=23, is_causal=1)
    for mode in range(4):
        parts = (q, k, v, f(3, 9), *past)
        options: dict[str, Any] = {"softcap": 0.8, "qk_matmul_output_mode": mode}
        yield case("Attention", *parts, to=4, opset=24, **options)
    flat = (f(2, 3, 8), f(2, 5, 4), f(2, 5, 6))
    yield case("Attention", *flat, opset=23, q_num_heads=4, kv_num_heads=2)
    yield case("Attention", q, k, v, None, None, None, n(5, 3), opset=24)
    yield case("Attention", q, k, v, f(3, 5), opset=23, softmax_precision=1)
    for options in ({}, {"interleaved": 1}, {"rotary_embedding_dim": 4}):
        width = options.get("rotary_embedding_dim", 6) // 2
        x, places = f(2, 4, 3, 6), i(0, 9, 2, 3)
        yield case("RotaryEmbedding", x, f(9, width), f(9, width), places, opset=23, **options)
        yield case("RotaryEmbedding", x, f(2, 3, width), f(2, 3, width), opset=23, **options)
        yield case(
            "RotaryEmbedding", f(2, 3, 24), f(9, width), f(9, width), places,
            opset=23, num_heads=4, **options,
        )  # fmt: skip


def quantization() -> Iterator[Case]:
    x = 3 * f(2, 4, 6)
    for dtype in (np.int8, np.uint8, np.int16, np.uint16):
        zero = 100 if np.dtype(dtype).kind == "u" else -3
        yield case("QuantizeLinear", x, s(0.05), s(zero, dtype))
        yield case("QuantizeLinear", x, u(0.01, 0.1, 4), n(1, 0, 2, 3, dtype=dtype))
        yield case(
            "QuantizeLinear", x, u(0.01, 0.1, 2, 2, 6), i(0, 3, 2, 2, 6, dtype=dtype), block_size=2
        )
        codes = i(0, 100, 2, 4, 6, dtype=dtype)
        yield case("DequantizeLinear", codes, s(0.05), s(zero, dtype))
        yield case("DequantizeLinear", codes, u(0.01, 0.1, 6), axis=-1)
        yield case(
            "DequantizeLinear", codes, u(0.01, 0.1, 2, 4, 2), i(0, 3, 2, 4, 2, dtype=dtype),
            axis=2, block_size=3,
        )  # fmt: skip
    yield case("QuantizeLinear", x, s(0.05))
    yield case("QuantizeLinear", x, s(0.05), output_dtype=3)
    yield case("QuantizeLinear", n(-2.5, -1.5, 0.5, 1.5, 2.5, 500, dtype=np.float32), s(1.0))
    yield case("DequantizeLinear", i(-9999, 9999, 5, dtype=np.int32), s(0.001))


def cases() -> Sequence[Case]:
    """All of them."""
    families = (
        pointwise, several, reductions, shapes, selections, convolutions, pools, norms, resizes,
        recurrent, attentions, quantization,
    )  # fmt: skip
    return [made for family in families for made in family()]
