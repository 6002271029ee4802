"""Laws of the border: what is no sound model is refused, naming the node or the value."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from graphs import CHAIN, CONV, graph, proto, samples

from qcompile import compiler, execute, text
from qcompile import graph as graphs
from qcompile.capture import capture
from qcompile.errors import CaptureError, TargetError, reason

BODY = """(bool c, float[2,8] x) => (float[2,8] y) <float[8,8] w> {
    h = MatMul(x, w)
    y = If(c) <
        then_branch = then () => (float[2,8] a) { a = Abs(h) },
        else_branch = other () => (float[2,8] b) { b = Neg(h) }> }"""
FUNCTION = """<ir_version: 10, opset_import: ["": 21, "acme": 1]>
    g (float[2,8] x, float[8,8] w) => (float[2,8] y) { y = acme.twice(x, w) }
    <domain: "acme", opset_import: ["": 21]>
    twice (a, b) => (c) { m = MatMul(a, b) c = MatMul(m, b) }"""


def _body(model: onnx.ModelProto) -> onnx.GraphProto:
    return model.graph.node[1].attribute[0].g


def _read(model: onnx.ModelProto) -> None:
    _body(model).node[0].input[0] = "nobody"


def _write(model: onnx.ModelProto) -> None:
    _body(model).output[0].name = "nobody"


def _attribute(model: onnx.ModelProto) -> None:
    _body(model).node[0].op_type = "LeakyRelu"
    _body(model).node[0].attribute.append(onnx.helper.make_attribute("alpha", [1, 2]))


def _unheard(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("gain", 2.0))


def _more(model: onnx.ModelProto) -> None:
    model.graph.node[0].input.append("x")


def _fewer(model: onnx.ModelProto) -> None:
    del model.graph.node[0].input[:]


def _lacking(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = ""


def _writing(model: onnx.ModelProto) -> None:
    model.graph.node[0].output.append("g")


def _sequence(model: onnx.ModelProto) -> None:
    model.graph.input[1].type.sequence_type.elem_type.tensor_type.elem_type = 1


def _negative(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = -8


def _sparse(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].ClearField("raw_data")
    model.graph.initializer[0].float_data.extend([1.0, 2.0])


def _untyped(model: onnx.ModelProto) -> None:
    model.graph.input[1].type.tensor_type.elem_type = 0


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_read, r"node 'a' \(Abs\) reads 'nobody', which nothing writes"),
        (_write, "output 'nobody' is written by nothing"),
        (_attribute, r"node 'a' \(LeakyRelu\) has the attribute 'alpha' as INTS; ONNX wants FLOAT"),
        (_unheard, r"node 'h' \(MatMul\) has the attribute 'gain', which ONNX does not know"),
        (_more, r"node 'h' \(MatMul\) reads 3 values; ONNX wants 2"),
        (_fewer, r"node 'h' \(MatMul\) reads 0 values; ONNX wants 2"),
        (_lacking, r"node 'h' \(MatMul\) lacks its input 'A'"),
        (_writing, r"node 'h' \(MatMul\) writes 2 values; ONNX wants 1"),
        (_sequence, "input 'x' is no tensor"),
        (_negative, r"weight 'w' has the shape \[-8, 8\]"),
        (_sparse, "weight 'w' cannot be read"),
        (_untyped, "input 'x' has no type"),
    ],
)
def test_what_is_broken_is_named(spoil: Callable[[onnx.ModelProto], None], says: str) -> None:
    model = proto(BODY, 18)
    spoil(model)
    with pytest.raises(CaptureError, match=says):
        capture(model)


def test_a_function_is_looked_into() -> None:
    model = onnx.parser.parse_model(FUNCTION)
    model.functions[0].node[1].input[0] = "nobody"
    with pytest.raises(CaptureError, match=r"node 'c' \(MatMul\) reads 'nobody'"):
        capture(model)


def test_a_name_that_is_no_text_is_refused(tmp_path: pathlib.Path) -> None:
    content = proto(CHAIN).SerializeToString().replace(b"Relu", b"R\xff\xfeu")
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(CaptureError, match=r"the name b'R\\xff\\xfeu' is no text"):
        capture(tmp_path / "m.onnx")


def test_a_graph_in_memory_is_looked_at_before_it_is_copied() -> None:
    model = ir.from_proto(proto(BODY, 18))
    inner = model.graph[1].attributes["then_branch"].value[0]
    inner.replace_input_with(0, ir.Value(name="nobody"))
    with pytest.raises(CaptureError, match="reads 'nobody'"):
        capture(model)


def test_nodes_of_a_circle_are_named() -> None:
    model = proto(CHAIN)
    model.graph.node[1].input[0] = "r"
    with pytest.raises(CaptureError, match="nodes read in a circle: 'r', 's'"):
        capture(model)


@pytest.mark.parametrize("place", ["/etc/passwd", "../secret", "a/../../secret"])
def test_a_file_does_not_choose_what_is_read_of_the_machine(
    tmp_path: pathlib.Path, place: str
) -> None:
    model = proto(CHAIN)
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=place)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(CaptureError, match="outside the folder of the model"):
        capture(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"offset": "200"}, "lies in bytes 200 to 456 of '.*w.data', which has 300"),
        ({"length": "8"}, "has 8 bytes, not 256"),
    ],
)
def test_a_file_of_weights_holds_what_the_shapes_need(
    tmp_path: pathlib.Path, fields: dict[str, str], says: str
) -> None:
    model = proto(CHAIN)
    weight = model.graph.initializer[0]
    (tmp_path / "w.data").write_bytes(bytes(300))
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": "w.data", **fields}.items():
        weight.external_data.add(key=key, value=value)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(CaptureError, match=says):
        capture(tmp_path / "m.onnx")


# -- what is odd and can be repaired ------------------------------------------------------------


def test_a_size_below_zero_is_a_dynamic_dimension() -> None:
    model = capture(proto(CHAIN.replace("float[2,8] x", "float[-1,8] x").replace("-1", "1", 0)))
    assert [str(d) for d in model.graph.inputs[0].shape or ()] == ["None", "8"]


def test_what_another_compilation_noted_is_forgotten() -> None:
    wanted = graph(CHAIN)
    model = proto(CHAIN)
    for key in ("qcompile.origin", "qcompile.spec.0", "qcompile.reason"):
        model.graph.node[0].metadata_props.add(key=key, value="{")
        model.graph.value_info.add(name="h").metadata_props.add(key="qcompile.range", value="gone")
    assert text.render(capture(model)) == text.render(wanted)
    assert graphs.origins(capture(model).graph[0]) == ("h",)


def test_an_output_that_is_listed_twice_stays_so() -> None:
    model = proto("(float[2,8] x) => (float[2,8] y) <float[8,8] w> { y = MatMul(x, w) }")
    model.graph.output.append(model.graph.output[0])
    captured = capture(model)
    graphs.redirect(
        captured,
        captured.graph.outputs[0],
        graphs.insert(captured, "Neg", [captured.graph.inputs[0]], output="n"),
        keep=lambda _: False,
    )
    assert [v.name for v in captured.graph.outputs] == ["y", "y"]


@pytest.mark.parametrize("rank", [1, 2, 6])
def test_a_kernel_of_a_wrong_rank_makes_no_layer(rank: int) -> None:
    model = ir.from_proto(proto(CONV))
    weight = model.graph.initializers["w"]
    weight.shape = ir.Shape([1] * rank)
    assert list(graphs.layers(model)) == []


def test_a_long_chain_of_moves_is_seen_through() -> None:
    model = ir.from_proto(
        proto("(float[2,8] x) => (float[2,3] y) <float[3,8] w> { y = Gemm(x, w) }")
    )
    value = model.graph.initializers["w"]
    for _ in range(2001):  # more than the stack holds
        value = graphs.insert(model, "Transpose", [value], {"perm": [1, 0]}, output="t")
    assert graphs.is_constant(value)
    assert graphs.constant(value).shape == (8, 3)


# -- the words of libraries ---------------------------------------------------------------------


def _refused(model: onnx.ModelProto) -> str:
    with pytest.raises(TargetError) as caught:
        execute.Session(ir.from_proto(model))
    return str(caught.value)


def test_what_the_runtime_says_is_one_line_without_its_own_places() -> None:
    unknown, missing = proto(CHAIN), proto(CHAIN)
    unknown.graph.node[2].op_type, unknown.graph.node[2].domain = "Swirl", "com.acme"
    unknown.opset_import.append(onnx.helper.make_opsetid("com.acme", 1))
    assert _refused(unknown) == (
        "ONNX Runtime refuses the model: it has no operator 'Swirl' of the domain 'com.acme'"
    )
    missing.graph.node[2].name = "act"
    missing.graph.node[2].op_type = "Where"
    said = _refused(missing)
    assert said.startswith("ONNX Runtime refuses the model: node 'act' (Where): has input size 1")
    for noise in ("onnxruntime_src", "ONNXRuntimeError", "\n"):
        assert noise not in said


def test_a_model_that_kills_the_runtime_is_refused(tmp_path: pathlib.Path) -> None:
    model = proto("""(float[2,8] x) => (float[2,8] y)
        <int64[0] n = {}, bool go = {1}, float[8,8] w> {
        h = MatMul(x, w)
        y = Loop(n, go, h) <
            body = body (int64 i, bool c, float[2,8] a) => (bool d, float[2,8] b) {
                d = Identity(c) b = Tanh(a) }> }""", 18)  # fmt: skip
    data = samples(capture(model), 2)
    with pytest.raises(TargetError, match=r"ONNX Runtime dies of the model \(SIGSEGV\)"):
        compiler.compile(model, tmp_path / "out", calib=data)


def test_the_reason_is_that_of_the_first_cause() -> None:
    def fail() -> None:
        try:
            raise ValueError("the weight\nis gone")
        except ValueError as error:
            raise RuntimeError("while doing this and that") from error

    with pytest.raises(RuntimeError) as caught:
        fail()
    assert reason(caught.value) == "the weight is gone"
    assert reason(KeyError()) == "KeyError"
