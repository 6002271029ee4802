"""The few things every pass needs of a graph: its layers, its uses, and the shared edits.

Passes ask ``layers(model)`` what can be quantized and never scan for operator types. All edits go
through this file, because they carry what onnx-ir does not know: the *origin* of a node (the ids of
the captured layers that it stands for) and the specs on its inputs.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile import spec
from qcompile.errors import PassError, nearest
from qcompile.spec import TensorSpec

ORIGIN = "qcompile.origin"
REASON = "qcompile.reason"
ROLE = "qcompile.role"
RECURRENT = ("LSTM", "GRU", "RNN")

Array = npt.NDArray[Any]
Kind = Literal[
    "conv", "depthwise", "conv-transpose", "linear", "attention", "embedding", "recurrent"
]
Shapes = Mapping[str, tuple[int, ...]]

# Operators that only move or relabel elements, so that a constant can be read through them.
_SEEN_THROUGH = {"Identity", "Transpose", "Cast", "Reshape", "Squeeze", "Unsqueeze"}
# Dimensions of a weight, where an operator takes no others: of kernels in one to three dimensions.
_RANKS: dict[str, Sequence[int]] = {
    "Conv": (3, 4, 5), "ConvTranspose": (3, 4, 5), "Gemm": (2,), **dict.fromkeys(RECURRENT, (3,))
}  # fmt: skip
_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}


@dataclasses.dataclass(frozen=True)
class Use:
    """Input ``index`` of ``node``: the place that a spec belongs to."""

    node: ir.Node
    index: int

    @property
    def value(self) -> ir.Value:
        """The value that is read here."""
        value = self.node.inputs[self.index]
        assert value is not None
        return value

    @property
    def spec(self) -> TensorSpec | None:
        """The decision on this use; None is float."""
        return spec.read(self.node, self.index)

    @spec.setter
    def spec(self, decided: TensorSpec | None) -> None:
        spec.write(self.node, self.index, decided)

    def decide(self, decided: TensorSpec | None) -> None:
        """Write the decision on this use."""
        spec.write(self.node, self.index, decided)

    def read_from(self, value: ir.Value) -> None:
        """Make this use read ``value``; its spec stays."""
        self.node.replace_input_with(self.index, value)


@dataclasses.dataclass(frozen=True)
class Layer:
    """An operator that can be quantized.

    ``kind``: ``conv``, ``depthwise`` (one input channel a group), ``conv-transpose``, ``linear``
    (MatMul or Gemm with a constant weight), ``attention`` (MatMul of two activations),
    ``embedding`` (Gather of rows of a constant table), ``recurrent`` (LSTM, GRU, RNN; ``weight`` is
    that of the input, the recurrent one stands behind it). ``input`` is None for an embedding;
    ``weight`` is the second activation for ``attention``. ``bias`` is the use that adds a constant
    bias: input 2 of a Conv or Gemm, or the constant side of an Add behind a MatMul.
    """

    node: ir.Node
    kind: Kind
    input: Use | None
    weight: Use
    bias: Use | None

    @property
    def name(self) -> str:
        """The name of the node, by which users and reports call the layer."""
        return self.node.name or ""

    @property
    def output(self) -> ir.Value:
        """What the layer writes, before a bias that is a node of its own."""
        return self.node.outputs[0]

    @property
    def biased_output(self) -> ir.Value:
        """What the layer writes, after its bias."""
        node = self.node if self.bias is None else self.bias.node
        return node.outputs[0]

    @property
    def channel_axis(self) -> int:
        """The axis of the weight that is the output channel (the row, for an embedding)."""
        rank = shape_of(self.weight.value)
        if self.kind in ("conv-transpose", "recurrent"):
            return 1
        if self.kind in ("conv", "depthwise", "embedding"):
            return 0
        if self.node.op_type == "Gemm":
            return 0 if attribute(self.node, "transB", 0) else 1
        return -1 if rank is None else len(rank) - 1

    @property
    def reduce_axis(self) -> int:
        """The axis of the weight that is summed over (the column, for an embedding)."""
        if self.kind == "conv-transpose":
            return 0
        if self.kind == "recurrent":
            return 2
        if self.kind in ("conv", "depthwise", "embedding"):
            return 1
        return 1 - self.channel_axis if self.node.op_type == "Gemm" else self.channel_axis - 1

    def weight_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the constant weights: one, or two of a recurrent layer; none if unknown."""
        uses = [self.weight]
        if self.kind == "recurrent":
            uses.append(Use(self.node, 2))
        found = [shape_of(use.value) for use in uses if is_constant(use.value)]
        return [shape for shape in found if shape is not None]

    def macs(self, shapes: Shapes) -> int:
        """Multiply-accumulates for values of ``shapes``; 0 for an embedding or if unknown."""
        if self.kind == "recurrent" and self.input is not None:
            # Input [steps, batch, width]; each weight is used once a step.
            entered = shapes.get(self.input.value.name or "")
            each = sum(math.prod(shape) for shape in self.weight_shapes())
            return 0 if entered is None else entered[0] * entered[1] * each
        out = shapes.get(self.output.name or "")
        weight = shape_of(self.weight.value) or shapes.get(self.weight.value.name or "")
        if out is None or weight is None or self.kind == "embedding":
            return 0
        if self.kind in ("conv", "depthwise"):
            return math.prod(out) * math.prod(weight[1:])
        if self.kind == "conv-transpose":
            entered = shapes.get(self.input.value.name or "") if self.input else None
            return 0 if entered is None else math.prod(entered) * math.prod(weight[1:])
        return math.prod(out) * weight[self.reduce_axis]


def layers(model: ir.Model) -> Iterator[Layer]:
    """The layers of the main graph, in its order. Bodies of control flow are not entered."""
    for node in model.graph:
        layer = layer_of(node)
        if layer is not None:
            yield layer


def ends(model: ir.Model, kinds: Collection[str]) -> frozenset[ir.Node]:
    """The first and last layers of ``kinds``: that depend on no other, or on which none depends."""
    found = {layer.node for layer in layers(model) if layer.kind in kinds}
    first = _unreached(model.graph, found, reads, lambda node: node.outputs)
    last = _unreached(reversed(model.graph), found, lambda node: node.outputs, reads)
    return frozenset(first + last)


def _unreached(
    nodes: Iterable[ir.Node],
    found: Collection[ir.Node],
    near: Callable[[ir.Node], Iterable[ir.Value]],
    far: Callable[[ir.Node], Iterable[ir.Value]],
) -> list[ir.Node]:
    """Those of ``found`` to whose ``near`` values nothing of ``found`` leads, along ``nodes``."""
    reached: set[ir.Value] = set()
    free: list[ir.Node] = []
    for node in nodes:
        led = not reached.isdisjoint(near(node))
        if node in found and not led:
            free.append(node)
        if node in found or led:
            reached.update(far(node))
    return free


def reads(node: ir.Node) -> Iterator[ir.Value]:
    """What ``node`` and the nodes in its bodies read."""
    for reader in (node, *inside(node)):
        yield from (value for value in reader.inputs if value is not None)


def layer_of(node: ir.Node) -> Layer | None:
    """The layer that ``node`` is, or None. A node with a role (an inserted rotation) is none."""
    if node.domain not in ("", "ai.onnx") or ROLE in node.metadata_props or len(node.inputs) < 2:
        return None
    first, second = node.inputs[0], node.inputs[1]
    if first is None or second is None or node.outputs[0].dtype not in (*_FLOATS, None):
        return None
    weight = shape_of(second) if is_constant(second) else None
    bias = Use(node, 2) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    if weight is not None and len(weight) not in _RANKS.get(node.op_type, (len(weight),)):
        return None
    if node.op_type in ("Conv", "ConvTranspose") and weight is not None and not is_constant(first):
        kind: Kind = "conv" if node.op_type == "Conv" else "conv-transpose"
        if kind == "conv" and weight[1] == 1 and attribute(node, "group", 1) > 1:
            kind = "depthwise"
        return Layer(node, kind, Use(node, 0), Use(node, 1), bias)
    if node.op_type == "Gemm" and weight is not None and not is_constant(first):
        return Layer(node, "linear", Use(node, 0), Use(node, 1), bias)
    if node.op_type == "MatMul" and not is_constant(first):
        if weight is not None and len(weight) == 2:
            return Layer(node, "linear", Use(node, 0), Use(node, 1), _added_bias(node))
        if not is_constant(second):
            return Layer(node, "attention", Use(node, 0), Use(node, 1), None)
    if node.op_type in RECURRENT and len(node.inputs) > 2:
        recurrent = node.inputs[2]
        if weight is not None and recurrent is not None and is_constant(recurrent):
            return Layer(node, "recurrent", Use(node, 0), Use(node, 1), None)
    if node.op_type == "Gather" and attribute(node, "axis", 0) == 0 and not is_constant(second):
        table = shape_of(first)
        if is_constant(first) and table is not None and len(table) == 2 and is_float(first):
            return Layer(node, "embedding", None, Use(node, 0), None)
    return None


def _added_bias(matmul: ir.Node) -> Use | None:
    """The constant operand of an Add that is the only reader of ``matmul``, if it is a bias."""
    read = readers(matmul.outputs[0])
    if len(read) != 1 or matmul.outputs[0].is_graph_output():
        return None
    add, index = read[0].node, read[0].index
    other = add.inputs[1 - index] if add.op_type == "Add" and len(add.inputs) == 2 else None
    if other is None or not is_constant(other) or add.graph is not matmul.graph:
        return None
    shape = shape_of(other)
    if shape is None or not shape or any(d != 1 for d in shape[:-1]):
        return None
    return Use(add, 1 - index)


def readers(value: ir.Value) -> list[Use]:
    """Who reads ``value``, bodies of control flow included."""
    return [Use(node, index) for node, index in value.uses()]


def select(model: ir.Model, globs: Sequence[str], option: str) -> list[Layer]:
    """The layers whose name or operator type matches one of ``globs``.

    Raises PassError for a glob that matches nothing, naming the nearest layer.
    """
    known = list(layers(model))
    if globs and not known:
        raise PassError(f"{option}={','.join(globs)} matches no layer: the model has none")
    for glob in globs:
        if not any(matches(layer.node, glob) for layer in known):
            names = [layer.name for layer in known]
            hint = nearest(glob, names) if len(names) <= 12 else nearest(glob, names).split("?")[0]
            raise PassError(f"{option}={glob} matches no layer; {hint}")
    return [layer for layer in known if any(matches(layer.node, glob) for glob in globs)]


def glob_of(name: str) -> str:
    """A glob that matches ``name`` and can stand in the text of an option."""
    return re.sub(r"[\[*?]", r"[\g<0>]", re.sub(r"[\s,{}]", "?", name)).replace("[?]", "?")


def matches(node: ir.Node, glob: str) -> bool:
    """Whether ``glob`` fits the name or the operator type of ``node``."""
    return fnmatch.fnmatchcase(node.name or "", glob) or fnmatch.fnmatchcase(node.op_type, glob)


# -- reading ------------------------------------------------------------------------------------


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """The value of an attribute of ``node``, or ``default``."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def shape_of(value: ir.Value) -> tuple[int, ...] | None:
    """The shape of ``value`` if every dimension is known."""
    if value.shape is None or not all(isinstance(d, int) for d in value.shape):
        return None
    return tuple(int(d) for d in value.shape)  # type: ignore[arg-type]


def rank_of(value: ir.Value) -> int | None:
    """The number of dimensions of ``value`` if it is known."""
    return None if value.shape is None else len(value.shape)


def is_float(value: ir.Value) -> bool:
    """Whether ``value`` holds floating-point numbers."""
    return value.dtype in _FLOATS


def is_constant(value: ir.Value) -> bool:
    """Whether ``value`` is an initializer (not an input), or one seen through moving operators."""
    # Not recursive, because a chain may be longer than the stack.
    waiting, seen = [value], {value}
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if node is None:
            if value.const_value is None or value.is_graph_input():
                return False
        elif not _holds_tensor(node):
            moves = node.op_type in _SEEN_THROUGH and node.domain in ("", "ai.onnx")
            if not moves or not node.inputs or node.inputs[0] is None:
                return False
            found = {v for v in node.inputs if v is not None} - seen
            seen |= found
            waiting += found
    return True


def finite_weight(layer: Layer) -> Array:
    """The array of the constant weight of ``layer``; raise PassError if it is not finite.

    No grid covers NaN or infinity, and a sum spreads them over what was finite.
    """
    array = constant(layer.weight.value)
    if not np.isfinite(array).all():
        raise PassError(
            f"weight {layer.weight.value.name!r} of layer {layer.name!r} has NaN or infinity in "
            "it; exclude the layer"
        )
    return array


def _holds_tensor(node: ir.Node) -> bool:
    return (
        node.op_type == "Constant"
        and node.domain in ("", "ai.onnx")
        and len(node.attributes) == 1
        and "sparse_value" not in node.attributes
    )


def constant(value: ir.Value) -> Array:
    """The array of a value for which ``is_constant`` holds."""
    moves: list[ir.Node] = []
    while (node := value.producer()) is not None and not _holds_tensor(node):
        assert node.inputs[0] is not None, node.name
        moves.append(node)
        value = node.inputs[0]
    tensor = ir.convenience.get_const_tensor(value)
    assert tensor is not None, value.name
    array = read_tensor(tensor)
    for node in reversed(moves):
        array = _moved(node, array, [constant(v) for v in node.inputs[1:] if v is not None])
    return array


def _moved(node: ir.Node, array: Array, rest: Sequence[Array]) -> Array:
    """What ``node`` makes of ``array`` and its other inputs."""
    if node.op_type == "Transpose":
        return array.transpose(attribute(node, "perm", list(range(array.ndim))[::-1]))
    if node.op_type == "Reshape":
        shape = [array.shape[i] if d == 0 else int(d) for i, d in enumerate(rest[0])]
        return array.reshape(shape)
    if node.op_type == "Cast":
        with np.errstate(over="ignore", invalid="ignore"):  # the runtime does not wonder either
            return array.astype(ir.DataType(attribute(node, "to", 1)).numpy())
    if node.op_type == "Squeeze":
        return np.squeeze(array, axis=tuple(int(a) for a in rest[0]) if rest else None)
    if node.op_type == "Unsqueeze":
        return np.expand_dims(array, tuple(int(a) for a in rest[0]))
    return array


def read_tensor(tensor: ir.TensorProtocol) -> Array:
    """The array of ``tensor``; of one in a file a copy, so that nothing of the file stays mapped.

    A model larger than memory is read weight by weight.
    """
    if not isinstance(tensor, ir.ExternalTensor) or tensor.dtype.bitwidth < 8:
        return tensor.numpy()
    kind = np.dtype(tensor.dtype.numpy())
    array = np.fromfile(tensor.path, kind, tensor.size, offset=tensor.offset or 0)
    return array.reshape(tensor.shape.numpy())


def origins(node: ir.Node) -> tuple[str, ...]:
    """The ids of the captured layers that ``node`` stands for; none for a node of ours."""
    text = node.metadata_props.get(ORIGIN)
    return tuple(json.loads(text)) if text else ()


def tensor_digest(tensor: ir.TensorProtocol) -> str:
    """A hash of type, shape and bytes; computed once for each tensor object."""
    meta: Any = getattr(tensor, "meta", None)
    if meta is not None and "qcompile.digest" in meta:
        return str(meta["qcompile.digest"])
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.tobytes())
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()  # unmap the file
    if meta is not None:
        meta["qcompile.digest"] = digest.hexdigest()
    return digest.hexdigest()


def absorbed(value: ir.Value) -> ir.Value:
    """The output of a ReLU or Clip from 0 that is the only reader of ``value``; else ``value``."""
    read = readers(value)
    if len(read) != 1 or value.is_graph_output():
        return value
    node, index = read[0].node, read[0].index
    if index == 0 and node.op_type == "Relu":
        return node.outputs[0]
    if index == 0 and node.op_type == "Clip" and len(node.inputs) > 1:
        low = node.inputs[1]
        if low is not None and is_constant(low) and float(constant(low)) == 0.0:
            return node.outputs[0]
    return value


# -- editing ------------------------------------------------------------------------------------


def drop_weights(model: ir.Model) -> None:
    """Let go of the weights of a model of no more use: a graph refers to itself and lives on."""
    for value in model.graph.initializers.values():
        value.const_value = None


def set_origins(node: ir.Node, ids: Iterable[str]) -> None:
    """Say which captured layers ``node`` stands for (sorted, without repetition)."""
    kept = sorted(set(ids))
    if kept:
        node.metadata_props[ORIGIN] = json.dumps(kept)
    else:
        node.metadata_props.pop(ORIGIN, None)


def unique(model: ir.Model, name: str) -> str:
    """``name``, or ``name.1``, ``name.2``, ... : the first that no value of the graph has."""
    return _free(name, _value_names(model))


def _value_names(model: ir.Model) -> set[str]:
    # Kept on the model, because collecting the names anew for every edit is quadratic. Names that
    # are gone stay reserved until the pass ends.
    meta: Any = model.meta
    names: set[str] | None = meta.get("qcompile.names")
    if names is None:
        names = {v.name for v in values(model) if v.name}
        meta["qcompile.names"] = names
    return names


def values(model: ir.Model) -> Iterator[ir.Value]:
    """Every value of the main graph and of the bodies in it."""
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph.all_nodes():
        yield from node.outputs
        for attr in node.attributes.values():
            if attr.type == ir.AttributeType.GRAPH:
                yield from attr.value.inputs
                yield from attr.value.initializers.values()


def forget_names(model: ir.Model) -> None:
    """Let names that are gone be used again.

    Between passes, so that the names which a pass gives do not depend on what ran in this process.
    """
    meta: Any = model.meta
    meta.pop("qcompile.names", None)
    meta.pop("qcompile.nodes", None)


def unique_node(model: ir.Model, name: str) -> str:
    """``name``, or ``name.1``, ... : the first that no node of the graph has."""
    meta: Any = model.meta
    taken: set[str] | None = meta.get("qcompile.nodes")
    if taken is None:
        taken = {n.name or "" for n in model.graph.all_nodes()}
        meta["qcompile.nodes"] = taken
    return _free(name, taken)


def _free(name: str, taken: set[str]) -> str:
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}.{count}"
    taken.add(candidate)
    return candidate


def add_constant(model: ir.Model, name: str, array: Array | ir.TensorProtocol) -> ir.Value:
    """A new initializer of the main graph, named ``name`` or the next free name like it."""
    tensor = ir.Tensor(array) if isinstance(array, np.ndarray) else array
    value = ir.Value(
        name=unique(model, name),
        shape=ir.Shape([int(d) for d in tensor.shape.numpy()]),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    tensor.name = value.name
    model.graph.register_initializer(value)
    return value


def insert(
    model: ir.Model,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    output: str,
    before: ir.Node | None = None,
    behind: ir.Value | None = None,
    like: ir.Value | None = None,
    role: str = "",
    outputs: int = 1,
    domain: str = "",
) -> ir.Value:
    """Insert a node with ``outputs`` outputs and return the first.

    It stands before the node ``before``, or right behind what writes the value ``behind``.
    ``output`` names the value (made unique; the node gets the same name); ``like`` is a value whose
    type and shape the output shares; ``role`` marks a node that is no layer, such as ``rotation``.
    """
    value = ir.Value(name=unique(model, output))
    if like is not None:
        value.type, value.shape = like.type, like.shape
    node = ir.Node(
        domain,
        op_type,
        inputs,
        attributes=ir.convenience.convert_attributes(attributes or {}),
        outputs=[value, *(ir.Value(name=unique(model, output)) for _ in range(outputs - 1))],
        name=unique_node(model, value.name or output),
    )
    if role:
        node.metadata_props[ROLE] = role
    writer = behind.producer() if behind is not None else None
    if writer is not None:
        model.graph.insert_after(writer, node)
    else:
        model.graph.insert_before(before if before is not None else model.graph[0], node)
    return value


def fuse(into: ir.Node, *gone: ir.Node) -> None:
    """Let ``into`` stand for the nodes ``gone`` as well; they are dead afterwards.

    Readers of the last of ``gone`` must have been moved to ``into`` by the caller.
    """
    set_origins(into, [*origins(into), *(o for node in gone for o in origins(node))])


def redirect(model: ir.Model, old: ir.Value, new: ir.Value, keep: Callable[[Use], bool]) -> None:
    """Make every reader of ``old`` for which ``keep`` is false read ``new`` instead.

    If ``old`` is an output of the graph, ``new`` takes its place and its name, so that names of
    graph outputs never change.
    """
    for node, index in list(old.uses()):
        if not keep(Use(node, index)):
            node.replace_input_with(index, new)
    places = [i for i, output in enumerate(model.graph.outputs) if output is old]
    if places:  # more than one if the model lists an output twice
        name = old.name
        old.name = unique(model, f"{name}/inner")
        new.name = name
        new.type, new.shape = old.type, old.shape
    for position in places:
        model.graph.outputs[position] = new


def replace(
    model: ir.Model, old: ir.Value, new: ir.Value, keep: Callable[[Use], bool] = lambda _: False
) -> None:
    """Let ``new``, which computes what ``old`` did, have its readers, its name and its place.

    Readers for which ``keep`` is true read ``old`` on.
    """
    name = old.name
    redirect(model, old, new, keep)
    if new.name != name:
        left = "inner" if old.uses() else "gone"
        old.name, new.name = unique(model, f"{name}/{left}"), name


def inside(node: ir.Node) -> Iterator[ir.Node]:
    """The nodes of the bodies of ``node``."""
    for attr in node.attributes.values():
        if attr.type == ir.AttributeType.GRAPH:
            yield from attr.value.all_nodes()
        elif attr.type == ir.AttributeType.GRAPHS:
            for body in attr.value:
                yield from body.all_nodes()


def remove_dead(model: ir.Model) -> int:
    """Remove nodes that nothing reads, and initializers that neither a node nor a spec names.

    Returns the number of nodes removed.
    """
    before = model.graph.num_nodes()
    for node in reversed(list(model.graph)):
        if not any(v.uses() or v.is_graph_output() for v in node.outputs):
            model.graph.remove(node, safe=True)
            for inner in inside(node):  # or its bodies would read on
                inner.resize_inputs(0)
    named = {
        name for node in model.graph for s in spec.all_specs(node).values() for name in s.arrays()
    }
    named |= {n for v in values(model) if (n := range_name(v)) is not None}
    named |= {spec.bias(node) for node in model.graph}
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and name not in named:
            if value in model.graph.inputs:
                continue
            del model.graph.initializers[name]
    return before - model.graph.num_nodes()


# -- ranges of activations ----------------------------------------------------------------------

RANGE = "qcompile.range"


def range_name(value: ir.Value) -> str | None:
    """The name of the initializer with the calibrated range of ``value``, if it was calibrated."""
    return value.metadata_props.get(RANGE)


def range_of(model: ir.Model, value: ir.Value) -> tuple[float, float] | None:
    """The calibrated range of ``value``, or None."""
    name = range_name(value)
    if name is None:
        return None
    low, high = constant(model.graph.initializers[name])
    return float(low), float(high)


def set_range(model: ir.Model, value: ir.Value, low: float, high: float) -> None:
    """Write the calibrated range of ``value`` as the initializer ``<value>/range``."""
    array = np.array([low, high], np.float32)
    name = range_name(value)
    if name is not None:
        model.graph.initializers[name].const_value = ir.Tensor(array, name=name)
        return
    value.metadata_props[RANGE] = add_constant(model, f"{value.name}/range", array).name or ""


def clear_ranges(model: ir.Model) -> None:
    """Forget every calibrated range."""
    for value in values(model):
        value.metadata_props.pop(RANGE, None)
