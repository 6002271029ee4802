"""Laws of capture: it repairs names and order, keeps the function, and refuses in plain words."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import CHAIN, LINEAR, graph, outputs, proto, samples

from qcompile import execute, opset, text, verify
from qcompile import graph as graphs
from qcompile.capture import capture, load_object
from qcompile.errors import CaptureError
from qcompile.models import fashion


def names(model: ir.Model) -> list[str | None]:
    return [node.name for node in model.graph]


# -- repair -------------------------------------------------------------------------------------


def test_the_names_of_the_user_are_kept() -> None:
    model = proto(CHAIN)
    for node, name in zip(model.graph.node, ["up", "bias", "act", "down"], strict=True):
        node.name = f"block/{name}"
    captured = capture(model)
    assert names(captured) == ["block/up", "block/bias", "block/act", "block/down"]
    assert [node.outputs[0].name for node in captured.graph] == ["h", "s", "r", "y"]


def test_a_node_without_a_name_is_called_after_what_it_writes() -> None:
    assert names(graph(CHAIN)) == ["h", "s", "r", "y"]


def test_repeated_node_names_are_made_unique() -> None:
    model = proto(CHAIN)
    for node in model.graph.node:
        node.name = "layer"
    assert names(capture(model)) == ["layer", "layer.1", "layer.2", "layer.3"]


def test_nodes_of_bodies_are_named_apart_from_those_of_the_graph() -> None:
    model = proto("""(bool c, float[4] x) => (float[4] y) { y = If(c) <
        then_branch = then () => (float[4] a) { a = Neg(x) },
        else_branch = other () => (float[4] b) { b = Abs(x) }> }""")
    for attribute in model.graph.node[0].attribute:
        attribute.g.node[0].name = "same"
    captured = capture(model)
    found = [node.name for node in captured.graph.all_nodes()]
    assert len(set(found)) == len(found) == 3


def test_an_unsorted_graph_is_sorted() -> None:
    model = proto(CHAIN)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))
    captured = capture(model)
    assert names(captured) == ["h", "s", "r", "y"]
    [feeds] = samples(captured)
    np.testing.assert_array_equal(outputs(captured, feeds)["y"], outputs(graph(CHAIN), feeds)["y"])


def test_constants_become_initializers() -> None:
    model = graph("""(float[2,4] x) => (float[4,2] y) {
        s = Constant<value_ints = [4, 2]>() r = Reshape(x, s)
        f = Constant<value_float = 2.0>() y = Mul(r, f) }""")
    assert names(model) == ["r", "y"]
    assert sorted(model.graph.initializers) == ["f", "s"]


def test_weights_that_are_inputs_as_well_become_constants() -> None:
    model = proto(LINEAR)
    model.graph.input.append(
        onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [8, 3])
    )
    captured = capture(model)
    assert [v.name for v in captured.graph.inputs] == ["x"]
    assert [layer.kind for layer in graphs.layers(captured)] == ["linear"]


def test_functions_are_inlined() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 21, "acme": 1]>
        g (float[2,8] x, float[8,8] w) => (float[2,8] y) { y = acme.twice(x, w) }
        <domain: "acme", opset_import: ["": 21]>
        twice (a, b) => (c) { m = MatMul(a, b) c = MatMul(m, b) }""")
    captured = capture(model)
    assert [node.op_type for node in captured.graph] == ["MatMul", "MatMul"]
    assert not captured.functions


def test_dead_nodes_are_removed() -> None:
    model = graph("(float[4] x) => (float[4] y) <float[4] w> { d = Mul(x, w) y = Neg(x) }")
    assert names(model) == ["y"]
    assert not model.graph.initializers


def test_shapes_are_inferred() -> None:
    model = graph(CHAIN)
    assert [graphs.shape_of(n.outputs[0]) for n in model.graph] == [(2, 8), (2, 8), (2, 8), (2, 4)]


def test_a_layer_behind_an_unknown_operator_has_a_type() -> None:
    model = proto("""(float[2,8] x) => (float[2,3] y) <float[8,8] w, float[8,3] v> {
        h = MatMul(x, w) g = Gelu(h) y = MatMul(g, v) }""")
    model.graph.node[1].domain = "com.microsoft"
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    captured = capture(model)
    assert [layer.input.value.dtype for layer in graphs.layers(captured) if layer.input] == [
        ir.DataType.FLOAT,
        ir.DataType.FLOAT,
    ]


def test_every_layer_is_its_own_origin() -> None:
    model = graph(CHAIN)
    assert {n.name: graphs.origins(n) for n in model.graph if graphs.origins(n)} == {
        "h": ("h",),
        "y": ("y",),
    }


def test_the_model_that_was_given_is_not_touched() -> None:
    given = ir.from_proto(proto(CHAIN))
    before = ir.to_proto(given).SerializeToString()
    capture(given)
    assert ir.to_proto(given).SerializeToString() == before


@pytest.mark.parametrize("name", [fashion.CNN, fashion.VIT])
def test_capture_keeps_the_function_and_is_its_own_fixed_point(name: str) -> None:
    model = capture(fashion.path(name))
    feeds = {"image": fashion.calibration()[:3]}
    wanted = execute.Session(fashion.path(name), optimize=False).run(feeds)
    for key, value in outputs(model, feeds).items():
        np.testing.assert_array_equal(value, wanted[key])
    again = capture(model)
    assert text.render(again, weights=True) == text.render(model, weights=True)
    assert names(again) == names(model)


def test_a_captured_model_is_the_same_after_save_and_load(tmp_path: pathlib.Path) -> None:
    model = capture(fashion.path(fashion.CNN))
    execute.save(model, tmp_path / "m.onnx")
    again = capture(tmp_path / "m.onnx")
    assert text.render(again, weights=True) == text.render(model, weights=True)
    assert text.render(model.clone(), weights=True) == text.render(model, weights=True)


# -- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [opset.OLDEST - 1, opset.NEWEST + 1])
def test_an_opset_out_of_range_is_rejected(version: int) -> None:
    with pytest.raises(CaptureError, match=rf"opset {version} is not supported; .* 7 to 25"):
        graph(LINEAR, version)


@pytest.mark.parametrize("version", [18, 21, 25])
def test_an_opset_from_18_on_is_kept(version: int) -> None:
    assert graph(LINEAR, version).opset_imports[""] == version


# Operators whose attributes became inputs, or whose meaning changed, between opset 7 and 18.
CHANGED = {
    "Clip 6": (10, "(float[2,8] x) => (float[2,8] y) { y = Clip<min=-0.1, max=0.3>(x) }"),
    "Softmax 11, inner axis": (11, "(float[N,3,4] x) => (float[N,3,4] y) { y = Softmax(x) }"),
    "Squeeze 11": (11, """(float[2,1,4] x) => (float[2,1,4] y) {
        s = Squeeze<axes=[1]>(x) y = Unsqueeze<axes=[1]>(s) }"""),
    "Split 11": (11, """(float[2,6] x) => (float[2,2] a, float[2,4] b) {
        a, b = Split<axis=1, split=[2,4]>(x) }"""),
    "ReduceSum 11": (11, """(float[2,6] x) => (float[2] y) {
        y = ReduceSum<axes=[1], keepdims=0>(x) }"""),
    "ReduceMean 17": (17, "(float[2,6] x) => (float[2,1] y) { y = ReduceMean<axes=[-1]>(x) }"),
    "Pad 10": (10, "(float[2,6] x) => (float[2,9] y) { y = Pad<pads=[0,1,0,2], value=0.5>(x) }"),
    "Slice 9": (9, """(float[4,6] x) => (float[2,6] y) {
        y = Slice<axes=[0], starts=[1], ends=[3]>(x) }"""),
    "TopK 9": (9, "(float[2,6] x) => (float[2,3] y, int64[2,3] i) { y, i = TopK<k=3>(x) }"),
    "Dropout 11": (11, "(float[2,6] x) => (float[2,6] y) { d = Dropout<ratio=0.5>(x) y = Neg(d) }"),
    "BatchNormalization 9": (9, """(float[1,3,4,4] x)
        => (float[1,3,4,4] y) <float[3] a, float[3] b, float[3] m, float[3] v = {1, 2, 3}> {
        y = BatchNormalization(x, a, b, m, v) }"""),
    "Upsample 9": (9, """(float[1,2,4,4] x) => (float[1,2,8,8] y) <float[4] s = {1, 1, 2, 2}> {
        y = Upsample<mode="nearest">(x, s) }"""),
    "Resize 11": (11, """(float[1,2,4,4] x) => (float[1,2,8,8] y)
        <float[8] r, float[4] s = {1, 1, 2, 2}> {
        y = Resize<mode="linear", coordinate_transformation_mode="align_corners">(x, r, s) }"""),
    "LSTM 13": (13, """(float[5,2,8] x) => (float[5,1,2,4] y)
        <float[1,16,8] w, float[1,16,4] r> { y = LSTM<hidden_size=4>(x, w, r) }"""),
    "a body": (11, """(bool c, float[2,1,4] x) => (float[2,4] y) {
        y = If(c) <
            then_branch = then () => (float[2,4] a) { a = Squeeze<axes=[1]>(x) },
            else_branch = other () => (float[2,4] b) { t = Neg(x) b = Squeeze<axes=[1]>(t) }> }"""),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGED)
def test_an_older_opset_is_converted_truly(case: str) -> None:
    version, source = CHANGED[case]
    model = proto(source, version)
    captured = capture(model)
    assert captured.opset_imports[""] == 18
    assert not verify.findings(captured)
    for feeds in samples(captured, 3):
        expected = execute.Session(ir.from_proto(model), optimize=False).run(feeds)
        for name, array in outputs(captured, feeds).items():
            np.testing.assert_allclose(array, expected[name], rtol=1e-6, atol=1e-6)


def test_a_model_of_an_old_format_is_converted() -> None:
    source = """(float[1,2,4,4] x) => (float[1,32] y) <float[2,2,1,1] w> {
        h = Conv(x, w) s = Constant<value_ints=[1, 32]>() y = Reshape(h, s) }"""
    model = proto(source, 9)
    shape = onnx.numpy_helper.from_array(np.array([1, 32]))
    model.graph.node[1].CopyFrom(onnx.helper.make_node("Constant", [], ["s"], value=shape))
    # Where all weights are inputs as well.
    model.ir_version = 3
    model.graph.input.append(
        onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [2, 2, 1, 1])
    )
    captured = capture(model)
    assert [v.name for v in captured.graph.inputs] == ["x"]
    assert [node.op_type for node in captured.graph] == ["Conv", "Reshape"]
    assert not verify.findings(captured)


def test_conversion_keeps_the_metadata_of_the_model() -> None:
    model = proto(LINEAR, 11)
    model.metadata_props.add(key="character", value="a\nb")
    assert capture(model).metadata_props["character"] == "a\nb"


def test_a_function_of_another_opset_is_converted_and_inlined() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 18, "acme": 1]>
        g (float[2,3] x) => (float[2,1] y) { y = acme.mean(x) }
        <domain: "acme", opset_import: ["": 15]>
        mean (a) => (b) { b = ReduceMean<axes=[1]>(a) }""")
    captured = capture(model)
    assert [node.op_type for node in captured.graph] == ["ReduceMean"]
    [feeds] = samples(captured)
    found = outputs(captured, feeds)["y"]
    np.testing.assert_allclose(found, feeds["x"].mean(axis=1, keepdims=True), rtol=1e-6)


def test_a_model_without_an_opset_is_rejected() -> None:
    model = proto(LINEAR)
    del model.opset_import[:]
    model.opset_import.append(onnx.helper.make_opsetid("com.acme", 1))
    with pytest.raises(CaptureError, match="imports no ONNX opset"):
        capture(model)


QUANTIZED = """(float[4] x) => (float[4] y) <float s = {0.5}, int8 z = {0}> {
    q = QuantizeLinear(x, s, z) [back] y = DequantizeLinear(q, s, z) }"""


def test_a_quantized_model_is_rejected_with_the_node() -> None:
    with pytest.raises(CaptureError, match=r"quantized already: node 'q' is QuantizeLinear"):
        model = proto(QUANTIZED)
        model.graph.node[0].name = "q"
        capture(model)


def test_a_quantized_node_without_a_name_is_still_pointed_at() -> None:
    with pytest.raises(CaptureError, match=r"quantized already: node 'q' is QuantizeLinear"):
        capture(proto(QUANTIZED))


@pytest.mark.parametrize("place", ["a body", "a function"])
def test_a_quantized_node_is_found_inside(place: str) -> None:
    if place == "a body":
        model = proto("""(bool c, float[4] x) => (float[4] y) <float s = {0.5}, int8 z = {0}> {
            y = If(c) <
                then_branch = then () => (float[4] a) {
                    q = QuantizeLinear(x, s, z) a = DequantizeLinear(q, s, z) },
                else_branch = other () => (float[4] b) { b = Abs(x) }> }""")
    else:
        model = onnx.parser.parse_model("""
            <ir_version: 10, opset_import: ["": 21, "acme": 1]>
            g (float[4] x, float s, int8 z) => (float[4] y) { y = acme.fake(x, s, z) }
            <domain: "acme", opset_import: ["": 21]>
            fake (a, s, z) => (c) { q = QuantizeLinear(a, s, z) c = DequantizeLinear(q, s, z) }""")
    with pytest.raises(CaptureError, match="quantized already"):
        capture(model)


def test_a_missing_file_is_rejected(tmp_path: pathlib.Path) -> None:
    with pytest.raises(CaptureError, match=r"there is no file '.*nothing\.onnx'"):
        capture(tmp_path / "nothing.onnx")


def test_a_folder_is_rejected(tmp_path: pathlib.Path) -> None:
    with pytest.raises(CaptureError, match=r"is a folder; name the \.onnx file"):
        capture(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"hello, this is no model\n" * 9, b"\x08\x0a\xff\xff\xff"]
)
def test_what_is_no_model_is_rejected(content: bytes, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "text.onnx"
    path.write_bytes(content)
    with pytest.raises(CaptureError, match=r"'.*text\.onnx' is not an? .*ONNX model"):
        capture(path)


def test_a_cut_off_file_is_rejected(tmp_path: pathlib.Path) -> None:
    whole = fashion.path(fashion.CNN).read_bytes()
    path = tmp_path / "half.onnx"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CaptureError, match=r"half\.onnx' is not"):
        capture(path)


def test_a_read_of_nothing_is_rejected() -> None:
    model = proto(LINEAR)
    model.graph.node[0].input[0] = "nobody"
    with pytest.raises(CaptureError, match="nobody"):
        capture(model)


def test_two_writers_of_one_value_are_rejected() -> None:
    model = proto("(float[4] x) => (float[4] y) { h = Neg(x) h = Abs(x) y = Relu(h) }")
    with pytest.raises(CaptureError):
        capture(model)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("no_such_module:make", "cannot import 'no_such_module'"),
        ("pathlib:no_such_thing", "pathlib has no 'no_such_thing'"),
        (":make", "not of the form package.module:name"),
        ("pathlib:", "not of the form package.module:name"),
    ],
)
def test_a_factory_that_is_not_there_is_rejected(source: str, says: str) -> None:
    with pytest.raises(CaptureError, match=says):
        capture(source)


def test_load_object_finds_what_lies_in_the_folder_of_the_user(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "users_own.py").write_text("answer = 42\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_object("users_own:answer", "model") == 42


# -- torch --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch_model() -> tuple[Any, Any]:
    """A module with BatchNorm and nested blocks, trained on nothing, and its example input."""
    torch: Any = pytest.importorskip("torch")  # torch is an extra, and its types are not ours
    torch.manual_seed(0)

    class Block(torch.nn.Module):
        def __init__(self, channels: int) -> None:
            torch.nn.Module.__init__(self)
            self.conv = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            self.norm = torch.nn.BatchNorm2d(channels)
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2.0)

        def forward(self, x: Any) -> Any:
            return torch.relu(self.norm(self.conv(x))) + x

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.layers = torch.nn.Sequential(Block(4), Block(4))
            self.head = torch.nn.Linear(4, 3)

        def forward(self, x: Any) -> Any:
            return self.head(self.layers(x).mean((2, 3)))

    return Net(), torch.randn(2, 4, 6, 6)


def test_torch_keeps_batch_norm_module_paths_and_the_function(torch_model: tuple[Any, Any]) -> None:
    module, example = torch_model
    model = capture((module, (example,)))
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("BatchNormalization") == 2
    assert [layer.name for layer in graphs.layers(model)] == [
        "layers.0.conv/Conv",
        "layers.1.conv/Conv",
        "head/Gemm",
    ]
    assert verify.findings(model) == []
    [name] = [v.name for v in model.graph.inputs]
    [found] = outputs(model, {name or "": example.numpy()}).values()
    # Two runtimes sum in different orders.
    np.testing.assert_allclose(found, module(example).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_torch_is_captured_alike_twice_with_a_dynamic_batch(torch_model: tuple[Any, Any]) -> None:
    import torch

    module, example = torch_model
    shapes = ({0: torch.export.Dim("batch")},)
    one, other = (capture((module, (example,), shapes)) for _ in range(2))
    assert text.render(one, weights=True) == text.render(other, weights=True)
    [read] = one.graph.inputs
    assert graphs.shape_of(read) is None
    [found] = outputs(one, {read.name or "": example.numpy().repeat(3, 0)}).values()
    assert found.shape == (6, 3)


def test_what_torch_cannot_export_is_said() -> None:
    torch: Any = pytest.importorskip("torch")

    class Branch(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x if x.sum() > 0 else -x

    with pytest.raises(CaptureError, match=r"torch\.export failed: "):
        capture((Branch(), (torch.ones(2),)))


def test_what_has_no_translation_to_onnx_is_named_with_its_reason() -> None:
    torch: Any = pytest.importorskip("torch")

    class Bessel(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.special.bessel_j0(x)

    says = (
        r"torch\.export failed: no translation of prims\.bessel_j0\.default to ONNX: No ONNX func"
    )
    with pytest.raises(CaptureError, match=says):
        capture((Bessel(), (torch.ones(1, 4),)))


def test_a_factory_that_returns_something_else_is_said() -> None:
    pytest.importorskip("torch")
    with pytest.raises(CaptureError, match=r"a factory must return \(module, example_inputs\)"):
        capture(lambda: 42)
