"""Laws of the shared reading and editing: what a layer is, and what an edit carries along."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graphs import CHAIN, CONV, GEMM, LINEAR, assert_same_function, graph, node, outputs, samples

from qcompile import execute, spec, text, verify
from qcompile import graph as graphs
from qcompile.calibrate import Calibration
from qcompile.errors import PassError
from qcompile.graph import Layer
from qcompile.sources import Data
from qcompile.spec import TensorSpec

DEPTHWISE = """(float[1,4,5,5] x) => (float[1,4,3,3] y) <float[4,1,3,3] w> {
    y = Conv<group=4>(x, w) }"""
TRANSPOSED = """(float[1,2,3,3] x) => (float[1,5,5,5] y) <float[2,5,3,3] w> {
    y = ConvTranspose(x, w) }"""
ATTENTION = """(float[2,4,8] q, float[2,8,6] k) => (float[2,4,6] y) { y = MatMul(q, k) }"""
EMBEDDING = """(int64[2,3] ids) => (float[2,3,8] y) <float[10,8] w> { y = Gather(w, ids) }"""
PLAIN_GEMM = """(float[2,8] x) => (float[2,3] y) <float[8,3] w> { y = Gemm(x, w) }"""
BEHIND_MOVES = """(float[2,8] x) => (float[2,3] y) <float[24] w, int64[2] s = {3, 8}> {
    r = Reshape(w, s) t = Transpose(r) c = Cast<to=1>(t) i = Identity(c) y = MatMul(x, i) }"""


def only(model: ir.Model) -> Layer:
    [layer] = graphs.layers(model)
    return layer


# -- layers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "kind", "weight_index", "channel", "reduce", "bias"),
    [
        (LINEAR, "linear", 1, 1, 0, False),
        (PLAIN_GEMM, "linear", 1, 1, 0, False),
        (GEMM, "linear", 1, 0, 1, True),
        (CONV, "conv", 1, 0, 1, True),
        (DEPTHWISE, "depthwise", 1, 0, 1, False),
        (TRANSPOSED, "conv-transpose", 1, 1, 0, False),
        (ATTENTION, "attention", 1, 2, 1, False),
        (EMBEDDING, "embedding", 0, 0, 1, False),
        (BEHIND_MOVES, "linear", 1, 1, 0, False),
    ],
)
def test_each_kind_of_layer_is_found(
    source: str, kind: str, weight_index: int, channel: int, reduce: int, bias: bool
) -> None:
    layer = only(graph(source))
    assert (layer.kind, layer.weight.index) == (kind, weight_index)
    assert (layer.channel_axis, layer.reduce_axis) == (channel, reduce)
    assert (layer.bias is not None) == bias
    assert (layer.input is None) == (kind == "embedding")


@pytest.mark.parametrize("source", [LINEAR, PLAIN_GEMM, GEMM, CONV, DEPTHWISE, TRANSPOSED])
def test_the_channel_axis_is_that_of_the_output(source: str) -> None:
    model = graph(source)
    layer = only(model)
    [feeds] = samples(model)
    before = outputs(model, feeds)["y"]
    weight = graphs.constant(layer.weight.value).copy()
    place: list[Any] = [slice(None)] * weight.ndim
    place[layer.channel_axis] = 1
    weight[tuple(place)] += 1.0
    layer.weight.read_from(graphs.add_constant(model, "changed", weight))
    moved = outputs(model, feeds)["y"] != before
    axis = moved.ndim - 1 if layer.kind == "linear" else 1
    others = tuple(a for a in range(moved.ndim) if a != axis)
    assert moved.any(axis=others).nonzero()[0].tolist() == [1]


@pytest.mark.parametrize(
    ("source", "macs"),
    [
        (LINEAR, 2 * 8 * 3),
        (GEMM, 2 * 8 * 3),
        (CONV, 4 * 5 * 5 * 2 * 3 * 3),
        (DEPTHWISE, 4 * 3 * 3 * 3 * 3),
        (TRANSPOSED, 2 * 3 * 3 * 5 * 3 * 3),
        (ATTENTION, 2 * 4 * 6 * 8),
        (EMBEDDING, 0),
    ],
)
def test_macs_are_counted_by_hand(source: str, macs: int) -> None:
    model = graph(source)
    shapes = Calibration(Data("test", samples(model))).shapes(model)
    assert only(model).macs(shapes) == macs
    assert only(model).macs({}) == 0


def test_an_added_constant_behind_a_matmul_is_its_bias() -> None:
    first, second = graphs.layers(graph(CHAIN))
    assert first.bias is not None and first.bias.value.name == "b1"
    assert (first.output.name, first.biased_output.name) == ("h", "s")
    assert second.bias is None and second.biased_output is second.output


@pytest.mark.parametrize(
    "source",
    [
        # Read twice, an output of the graph, one number a row, a scalar: none of these is a bias.
        """(float[2,8] x) => (float[2,3] y) <float[8,3] w, float[3] b> {
           h = MatMul(x, w) s = Add(h, b) y = Mul(s, h) }""",
        """(float[2,8] x) => (float[2,3] h, float[2,3] y) <float[8,3] w, float[3] b> {
           h = MatMul(x, w) y = Add(h, b) }""",
        """(float[2,8] x) => (float[2,3] y) <float[8,3] w, float[2,1] b> {
           h = MatMul(x, w) y = Add(h, b) }""",
        """(float[2,8] x) => (float[2,3] y) <float[8,3] w, float b> {
           h = MatMul(x, w) y = Add(h, b) }""",
    ],
)
def test_what_is_no_bias_is_not_taken_for_one(source: str) -> None:
    assert only(graph(source)).bias is None


@pytest.mark.parametrize(
    "source",
    [
        "(float[2,3] y, float[2,3] x) => (float[2,3] z) { z = Add(x, y) }",
        "(float[8] x) => (float[8] y) <float[8] w> { y = Mul(x, w) }",
        "(int64[2] i) => (float[3,2] y) <float[3,5] w> { y = Gather<axis=1>(w, i) }",
        "(int64[2] i) => (int64[2] y) <int64[3] w = {1,2,3}> { y = Gather(w, i) }",
    ],
)
def test_what_is_no_layer_is_not_found(source: str) -> None:
    assert list(graphs.layers(graph(source))) == []


def test_a_node_with_a_role_is_no_layer() -> None:
    model = graph(LINEAR)
    model.graph[0].metadata_props[graphs.ROLE] = "rotation"
    assert list(graphs.layers(model)) == []


@pytest.mark.parametrize(
    "moves",
    [
        "t = Transpose(w)",
        "t = Transpose<perm=[1,2,0]>(w)",
        "t = Reshape(w, s)",
        "u = Unsqueeze(w, a) t = Squeeze(u, a)",
        "u = Squeeze(w, a) t = Unsqueeze(u, a)",
        "t = Squeeze(w)",
        "c = Cast<to=11>(w) t = Identity(c)",
        "c = Cast<to=10>(w) t = Cast<to=1>(c)",
    ],
)
def test_a_constant_is_what_the_runtime_computes(moves: str) -> None:
    model = graph(f"""(float[1] x) => (float[1] y, t) <
        float[1,3,4] w, int64[3] s = {{0, -1, 2}}, int64[1] a = {{0}}> {{ y = Neg(x) {moves} }}""")
    value = model.graph.outputs[1]
    assert graphs.is_constant(value)
    wanted = execute.execute(model, samples(model)[0])["t"]
    np.testing.assert_array_equal(graphs.constant(value), wanted)
    assert graphs.constant(value).dtype == wanted.dtype


# -- selection ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("globs", "found"),
    [
        (("h",), ["h"]),
        (("MatMul",), ["h", "y"]),
        (("*",), ["h", "y"]),
        (("y", "h"), ["h", "y"]),
        ((), []),
    ],
)
def test_globs_match_names_and_operator_types(globs: tuple[str, ...], found: list[str]) -> None:
    assert [layer.name for layer in graphs.select(graph(CHAIN), globs, "layer")] == found


def test_globs_tell_upper_from_lower_case() -> None:
    with pytest.raises(PassError, match=r"layer=matmul matches no layer"):
        graphs.select(graph(CHAIN), ["matmul"], "layer")


def test_a_glob_that_matches_nothing_is_rejected_with_the_layers() -> None:
    with pytest.raises(PassError, match=r"exclude=head\* matches no layer; .*known are h, y"):
        graphs.select(graph(CHAIN), ["h", "head*"], "exclude")


# -- edits --------------------------------------------------------------------------------------


def test_new_names_are_free() -> None:
    model = graph(LINEAR)
    array = np.zeros(1, np.float32)
    assert [graphs.add_constant(model, "w", array).name for _ in range(3)] == ["w.1", "w.2", "w.3"]
    assert graphs.unique(model, "y") == "y.1"
    assert graphs.unique_node(model, "y") == "y.1"
    value = graphs.insert(
        model, "Relu", [model.graph.inputs[0]], output="w", before=model.graph[0],
        like=model.graph.inputs[0],
    )  # fmt: skip
    assert value.name == "w.4"


def test_names_inside_bodies_are_not_free() -> None:
    model = graph("""(bool c, float[4] x) => (float[4] y) { y = If(c) <
        then_branch = then () => (float[4] a) { a = Neg(x) },
        else_branch = other () => (float[4] b) { b = Abs(x) }> }""")
    assert graphs.unique(model, "a") == "a.1"
    assert graphs.unique_node(model, "b") == "b.1"


def test_insert_stands_behind_the_writer_and_keeps_the_type() -> None:
    model = graph(CHAIN)
    h = node(model, "h").outputs[0]
    added = graphs.insert(model, "Neg", [h], output="n", behind=h, like=h, role="probe")
    assert [n.name for n in model.graph] == ["h", "n", "s", "r", "y"]
    assert (added.dtype, graphs.shape_of(added)) == (h.dtype, graphs.shape_of(h))
    assert node(model, "n").metadata_props[graphs.ROLE] == "probe"
    assert graphs.origins(node(model, "n")) == ()


def test_redirect_moves_the_readers_that_are_not_kept() -> None:
    model = graph("""(float[4] x) => (float[4] y, float[4] z, float[4] b) {
        a = Neg(x) b = Abs(x) y = Relu(a) z = Exp(a) }""")
    a, b = node(model, "a").outputs[0], node(model, "b").outputs[0]
    graphs.redirect(model, a, b, keep=lambda use: use.node.op_type == "Exp")
    assert node(model, "y").inputs[0] is b
    assert node(model, "z").inputs[0] is a


def test_redirect_keeps_the_name_of_an_output() -> None:
    model = graph("(float[4] x) => (float[4] y) { h = Neg(x) y = Relu(h) }")
    y, h = node(model, "y").outputs[0], node(model, "h").outputs[0]
    graphs.redirect(model, y, h, keep=lambda _: False)
    graphs.remove_dead(model)
    assert [v.name for v in model.graph.outputs] == ["y"]
    assert [n.op_type for n in model.graph] == ["Neg"]
    verify.verify(model)


def test_fuse_unites_the_origins() -> None:
    model = graph(CHAIN)
    first, second = node(model, "h"), node(model, "y")
    graphs.fuse(first, second, node(model, "r"))
    assert graphs.origins(first) == ("h", "y")
    graphs.fuse(first, second)
    assert graphs.origins(first) == ("h", "y")


def test_remove_dead_keeps_what_a_decision_or_a_range_names() -> None:
    model = graph(LINEAR)
    array = np.ones(2, np.float32)
    for name in ("kept", "lost"):
        graphs.add_constant(model, name, array)
    spec.write(model.graph[0], 1, TensorSpec("int8", scale="kept"))
    graphs.set_range(model, model.graph.inputs[0], -1.0, 1.0)
    assert graphs.remove_dead(model) == 0
    assert sorted(model.graph.initializers) == ["kept", "w", "x/range"]


def test_remove_dead_removes_chains_and_counts_them() -> None:
    model = graph(CHAIN)
    graphs.redirect(
        model, node(model, "y").outputs[0], graphs.add_constant(model, "c", np.ones((2, 4), "f4")),
        lambda _: False,
    )  # fmt: skip
    assert graphs.remove_dead(model) == 4
    assert list(model.graph.initializers) == ["y"]


def test_edits_of_a_clone_leave_the_model_alone() -> None:
    model = graph(CHAIN)
    before = text.render(model, weights=True)
    clone = model.clone()
    graphs.set_range(clone, clone.graph.inputs[0], -1.0, 1.0)
    for layer in graphs.layers(clone):
        layer.weight.decide(TensorSpec("int8"))
        layer.weight.read_from(graphs.add_constant(clone, "z", np.zeros((8, 8), np.float32)))
    graphs.remove_dead(clone)
    assert text.render(model, weights=True) == before
    assert_same_function(graph(CHAIN), model)


# -- ranges -------------------------------------------------------------------------------------


def test_a_range_is_an_initializer_and_is_overwritten() -> None:
    model = graph(LINEAR)
    x = model.graph.inputs[0]
    assert graphs.range_of(model, x) is None
    graphs.set_range(model, x, -1.0, 2.0)
    graphs.set_range(model, x, -3.0, 4.0)
    assert graphs.range_of(model, x) == (-3.0, 4.0)
    assert sorted(model.graph.initializers) == ["w", "x/range"]
    graphs.clear_ranges(model)
    assert graphs.range_of(model, x) is None


def test_the_digest_tells_type_shape_and_numbers_apart() -> None:
    arrays = [
        np.zeros((2, 3), np.float32),
        np.zeros((3, 2), np.float32),
        np.zeros((2, 3), np.int32),
        np.ones((2, 3), np.float32),
    ]
    digests = {graphs.tensor_digest(ir.Tensor(array)) for array in arrays}
    assert len(digests) == 4
    assert graphs.tensor_digest(ir.Tensor(arrays[0], name="a")) in digests


LSTM = """(float[5,2,8] x) => (float[5,1,2,6] y) <float[1,24,8] w, float[1,24,6] r> {
    y = LSTM<hidden_size=6>(x, w, r)
}"""


def test_a_recurrent_layer_counts_both_its_weights_at_every_step() -> None:
    [layer] = graphs.layers(graph(LSTM))
    assert layer.kind == "recurrent"
    assert layer.macs({"x": (5, 2, 8)}) == 5 * 2 * 24 * (8 + 6)
