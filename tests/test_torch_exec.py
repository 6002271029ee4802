"""A subgraph as a torch function: every operator as ONNX Runtime computes it, and its gradients."""

from __future__ import annotations

import itertools
import pathlib
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import graphs
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qcompile.models
from qcompile import execute, pipeline, registry
from qcompile.capture import capture
from qcompile.errors import PassError, TargetError
from qcompile.models import fetch, filetypes, ocr, speech

torch = pytest.importorskip("torch")

import torch_cases  # noqa: E402
from torch import Tensor  # noqa: E402
from torch_cases import Case, assert_close  # noqa: E402

from qcompile import torch_exec  # noqa: E402
from qcompile.torch_exec import OPERATORS, TorchGraph  # noqa: E402
from qcompile.torch_table import from_array, numbers, tensor_of  # noqa: E402

Array = npt.NDArray[Any]

CASES = torch_cases.cases()
BY_OPERATOR = {
    operator: list(group)
    for operator, group in itertools.groupby(
        sorted(CASES, key=lambda case: case.operator), lambda case: case.operator
    )
}


def tensors(feeds: dict[str, Array]) -> dict[str, Tensor]:
    return {name: from_array(np.array(array)) for name, array in feeds.items()}


def whole(model: ir.Model) -> TorchGraph:
    """All of ``model``."""
    return TorchGraph(
        model,
        [v.name or "" for v in model.graph.inputs],
        [v.name or "" for v in model.graph.outputs],
    )


def assert_as_runtime(
    model: ir.Model, feeds: dict[str, Array], tolerance: float, say: str = ""
) -> None:
    """Shapes and types are those of the runtime; errors are relative to the largest element."""
    wanted = execute.execute(model, feeds)
    with torch.no_grad():
        actual = whole(model)(tensors(feeds))
    for name, array in wanted.items():
        found = actual[name].numpy()
        assert (found.dtype, found.shape) == (array.dtype, array.shape), say
        assert_close(found, array, tolerance, say)


# -- operators ----------------------------------------------------------------------------------

# Sums of at most a few hundred products, of numbers of about 1, with 24 or 11 bits.
FLOAT, HALF = 3e-6, 5e-3
# What ONNX Runtime has no kernel for in float16, or the operator does not take.
NO_HALF = {"Celu", "Range", "ScatterND", "ScatterElements"}


def test_every_operator_of_the_table_has_a_case() -> None:
    assert set(BY_OPERATOR) == set(OPERATORS)


@pytest.mark.parametrize("operator", sorted(BY_OPERATOR))
def test_an_operator_is_what_onnx_runtime_computes(operator: str) -> None:
    for case in BY_OPERATOR[operator]:
        assert_as_runtime(ir.from_proto(case.model()), case.feeds, FLOAT, str(case.attributes))


@pytest.mark.parametrize("operator", sorted(set(BY_OPERATOR) - NO_HALF))
def test_an_operator_is_what_onnx_runtime_computes_in_half(operator: str) -> None:
    for case in BY_OPERATOR[operator]:
        half = case.astype(np.float16)
        assert_as_runtime(ir.from_proto(half.model()), half.feeds, HALF, str(case.attributes))


@pytest.mark.parametrize("operator", sorted(BY_OPERATOR))
def test_an_operator_takes_float64(operator: str) -> None:
    for case in BY_OPERATOR[operator]:
        wanted = execute.execute(ir.from_proto(case.model()), case.feeds)
        double = case.astype(np.float64)
        actual = whole(ir.from_proto(double.model()))(tensors(double.feeds))
        for name, array in wanted.items():
            assert_close(actual[name].numpy(), array, FLOAT, str(case.attributes))
            if actual[name].is_floating_point() and "dtype" not in case.attributes:
                kept = operator in ("Cast", "ConstantOfShape", "QuantizeLinear")
                assert kept or actual[name].dtype == torch.float64, case.attributes


@pytest.mark.parametrize("operator", sorted({*BY_OPERATOR} - {"NonZero"}))
def test_only_non_zero_looks_at_elements_on_a_device(operator: str) -> None:
    """The device of torch called meta has no elements, only shapes and types."""
    for case in BY_OPERATOR[operator]:
        model, feeds = ir.from_proto(case.model()), tensors(case.feeds)
        assert_same_shapes(model, feeds, str(case.attributes))


def assert_same_shapes(model: ir.Model, feeds: dict[str, Tensor], say: str = "") -> None:
    """On a device without elements shapes and types are those on the CPU."""
    with torch.no_grad():
        here = whole(model)(feeds)
        names = [value.name or "" for value in model.graph.inputs]
        there = TorchGraph(model, names, list(here), device="meta")(feeds)
    for name, tensor in here.items():
        found = there[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), say


# No derivative: integers and booleans, steps, and rounding.
FLAT = """
    And ArgMax ArgMin BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil
    ConstantOfShape Equal EyeLike Floor Greater GreaterOrEqual Hardmax IsInf IsNaN Less LessOrEqual
    Mod NonZero Not OneHot Or QuantizeLinear Range Round Shape Sign Size Xor
"""


@pytest.mark.parametrize("operator", sorted(set(BY_OPERATOR) - set(FLAT.split())))
def test_gradients_are_slopes(operator: str) -> None:
    case = next(c for c in BY_OPERATOR[operator] if any(map(is_float, c.inputs)))
    double = case.astype(np.float64)
    graph, feeds = whole(ir.from_proto(double.model())), tensors(double.feeds)
    moved = [name for name, x in feeds.items() if x.dtype == torch.float64]

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        results = graph(feeds | dict(zip(moved, inputs, strict=True))).values()
        return tuple(y for y in results if y.requires_grad)

    inputs = [feeds[name].requires_grad_() for name in moved]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def is_float(array: Array | None) -> bool:
    return array is not None and array.dtype == np.float32


def binary(operator: str, one: Array, other: Array) -> None:
    case = Case(operator, (one, other), {})
    assert_as_runtime(ir.from_proto(case.model()), case.feeds, FLOAT)


@given(st.data())
def test_operands_broadcast(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 3), max_size=4))
    shapes = [
        [1 if data.draw(st.booleans()) else size for size in sizes[data.draw(st.integers(0, 4)) :]]
        for _ in range(2)
    ]
    one, other = (np.random.default_rng(0).standard_normal(s).astype(np.float32) for s in shapes)
    binary(data.draw(st.sampled_from(["Add", "Mul", "Greater", "Max"])), one, other)


@given(st.data())
def test_slices_are_clamped(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    axes = data.draw(st.lists(st.sampled_from(range(len(sizes))), min_size=1, unique=True))
    ends = st.lists(st.integers(-6, 6), min_size=len(axes), max_size=len(axes))
    steps = [data.draw(st.sampled_from([-2, -1, 1, 3])) for _ in axes]
    x = np.arange(np.prod(sizes, dtype=int), dtype=np.float32).reshape(sizes)
    lists = (data.draw(ends), data.draw(ends), axes, steps)
    case = Case("Slice", (x, *(np.array(values, np.int64) for values in lists)), {})
    assert_as_runtime(ir.from_proto(case.model()), case.feeds, 0.0)


@given(st.data())
def test_reductions_take_any_axes(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    rank = len(sizes)
    axes = data.draw(st.lists(st.integers(-rank, rank - 1), unique_by=lambda a: a % rank))
    options = {
        "keepdims": data.draw(st.integers(0, 1)),
        "noop_with_empty_axes": data.draw(st.integers(0, 1)),
    }
    operator = data.draw(st.sampled_from([o for o in BY_OPERATOR if o.startswith("Reduce")]))
    x = np.random.default_rng(0).uniform(0.3, 2, sizes).astype(np.float32)
    case = Case(operator, (x, np.array(axes, np.int64)), options)
    assert_as_runtime(ir.from_proto(case.model()), case.feeds, FLOAT)


@given(st.data())
def test_windows_begin_and_end_where_they_do_in_the_runtime(data: st.DataObject) -> None:
    def two(low: int, high: int) -> list[int]:
        return [data.draw(st.integers(low, high)) for _ in range(2)]

    kernel, strides = two(1, 3), two(1, 3)
    window: dict[str, Any] = {"kernel_shape": kernel, "strides": strides}
    auto = data.draw(st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if auto == "NOTSET":
        window["pads"] = [data.draw(st.integers(0, k - 1)) for k in (*kernel, *kernel)]
    else:
        window["auto_pad"] = auto
    if not auto.startswith("SAME"):
        window["dilations"] = two(1, 2)
    sizes = two(5, 9)
    x, weight = (
        np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        for shape in ((1, 2, *sizes), (3, 2, *kernel))
    )
    cases = [Case("Conv", (x, weight), dict(window))]
    window |= {"ceil_mode": data.draw(st.integers(0, 1))}
    counted = {"count_include_pad": data.draw(st.integers(0, 1))}
    cases += [Case("MaxPool", (x,), window, 2), Case("AveragePool", (x,), window | counted)]
    for case in cases:
        try:
            assert_as_runtime(ir.from_proto(case.model()), case.feeds, FLOAT)
        except TargetError:
            continue  # as where the padding is larger than a window


# -- quantization -------------------------------------------------------------------------------

QDQ = """(float[8] x) => (float[8] y) <float s = {0.5}, int8 z = {3}> {
    q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }"""


def test_quantization_passes_gradients_straight_through_within_the_range() -> None:
    graph = whole(ir.from_proto(graphs.proto(QDQ)))
    x = torch.tensor([-80.0, -66.1, -65.4, -1.3, 0.2, 61.9, 62.4, 70.0], requires_grad=True)
    scale = graph.constants["s"].requires_grad_()
    learnt = graph({"x": x})["y"]
    with torch.no_grad():
        torch.testing.assert_close(learnt, graph({"x": x})["y"], rtol=0.0, atol=0.0)
    by_x, by_scale = torch.autograd.grad(learnt.sum(), [x, scale])
    # Codes are round(x / 0.5) + 3 within [-128, 127],
    # so that x lies between -65.75 and 62.25.
    inside = torch.tensor([0, 0, 1, 1, 1, 1, 0, 0.0])
    torch.testing.assert_close(by_x, inside)
    # Of the scale: the code, less the ratio where that moves with it.
    ratio = x.detach() / 0.5
    codes = (ratio.round() + 3).clamp(-128, 127) - 3
    torch.testing.assert_close(by_scale, (codes - inside * ratio).sum())


FORMATS = [
    *(ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT16, ir.DataType.UINT16),
    *(ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2),
]


@pytest.mark.parametrize("block", [0, 4])
@pytest.mark.parametrize("format", FORMATS)
def test_codes_of_every_format_are_those_of_onnx_runtime(format: ir.DataType, block: int) -> None:
    rng = np.random.default_rng(0)
    x = (100 * rng.standard_normal((3, 8))).astype(np.float32)
    shape = (3, 2) if block else (3,)
    scale = rng.uniform(0.5, 9, shape).astype(np.float32)
    zero = np.zeros(shape) if format.is_floating_point() else rng.integers(0, 3, shape)
    codes = rng.integers(0, 7, (3, 8))
    given = [
        ir.Value(name=name, const_value=ir.tensor(array.astype(dtype.numpy())))
        for name, array, dtype in (
            ("scale", scale, ir.DataType.FLOAT), ("zero", zero, format), ("codes", codes, format)
        )
    ]  # fmt: skip
    entered = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(x.shape))
    options = {"axis": 1 if block else 0} | ({"block_size": block} if block else {})
    attributes = ir.convenience.convert_attributes(options)
    to, back, stored = (
        ir.Node("", kind, values, attributes, name=name, outputs=[ir.Value(name=name)])
        for kind, values, name in (
            ("QuantizeLinear", [entered, *given[:2]], "q"),
            ("DequantizeLinear", [None, *given[:2]], "y"),
            ("DequantizeLinear", [given[2], *given[:2]], "stored"),
        )
    )
    back.replace_input_with(0, to.outputs[0])
    graph = ir.Graph(
        [entered], [back.outputs[0], stored.outputs[0]], nodes=[to, back, stored],
        initializers=given, opset_imports={"": 21}, name="codes",
    )  # fmt: skip
    for value in graph.outputs:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    assert_as_runtime(ir.Model(graph, ir_version=10), {"x": x}, 0.0)


# -- control flow -------------------------------------------------------------------------------

NESTED = """(float[2,3] x, bool a, bool b) => (float[2,3] y) <float[3] w> {
    h = Relu(x)
    y = If(a) <
        then_branch = g1 () => (float[2,3] t) {
            s = Mul(h, w)
            t = If(b) <
                then_branch = g2 () => (float[2,3] u) { u = Add(s, x) },
                else_branch = g3 () => (float[2,3] v) { v = Identity(h) }
            >
        },
        else_branch = g4 () => (float[2,3] e) { e = Sub(h, w) }
    > }"""
COUNT = """(float[3] x, int64 n, bool go) => (float[3] y, float[k,3] all) <float[3] w> {
    y, all = Loop(n, go, x) <
        body = g (int64 i, bool c, float[3] h) => (bool d, float[3] k, float[3] each) {
            k = Mul(h, w)  each = Add(k, x)
            m = ReduceMax<keepdims = 0>(k)
            one = Constant<value_float = 0.05>()
            d = Greater(m, one)
        }
    > }"""


@pytest.mark.parametrize("a", [False, True])
@pytest.mark.parametrize("b", [False, True])
def test_branches_read_what_is_around_them(a: bool, b: bool) -> None:
    model = graphs.graph(NESTED)
    x = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    assert_as_runtime(model, {"x": x, "a": np.array(a), "b": np.array(b)}, FLOAT)
    graph, weight = whole(model), "w"
    graph.constants[weight].requires_grad_()
    feeds = {"x": from_array(x), "a": torch.tensor(a), "b": torch.tensor(b)}
    y = graph(feeds)["y"]
    assert y.requires_grad == (not a or b)  # whether w was read


@pytest.mark.parametrize(("limit", "go"), [(4, True), (9, True), (0, True), (3, False)])
def test_loops_carry_and_gather(limit: int, go: bool) -> None:
    feeds = {"x": np.array([1, 2, 3], np.float32), "n": np.array(limit), "go": np.array(go)}
    assert_as_runtime(graphs.graph(COUNT), feeds, FLOAT)


# -- models -------------------------------------------------------------------------------------

SHIPPED = ["fashion_cnn", "fashion_vit"]
FOLDER = pathlib.Path(qcompile.models.__file__ or "").parent


def compiled(path: pathlib.Path, passes: str) -> ir.Model:
    model = capture(path)
    if passes:
        pipeline.run(model, pipeline.parse(passes, registry.passes()), pipeline.Context())
    return model


def shipped(name: str, passes: str = "") -> ir.Model:
    return compiled(FOLDER / f"{name}.onnx", passes)


@pytest.mark.parametrize("passes", ["", "simplify,recompose,fold-bn", "cast-half"])
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models_are_what_onnx_runtime_computes(name: str, passes: str) -> None:
    model = shipped(name, passes)
    feeds = graphs.samples(model)[0]
    assert_same_shapes(model, tensors(feeds))
    # A few dozen layers, of which each rounds.
    assert_as_runtime(model, feeds, 1e-5 if passes != "cast-half" else 1e-2)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_part_from_the_middle_is_that_part(name: str) -> None:
    model = shipped(name)
    # Between two values that all that follows is computed from.
    kind, reads = ("Relu", False) if name == "fashion_cnn" else ("LayerNormalization", True)
    ends = [(n.inputs if reads else n.outputs)[0] for n in model.graph if n.op_type == kind][2:4]
    first, last = (value.name or "" for value in ends if value is not None)
    feeds = graphs.samples(model)[0]
    values = execute.execute(model, feeds, [first, last])
    graph = TorchGraph(model, [first], [last])
    assert 0 < len(graph.nodes) < len(list(model.graph))
    found = graph({first: from_array(values[first])})[last]
    assert_close(found.detach().numpy(), values[last], 1e-5)


def test_what_is_fed_is_not_written_over() -> None:
    model = graphs.graph("""(float[4] x) => (float[2] y) {
        a, b = Split<num_outputs = 2>(x) y = Sub(a, b) }""")
    graph = TorchGraph(model, ["x", "a"], ["y", "a"])
    found = graph({"x": torch.arange(4.0), "a": torch.tensor([10.0, 20.0])})
    assert numbers(found["y"]) == [8.0, 17.0]
    assert numbers(found["a"]) == [10.0, 20.0]


def test_constants_may_be_outputs_and_be_replaced() -> None:
    model = graphs.graph(graphs.CHAIN)
    graph = TorchGraph(model, ["s"], ["w1", "y", "s"])
    assert set(graph.constants) == {"w1", "w2"}
    graph.constants["w2"] = torch.zeros(8, 4)
    found = graph({"s": torch.ones(2, 8)})
    assert found["w1"] is graph.constants["w1"]
    assert not found["y"].any() and found["s"].all()


@pytest.mark.parametrize(
    "format", [ir.DataType.BFLOAT16, ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E5M2FNUZ]
)
def test_constants_of_types_that_numpy_lacks_keep_their_values(format: ir.DataType) -> None:
    array = np.array([-1.5, 0.5, 3.0]).astype(format.numpy())
    found = tensor_of(ir.tensor(array))
    assert numbers(found.float()) == [-1.5, 0.5, 3.0]


def test_constants_are_copies() -> None:
    model = graphs.graph(graphs.CHAIN)
    before = graphs.weight(model, "w1").copy()
    whole(model).constants["w1"].zero_()
    np.testing.assert_array_equal(graphs.weight(model, "w1"), before)


# -- changes ------------------------------------------------------------------------------------

TWICE = "(float[2,3] x) => (float[2,3] y) { h = Relu(x) a = Mul(h, h) y = Add(a, h) }"


def same(x: Tensor, number: float) -> bool:
    """Whether every element is ``number``."""
    return bool((x == number).all())


def test_at_maps_one_use_and_after_maps_all() -> None:
    model = graphs.graph(TWICE)
    graph = whole(model)
    square = next(n.name or "" for n in model.graph if n.op_type == "Mul")
    x = torch.full((2, 3), 3.0)
    assert same(graph({"x": x})["y"], 12.0)
    one = graph({"x": x}, at={(square, 1): lambda h: 10 * h})["y"]
    assert same(one, 93.0)
    both = graph({"x": x}, after={"h": lambda h: 10 * h})["y"]
    assert same(both, 930.0)
    assert same(graph({"x": x}, after={"y": lambda y: y - 12})["y"], 0.0)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_weight_changed_at_its_use_is_a_changed_weight(name: str) -> None:
    model = shipped(name, "simplify,recompose,fold-bn")
    node = next(n for n in model.graph if n.op_type in ("Conv", "MatMul") and n.inputs[1])
    weight = node.inputs[1]
    assert weight is not None and weight.name is not None
    graph, feeds = whole(model), graphs.samples(model)[0]
    step = 0.05
    found = graph(tensors(feeds), at={(node.name or "", 1): lambda w: step * (w / step).round()})
    rounded = step * np.round(graphs.weight(model, weight.name) / step)
    model.graph.initializers[weight.name].const_value = ir.tensor(rounded.astype(np.float32))
    for output, wanted in execute.execute(model, feeds).items():
        assert_close(found[output].detach().numpy(), wanted, 1e-5)


def test_changes_reach_into_branches() -> None:
    graph = whole(graphs.graph(NESTED))
    feeds = {"x": torch.ones(2, 3), "a": torch.tensor(True), "b": torch.tensor(True)}
    found = graph(feeds, after={"s": torch.zeros_like})["y"]
    torch.testing.assert_close(found, feeds["x"])


@pytest.mark.parametrize("name", SHIPPED)
def test_gradients_reach_inputs_and_weights_and_foretell_the_runtime(name: str) -> None:
    model = shipped(name)
    graph, feeds = whole(model), graphs.samples(model)[0]
    entered = {k: t.requires_grad_() for k, t in tensors(feeds).items()}
    learnt = {k: t.requires_grad_() for k, t in graph.constants.items() if t.is_floating_point()}
    [(output, found)] = graph(entered).items()
    leaves = entered | learnt
    grads = torch.autograd.grad(found.square().mean(), list(leaves.values()))
    slope_of = dict(zip(leaves, grads, strict=True))
    assert all(slope.isfinite().all() and slope.any() for slope in slope_of.values())

    # Along the gradient of a few weights the loss of the runtime rises by its squared length.
    def loss() -> float:
        return float(np.mean(np.square(execute.execute(model, feeds)[output].astype(np.float64))))

    chosen = [k for k, t in learnt.items() if t.dim() > 1][:4]
    slopes = {k: slope_of[k].numpy() for k in chosen}
    length = sum(float(np.square(s, dtype=np.float64).sum()) for s in slopes.values())
    step = 1e-2 * loss() / length
    losses: list[float] = []
    for sign in (1.0, -1.0):
        for key, slope in slopes.items():
            moved = learnt[key].detach().numpy() + sign * step * slope
            model.graph.initializers[key].const_value = ir.tensor(moved.astype(np.float32))
        losses.append(loss())
    assert losses[0] - losses[1] == pytest.approx(2 * step * length, rel=0.02)


def test_values_are_freed_once_they_are_read() -> None:
    body = " ".join(f"h{i + 1} = Add(h{i}, x)" for i in range(20))
    model = graphs.graph(f"(float[4] x) => (float[4] h20) {{ h0 = Neg(x) {body} }}")
    alive: list[int] = []
    seen: list[weakref.ref[Tensor]] = []

    def watch(tensor: Tensor) -> Tensor:
        seen.append(weakref.ref(tensor))
        alive.append(sum(reference() is not None for reference in seen))
        return tensor

    after: dict[str, Callable[[Tensor], Tensor]] = {f"h{i}": watch for i in range(21)}
    with torch.no_grad():
        whole(model)({"x": torch.ones(4)}, after=after)
    assert len(alive) == 21
    assert max(alive) == 2  # what is read and what is written


# -- errors -------------------------------------------------------------------------------------


def test_operators_without_an_entry_are_named() -> None:
    boxes = """(float[1,4,4] b, float[1,1,4] s, bool c) => (int64[n,3] y, float[1] z) {
        y = NonMaxSuppression(b, s)
        z = If(c) <
            then_branch = g1 () => (float[1] t) { v = Det(b) t = Identity(v) },
            else_branch = g2 () => (float[1] e) { e = ReduceSum<keepdims = 0>(b) }
        > }"""
    model = ir.from_proto(graphs.proto(boxes))
    assert torch_exec.missing(model.graph) == ["Det", "NonMaxSuppression"]
    with pytest.raises(PassError, match="cannot run the operators Det, NonMaxSuppression"):
        whole(model)
    TorchGraph(model, ["b"], ["b"])  # nothing of them is needed


def test_an_input_that_is_needed_is_asked_for() -> None:
    model = graphs.graph("(float[2] x, float[2] z) => (float[2] y) { y = Add(x, z) }")
    with pytest.raises(PassError, match="'y' need the input 'z' of the model; name it"):
        TorchGraph(model, ["x"], ["y"])
    with pytest.raises(PassError, match=r"no value 'h': .*known are x, y, z"):
        TorchGraph(model, ["x", "z"], ["h"])
    with pytest.raises(PassError, match="an input 'z', for which there is no value"):
        whole(model)({"x": torch.ones(2)})


def test_what_an_entry_does_not_cover_names_the_node() -> None:
    case = next(c for c in BY_OPERATOR["LSTM"] if len(c.inputs) == 3)
    case.attributes["layout"] = 1
    with pytest.raises(PassError, match=r"node 'node' \(LSTM\) has layout 1"):
        whole(ir.from_proto(case.model()))(tensors(case.feeds))
    window = {"kernel_shape": [2], "dilations": [2], "auto_pad": "SAME_UPPER"}
    case = Case("MaxPool", (np.ones((1, 1, 5), np.float32),), window)
    with pytest.raises(PassError, match=r"\(MaxPool\) has auto_pad SAME_UPPER with dilations"):
        whole(ir.from_proto(case.model()))(tensors(case.feeds))


def test_the_rest_of_the_compiler_does_not_load_torch() -> None:
    code = """
import sys
from qcompile import cli, compiler, registry
dict(registry.passes()), dict(registry.targets())
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# -- public models ------------------------------------------------------------------------------

Feeds = dict[str, Array]
PUBLIC: dict[str, tuple[Callable[[], pathlib.Path], Callable[[np.random.Generator], Feeds]]] = {
    "det": (ocr.det, lambda r: {"x": r.standard_normal((1, 3, 96, 64))}),
    "rec": (ocr.rec, lambda r: {"x": r.standard_normal((2, 3, 48, 160))}),
    "cls": (ocr.cls, lambda r: {"x": r.standard_normal((2, 3, 48, 192))}),
    "magika": (filetypes.magika, lambda r: {"bytes": r.integers(0, 257, (1, 2048))}),
    "silero": (
        speech.silero,
        lambda r: {
            "input": 0.1 * r.standard_normal((1, 576)),
            "state": 0.5 * r.standard_normal((2, 1, 128)),
            "sr": np.array(16000),
        },
    ),
}


@pytest.mark.parametrize("passes", ["", "simplify,recompose,fold-bn"])
@pytest.mark.parametrize("name", PUBLIC)
def test_public_models_are_what_onnx_runtime_computes(name: str, passes: str) -> None:
    find, make = PUBLIC[name]
    try:
        path = find()
    except fetch.FetchError as error:
        pytest.skip(str(error))
    model = compiled(path, passes)
    types = {value.name: value.dtype for value in model.graph.inputs}
    feeds = {
        key: np.asarray(array, types[key].numpy())  # type: ignore[union-attr]
        for key, array in make(np.random.default_rng(0)).items()
    }
    assert_same_shapes(model, tensors(feeds))
    assert_as_runtime(model, feeds, 1e-4)  # a hundred layers, on noise
