"""What is refused before a builder is called: each node by name, and nothing that builds."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import lowering
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from qcompile import execute, graph
from qcompile.backends import trt_build, trt_check
from qcompile.backends.tensorrt import TensorRtRtx

# A product with both sides through Q/DQ; each case changes a word.
PAIRS = """(float[4,16] x) => (float[4,16] y)
<float s = {0.1}, int8 z = {0}, int8[4,16] c, float t = {0.1}, int8 u = {0}> {
    q = QuantizeLinear(x, s, z)
    a = DequantizeLinear(q, s, z)
    b = DequantizeLinear(c, t, u)
    d = Transpose(b)
    e = MatMul(a, d)
    y = Concat<axis=1>(e, e, e, e)
}"""
BLOCKS = """(float[4,32] x) => (float[4,8] y)
<int4[32,8] c, float[2,8] t> {
    b = DequantizeLinear<axis=0, block_size=16>(c, t)
    y = MatMul(x, b)
}"""
BESIDE = BLOCKS.replace("int4[32,8] c", "float s = {0.1}, int8 z = {0}, int4[32,8] c").replace(
    "y = MatMul(x, b)",
    "q = QuantizeLinear(x, s, z) a = DequantizeLinear(q, s, z) y = MatMul(a, b)",
)
BIAS = """(float[4,16] x) => (float[4,16] y) <int32[16] c, float t = {0.1}> {
    b = DequantizeLinear(c, t)
    y = Add(x, b)
}"""
HALF = """(float[4,32] x) => (float16[4,8] y)
<int4[32,8] c, float16[2,8] t> {
    h = Cast<to=10>(x)
    b = DequantizeLinear<axis=0, block_size=16>(c, t)
    y = MatMul(h, b)
}"""


def parsed(source: str, opset: int = 21) -> ir.Model:
    """The model of ``source``, its weights 1, as it is: what is to be refused need not be sound."""
    text = f'<ir_version: 10, opset_import: ["": {opset}, "com.microsoft": 1]> t {source}'
    proto = onnx.parser.parse_model(text)
    for node in proto.graph.node:
        node.name = node.output[0]
    written = {name for node in proto.graph.node for name in node.output}
    weights = {info.name for info in proto.graph.value_info} - written
    model = ir.from_proto(proto)
    for value in [v for node in model.graph for v in node.inputs if v is not None]:
        if value.name in weights and value.const_value is None and value.dtype and value.shape:
            ones: graph.Array = np.ones(value.shape.numpy()).astype(value.dtype.numpy())
            value.const_value = ir.Tensor(ones, dtype=value.dtype, name=value.name)
            model.graph.register_initializer(value)
    kinds = {"QuantizeLinear": 2, "DequantizeLinear": 1}
    for node in model.graph:  # the types that shape inference would give
        place = kinds.get(node.op_type)
        typed = node.inputs[place] if place is not None else node.inputs[0]
        assert typed is not None
        kind = typed.dtype
        if node.op_type == "Cast":
            kind = ir.DataType(node.attributes["to"].value)
        if kind is not None and node.outputs[0].dtype is None:
            node.outputs[0].type = ir.TensorType(kind)
    return model


# By words of the source to replace, options of the check, and what is said of which node.
@pytest.mark.parametrize(
    ("source", "said"),
    [
        (PAIRS.replace("int8 z = {0}", "int8 z = {5}"), "q (QuantizeLinear): a zero point"),
        (PAIRS.replace("int8 u = {0}", "int8 u = {3}"), "b (DequantizeLinear): a zero point"),
        (PAIRS.replace("float t = {0.1}", "float t = {-0.1}"), "b (DequantizeLinear): a scale"),
        (PAIRS.replace("int8 z = {0}", "uint8 z = {0}"), "q (QuantizeLinear): uint8 codes"),
        (PAIRS.replace("int8[4,16] c", "uint8[4,16] c"), "b (DequantizeLinear): uint8 codes"),
        (BLOCKS.replace("int4[32,8] c", "uint4[32,8] c"), "b (DequantizeLinear): uint4 codes"),
        (BIAS, "b (DequantizeLinear): int32 codes, as of a bias"),
        (BESIDE, "y (MatMul): weights with a scale a block beside int8"),
        (HALF.replace("MatMul(h, b)", "MatMul(x, b)"), "y (MatMul): inputs of float and float16"),
        (
            "(float[4,16] x) => (float[4,16] y) { y = com.microsoft.MatMulNBits(x) }",
            "y (MatMulNBits): TensorRT takes integers as pairs",
        ),
        (
            "(uint8[4,4] x) => (int32[4,4] y) { y = MatMulInteger(x, x) }",
            "y (MatMulInteger): TensorRT takes integers as pairs",
        ),
        (
            """(float[1,32,4,4] x) => (float[1,2,4,4] y)
            <int4[2,32,1,1] c, float[2,2,1,1] t> {
                b = DequantizeLinear<axis=1, block_size=16>(c, t)
                y = Conv(x, b)
            }""",
            "b (DequantizeLinear): blocks must lie along",
        ),
    ],
)  # fmt: skip
def test_what_no_engine_holds_is_named(source: str, said: str) -> None:
    model = parsed(source)
    if "Conv(" in source:
        node = next(n for n in model.graph if n.op_type == "DequantizeLinear")
        node.outputs[0].shape = ir.Shape([2, 32, 1, 1])
    found = trt_check.refusals(model)
    assert [line for line in found if line.startswith(said)], found


def test_every_node_is_named_once() -> None:
    source = PAIRS.replace("int8 z = {0}", "uint8 z = {5}")
    found = trt_check.refusals(parsed(source))
    assert [line.split(" ")[0] for line in found] == ["q", "a"]


@pytest.mark.parametrize(
    ("kind", "capability", "version", "said"),
    [
        (ir.DataType.FLOAT8E4M3FN, 86, None, "fp8e4m3 needs compute capability 8.9, not 8.6"),
        (ir.DataType.FLOAT8E4M3FN, 89, None, ""),
        (ir.DataType.FLOAT4E2M1, 89, None, "fp4e2m1 needs compute capability 12.0, not 8.9"),
        (ir.DataType.FLOAT4E2M1, 120, (10, 13), "FP4 needs TensorRT 11.0"),
        (ir.DataType.FLOAT4E2M1, 120, (11, 0), ""),
        (ir.DataType.BFLOAT16, 75, None, "bfloat16 needs compute capability 8.0, not 7.5"),
        (ir.DataType.FLOAT8E5M2, 120, None, "fp8e5m2 codes are refused"),
        (ir.DataType.INT2, 120, None, "int2 codes are refused"),
    ],
)
def test_types_need_hardware_and_versions(
    kind: ir.DataType, capability: int, version: tuple[int, int] | None, said: str
) -> None:
    model = parsed(PAIRS)
    codes = model.graph.initializers["c"]
    codes.type = ir.TensorType(kind)
    found = " ".join(trt_check.refusals(model, (capability,), version))
    assert said in found if said else found == ""


def test_a_static_fp4_activation_never_reaches_the_builder() -> None:
    model = parsed(PAIRS)
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT4E2M1)
    assert "q (QuantizeLinear): a static FP4 activation" in " ".join(trt_check.refusals(model))


def test_turing_has_no_half_kernel_for_int4() -> None:
    assert not trt_check.refusals(parsed(HALF), (80, 89))
    assert "7.5 has no float16 kernel" in trt_check.refusals(parsed(HALF), (75,))[0]


@pytest.mark.parametrize("passes", [lowering.DECIDE, f"{lowering.DECIDE},cast-half"])
def test_nothing_of_the_dialect_is_refused(passes: str) -> None:
    model = lowering.graph_of("(float[N,32] x) => (float[N,16] y) <float[32,16] w> {"
                              " y = MatMul(x, w) }")  # fmt: skip
    lowering.decide(model, passes)
    TensorRtRtx().lower(model)
    assert trt_check.refusals(model, (80, 89), (10, 3)) == []


@pytest.mark.parametrize(
    "source", [BIAS, PAIRS.replace("int8 u = {0}", "int8 u = {3}"), PAIRS, BLOCKS, HALF]
)
def test_the_parser_agrees(tmp_path: pathlib.Path, source: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    path = tmp_path / "model.onnx"
    execute.save(parsed(source), path)
    request = trt_build.Request(
        module="tensorrt_rtx", model=str(path), engine=str(tmp_path / "e"), cc=[89], profile={}
    )
    done = subprocess.run(
        [sys.executable, "-m", "qcompile.backends.trt_build"],
        input=json.dumps(request), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    refused = bool(trt_check.refusals(parsed(source), (89,)))
    assert bool(json.loads(done.stdout)["error"]) == refused
