"""Laws of the partition into blocks: what a block is, in which order, and that none is lost."""

from __future__ import annotations

import cProfile
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import graphs
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qcompile.models
from qcompile import blocks, graph
from qcompile.blocks import MOST_LAYERS, Block, Granularity
from qcompile.capture import capture
from qcompile.errors import CaptureError
from qcompile.models import fetch, ocr

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402

from qcompile.torch_exec import TorchGraph  # noqa: E402
from qcompile.torch_table import from_array  # noqa: E402

Array = npt.NDArray[Any]

SHIPPED = pathlib.Path(qcompile.models.__file__ or "").parent
MATTING = {f"r{i}": f"r{i}_out" for i in (1, 2, 3, 4)}


def network(body: str, inputs: str = "float[1,4,8,8] x") -> ir.Model:
    """The graph of ``body``, from ``inputs`` to y, in which ``a = conv(x)`` is a Conv."""
    weights: list[str] = []

    def conv(found: re.Match[str]) -> str:
        written, read = found.groups()
        weights.append(f"float[4,4,3,3] w_{written}")
        return f"{written} = Conv<pads=[1,1,1,1]>({read}, w_{written})"

    body = re.sub(r"(\w+) = conv\((\w+)\)", conv, body)
    return graphs.graph(f"({inputs}) => (float[1,4,8,8] y) <{', '.join(weights)}> {{ {body} }}")


def parts(model: ir.Model, **options: Any) -> list[list[str]]:
    """The names of the layers in each block: what their nodes write."""
    found = blocks.partition(model, **options)
    return [[layer.node.outputs[0].name or "" for layer in part.layers] for part in found]


RESIDUAL = "a = conv(x) b = conv(a) r = Relu(b) c = conv(r) s = Add(c, a) y = conv(s)"
SQUEEZE = """a = conv(x) g = GlobalAveragePool(a) h = conv(g) e = Sigmoid(h) m = Mul(a, e)
    y = conv(m)"""
BRANCHES = """a = conv(x) b = conv(a) c = conv(a) d = conv(c) e = Sum(b, d, a) y = conv(e)"""
DENSE = """a = conv(x) b = conv(a) s = Add(a, b) c = conv(s) t = Sum(a, b, c) d = conv(t)
    u = Sum(a, b, c, d) y = conv(u)"""
PLAIN = "a = conv(x) b = Relu(a) c = conv(b) y = conv(c)"


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        (RESIDUAL, [["a"], ["b", "c"], ["y"]]),
        (SQUEEZE, [["a"], ["h"], ["y"]]),
        (BRANCHES, [["a"], ["b", "c", "d"], ["y"]]),
        (DENSE, [["a"], ["b", "c", "d"], ["y"]]),
        (PLAIN, [["a"], ["c"], ["y"]]),
    ],
)
def test_a_block_is_what_comes_together_again(body: str, wanted: list[list[str]]) -> None:
    model = network(body)
    assert parts(model) == wanted
    assert parts(model, granularity="layer") == [[n] for part in wanted for n in part]


def test_what_is_no_layer_goes_to_what_it_reads() -> None:
    [first, second, _] = blocks.partition(network(PLAIN))
    assert first.outputs == second.inputs == ("b",)


def test_a_concat_belongs_to_its_branches() -> None:
    model = graphs.graph("""(float[1,4,8,8] x) => (float[1,4,8,8] y)
        <float[4,4,1,1] a, float[2,4,1,1] b, float[2,4,1,1] c, float[4,4,1,1] d> {
        s = Conv(x, a) l = Conv(s, b) r = Conv(s, c) t = Concat<axis=1>(l, r) y = Conv(t, d) }""")
    assert parts(model) == [["s"], ["l", "r"], ["y"]]
    assert [part.outputs for part in blocks.partition(model)] == [("s",), ("t",), ("y",)]


def test_a_skip_over_half_of_the_network_makes_no_block() -> None:
    depth = MOST_LAYERS + 2
    chain = " ".join(f"c{i + 1} = conv(c{i})" for i in range(depth))
    model = network(f"c0 = conv(x) {chain} s = Add(c{depth}, c0) y = conv(s)")
    found = blocks.partition(model)
    assert max(len(part.layers) for part in found) == 1
    # What joins reads two blocks, and so goes to the one that reads it.
    assert found[-1].inputs == (f"c{depth}", "c0")


def test_numbered_modules_are_blocks() -> None:
    model = capture(SHIPPED / "fashion_vit.onnx")
    found = blocks.partition(model)
    names = [part.name for part in found]
    assert names == ["patch/Conv", *(f"blocks.{i}" for i in range(6)), "head/Gemm"]
    assert [len(part.layers) for part in found] == [1, *[8] * 6, 1]


def test_two_inputs_come_together_in_one_block() -> None:
    model = network("a = conv(x) b = conv(z) s = Add(a, b) y = conv(s)",
                    "float[1,4,8,8] x, float[1,4,8,8] z")  # fmt: skip
    assert parts(model) == [["a", "b"], ["y"]]
    assert blocks.partition(model)[0].inputs == ("x", "z")


def test_what_depends_on_no_layer_is_in_no_block_and_computed_anew() -> None:
    model = network("h = Relu(x) a = conv(h) b = conv(a) s = Add(b, h) y = conv(s)")
    found = blocks.partition(model)
    assert all(node.op_type != "Relu" for part in found for node in part.nodes)
    assert [part.inputs for part in found if "x" in part.inputs] == [("x",), ("a", "x")]


def test_a_graph_without_layers_has_no_blocks() -> None:
    assert blocks.partition(graphs.graph("(float[4] x) => (float[4] y) { y = Relu(x) }")) == []


BRANCHED = """(float[2,4] x, bool c) => (float[2,4] y) <float[4,4] v, float[4,4] w> {
    a = MatMul(x, v)
    h = If(c) <
        then_branch = g1 () => (float[2,4] t) { t = Relu(a) },
        else_branch = g2 () => (float[2,4] e) { e = Add(a, x) }
    >
    y = MatMul(h, w) }"""


def test_what_a_body_reads_is_an_input_of_its_block() -> None:
    model = graphs.graph(BRANCHED)
    first, second = blocks.partition(model)
    assert first.inputs == ("x", "c") and first.outputs == ("h",)
    assert second.inputs == ("h",)
    assert_runs(model, graphs.samples(model)[0])


# -- state --------------------------------------------------------------------------------------


def test_a_path_of_a_state_is_in_one_block() -> None:
    found = blocks.partition(capture(SHIPPED / "matting.onnx"), MATTING)
    for taken, left in MATTING.items():
        [reader] = [part for part in found if taken in part.inputs]
        assert left in reader.outputs
    assert len(found) > 10


def test_a_state_over_the_whole_network_makes_one_block() -> None:
    model = network("t = Add(x, h) a = conv(t) b = conv(a) c = conv(b) y = conv(c)",
                    "float[1,4,8,8] x, float[1,4,8,8] h")  # fmt: skip
    assert len(blocks.partition(model)) == 4
    assert parts(model, state={"h": "y"}) == [["a", "b", "c", "y"]]


def test_a_state_that_no_layer_gives_is_given_by_a_block() -> None:
    model = graphs.graph("""(float[2,4] x, float[2,4] h) => (float[2,4] y, float[2,4] out)
        <float[4,4] w, float[4,4] v> {
        t = Add(x, h) a = MatMul(t, w) y = MatMul(a, v) out = Add(h, x) }""")
    found = blocks.partition(model, {"h": "out"})
    assert "out" in {name for part in found for name in part.outputs}
    assert [len(part.layers) for part in found if part.layers] == [1, 1]


# -- laws ---------------------------------------------------------------------------------------


def assert_lawful(model: ir.Model, found: Sequence[Block], state: Mapping[str, str]) -> None:
    """Nothing is lost or twice, nothing is read before it is written, all that is read is named."""
    nodes = [node for part in found for node in part.nodes]
    assert len(nodes) == len(set(nodes))
    assert {layer.node for layer in graph.layers(model)} <= set(nodes)
    for node in model.graph:
        before = [v.producer() for v in node.inputs if v is not None]
        assert node in nodes or not any(p in nodes for p in before)
    known = {value.name for value in model.graph.inputs}
    for part in found:
        assert known.issuperset(part.inputs), part.name
        known.update(part.outputs)
    names = [part.name for part in found]
    assert len(names) == len(set(names))
    for taken, left in state.items():
        assert all(left in part.outputs for part in found if taken in part.inputs)


def assert_runs(
    model: ir.Model,
    feeds: Mapping[str, Array],
    granularity: Granularity = "block",
    state: Mapping[str, str] | None = None,
) -> None:
    """Blocks that are run one after the other give what the whole model gives."""
    found = blocks.partition(model, state, granularity)
    assert_lawful(model, found, state or {})
    inputs: dict[str, Tensor] = {name: from_array(np.array(a)) for name, a in feeds.items()}
    with torch.no_grad():
        whole = blocks.whole(model)
        wanted = TorchGraph(model, whole.inputs, whole.outputs)(inputs)
        values = dict(inputs)
        for part in found:
            values |= TorchGraph(model, part.inputs, part.outputs)(values)
    computed = {name for part in found for name in part.outputs}
    for name in computed & set(wanted):
        torch.testing.assert_close(values[name], wanted[name], rtol=0.0, atol=0.0)


@st.composite
def bodies(draw: st.DrawFn) -> str:
    """Nodes that each read one or two of the values so far."""
    values = ["x", "z"]
    lines: list[str] = []
    for number in range(draw(st.integers(1, 14))):
        name, source = f"v{number}", draw(st.sampled_from(values[-5:]))
        other = draw(st.sampled_from(values))
        line = draw(
            st.sampled_from(
                [f"conv({source})", f"Relu({source})", *[f"Add({source}, {other})"] * 2]
            )
        )
        lines.append(f"{name} = {line}")
        values.append(name)
    return "\n".join([*lines, f"y = Add({values[-1]}, {draw(st.sampled_from(values))})"])


@given(bodies(), st.sampled_from(["block", "layer"]), st.booleans())
def test_blocks_one_after_the_other_are_the_model(
    body: str, granularity: Granularity, carried: bool
) -> None:
    model = network(body, "float[1,4,8,8] x, float[1,4,8,8] z")
    state = {"z": "y"} if carried else {}
    assert_runs(model, graphs.samples(model)[0], granularity, state)


@pytest.mark.parametrize("granularity", ["block", "layer"])
@pytest.mark.parametrize("name", ["fashion_cnn", "fashion_vit", "matting"])
def test_blocks_of_shipped_models_are_the_model(name: str, granularity: Granularity) -> None:
    model = capture(SHIPPED / f"{name}.onnx")
    state = MATTING if name == "matting" else {}
    assert_runs(model, graphs.samples(model)[0], granularity, state)


# -- size ---------------------------------------------------------------------------------------


def test_work_grows_with_the_number_of_layers_not_its_square() -> None:
    calls: list[int] = []
    for count in (100, 1000):
        # Residual blocks of two layers, and a skip over everything.
        chain = [
            f"a{i} = conv(r{i}) b{i} = conv(a{i}) r{i + 1} = Add(b{i}, r{i})"
            for i in range(count // 2)
        ]
        model = network("\n".join(["r0 = conv(x)", *chain, f"y = Add(r{count // 2}, r0)"]))
        profile = cProfile.Profile()
        found = profile.runcall(blocks.partition, model)
        calls.append(sum(entry.callcount for entry in profile.getstats()))
        assert len(found) == 2 + count // 2  # the last Add joins two blocks
    assert calls[1] < 15 * calls[0], calls  # a square would be 100


# -- public models ------------------------------------------------------------------------------


PUBLIC: dict[str, tuple[Callable[[], Any], range]] = {
    "efficientnet-lite0": (lambda: "qcompile.models.public:efficientnet_lite0", range(16, 24)),
    "minilm": (lambda: "qcompile.models.public:minilm", range(7, 12)),
    "det": (ocr.det, range(40, 80)),
    "rec": (ocr.rec, range(40, 80)),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_models_have_blocks_of_a_few_layers(name: str) -> None:
    find, count = PUBLIC[name]
    try:
        model = capture(find())
    except (fetch.FetchError, CaptureError) as error:
        pytest.skip(str(error))
    found = blocks.partition(model)
    assert_lawful(model, found, {})
    assert len(found) in count
    assert max(len(part.layers) for part in found) <= MOST_LAYERS
