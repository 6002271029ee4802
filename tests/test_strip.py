"""Taking Q/DQ away: what is left is the float function of what was quantized."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx_ir as ir
import pytest
from graphs import CHAIN, graph, outputs, proto, samples

from qcompile import compiler, execute, simulate, strip
from qcompile.capture import capture
from qcompile.errors import CaptureError
from qcompile.models import fashion


@pytest.mark.parametrize("name", [fashion.CNN, fashion.VIT])
@pytest.mark.parametrize(
    "quantize",
    [
        "quantize",
        "quantize{granularity=tensor}",
        "quantize{weight=int4 input=float}",
        "quantize{scale=dynamic}",
    ],
)
def test_a_compiled_model_without_its_pairs_is_the_float_model_with_rounded_weights(
    name: str, quantize: str, tmp_path: pathlib.Path
) -> None:
    model = capture(fashion.path(name))
    passes = f"simplify,fold-bn,calibrate,{quantize},insert-qdq"
    [done] = compiler.compile(
        model, tmp_path / "out", calib=str(fashion.path(fashion.CALIBRATION)), passes=passes
    )
    stripped = capture(tmp_path / "out" / "model.onnx", requantize=True)
    kinds = {node.op_type for node in stripped.graph}
    assert not kinds & {"QuantizeLinear", "DequantizeLinear"}
    assert [v.name for v in stripped.graph.outputs] == [v.name for v in model.graph.outputs]
    image = fashion.calibration()[:32]
    [wanted] = outputs(model, {"image": image}).values()
    [found] = outputs(stripped, {"image": image}).values()
    # Without the rounding of activations it is no farther from float than what it was made of; the
    # two figures are of different pictures.
    assert simulate.sqnr(wanted, found) > done.report.outputs[0].sqnr - 3


def test_the_constants_are_what_the_runtime_dequantizes() -> None:
    model = proto("""(float[2,4] x) => (float[2,4] y, float[4,4] w)
        <int8[4,4] c = {1,2,3,4,5,6,7,8,-1,-2,-3,-4,-5,-6,-7,-8},
         float[4] s = {0.5, 0.25, 1.0, -2.0}, int8[4] z = {0, 1, -1, 3}> {
        d = DequantizeLinear<axis = 0>(c, s, z) y = MatMul(x, d) w = Identity(d) }""")
    stripped = capture(model, requantize=True)
    [feeds] = samples(stripped)
    expected = execute.Session(ir.from_proto(model)).run(feeds)
    np.testing.assert_array_equal(outputs(stripped, feeds)["w"], expected["w"])
    np.testing.assert_allclose(outputs(stripped, feeds)["y"], expected["y"], rtol=1e-6)


def test_a_float_model_is_left_alone() -> None:
    model = graph(CHAIN)
    assert strip.strip(model) == 0


def test_integer_operators_are_refused_by_name() -> None:
    model = proto("""(uint8[2,4] x, uint8[4,3] w) => (int32[2,3] y) {
        y = MatMulInteger(x, w) }""")
    with pytest.raises(CaptureError, match=r"quantized already: node 'y' is MatMulInteger"):
        capture(model, requantize=True)


def test_a_quantized_model_can_be_quantized_again(tmp_path: pathlib.Path) -> None:
    data = str(fashion.path(fashion.CALIBRATION))
    compiler.compile(fashion.path(fashion.CNN), tmp_path / "a", calib=data)
    with pytest.raises(CaptureError, match="--requantize"):
        compiler.compile(tmp_path / "a" / "model.onnx", tmp_path / "b", calib=data)
    [again] = compiler.compile(
        tmp_path / "a" / "model.onnx", tmp_path / "b", calib=data, requantize=True
    )
    assert again.report.fused() == 1.0
    assert again.report.outputs[0].sqnr > 30
