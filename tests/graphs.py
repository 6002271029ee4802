"""Tiny models for tests: a graph as onnx.parser text, its weights filled from a seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir

from qcompile import execute
from qcompile.capture import capture

Array = npt.NDArray[Any]

# What each layer of a test graph is: one of each kind that ``graph.layers`` knows.
LINEAR = "(float[2,8] x) => (float[2,3] y) <float[8,3] w> { y = MatMul(x, w) }"
GEMM = """(float[2,8] x) => (float[2,3] y) <float[3,8] w, float[3] b> {
    y = Gemm<transB=1>(x, w, b) }"""
CONV = """(float[1,2,5,5] x) => (float[1,4,5,5] y) <float[4,2,3,3] w, float[4] b> {
    y = Conv<pads=[1,1,1,1]>(x, w, b) }"""
CHAIN = """(float[2,8] x) => (float[2,4] y) <float[8,8] w1, float[8] b1, float[8,4] w2> {
    h = MatMul(x, w1) s = Add(h, b1) r = Relu(s) y = MatMul(r, w2) }"""


def proto(text: str, opset: int = 21, seed: int = 0) -> onnx.ModelProto:
    """The model of ``text``; a declared float that nothing writes is a weight from ``seed``."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> tiny {text}')
    written = {name for node in model.graph.node for name in node.output}
    rng = np.random.default_rng(seed)
    for info in list(model.graph.value_info):
        tensor = info.type.tensor_type
        if info.name not in written and tensor.elem_type == onnx.TensorProto.FLOAT:
            shape = [d.dim_value for d in tensor.shape.dim]
            weight = (0.3 * rng.standard_normal(shape)).astype(np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(weight, info.name))
            model.graph.value_info.remove(info)
    return model


def graph(text: str, opset: int = 21, seed: int = 0) -> ir.Model:
    """The model of ``text`` as captured, so that nodes are named and layers have origins."""
    return capture(proto(text, opset, seed))


def samples(model: ir.Model, count: int = 1, seed: int = 1) -> list[dict[str, Array]]:
    """Random inputs: normal floats, integers 0 and 1; a dynamic dimension is 2."""
    rng = np.random.default_rng(seed)
    found: list[dict[str, Array]] = []
    for _ in range(count):
        sample: dict[str, Array] = {}
        for value in model.graph.inputs:
            assert value.dtype is not None
            shape = [d if isinstance(d, int) else 2 for d in value.shape or ()]
            dtype = value.dtype.numpy()
            whole = np.dtype(dtype).kind in "iub"
            noise = rng.integers(0, 2, shape) if whole else rng.standard_normal(shape)
            sample[value.name or ""] = noise.astype(dtype)
        found.append(sample)
    return found


def weight(model: ir.Model, name: str) -> Array:
    """The array of an initializer."""
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def node(model: ir.Model, name: str) -> ir.Node:
    """The node called ``name``."""
    return next(n for n in model.graph if n.name == name)


def outputs(model: ir.Model, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """What ONNX Runtime computes for every output of ``model``, without optimizations."""
    return execute.execute(model, feeds)


def assert_same_function(before: ir.Model, after: ir.Model, count: int = 3) -> None:
    """Outputs agree to the rounding of float32 sums of at most a few hundred terms."""
    for feeds in samples(before, count):
        wanted, actual = outputs(before, feeds), outputs(after, feeds)
        assert list(wanted) == list(actual)
        for name in wanted:
            np.testing.assert_allclose(actual[name], wanted[name], rtol=1e-5, atol=1e-5)
