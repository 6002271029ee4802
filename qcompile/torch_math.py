"""Operators that compute: pointwise, logic, reductions, products, quantization."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.torch_table import Call, Table, along, dtype_of, integers, norm, wide

TABLE = Table()

# If two threads make the first call of Intel's vector mathematics in a process at once, one of them
# may round otherwise in it: what is fitted then differs from run to run. So one thread makes it.
torch.exp(torch.ones(1))


# -- one input ----------------------------------------------------------------------------------

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs, "Neg": torch.neg, "Exp": torch.exp, "Log": torch.log, "Sqrt": torch.sqrt,
    "Reciprocal": torch.reciprocal, "Floor": torch.floor, "Ceil": torch.ceil, "Sign": torch.sign,
    "Sin": torch.sin, "Cos": torch.cos, "Tan": torch.tan,
    "Asin": torch.asin, "Acos": torch.acos, "Atan": torch.atan,
    "Sinh": torch.sinh, "Cosh": torch.cosh, "Tanh": torch.tanh,
    "Asinh": torch.asinh, "Acosh": torch.acosh, "Atanh": torch.atanh,
    "Erf": torch.erf, "Sigmoid": torch.sigmoid, "Relu": torch.relu,
    "Softsign": F.softsign, "HardSwish": F.hardswish, "Mish": F.mish,
    "Not": torch.logical_not, "BitwiseNot": torch.bitwise_not, "IsNaN": torch.isnan,
}  # fmt: skip


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[[Call, Tensor], Tensor]:
    return lambda _, x: function(x)


for _name, _function in _UNARY.items():
    TABLE.entry(_name)(_unary(_function))


@TABLE.entry("Round")
def round_half_to_even(_: Call, x: Tensor) -> Tensor:
    """Ties go to the even integer."""
    return torch.round(x)


@TABLE.entry("Identity")
def identity(_: Call, x: Tensor) -> Tensor:
    """The input itself."""
    return x


@TABLE.entry("Dropout", host=(1, 2))
def dropout(call: Call, x: Tensor, _: Tensor | None = None, training: Tensor | None = None):
    """Inference only: the input, and a mask that keeps everything."""
    if training is not None and bool(training):
        call.refuse("training_mode")
    return x, torch.ones_like(x, dtype=torch.bool) if call.wants(1) else None


@TABLE.entry("Softplus")
def softplus(_: Call, x: Tensor) -> Tensor:
    """log(1 + e^x) at every x; torch's own turns linear at 20."""
    return torch.logaddexp(x, torch.zeros_like(x))


@TABLE.entry("Gelu")
def gelu(call: Call, x: Tensor) -> Tensor:
    """x times the normal distribution function, or its approximation by tanh."""
    return F.gelu(x, approximate=call.text("approximate", "none"))


@TABLE.entry("Elu")
def elu(call: Call, x: Tensor) -> Tensor:
    """alpha (e^x - 1) below zero."""
    return F.elu(x, call.float("alpha", 1.0))


@TABLE.entry("Selu")
def selu(call: Call, x: Tensor) -> Tensor:
    """gamma times Elu."""
    alpha = call.float("alpha", 1.67326319217681884765625)
    return call.float("gamma", 1.05070102214813232421875) * F.elu(x, alpha)


@TABLE.entry("Celu")
def celu(call: Call, x: Tensor) -> Tensor:
    """alpha (e^(x / alpha) - 1) below zero."""
    return F.celu(x, call.float("alpha", 1.0))


@TABLE.entry("LeakyRelu")
def leaky_relu(call: Call, x: Tensor) -> Tensor:
    """alpha x below zero."""
    return F.leaky_relu(x, call.float("alpha", 0.01))


@TABLE.entry("ThresholdedRelu")
def thresholded_relu(call: Call, x: Tensor) -> Tensor:
    """x above alpha, else zero."""
    return F.threshold(x, call.float("alpha", 1.0), 0.0)


@TABLE.entry("Shrink")
def shrink(call: Call, x: Tensor) -> Tensor:
    """x moved by ``bias`` towards zero, zero within ``lambd``."""
    lambd, bias = call.float("lambd", 0.5), call.float("bias", 0.0)
    return torch.where(x.abs() > lambd, x - bias * torch.sign(x), torch.zeros_like(x))


@TABLE.entry("HardSigmoid")
def hard_sigmoid(call: Call, x: Tensor) -> Tensor:
    """alpha x + beta within [0, 1]."""
    return (call.float("alpha", 0.2) * x + call.float("beta", 0.5)).clamp(0.0, 1.0)


@TABLE.entry("Swish")
def swish(call: Call, x: Tensor) -> Tensor:
    """x sigmoid(alpha x)."""
    return x * torch.sigmoid(call.float("alpha", 1.0) * x)


@TABLE.entry("IsInf")
def is_inf(call: Call, x: Tensor) -> Tensor:
    """Infinite, of the signs that are asked for."""
    negative, positive = call.int("detect_negative", 1), call.int("detect_positive", 1)
    return torch.isinf(x) & (((x < 0) & bool(negative)) | ((x > 0) & bool(positive)))


@TABLE.entry("Clip", host=(1, 2))
def clip(_: Call, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Within the bounds that are there; like Relu without a gradient at a bound.

    Bounds with a gradient have that of the elements outside.
    """
    bounds = [bound for bound in (low, high) if bound is not None]
    if not bounds:
        return x
    if not x.is_floating_point() or any(bound.requires_grad for bound in bounds):
        return torch.clamp(x, low, high)
    least = -math.inf if low is None else float(low)
    most = math.inf if high is None else float(high)
    # The backward pass of clamp takes six times as long.
    return F.hardtanh(x, least, most) if least < most else torch.clamp(x, least, most)


@TABLE.entry("Softmax")
def softmax(call: Call, x: Tensor) -> Tensor:
    """Along one axis."""
    return torch.softmax(x, call.int("axis", -1))


@TABLE.entry("LogSoftmax")
def log_softmax(call: Call, x: Tensor) -> Tensor:
    """Along one axis."""
    return torch.log_softmax(x, call.int("axis", -1))


@TABLE.entry("Hardmax")
def hardmax(call: Call, x: Tensor) -> Tensor:
    """One at the first maximum along the axis, else zero."""
    axis = call.int("axis", -1)
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1.0)


# -- more inputs --------------------------------------------------------------------------------

_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul,
    "And": torch.logical_and, "Or": torch.logical_or, "Xor": torch.logical_xor,
    "Equal": torch.eq, "Greater": torch.gt, "GreaterOrEqual": torch.ge,
    "Less": torch.lt, "LessOrEqual": torch.le,
    "BitwiseAnd": torch.bitwise_and, "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
}  # fmt: skip


def _binary(
    function: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[Call, Tensor, Tensor], Tensor]:
    return lambda _, a, b: function(a, b)


for _name, _function in _BINARY.items():
    TABLE.entry(_name)(_binary(_function))


@TABLE.entry("MatMul")
def matmul(_: Call, a: Tensor, b: Tensor) -> Tensor:
    """CUDA has no product of integers; that of doubles is as exact up to 2^53."""
    if a.is_floating_point() or not a.is_cuda:
        return torch.matmul(a, b)
    return torch.matmul(a.double(), b.double()).to(a.dtype)


@TABLE.entry("Div")
def div(_: Call, a: Tensor, b: Tensor) -> Tensor:
    """Integers are truncated towards zero."""
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@TABLE.entry("Pow")
def power(_: Call, a: Tensor, b: Tensor) -> Tensor:
    """The type of the result is that of the base."""
    return torch.pow(a, b).to(a.dtype)


@TABLE.entry("Mod")
def mod(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """With the sign of the divisor, or of the dividend for ``fmod``."""
    return torch.fmod(a, b) if call.int("fmod", 0) else torch.remainder(a, b)


@TABLE.entry("PRelu")
def prelu(_: Call, x: Tensor, slope: Tensor) -> Tensor:
    """slope x below zero."""
    return torch.where(x < 0, slope * x, x)


@TABLE.entry("BitShift")
def bit_shift(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """In int64, because torch shifts no unsigned type but uint8."""
    left = call.text("direction", "") == "LEFT"
    shift = torch.bitwise_left_shift if left else torch.bitwise_right_shift
    return shift(a.long(), b.long()).to(a.dtype)


@TABLE.entry("Where")
def where(_: Call, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``a`` where the condition holds, else ``b``."""
    return torch.where(condition, a, b)


@TABLE.entry("Max")
def maximum(_: Call, *inputs: Tensor) -> Tensor:
    """Of any number of inputs."""
    return functools.reduce(torch.maximum, inputs)


@TABLE.entry("Min")
def minimum(_: Call, *inputs: Tensor) -> Tensor:
    """Of any number of inputs."""
    return functools.reduce(torch.minimum, inputs)


@TABLE.entry("Sum")
def total(_: Call, *inputs: Tensor) -> Tensor:
    """Of any number of inputs."""
    return functools.reduce(torch.add, inputs)


@TABLE.entry("Mean")
def mean(_: Call, *inputs: Tensor) -> Tensor:
    """Of any number of inputs."""
    return functools.reduce(torch.add, inputs) / len(inputs)


@TABLE.entry("Gemm")
def gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """alpha A B + beta C, with A and B transposed if asked for."""
    a = a.t() if call.int("transA", 0) else a
    b = b.t() if call.int("transB", 0) else b
    alpha, beta = call.float("alpha", 1.0), call.float("beta", 1.0)
    if c is None or beta == 0.0:
        product = a @ b
        return product if alpha == 1.0 else alpha * product
    return torch.addmm(c, a, b, beta=beta, alpha=alpha)


@TABLE.entry("Einsum")
def einsum(call: Call, *inputs: Tensor) -> Tensor:
    """The sum of products that the equation says."""
    return torch.einsum(call.text("equation", ""), *inputs)


# -- reductions ---------------------------------------------------------------------------------


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, axis, keepdim=keep, dtype=x.dtype)
    return x


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.sum(x, axes, keepdim=keep, dtype=x.dtype)


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return torch.mean(x, axes, keepdim=keep)
    count = math.prod(x.shape[axis] for axis in axes)
    return torch.div(_sum(x, axes, keep), count, rounding_mode="trunc")


def _norm(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return norm(wide(x) if x.is_floating_point() else x.double(), axes, keep).to(x.dtype)


_REDUCE: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceSum": _sum,
    "ReduceMean": _mean,
    "ReduceProd": _product,
    "ReduceMax": lambda x, axes, keep: torch.amax(x, axes, keepdim=keep),
    "ReduceMin": lambda x, axes, keep: torch.amin(x, axes, keepdim=keep),
    "ReduceL1": lambda x, axes, keep: _sum(x.abs(), axes, keep),
    "ReduceL2": _norm,
    "ReduceLogSum": lambda x, axes, keep: _sum(x, axes, keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep),
    "ReduceSumSquare": lambda x, axes, keep: _sum(x.square(), axes, keep),
}


def _reduce(
    function: Callable[[Tensor, list[int], bool], Tensor],
) -> Callable[..., Tensor]:
    def reduce(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
        chosen = integers(axes) or call.ints("axes")
        keep = bool(call.int("keepdims", 1))
        if not chosen and not call.int("noop_with_empty_axes", 0):
            chosen = list(range(x.dim()))
        if not chosen:  # each element by itself, of which torch has no notion
            return function(x.unsqueeze(-1), [x.dim()], False)
        return function(x, [axis % x.dim() for axis in chosen], keep)

    return reduce


for _name, _reduction in _REDUCE.items():
    TABLE.entry(_name, host=(1,))(_reduce(_reduction))


@TABLE.entry("ArgMax")
def arg_max(call: Call, x: Tensor) -> Tensor:
    """The first place of the maximum, or the last."""
    return _place(call, x, torch.argmax)


@TABLE.entry("ArgMin")
def arg_min(call: Call, x: Tensor) -> Tensor:
    """The first place of the minimum, or the last."""
    return _place(call, x, torch.argmin)


def _place(call: Call, x: Tensor, find: Callable[..., Tensor]) -> Tensor:
    axis, keep = call.int("axis", 0), bool(call.int("keepdims", 1))
    if not call.int("select_last_index", 0):
        return find(x, axis, keepdim=keep)
    return x.shape[axis] - 1 - find(x.flip(axis), axis, keepdim=keep)


@TABLE.entry("CumSum", host=(1,))
def cumulative_sum(call: Call, x: Tensor, axis: Tensor) -> Tensor:
    """Along one axis, from its end if ``reverse``, without the element itself if ``exclusive``."""
    along_axis = int(axis)
    backwards = bool(call.int("reverse", 0))
    summed = x.flip(along_axis) if backwards else x
    summed = torch.cumsum(summed, along_axis, dtype=x.dtype)
    if call.int("exclusive", 0):
        head = torch.zeros_like(summed.narrow(along_axis, 0, 1))
        body = summed.narrow(along_axis, 0, x.shape[along_axis] - 1)
        summed = torch.cat([head, body], along_axis)
    return summed.flip(along_axis) if backwards else summed


@TABLE.entry("TopK", host=(1,))
def top_k(call: Call, x: Tensor, k: Tensor):
    """Of equal elements that with the lower index comes first."""
    axis, largest = call.int("axis", -1), bool(call.int("largest", 1))
    values, places = torch.sort(x, dim=axis, descending=largest, stable=True)
    return values.narrow(axis, 0, int(k)), places.narrow(axis, 0, int(k))


# -- quantization -------------------------------------------------------------------------------


def _spread(call: Call, x: Tensor, parameter: Tensor) -> Tensor:
    """A scale or zero point so that it broadcasts with ``x``: of a tensor, an axis or blocks."""
    if parameter.dim() <= 1 and parameter.numel() == 1:
        return parameter.reshape(())
    axis = call.int("axis", 1) % x.dim()
    if parameter.dim() == 1:
        return along(x, parameter, axis)
    size = call.int("block_size", 0) or -(-x.shape[axis] // parameter.shape[axis])
    return parameter.repeat_interleave(size, axis).narrow(axis, 0, x.shape[axis])


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """``rounded``, to the bit, with the gradient of ``value``."""
    return rounded.detach() + (value - value.detach())


@TABLE.entry("QuantizeLinear")
def quantize(call: Call, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """round(x / scale) + zero, within the range of the type.

    The gradient is that of x / scale within the range and zero outside. A type of integers has
    none in torch, so that codes with a gradient are kept in floating point.
    """
    kind = _code_type(call)
    ratio = wide(x) / wide(_spread(call, x, scale))
    learns = torch.is_grad_enabled() and ratio.requires_grad
    if kind.is_floating_point():
        dtype, largest = dtype_of(kind), torch.finfo(dtype_of(kind)).max
        if call.int("saturate", 1):
            ratio = ratio.clamp(-largest, largest)
        return straight_through(ratio, ratio.to(dtype).to(ratio)) if learns else ratio.to(dtype)
    shift = 0.0 if zero is None else _spread(call, x, zero).to(ratio.dtype)
    low, high = _range(kind)
    codes = straight_through(ratio, ratio.round()) if learns else ratio.round()
    codes = (codes + shift).clamp(low, high)
    return codes if learns else codes.to(torch.int32).to(dtype_of(kind))


def _code_type(call: Call) -> ir.DataType:
    """The type of the codes: of the zero point, else the attribute, else uint8."""
    zero = call.node.inputs[2] if len(call.node.inputs) > 2 else None
    named = call.int("output_dtype", 0)
    if zero is None:
        return ir.DataType(named) if named else ir.DataType.UINT8
    kind = zero.dtype or (zero.const_value.dtype if zero.const_value is not None else None)
    if kind is None:
        call.refuse("a zero point of unknown type")
    if kind is ir.DataType.FLOAT4E2M1:
        call.refuse("codes of the type FLOAT4E2M1")
    return kind


def _range(kind: ir.DataType) -> tuple[int, int]:
    bits = kind.bitwidth
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if kind.is_signed() else (0, (1 << bits) - 1)


@TABLE.entry("DequantizeLinear")
def dequantize(call: Call, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """(codes - zero) scale, in the type of the scale."""
    step = _spread(call, codes, scale)
    if not codes.is_floating_point():
        codes = codes.to(torch.int32)  # torch subtracts no uint16
    if zero is not None and not zero.is_floating_point():
        codes = codes - _spread(call, codes, zero).to(codes.dtype)
    product = codes.to(wide(step).dtype) * wide(step)
    return product.to(call.dtype("output_dtype", scale.dtype))
