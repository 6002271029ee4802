"""Codes of few bits in a file: as many bits as they have, not those of the type of a kernel.

A runtime that computes what depends on constants alone when it makes a session may be given codes
packed, with nodes that unpack them: the file is smaller, and what runs is the same. The memory of a
session is not less.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile import graph, numerics
from qcompile.numerics import Codes, IntFormat

# On a node that reads codes which may be packed: the bits that they take.
BITS = "qcompile.packed_bits"
# Bytes of the nodes that unpack a weight, rather too many (570 to 650 in the shipped models).
NODES = 800


def bits_of(form: IntFormat, held: int, count: int) -> int:
    """The bits of each of ``count`` codes of ``form`` in a file, in a type of ``held`` bits."""
    saved = (held - form.bits) * count / 8
    return form.bits if 4 * form.bits <= 3 * held and saved > 2 * NODES else held


def _codes(node: ir.Node) -> ir.Value | None:
    """The codes that ``node`` reads."""
    return node.inputs[0 if node.op_type == "DequantizeLinear" else 1]


def follow(old: ir.Node, new: ir.Node) -> None:
    """Let ``new``, which reads the codes in place of ``old``, have them packed as well."""
    if BITS in old.metadata_props:
        new.metadata_props[BITS] = old.metadata_props[BITS]


def saved(node: ir.Node) -> int:
    """The bytes that the codes which ``node`` reads take less in the file than in memory."""
    bits = int(node.metadata_props.get(BITS, 0))
    codes = _codes(node) if bits else None
    if codes is None or codes.const_value is None:
        return 0
    tensor = codes.const_value
    return tensor.nbytes - bits * -(-math.prod(map(int, tensor.shape.numpy())) // 8)


def planes(codes: Codes, bits: int) -> npt.NDArray[np.uint8]:
    """``codes`` of ``bits``, signed, as uint8 [bits, ceil(n / 8), 1]: a bit of each, lowest first.

    The codes stand in the order of the array, eight in a byte, the first the lowest bit; what they
    are more than the smallest code is stored.
    """
    above = (codes.reshape(-1) + (1 << (bits - 1))).astype(np.uint8)
    rows = [np.packbits((above >> bit) & 1, bitorder="little") for bit in range(bits)]
    return np.stack(rows)[:, :, None]


def packed(model: ir.Model) -> ir.Model:
    """A copy of the lowered ``model`` in which the codes that may be packed are.

    ``((planes >> 0..7) & 1)`` are the bits, [bits, n]; their product with ``1, 2, 4, ...``, less
    the largest of these, are the codes.
    """
    made = model.clone()
    packer = _Packer(made)
    for node in list(made.graph):
        bits = int(node.metadata_props.pop(BITS, 0))
        codes = _codes(node) if bits else None
        if codes is not None and codes.is_initializer():
            packer.pack(codes, bits, node)
    return made


class _Packer:
    """Packs codes of ``model``; small constants are shared."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self._constants: dict[str, ir.Value] = {}
        self._nodes = 0

    def pack(self, codes: ir.Value, bits: int, reader: ir.Node) -> None:
        """Pack ``codes``, first read by ``reader``, and unpack them in front of it."""
        tensor, dtype, name = codes.const_value, codes.dtype, codes.name or "codes"
        assert tensor is not None and dtype is not None
        shape = tuple(map(int, tensor.shape.numpy()))
        count = math.prod(shape)

        def compute() -> ir.TensorProtocol:
            return ir.Tensor(planes(numerics.unpack(tensor), bits))

        def add(op: str, *inputs: ir.Value, **attributes: int | str) -> ir.Value:
            # Names that are short: they are most of what a node takes in a file.
            self._nodes += 1
            output = f"unpack/{self._nodes}"
            return graph.insert(self.model, op, inputs, attributes, output=output, before=reader)

        size = ir.Shape((bits, -(-count // 8), 1))
        lazy = ir.LazyTensor(compute, ir.DataType.UINT8, size)
        powers = (1 << np.arange(bits)).astype(np.uint8)
        held = graph.add_constant(self.model, f"{name}/packed", lazy)
        shifts = self._constant("shifts", np.arange(8, dtype=np.uint8).reshape(1, 1, 8))
        shifted = add("BitShift", held, shifts, direction="RIGHT")
        single = add("BitwiseAnd", shifted, self._constant("one", np.array(1, np.uint8)))
        rows = add("Reshape", single, self._constant(f"rows/{bits}", np.array([bits, -1])))
        weights = self._constant(f"powers/{bits}", powers.reshape(1, bits))
        summed = add("MatMulInteger", weights, rows)
        middle = self._constant(f"middle/{bits}", np.array(1 << (bits - 1), np.int32))
        found = add("Sub", summed, middle)
        if count % 8:
            ends = (np.array([number]) for number in (0, count, 1))  # start, end, axis
            found = add("Slice", found, *(self._constant(f"at/{e[0]}", e) for e in ends))
        wanted = self._constant(f"shape/{shape}", np.array(shape, np.int64))
        unpacked = add("Cast", add("Reshape", found, wanted), to=int(dtype))
        graph.redirect(self.model, codes, unpacked, keep=lambda _: False)
        # The runtime calls a constant that it computed as the value was: proofs find it by name.
        del self.model.graph.initializers[name]
        unpacked.name = name
        unpacked.type, unpacked.shape = ir.TensorType(dtype), ir.Shape(shape)

    def _constant(self, what: str, array: npt.NDArray[np.generic]) -> ir.Value:
        if what not in self._constants:
            self._constants[what] = graph.add_constant(self.model, f"unpack/{what}", array)
        return self._constants[what]
