"""Odd models, each with what must come out of it, on both targets by one default run."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from graphs import proto

import qcompile
from qcompile import execute

Array = npt.NDArray[np.generic]
LINEARS = """(float[N,32] x) => (float[N,32] y) <float[32,32] w, float[32] b, float[32,32] v> {
    h = MatMul(x, w) i = Add(h, b) r = Relu(i) y = MatMul(r, v) }"""
CONVS = """(float[1,16,8,8] x) => (float[1,32,4,4] y)
    <float[32,16,3,3] w, float[32] b, float[32,32,1,1] v> {
    h = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(h) p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
    y = Conv(p, v) }"""


@dataclasses.dataclass(frozen=True)
class Fixture:
    """A graph and what must come out: the layers that run in int8, and what is left alone.

    ``shapes``: of inputs with dynamic dimensions. ``fewer``: layers that TensorRT keeps in float.
    """

    text: str
    int8: tuple[str, ...]
    alone: tuple[str, ...] = ()
    opset: int = 18
    shapes: dict[str, tuple[int, ...]] = dataclasses.field(
        default_factory=dict[str, "tuple[int, ...]"]
    )
    custom: tuple[str, ...] = ()
    targets: tuple[str, ...] = ("ort-cpu", "tensorrt-rtx")
    least: float = 25.0


FIXTURES = {
    **{f"linears at opset {n}": Fixture(LINEARS, ("h", "y"), opset=n) for n in (11, 13, 17, 21)},
    **{f"convs at opset {n}": Fixture(CONVS, ("h", "y"), opset=n) for n in (11, 13, 17, 21, 25)},
    "two Linears that share a weight": Fixture("""(float[N,32] x) => (float[N,32] y)
        <float[32,32] w> { h = MatMul(x, w) r = Relu(h) y = MatMul(r, w) }""", ("h", "y")),
    "a custom operator between two Linears": Fixture("""(float[N,32] x) => (float[N,32] y)
        <float[32,32] w, float[32,32] v> { h = MatMul(x, w) g = QuickGelu(h) y = MatMul(g, v) }""",
        ("h", "y"), ("g",), custom=("g",), targets=("ort-cpu",)),
    "an If that reads a value which is quantized outside": Fixture("""(float[N,32] x, bool c)
        => (float[N,32] y, float[N,32] z) <float[32,32] w, float[32,32] v> {
        h = MatMul(x, w) r = Relu(h) y = MatMul(r, v)
        z = If(c) <then_branch = a () => (float[N,32] t) { t = Neg(r) },
                   else_branch = b () => (float[N,32] e) { e = Abs(r) }> }""", ("h", "y"), ("z",)),
    "a Loop that multiplies": Fixture("""(float[2,32] x, int64 n, bool c) => (float[2,32] y)
        <float[32,32] w, float[32,32] v> {
        h = MatMul(x, w) r = Relu(h) l = Loop(n, c, r) <
            body = s (int64 k, bool go, float[2,32] p) => (bool on, float[2,32] q) {
                on = Identity(go) m = MatMul(p, v) q = Tanh(m) }>
        y = MatMul(l, v) }""", ("y",), ("h", "l"), targets=("ort-cpu",)),
    "weights behind Constant, Identity, Transpose and Cast": Fixture("""(float[N,32] x)
        => (float[N,32] y) <float[32,32] w, float[32,32] v> {
        a = Transpose<perm=[1,0]>(w) h = MatMul(x, a) i = Identity(v) d = Cast<to=11>(i)
        f = Cast<to=1>(d) r = Relu(h) y = MatMul(r, f) }""", ("h", "y")),
    "NHWC with transposes": Fixture("""(float[1,8,8,16] x) => (float[1,8,8,32] y)
        <float[32,16,3,3] w, float[32] b, float[32,32,1,1] v> {
        t = Transpose<perm=[0,3,1,2]>(x) h = Conv<pads=[1,1,1,1]>(t, w, b)
        u = Transpose<perm=[0,2,3,1]>(h) r = Relu(u) s = Transpose<perm=[0,3,1,2]>(r)
        c = Conv(s, v) y = Transpose<perm=[0,2,3,1]>(c) }""", ("h", "c")),
    "zero-size, scalar and int64 inputs": Fixture("""(float[N,32] x, float[N,K] none, float gain,
        int64[N,1] index) => (float[N,32] y) <float[32,32] w, float[32,32] v> {
        j = Concat<axis=1>(x, none) h = MatMul(j, w) s = Mul(h, gain)
        k = Cast<to=1>(index) a = Add(s, k) y = MatMul(a, v) }""", ("h", "y"),
        shapes={"none": (2, 0)}, targets=("ort-cpu",)),
    "a recurrent layer": Fixture("""(float[5,1,32] x) => (float[5,1,32] y)
        <float[1,128,32] w, float[1,128,32] r, float[32,32] v> {
        l, m, n = LSTM<hidden_size=32>(x, w, r) o = Constant<value_ints=[1]>() s = Squeeze(l, o)
        y = MatMul(s, v) }""", ("y",), ("l",), opset=13),
    "a decomposed LayerNorm and Gelu": Fixture("""(float[N,6,32] x) => (float[N,6,32] y)
        <float two = {2}, float eps = {0.001}, float[32] g, float[32] b, float[32,32] w,
         float[32,32] v, float q = {1.41421356}, float one = {1}, float half = {0.5}> {
        m = ReduceMean<axes=[-1]>(x) d = Sub(x, m) p = Pow(d, two) t = ReduceMean<axes=[-1]>(p)
        e = Add(t, eps) r = Sqrt(e) n = Div(d, r) s = Mul(n, g) u = Add(s, b) h = MatMul(u, w)
        i = Div(h, q) j = Erf(i) k = Add(j, one) l = Mul(h, k) o = Mul(l, half)
        y = MatMul(o, v) }""", ("h", "y"), opset=11),
    "a decomposed BatchNorm": Fixture("""(float[1,16,8,8] x) => (float[1,16,8,8] y)
        <float[16,16,3,3] w, float[1,16,1,1] g, float[1,16,1,1] b> {
        h = Conv<pads=[1,1,1,1]>(x, w) s = Mul(h, g) a = Add(s, b) y = Relu(a) }""", ("h",)),
    "a Softmax over the channels of opset 11": Fixture("""(float[N,16,4,4] x) => (float[N,16,4,4] y)
        <float[16,16,1,1] w> { h = Conv(x, w) y = Softmax<axis=1>(h) }""", ("h",), opset=11,
        least=18),
}  # fmt: skip


def samples(model: onnx.ModelProto, shapes: dict[str, tuple[int, ...]]) -> list[dict[str, Array]]:
    """Twenty samples; a dynamic dimension is 2."""
    rng = np.random.default_rng(0)
    found: list[dict[str, Array]] = []
    for number in range(20):
        sample: dict[str, Array] = {}
        for value in ir.from_proto(model).graph.inputs:
            assert value.dtype is not None and value.name
            dims = tuple(d if isinstance(d, int) else 2 for d in value.shape or ())
            shape = shapes.get(value.name, dims)
            dtype = np.dtype(value.dtype.numpy())
            noise = rng.standard_normal(shape) if dtype.kind == "f" else np.full(shape, number % 2)
            sample[value.name] = np.asarray(noise, dtype)
        found.append(sample)
    return found


@pytest.mark.parametrize("name", FIXTURES)
def test_an_odd_model_compiles_and_nothing_is_silent(name: str, tmp_path: pathlib.Path) -> None:
    fixture = FIXTURES[name]
    model = proto(fixture.text, fixture.opset)
    for node in model.graph.node:
        if node.output[0] in fixture.custom:
            node.domain = "com.microsoft"
    if fixture.custom:
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    data = samples(model, fixture.shapes)
    path = tmp_path / "odd.onnx"
    path.write_bytes(model.SerializeToString())
    results = qcompile.compile(path, tmp_path / "out", calib=data, targets=fixture.targets)
    for result in results:
        runs = {layer.name: layer.runs for layer in result.report.layers}
        assert {layer for layer, runs in runs.items() if runs == "int8"} == set(fixture.int8)
        assert {item.name for item in result.report.left_alone} == set(fixture.alone)
        assert all(item.reason for item in result.report.left_alone)
        for output in result.report.outputs:
            assert output.sqnr > fixture.least, output
    session = execute.Session(results[0].folder / "model.onnx")
    assert session.inputs == tuple(i.name for i in model.graph.input)
    assert session.outputs == tuple(o.name for o in model.graph.output)
    session.run(data[0])
