"""What the entries of the operator table share: the table, the call, and types.

An entry computes one ONNX operator with torch: it takes the call and the inputs of the node (None
for one that is left out) and returns the output, or a tuple of outputs. It never writes to what it
reads, and works in float32, float16 and float64 alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from qcompile.errors import PassError

Output = Tensor | tuple[Tensor | None, ...]
Function = Callable[..., Output]

# Types that torch lacks are held in the next larger one; their codes and values are the same.
_TYPES: dict[ir.DataType, torch.dtype] = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    ir.DataType.FLOAT8E5M2: torch.float8_e5m2,
    ir.DataType.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    ir.DataType.FLOAT4E2M1: torch.float32,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.INT64: torch.int64,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT4: torch.int8,
    ir.DataType.INT2: torch.int8,
    ir.DataType.UINT64: torch.uint64,
    ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT4: torch.uint8,
    ir.DataType.UINT2: torch.uint8,
}
# Types that torch takes from numpy by their bits only, and those of which several share a byte.
_BITS = {
    ir.DataType.BFLOAT16: np.uint16,
    ir.DataType.FLOAT8E4M3FN: np.uint8,
    ir.DataType.FLOAT8E4M3FNUZ: np.uint8,
    ir.DataType.FLOAT8E5M2: np.uint8,
    ir.DataType.FLOAT8E5M2FNUZ: np.uint8,
}
_HELD = {torch.int8: np.int8, torch.uint8: np.uint8, torch.float32: np.float32}


@dataclasses.dataclass(frozen=True)
class Entry:
    """How one operator is computed.

    ``host`` are the inputs that are read as numbers, such as the shape of a Reshape. They are
    brought to the CPU; all others are brought to one device.
    """

    function: Function
    host: frozenset[int]


class Table(dict[str, Entry]):
    """Entries by operator of the ONNX domain."""

    def entry(self, *operators: str, host: Sequence[int] = ()) -> Callable[[Function], Function]:
        """Enter the decorated function for ``operators``."""

        def enter(function: Function) -> Function:
            for operator in operators:
                self[operator] = Entry(function, frozenset(host))
            return function

        return enter


class Call:
    """The node that is computed: its attributes, the opset, and which outputs are wanted."""

    def __init__(self, node: ir.Node, opset: int) -> None:
        self.node, self.opset = node, opset
        self._attributes: dict[str, Any] = {
            name: attribute.value for name, attribute in node.attributes.items()
        }

    def has(self, name: str) -> bool:
        """Whether the attribute is there."""
        return name in self._attributes

    def int(self, name: str, default: int) -> int:
        """An integer attribute."""
        return self._attributes.get(name, default)

    def float(self, name: str, default: float) -> float:
        """A floating-point attribute."""
        return self._attributes.get(name, default)

    def text(self, name: str, default: str) -> str:
        """A string attribute."""
        return self._attributes.get(name, default)

    def ints(self, name: str) -> list[int] | None:
        """An attribute of integers; None if it is not there."""
        found = self._attributes.get(name)
        return None if found is None else [int(v) for v in found]

    def floats(self, name: str) -> list[float]:
        """An attribute of numbers; none if it is not there."""
        return [float(v) for v in self._attributes.get(name, ())]

    def texts(self, name: str) -> list[str]:
        """An attribute of strings; none if it is not there."""
        return list(self._attributes.get(name, ()))

    def tensor(self, name: str) -> Tensor | None:
        """A tensor attribute."""
        found = self._attributes.get(name)
        return None if found is None else tensor_of(found)

    def dtype(self, name: str, default: torch.dtype) -> torch.dtype:
        """An attribute that is a type."""
        number = self._attributes.get(name)
        return default if not number else dtype_of(ir.DataType(number))

    def wants(self, output: int) -> bool:
        """Whether the output at this position exists."""
        return output < len(self.node.outputs) and bool(self.node.outputs[output].name)

    def refuse(self, what: str) -> NoReturn:
        """Raise PassError: the entry of the operator does not cover ``what``."""
        raise PassError(
            f"node {self.node.name!r} ({self.node.op_type}) has {what}, which cannot be run in "
            f"torch; choose a subgraph without it"
        )


def dtype_of(dtype: ir.DataType) -> torch.dtype:
    """The torch type that holds ``dtype``. Raises PassError for text and complex numbers."""
    if dtype not in _TYPES:
        raise PassError(f"torch has no tensors of the type {dtype.name}")
    return _TYPES[dtype]


def tensor_of(tensor: ir.TensorProtocol) -> Tensor:
    """A copy of an ONNX tensor on the CPU."""
    kind = ir.DataType(tensor.dtype)
    dtype = dtype_of(kind)
    array: npt.NDArray[Any] = np.array(tensor.numpy(), order="C")  # rank 0 stays rank 0
    if kind in _BITS:
        return from_array(array.view(_BITS[kind])).view(dtype)
    if kind.bitwidth < 8:
        array = array.astype(_HELD[dtype])
    return from_array(array)


def from_array(array: npt.NDArray[Any]) -> Tensor:
    """A tensor on the CPU that shares the memory of ``array``."""
    library: Any = torch  # partly untyped
    return library.from_numpy(array)


def numbers(tensor: Tensor | None) -> list[Any] | None:
    """The elements of a tensor of any rank, in order; None for None."""
    flat: Any = None if tensor is None else tensor.reshape(-1)  # partly untyped
    return None if flat is None else flat.tolist()


def integers(tensor: Tensor | None) -> list[int] | None:
    """``numbers`` of a tensor of integers or booleans."""
    return numbers(tensor)


def wide(x: Tensor) -> Tensor:
    """``x`` in float32 if its type has fewer bits: what sums and norms are computed in."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def along(x: Tensor, vector: Tensor, axis: int) -> Tensor:
    """``vector`` shaped so that it broadcasts along ``axis`` of ``x``."""
    shape = [1] * x.dim()
    shape[axis] = -1
    return vector.reshape(shape)


def norm(x: Tensor, axes: list[int], keep: bool, p: float = 2) -> Tensor:
    """The p-norm along ``axes``; its gradient is zero where it is zero."""
    library: Any = torch.linalg  # partly untyped
    return library.vector_norm(x, p, axes, keep)
