"""Broken models from sound ones: seed models, and random changes to their files, for the fuzzing.

``mutant(number, seed)`` is a file that somebody might hand to the compiler, and data that fits the
sound model it was made from. The same numbers make the same file.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
import onnx.parser
from graphs import CHAIN, CONV, GEMM, proto

from qcompile.models import fashion

Array = npt.NDArray[Any]
Rng = np.random.Generator
# Enough that one is kept apart to judge.
SAMPLES = 6


@dataclasses.dataclass(frozen=True)
class Seed:
    """A sound model, and arrays named like its inputs with a leading sample axis."""

    name: str
    model: onnx.ModelProto
    data: Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A file, what was done to make it, and the data of the seed."""

    seed: Seed
    changes: tuple[str, ...]
    content: bytes


# -- seeds --------------------------------------------------------------------------------------

# Opset and text of tiny graphs that hold one of each thing which the compiler looks at.
TEXTS = {
    "chain": (21, CHAIN),
    "gemm": (13, GEMM),
    "conv": (18, CONV),
    "conv-bn": (9, """(float[N,3,8,8] x) => (float[N,5] y) <float[4,3,3,3] w, float[4] b,
        float[4] g, float[4] s, float[4] m, float[4] v = {1, 2, 3, 4}, float[5,4] u, float[5] c> {
        p = Pad<pads=[0,0,1,1,0,0,1,1]>(x) h = Conv<kernel_shape=[3,3], strides=[2,2]>(p, w, b)
        n = BatchNormalization(h, g, s, m, v) r = Relu(n) q = GlobalAveragePool(r)
        f = Flatten(q) y = Gemm<transB=1>(f, u, c) }"""),
    "depthwise": (11, """(float[1,4,6,6] x) => (float[1,4,12,12] y)
        <float[4,1,3,3] w, float[4,4,1,1] u, float[8] roi, float[4] s = {1, 1, 2, 2}> {
        h = Conv<group=4, pads=[1,1,1,1]>(x, w) r = Clip(h) k = Conv(r, u) a = Add(k, x)
        y = Resize<mode="linear", coordinate_transformation_mode="align_corners">(a, roi, s) }"""),
    "transposed": (14, """(float[1,4,5,5] x) => (float[1,2,9,9] y)
        <float[4,4,1,1] u, float[4,2,3,3] w, float[2] a, float[2] b, float[2] m,
        float[2] v = {1, 2}> {
        c = Conv(x, u) h = ConvTranspose<strides=[2,2], pads=[1,1,1,1]>(c, w)
        y = BatchNormalization(h, a, b, m, v) }"""),
    "attention": (17, """(float[B,4,8] x) => (float[B,4,8] y)
        <float[8,8] wq, float[8,8] wk, float[8,8] wv, float[8] b, float[8] g, float[8] s,
        int64[4] heads = {0, 0, 2, 4}, int64[3] whole = {0, 0, 8}, float scale = {0.5}> {
        n = LayerNormalization(x, g, s) q0 = MatMul(n, wq) q1 = Add(q0, b)
        q2 = Reshape(q1, heads) q = Transpose<perm=[0,2,1,3]>(q2)
        k0 = MatMul(n, wk) k1 = Reshape(k0, heads) k = Transpose<perm=[0,2,3,1]>(k1)
        v0 = MatMul(n, wv) v1 = Reshape(v0, heads) v = Transpose<perm=[0,2,1,3]>(v1)
        l0 = MatMul(q, k) l = Mul(l0, scale) p = Softmax(l) o = MatMul(p, v)
        o1 = Transpose<perm=[0,2,1,3]>(o) o2 = Reshape(o1, whole) y = Add(o2, x) }"""),
    "attention-23": (23, """(float[1,4,8] x) => (float[1,4,3] y)
        <float[8] g, float[8,8] w, float[8,3] u> {
        n = RMSNormalization(x, g) q = MatMul(n, w)
        a = Attention<q_num_heads=2, kv_num_heads=2>(q, n, n) y = MatMul(a, u) }"""),
    "lstm": (14, """(float[5,1,6] x) => (float[5,1,3] y)
        <float[1,16,6] w, float[1,16,4] r, float[1,32] b, float[4,3] u, int64[1] one = {1}> {
        h, last, cell = LSTM<hidden_size=4>(x, w, r, b) s = Squeeze(h, one) y = MatMul(s, u) }"""),
    "if": (19, """(bool c, float[2,8] x) => (float[2,4] y) <float[8,4] w, float[8,4] u> {
        h = MatMul(x, w)
        y = If(c) <
            then_branch = then () => (float[2,4] a) { t = MatMul(x, u) a = Add(t, h) },
            else_branch = other () => (float[2,4] b) { b = Neg(h) }> }"""),
    "loop": (18, """(float[2,8] x) => (float[2,8] y)
        <int64 n = {3}, bool go = {1}, float[8,8] w> {
        h = MatMul(x, w)
        y = Loop(n, go, h) <
            body = body (int64 i, bool c, float[2,8] a) => (bool d, float[2,8] b) {
                d = Identity(c) t = MatMul(a, w) b = Tanh(t) }> }"""),
    "embedding": (16, """(int64[1,T] ids, int64[1,T] mask) => (float[1,T,3] y)
        <float[7,8] table, float[8,3] w, int64 axis = {-1}> {
        e = Gather(table, ids) m = Cast<to=1>(mask) u = Unsqueeze(m, axis) h = Mul(e, u)
        s = Shape(h) r = Reshape(h, s) y = MatMul(r, w) }"""),
    "function": (21, """(float[2,8] x) => (float[2,8] y) <float[8,8] w> {
        h = acme.twice<gain=2.0>(x, w) y = Relu(h) }
        <domain: "acme", opset_import: ["": 21]>
        twice <gain> (a, b) => (c) {
            k = Constant<value_float: float = @gain>() m = MatMul(a, b) n = Mul(m, k)
            c = MatMul(n, b) }"""),
    "custom": (20, """(float[2,8] x) => (float[2,3] y) <float[8,8] w, float[8,3] v> {
        h = MatMul(x, w) g = com.microsoft.FastGelu(h) y = MatMul(g, v) }"""),
    "old": (7, """(float[2,6] x) => (float[2,3] y) <float[6,6] w, float[3,3] u> {
        h = MatMul(x, w) a, b = Split<axis=1, split=[3,3]>(h) c = Sum(a, b)
        d = Dropout<ratio=0.5>(c) s = Slice<axes=[1], starts=[0], ends=[3]>(d)
        m = ReduceMean<axes=[1], keepdims=1>(s) t = Sub(s, m) y = MatMul(t, u) }"""),
    "upsample": (9, """(float[1,2,4,4] x) => (float[1,2,8,8] y)
        <float[2,2,1,1] w, float[4] s = {1, 1, 2, 2}> {
        h = Conv(x, w) y = Upsample<mode="nearest">(h, s) }"""),
    "moved": (22, """(float[2,3,4,4] x) => (float[2,5] y, float[2,3] z)
        <float[5,3] w0, float[3,3] v, int64[2] axes = {2, 3}> {
        p = ReduceMean<keepdims=0>(x, axes) w1 = Identity(w0) w = Transpose<perm=[1,0]>(w1)
        y = MatMul(p, w) a, i = TopK<axis=1>(p, three) z = MatMul(a, v)
        three = Constant<value_ints=[3]>() }"""),
    "half": (19, """(float[2,8] x) => (float[2,4] y) <float[8,8] w, float[8,4] u> {
        h = Cast<to=10>(x) k = Cast<to=10>(w) m = MatMul(h, k) r = Relu(m)
        f = Cast<to=1>(r) y = MatMul(f, u) }"""),
    "recurrent": (21, """(float[3,1,4] x, float[1,1,5] h0) => (float[3,1,1,2] z, float[1,1,5] h1)
        <float[1,15,4] w, float[1,15,5] r, float[1,30] b, int32[1] n = {3}, float[5,2] u> {
        y, h1 = GRU<hidden_size=5>(x, w, r, b, n, h0) z = MatMul(y, u) }"""),
    "mixed": (13, """(float[1,2,4,4] x, float[1,2,4,4] z) => (float[1,4,2,2] y)
        <float[4,4,2,2] w, float[4] b, float low = {0}, float high = {6}> {
        c = Concat<axis=1>(x, z) h = Conv<strides=[1,1]>(c, w, b) r = Clip(h, low, high)
        m = MaxPool<kernel_shape=[2,2]>(r) s = Sigmoid(m) y = Mul(m, s) }"""),
}  # fmt: skip


@functools.cache
def seeds() -> tuple[Seed, ...]:
    """The tiny graphs, and the two trained models."""
    found = [_tiny(name, opset, text) for name, (opset, text) in TEXTS.items()]
    pictures = fashion.calibration()[:SAMPLES]
    for file in (fashion.CNN, fashion.VIT):
        model = onnx.ModelProto.FromString(fashion.path(file).read_bytes())
        found.append(Seed(file, model, {"image": pictures}))
    return tuple(found)


def _tiny(name: str, opset: int, text: str) -> Seed:
    body, separator, functions = text.partition("<domain:")
    model = proto(body, opset)
    # The file says that it needs no newer reader than its opset does.
    model.ir_version = 8 if opset < 19 else 10
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    if separator:
        head = f'<ir_version: 10, opset_import: ["": {opset}]> g () => () {{}}'
        whole = onnx.parser.parse_model(f"{head} {separator}{functions}")
        model.functions.extend(whole.functions)
        model.opset_import.append(onnx.helper.make_opsetid("acme", 1))
    rng = np.random.default_rng(1)
    data: dict[str, Array] = {}
    for value in model.graph.input:
        kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        shape = [d.dim_value or 2 for d in value.type.tensor_type.shape.dim]
        whole_numbers = rng.integers(0, 2, [SAMPLES, *shape])
        noise = rng.standard_normal([SAMPLES, *shape])
        data[value.name] = (noise if kind.kind == "f" else whole_numbers).astype(kind)
    return Seed(name, model, data)


def mutant(number: int, seed: int = 0) -> Mutant:
    """The mutant ``number``: one to four changes to a seed, or to the bytes of its file."""
    rng = np.random.default_rng([seed, number])
    known = seeds()
    # The trained models take longest and hold the fewest operators.
    chances = np.array([0.3 if s.name in fashion.FILES else 1.0 for s in known])
    start = known[int(rng.choice(len(known), p=chances / chances.sum()))]
    model = onnx.ModelProto()
    model.CopyFrom(start.model)
    changes: list[str] = []
    wanted = int(rng.choice([1, 2, 3, 4], p=[0.55, 0.25, 0.1, 0.1]))
    if rng.random() < 0.08:
        content = model.SerializeToString()
        for _ in range(wanted):
            change = _pick(rng, BYTES)
            content = change(content, rng)
            changes.append(change.__name__.strip("_"))
        return Mutant(start, tuple(changes), content)
    while len(changes) < wanted:
        change = _pick(rng, CHANGES)
        said = change(model, rng)
        if said is not None:
            changes.append(f"{change.__name__.strip('_')}: {said}")
    return Mutant(start, tuple(changes), model.SerializeToString())


# -- choices ------------------------------------------------------------------------------------

Change = Callable[[onnx.ModelProto, Rng], "str | None"]


def _pick(rng: Rng, items: Any) -> Any:
    return items[int(rng.integers(len(items)))]


def _graphs(model: onnx.ModelProto) -> list[Any]:
    """The main graph, the bodies inside it, and the functions; all have nodes."""

    def inside(graph: Any) -> Iterator[Any]:
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    yield from inside(attribute.g)

    return [*inside(model.graph), *model.functions]


def _graph(model: onnx.ModelProto, rng: Rng) -> Any:
    known = _graphs(model)
    return known[0] if rng.random() < 0.6 else _pick(rng, known)


def _node(model: onnx.ModelProto, rng: Rng) -> Any:
    graph = _graph(model, rng)
    return _pick(rng, graph.node) if graph.node else None


def _names(model: onnx.ModelProto) -> list[str]:
    """Every name that a value may be read by, and some that none has."""
    found = [v.name for v in (*model.graph.input, *model.graph.initializer)]
    for graph in _graphs(model):
        found += [name for node in graph.node for name in node.output]
    return [*found, "nobody"]


ODD_NAMES = ("", " ", "a/b\\c", "new\nline", "[red]", "\0", "ä" * 300, "..", "x", "y", "%h", "{a}")
ODD_NUMBERS = (-1, 0, 1, 2, 3, 7, 99, -99, 2**31 - 1, 2**31, -(2**63), 2**63 - 1)
ODD_FLOATS = (0.0, -1.0, 1e-38, 1e38, float("nan"), float("inf"), -float("inf"))
OPERATORS = (
    "Conv", "ConvTranspose", "MatMul", "Gemm", "Add", "Relu", "Clip", "Reshape", "Transpose", "Pad",
    "BatchNormalization", "Gather", "LSTM", "Squeeze", "Unsqueeze", "Concat", "Identity", "Cast",
    "ReduceMean", "GlobalAveragePool", "MaxPool", "AveragePool", "Resize", "Flatten", "Shape", "If",
    "Loop", "Constant", "ConstantOfShape", "Einsum", "Softmax", "Split", "Slice", "NonZero",
    "Where", "Expand", "Range", "SequenceConstruct", "Optional", "StringNormalizer",
    "QuantizeLinear", "RandomNormalLike", "NoSuchOperator", "", "matmul",
)  # fmt: skip
DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "acme", "com.acme.very.long", "\n")


# -- edges and nodes ----------------------------------------------------------------------------


def _drop_read(model: onnx.ModelProto, rng: Rng) -> str | None:
    node = _node(model, rng)
    if node is None or not node.input:
        return None
    index = int(rng.integers(len(node.input)))
    gone = node.input[index]
    if rng.random() < 0.5:
        node.input[index] = ""
    else:
        del node.input[index]
    return f"{gone!r} of {node.op_type}"


def _redirect_read(model: onnx.ModelProto, rng: Rng) -> str | None:
    node = _node(model, rng)
    if node is None or not node.input:
        return None
    index = int(rng.integers(len(node.input)))
    node.input[index] = _pick(rng, _names(model))
    return f"input {index} of {node.op_type} reads {node.input[index]!r}"


def _add_read(model: onnx.ModelProto, rng: Rng) -> str | None:
    node = _node(model, rng)
    if node is None:
        return None
    for _ in range(int(rng.choice([1, 2, 20]))):
        node.input.append(_pick(rng, _names(model)))
    return f"{node.op_type} reads {len(node.input)} values"


def _cycle(model: onnx.ModelProto, rng: Rng) -> str | None:
    graph = _graph(model, rng)
    if not graph.node:
        return None
    first = int(rng.integers(len(graph.node)))
    later = int(rng.integers(first, len(graph.node)))
    if not graph.node[first].input or not graph.node[later].output:
        return None
    graph.node[first].input[0] = graph.node[later].output[0]
    return f"{graph.node[first].op_type} reads what is behind it"


def _rename_write(model: onnx.ModelProto, rng: Rng) -> str | None:
    node = _node(model, rng)
    if node is None or not node.output:
        return None
    index = int(rng.integers(len(node.output)))
    before = node.output[index]
    node.output[index] = _pick(rng, (*_names(model), *ODD_NAMES))
    return f"{before!r} is {node.output[index]!r}"


def _change_writes(model: onnx.ModelProto, rng: Rng) -> str | None:
    node = _node(model, rng)
    if node is None:
        return None
    if node.output and rng.random() < 0.5:
        del node.output[-1]
    else:
        node.output.append(_pick(rng, ("extra", "extra", *ODD_NAMES)))
    return f"{node.op_type} writes {list(node.output)}"


def _drop_node(model: onnx.ModelProto, rng: Rng) -> str | None:
    graph = _graph(model, rng)
    if not graph.node:
        return None
    index = int(rng.integers(len(graph.node)))
    kind = graph.node[index].op_type
    del graph.node[index]
    return kind


def _double_node(model: onnx.ModelProto, rng: Rng) -> str | None:
    graph = _graph(model, rng)
    if not graph.node:
        return None
    copy = onnx.NodeProto()
    copy.CopyFrom(_pick(rng, graph.node))
    if rng.random() < 0.5:
        copy.output[:] = [f"{name}2" for name in copy.output]
    graph.node.append(copy)
    return str(copy.op_type)


def _shuffle(model: onnx.ModelProto, rng: Rng) -> str | None:
    graph = _graph(model, rng)
    order = rng.permutation(len(graph.node))
    nodes = [onnx.NodeProto.FromString(graph.node[int(i)].SerializeToString()) for i in order]
    del graph.node[:]
    graph.node.extend(nodes)
    return f"{len(nodes)} nodes"


def _name_nodes(model: onnx.ModelProto, rng: Rng) -> str | None:
    graph, name = _graph(model, rng), _pick(rng, ODD_NAMES)
    for node in graph.node:
        if rng.random() < 0.7:
            node.name = name
    return repr(name)


def _change_operator(model: onnx.ModelProto, rng: Rng) -> str | None:
    node = _node(model, rng)
    if node is None:
        return None
    before, node.op_type = node.op_type, _pick(rng, OPERATORS)
    return f"{before} is {node.op_type}"


def _change_domain(model: onnx.ModelProto, rng: Rng) -> str | None:
    node = _node(model, rng)
    if node is None:
        return None
    node.domain = _pick(rng, DOMAINS)
    if rng.random() < 0.5:
        model.opset_import.append(onnx.helper.make_opsetid(node.domain, 1))
    return f"{node.op_type} is of {node.domain!r}"


def _long_chain(model: onnx.ModelProto, rng: Rng) -> str | None:
    """A chain of operators on one edge: what recurses over the graph runs out of stack."""
    node = _node(model, rng)
    if node is None or not node.input or not node.input[0]:
        return None
    graph, index = model.graph, int(rng.integers(len(node.input)))
    kind, length = _pick(rng, ("Identity", "Transpose", "Relu")), int(rng.choice([3, 1500]))
    name, chain = node.input[index], list[onnx.NodeProto]()
    for number in range(length):
        chain.append(onnx.helper.make_node(kind, [name], [f"chain{number}"]))
        name = f"chain{number}"
    node.input[index] = name
    rest = [onnx.NodeProto.FromString(n.SerializeToString()) for n in graph.node]
    del graph.node[:]
    graph.node.extend([*chain, *rest])
    return f"{length} {kind} before {node.op_type}"


def _deep(model: onnx.ModelProto, rng: Rng) -> str | None:
    """An If in an If in an If: protobuf itself reads about thirty of them."""
    depth = int(rng.choice([2, 10, 24]))
    inner = onnx.helper.make_node("Identity", ["deep_in"], ["deep0"])
    for level in range(1, depth):
        info = onnx.helper.make_tensor_value_info(f"deep{level - 1}", 1, None)
        body = onnx.helper.make_graph([inner], f"body{level}", [], [info])
        inner = onnx.helper.make_node(
            "If", ["deep_condition"], [f"deep{level}"], then_branch=body, else_branch=body
        ) if level < 8 else onnx.helper.make_node(
            "If", ["deep_condition"], [f"deep{level}"], then_branch=body,
            else_branch=onnx.helper.make_graph(
                [onnx.helper.make_node("Identity", ["deep_in"], ["other"])], "other", [],
                [onnx.helper.make_tensor_value_info("other", 1, None)],
            ),
        )  # fmt: skip
    read = _pick(rng, _names(model))
    for old in [model.graph.node[-1]] if model.graph.node else []:
        old.input[:] = [f"deep{depth - 1}" if name == read else name for name in old.input]
    condition = onnx.numpy_helper.from_array(np.array(True), "deep_condition")
    model.graph.initializer.append(condition)
    first = onnx.helper.make_node("Identity", [read], ["deep_in"])
    rest = [onnx.NodeProto.FromString(n.SerializeToString()) for n in model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend([*rest, first, inner])
    model.graph.output.append(
        onnx.helper.make_tensor_value_info(inner.output[0], onnx.TensorProto.FLOAT, None)
    )
    return f"{depth} deep, of {read!r}"


# -- attributes ---------------------------------------------------------------------------------


def _drop_attribute(model: onnx.ModelProto, rng: Rng) -> str | None:
    node = _node(model, rng)
    if node is None or not node.attribute:
        return None
    index = int(rng.integers(len(node.attribute)))
    name = node.attribute[index].name
    del node.attribute[index]
    return f"{name} of {node.op_type}"


def _add_attribute(model: onnx.ModelProto, rng: Rng) -> str | None:
    node = _node(model, rng)
    if node is None:
        return None
    name = _pick(rng, (
        "axis", "axes", "group", "strides", "pads", "dilations", "kernel_shape", "perm", "alpha",
        "beta", "transA", "transB", "to", "keepdims", "auto_pad", "epsilon", "training_mode",
        "hidden_size", "direction", "layout", "allowzero", "mode", "body", "equation", "unheard_of",
        "block_size", "value", "bits", "",
    ))  # fmt: skip
    made = _odd_attribute(rng, name)
    node.attribute.append(made)
    return f"{node.op_type} has {_shown(made)}"


def _odd_attribute(rng: Rng, name: str) -> onnx.AttributeProto:
    kind = int(rng.integers(6))
    if kind == 0:
        return onnx.helper.make_attribute(name, _pick(rng, ODD_NUMBERS))
    if kind == 1:
        return onnx.helper.make_attribute(name, _pick(rng, ODD_FLOATS))
    if kind == 2:
        length = int(rng.choice([1, 2, 4, 9]))
        return onnx.helper.make_attribute(name, [_pick(rng, ODD_NUMBERS) for _ in range(length)])
    if kind == 3:
        return onnx.helper.make_attribute(name, _pick(rng, (b"SAME_UPPER", b"", b"\xff\xfe", b"a")))
    if kind == 4:
        array = np.zeros(_pick(rng, ([], [0], [3], [2, 2])), np.float32)
        return onnx.helper.make_attribute(name, onnx.numpy_helper.from_array(array))
    made = onnx.AttributeProto(name=name, type=_pick(rng, (0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12)))
    if rng.random() < 0.3:
        made.ref_attr_name = "gain"
    return made


def _shown(attribute: onnx.AttributeProto) -> str:
    text = " ".join(str(attribute).split())
    return text if len(text) < 90 else f"{text[:90]}..."


def _change_attribute(model: onnx.ModelProto, rng: Rng) -> str | None:
    node = _node(model, rng)
    if node is None or not node.attribute:
        return None
    changed = _pick(rng, node.attribute)
    if rng.random() < 0.3:
        changed.CopyFrom(_odd_attribute(rng, changed.name))
    elif changed.ints:
        _odd_list(changed.ints, rng)
    elif changed.HasField("i"):
        changed.i = _pick(rng, ODD_NUMBERS)
    elif changed.HasField("f"):
        changed.f = _pick(rng, ODD_FLOATS)
    elif changed.HasField("s"):
        changed.s = _pick(rng, (b"", b"VALID", b"\xff", b"linear", b"cubic", b"NOTSET"))
    elif changed.HasField("g"):
        body = changed.g
        del (body.node if rng.random() < 0.5 else body.output)[:]
    elif changed.HasField("t"):
        _spoil(changed.t, rng)
    return f"{node.op_type} has {_shown(changed)}"


def _odd_list(numbers: Any, rng: Rng) -> None:
    choice = int(rng.integers(5))
    if choice == 0:
        del numbers[:]
    elif choice == 1:
        del numbers[-1]
    elif choice == 2:
        numbers.append(_pick(rng, ODD_NUMBERS))
    elif choice == 3:
        numbers[0] = numbers[-1]
    else:
        numbers[int(rng.integers(len(numbers)))] = _pick(rng, ODD_NUMBERS)


def _double_attribute(model: onnx.ModelProto, rng: Rng) -> str | None:
    node = _node(model, rng)
    if node is None or not node.attribute:
        return None
    node.attribute.append(_pick(rng, node.attribute))
    return f"{node.attribute[-1].name} of {node.op_type}"


# -- types and shapes ---------------------------------------------------------------------------


def _change_type(model: onnx.ModelProto, rng: Rng) -> str | None:
    graph = model.graph
    value: Any = _pick(rng, (*graph.input, *graph.input, *graph.output, *graph.value_info, None))
    if value is None:
        name = _pick(rng, _names(model))
        value = onnx.helper.make_tensor_value_info(name, int(rng.integers(0, 24)), [1, "n", 3])
        graph.value_info.append(value)
        return f"value_info of {name!r}"
    choice = int(rng.integers(9))
    tensor = value.type.tensor_type
    if choice == 0:
        value.ClearField("type")
    elif choice == 1:
        tensor.ClearField("shape")
    elif choice == 2:
        tensor.elem_type = int(rng.choice([*range(24), 99]))
    elif choice == 3:
        value.type.sequence_type.elem_type.tensor_type.elem_type = 1
    elif choice == 4:
        tensor.shape.ClearField("dim")
        tensor.shape.SetInParent()
    elif choice == 5:
        tensor.shape.dim.add().dim_value = _pick(rng, ODD_NUMBERS)
    elif choice == 6 and tensor.shape.dim:
        del tensor.shape.dim[-1]
    elif tensor.shape.dim:
        dim = _pick(rng, tensor.shape.dim)
        if choice == 7:
            dim.dim_value = _pick(rng, ODD_NUMBERS)
        else:
            dim.dim_param = _pick(rng, ODD_NAMES)
    return f"{value.name!r} is {' '.join(str(value.type).split())}"


# -- weights ------------------------------------------------------------------------------------


def _weight(model: onnx.ModelProto, rng: Rng) -> Any:
    known = model.graph.initializer
    return _pick(rng, known) if known else None


def _drop_weight(model: onnx.ModelProto, rng: Rng) -> str | None:
    weight = _weight(model, rng)
    if weight is None:
        return None
    model.graph.initializer.remove(weight)
    return str(weight.name)


def _rename_weight(model: onnx.ModelProto, rng: Rng) -> str | None:
    weight = _weight(model, rng)
    if weight is None:
        return None
    before, weight.name = weight.name, _pick(rng, (*_names(model), *ODD_NAMES))
    return f"{before!r} is {weight.name!r}"


def _double_weight(model: onnx.ModelProto, rng: Rng) -> str | None:
    weight = _weight(model, rng)
    if weight is None:
        return None
    model.graph.initializer.append(weight)
    return str(weight.name)


def _spoil_weight(model: onnx.ModelProto, rng: Rng) -> str | None:
    weight = _weight(model, rng)
    return None if weight is None else f"{weight.name}: {_spoil(weight, rng)}"


def _spoil(tensor: Any, rng: Rng) -> str:
    """Make the numbers of ``tensor`` fewer, more, or none; or its shape or type another."""
    choice = int(rng.integers(10))
    if choice == 0:
        tensor.raw_data = tensor.raw_data[: len(tensor.raw_data) // 2]
        return "too short"
    if choice == 1:
        tensor.raw_data = tensor.raw_data + b"\1\2\3"
        return "too long"
    if choice == 2:
        tensor.data_type = int(rng.choice([*range(24), 99]))
        return f"type {tensor.data_type}"
    if choice == 3:
        tensor.dims.append(_pick(rng, ODD_NUMBERS))
        return f"dims {list(tensor.dims)}"
    if choice == 4 and tensor.dims:
        tensor.dims[int(rng.integers(len(tensor.dims)))] = _pick(rng, ODD_NUMBERS)
        return f"dims {list(tensor.dims)}"
    if choice == 5:
        del tensor.dims[:]
        return "no dims"
    if choice == 6:
        tensor.ClearField("raw_data")
        return "no data"
    if choice == 7:
        tensor.float_data.extend([1.0, 2.0])
        return "float_data as well"
    if choice == 8 and tensor.dims:
        tensor.dims[:] = list(tensor.dims)[::-1]
        return f"dims {list(tensor.dims)}"
    tensor.dims[:] = [0, *list(tensor.dims)[1:]]
    tensor.raw_data = b""
    return "holds nothing"


def _odd_weight(model: onnx.ModelProto, rng: Rng) -> str | None:
    """Numbers that are no numbers, or too large for the arithmetic."""
    weight = _weight(model, rng)
    if weight is None or weight.data_type != onnx.TensorProto.FLOAT:
        return None
    try:
        array = onnx.numpy_helper.to_array(weight).copy()
    except (ValueError, TypeError, onnx.checker.ValidationError):  # spoilt by an earlier change
        return None
    number = _pick(rng, (*ODD_FLOATS, 3e38, 1e-45))
    if rng.random() < 0.5:
        array[...] = number
    elif array.size:
        array.flat[int(rng.integers(array.size))] = number
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    return f"{number} in {weight.name}"


def _external_weight(model: onnx.ModelProto, rng: Rng) -> str | None:
    weight = _weight(model, rng)
    # A Loop that counts to a number out of random bytes is sound, and does not end.
    if weight is None or not weight.dims:
        return None
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    places = ("gone.data", "../gone.data", "/etc/passwd", "../../../../etc/passwd", "model.onnx")
    fields = {"location": _pick(rng, (*places, "", ".", "data.npz", "\0"))}
    fields["offset"] = str(_pick(rng, ODD_NUMBERS))
    fields["length"] = _pick(rng, ("0", "4", "many", str(2**62), "-8"))
    for key in list(fields):
        if key == "location" or rng.random() < 0.5:
            weight.external_data.add(key=key, value=fields[key])
    return f"{weight.name} lies in {fields['location']!r}"


def _sparse_weight(model: onnx.ModelProto, rng: Rng) -> str | None:
    weight = _weight(model, rng)
    if weight is None:
        return None
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(onnx.numpy_helper.from_array(np.ones(2, np.float32), weight.name))
    sparse.indices.CopyFrom(onnx.numpy_helper.from_array(np.array([0, 10**9])))
    sparse.dims.extend(weight.dims)
    model.graph.initializer.remove(weight)
    return str(weight.name)


# -- the model ----------------------------------------------------------------------------------


def _change_outputs(model: onnx.ModelProto, rng: Rng) -> str | None:
    outputs = model.graph.output
    choice = int(rng.integers(5))
    if choice == 0:
        del outputs[:]
    elif choice == 1 and outputs:
        outputs.append(outputs[0])
    elif choice == 2 and outputs:
        outputs[0].name = _pick(rng, (*_names(model), *ODD_NAMES))
    else:
        name = _pick(rng, _names(model))
        outputs.append(onnx.helper.make_tensor_value_info(name, 1, None))
    return str([v.name for v in outputs])


def _change_inputs(model: onnx.ModelProto, rng: Rng) -> str | None:
    inputs = model.graph.input
    choice = int(rng.integers(5))
    if choice == 0 and inputs:
        del inputs[int(rng.integers(len(inputs)))]
    elif choice == 1 and inputs:
        inputs.append(inputs[0])
    elif choice == 2 and inputs:
        inputs[0].name = _pick(rng, (*_names(model), *ODD_NAMES))
    else:
        name = _pick(rng, (*_names(model), "fresh"))
        inputs.append(onnx.helper.make_tensor_value_info(name, 1, [2, 8]))
    return str([v.name for v in inputs])


def _change_versions(model: onnx.ModelProto, rng: Rng) -> str | None:
    choice = int(rng.integers(5))
    if choice == 0:
        model.ir_version = int(rng.choice([0, 2, 3, 7, 11, 99, 2**40]))
    elif choice == 1:
        del model.opset_import[:]
    elif choice == 2:
        version = int(rng.choice([0, 1, 6, 7, 8, 13, 17, 18, 25, 26, 99]))
        model.opset_import.append(onnx.helper.make_opsetid(_pick(rng, DOMAINS), version))
    elif choice == 3 and model.opset_import:
        model.opset_import[0].domain = _pick(rng, DOMAINS)
    elif model.opset_import:
        versions = [-1, 0, 1, 6, 7, 9, 11, 13, 15, 17, 18, 19, 21, 23, 24, 25, 26, 2**40]
        model.opset_import[0].version = int(rng.choice(versions))
    said = ", ".join(f"{o.domain!r} {o.version}" for o in model.opset_import)
    return f"format {model.ir_version}, {said}"


def _change_functions(model: onnx.ModelProto, rng: Rng) -> str | None:
    if not model.functions:
        return None
    function = model.functions[0]
    choice = int(rng.integers(6))
    if choice == 0:
        del model.functions[:]
    elif choice == 1:
        model.functions.append(function)
    elif choice == 2:
        function.node.add(op_type=function.name, domain=function.domain, input=["a", "b"])
    elif choice == 3:
        del function.opset_import[:]
    elif choice == 4:
        function.input.append(_pick(rng, ("a", "b", "", "more")))
    else:
        function.output[:] = [_pick(rng, ("a", "nobody", ""))]
    return f"choice {choice}"


def _change_metadata(model: onnx.ModelProto, rng: Rng) -> str | None:
    key = _pick(rng, ("qcompile", "qcompile.origin", "qcompile.spec.0", "", "a"))
    value = _pick(rng, ("{", "[]", "", "null", "\0"))
    holder: Any = _pick(rng, (model, model.graph, *model.graph.node))
    holder.metadata_props.add(key=key, value=value)
    if rng.random() < 0.3:
        holder.metadata_props.add(key=key, value=value)
    holder.doc_string = "\n"
    return f"{key!r}: {value!r}"


CHANGES: tuple[Change, ...] = (
    _drop_read, _redirect_read, _redirect_read, _add_read, _cycle, _rename_write, _change_writes,
    _drop_node, _double_node, _shuffle, _name_nodes, _change_operator, _change_operator,
    _change_domain, _long_chain, _deep, _drop_attribute, _add_attribute, _add_attribute,
    _change_attribute, _change_attribute, _change_attribute, _double_attribute, _change_type,
    _change_type, _change_type, _drop_weight, _rename_weight, _double_weight, _spoil_weight,
    _spoil_weight, _spoil_weight, _odd_weight, _odd_weight, _external_weight, _sparse_weight,
    _change_outputs, _change_inputs, _change_versions, _change_functions, _change_metadata,
)  # fmt: skip


# -- bytes --------------------------------------------------------------------------------------


def _cut(content: bytes, rng: Rng) -> bytes:
    return content[: int(rng.integers(len(content) + 1))]


def _flip(content: bytes, rng: Rng) -> bytes:
    changed = bytearray(content)
    # The structure stands between the weights, mostly at the start and the end of a small file.
    for _ in range(int(rng.choice([1, 3, 20])) if changed else 0):
        changed[int(rng.integers(len(changed)))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _overwrite(content: bytes, rng: Rng) -> bytes:
    start = int(rng.integers(len(content) + 1))
    return content[:start] + rng.bytes(int(rng.choice([1, 8, 64]))) + content[start + 8 :]


def _repeat(content: bytes, rng: Rng) -> bytes:
    start, end = sorted(int(i) for i in rng.integers(0, len(content) + 1, 2))
    return content[:end] + content[start:]


BYTES: tuple[Callable[[bytes, Rng], bytes], ...] = (_cut, _flip, _flip, _overwrite, _repeat)
