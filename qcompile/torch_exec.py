"""A subgraph of a model, up to the whole, as a differentiable torch function.

Each ONNX operator is one small entry of a table (``torch_math``, ``torch_moves``, ``torch_layers``,
``torch_attention``, ``torch_recurrent``), which the tests hold to what ONNX Runtime computes. Needs
the extra ``torch``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from qcompile import (
    torch_attention,
    torch_elsewhere,
    torch_layers,
    torch_math,
    torch_moves,
    torch_recurrent,
)
from qcompile.errors import PassError, nearest
from qcompile.torch_table import Call, Entry, Table, dtype_of, tensor_of

OPERATORS = Table(
    torch_math.TABLE
    | torch_moves.TABLE
    | torch_layers.TABLE
    | torch_attention.TABLE
    | torch_recurrent.TABLE
)
# Operators with bodies, which are run here, and the attributes of a Constant that are numbers.
_CONTROL = ("If", "Loop")
_NUMBERS = {"value", "value_float", "value_floats", "value_int", "value_ints"}

Map = Callable[[Tensor], Tensor]


def missing(nodes: Iterable[ir.Node]) -> list[str]:
    """The operators of ``nodes`` and of their bodies that cannot be run, sorted."""
    return sorted({_operator(node) for node in _with_bodies(nodes) if not _runs(node)})


def _runs(node: ir.Node) -> bool:
    known = node.op_type in OPERATORS or node.op_type in _CONTROL
    return node.domain in ("", "ai.onnx") and (known or _is_constant(node))


def _operator(node: ir.Node) -> str:
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}:{node.op_type}"


def _bodies(node: ir.Node) -> list[ir.Graph]:
    return [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]


def _with_bodies(nodes: Iterable[ir.Node]) -> Iterator[ir.Node]:
    for node in nodes:
        yield node
        for body in _bodies(node):
            yield from _with_bodies(body)


def _reads(node: ir.Node) -> list[ir.Value]:
    """What a node and its bodies read and do not write themselves."""
    found = [value for value in node.inputs if value is not None]
    for body in _bodies(node):
        own = {*body.inputs, *body.initializers.values(), *(o for n in body for o in n.outputs)}
        inner = [value for n in body for value in _reads(n)] + list(body.outputs)
        found += [value for value in inner if value not in own]
    return found


def _numbers(nodes: Iterable[ir.Node]) -> Iterator[ir.Value]:
    """What ``nodes`` read as numbers."""
    for node in nodes:
        host = OPERATORS[node.op_type].host if node.op_type in OPERATORS else frozenset[int]()
        for index, value in enumerate(node.inputs):
            if value is not None and index in host:
                yield value


def _is_constant(node: ir.Node) -> bool:
    """Whether a node is a Constant of numbers, not of text or sparse."""
    return node.op_type == "Constant" and bool(_NUMBERS & {*node.attributes})


def _constant(value: ir.Value) -> Tensor | None:
    """What an initializer or a Constant node holds; None for every other value."""
    node = value.producer()
    if node is None:
        return None if value.const_value is None else tensor_of(value.const_value)
    if not _is_constant(node):
        return None
    ((name, attribute),) = node.attributes.items()
    if name == "value":
        return tensor_of(attribute.as_tensor())
    dtype = torch.float32 if name.startswith("value_float") else torch.int64
    return torch.tensor(attribute.value, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class _Step:
    """One node to run, and the values that nothing reads after it."""

    node: ir.Node
    call: Call
    entry: Entry | None  # None for control flow
    dead: tuple[ir.Value, ...]


@dataclasses.dataclass(frozen=True)
class _Body:
    """A graph inside a node: its steps, and of what it writes that which is still there then."""

    graph: ir.Graph
    steps: list[_Step]
    left: tuple[ir.Value, ...]


@dataclasses.dataclass(frozen=True)
class _Scope:
    """One call: the values that are there, and how the caller changes some of them."""

    values: dict[ir.Value, Tensor]
    fed: frozenset[ir.Value]
    at: Mapping[tuple[str, int], Map]
    after: Mapping[str, Map]

    def read(self, node: ir.Node) -> list[Tensor | None]:
        """What ``node`` reads."""
        found = [None if value is None else self.values[value] for value in node.inputs]
        if self.at:
            for index, tensor in enumerate(found):
                change = self.at.get((node.name or "", index))
                if change is not None and tensor is not None:
                    found[index] = change(tensor)
        return found

    def write(self, node: ir.Node, written: Sequence[Tensor | None]) -> None:
        """What ``node`` writes, as far as it is there; a value that was fed stays."""
        for value, tensor in zip(node.outputs, written, strict=False):
            if tensor is not None and value not in self.fed:
                change = self.after.get(value.name or "") if self.after else None
                self.values[value] = tensor if change is None else change(tensor)


class TorchGraph:
    """Part of a model as a torch function.

    Takes the nodes of the main graph that ``outputs`` need, back to ``inputs``, which may name any
    values. ``constants`` are copies, by value name, of the initializers and constants that these
    nodes and their bodies read; what the caller puts there is what is computed with, so that float
    ones may be given a gradient or another type. Single numbers, lists of integers, and what
    operators read as numbers, such as a shape, are on the CPU, whatever ``device`` is.

    Raises PassError if an operator cannot be run, if a name is unknown, or if an input of the model
    is needed that is not among ``inputs``. With ``elsewhere`` ONNX Runtime runs the operators that
    the table lacks, without a gradient; these are ``lacking``.
    """

    def __init__(
        self,
        model: ir.Model,
        inputs: Sequence[str],
        outputs: Sequence[str],
        device: str = "cpu",
        elsewhere: bool = False,
    ) -> None:
        self._device = torch.device(device)
        self._opset = model.graph.opset_imports.get("", 1)
        known = _values(model)
        for name in (*inputs, *outputs):
            if name not in known:
                raise PassError(f"there is no value {name!r}: {nearest(name, known)}")
        self._inputs = {name: known[name] for name in inputs}
        self._outputs = {name: known[name] for name in outputs}
        self.nodes: tuple[ir.Node, ...] = tuple(self._needed(model))
        self.lacking = missing(self.nodes)
        self._imports = model.graph.opset_imports
        # What a body reads of the graph around it is not handed to ONNX Runtime.
        beyond = [node for node in _with_bodies(self.nodes) if not _runs(node) and _bodies(node)]
        refused = missing(beyond) if elsewhere else self.lacking
        if refused:
            raise PassError(
                f"torch cannot run the operators {', '.join(refused)}; choose a subgraph without "
                f"them"
            )
        self._numbers = set(_numbers(_with_bodies(self.nodes)))
        self.constants: dict[str, Tensor] = {}
        self._held: list[ir.Value] = []
        self._hold(self.nodes, [*self._outputs.values()])
        self._bodies: dict[int, _Body] = {}
        self._steps = self._program(self.nodes, {*self._outputs.values()})

    def _needed(self, model: ir.Model) -> list[ir.Node]:
        """The nodes between, in the order of the graph."""
        cut = set(self._inputs.values())
        found: set[ir.Node] = set()
        open_values = list(self._outputs.values())
        while open_values:
            value = open_values.pop()
            writer = value.producer()
            if value in cut or writer in found:
                continue
            if writer is not None:
                found.add(writer)
                open_values += _reads(writer)
            elif value.const_value is None:
                raise PassError(
                    f"{', '.join(map(repr, self._outputs))} need the input {value.name!r} of the "
                    f"model; name it among the inputs of the subgraph"
                )
        return [node for node in model.graph if node in found]

    def _hold(self, nodes: Iterable[ir.Node], more: Iterable[ir.Value]) -> None:
        """Copy the constants that ``nodes`` read."""
        cut = set(self._inputs.values())
        nodes = list(_with_bodies(nodes))
        read = [v for node in nodes for v in node.inputs if v is not None]
        read += [v for node in nodes for body in _bodies(node) for v in body.outputs]
        for value in dict.fromkeys([*read, *more]):
            tensor = None if value in cut else _constant(value)
            if tensor is None:
                continue
            name = value.name or ""
            if name in self.constants:
                raise PassError(f"two constants are called {name!r}; capture the model first")
            self._held.append(value)
            self.constants[name] = self._place(value, tensor)

    def _place(self, value: ir.Value, tensor: Tensor) -> Tensor:
        """On the device, unless it is read as numbers or is likely to lead to a shape."""
        number = tensor.dim() == 0 or (tensor.dim() == 1 and not tensor.is_floating_point())
        return tensor if number or value in self._numbers else tensor.to(self._device)

    def _program(self, nodes: Iterable[ir.Node], kept: set[ir.Value]) -> list[_Step]:
        """The steps of a graph, which free everything but ``kept`` and the constants."""
        run = [node for node in nodes if not _is_constant(node)]
        seen = kept | {*self._held}
        steps: list[_Step] = []
        for node in reversed(run):
            dead = {*_reads(node), *node.outputs} - seen
            seen |= dead
            entry = None if node.op_type in _CONTROL else self._entry(node)
            steps.append(_Step(node, Call(node, self._opset), entry, tuple(dead)))
            for body in _bodies(node):
                own = {*body.inputs, *(o for n in body for o in n.outputs)}
                around = {v for n in body for v in _reads(n)} - own
                inner = self._program(body, around | {*body.outputs})
                left = own & {*body.inputs, *body.outputs}
                self._bodies[id(body)] = _Body(body, inner, tuple(left))
        return steps[::-1]

    def _entry(self, node: ir.Node) -> Entry:
        return (
            OPERATORS[node.op_type] if _runs(node) else torch_elsewhere.entry(node, self._imports)
        )

    def __call__(
        self,
        feeds: Mapping[str, Tensor],
        at: Mapping[tuple[str, int], Map] | None = None,
        after: Mapping[str, Map] | None = None,
    ) -> dict[str, Tensor]:
        """The outputs, by name, for the inputs in ``feeds``.

        ``at[node name, input index]`` maps what that one use reads, ``after[value name]`` what a
        node wrote, for all that read it; both see tensors and keep gradients if they do themselves.
        Without gradients a value is freed when its last reader has run.
        """
        values = {value: self.constants[value.name or ""] for value in self._held}
        for name, value in self._inputs.items():
            if name not in feeds:
                raise PassError(f"the subgraph has an input {name!r}, for which there is no value")
            values[value] = self._place(value, feeds[name])
        fed = frozenset(self._inputs.values())
        self._run(self._steps, _Scope(values, fed, at or {}, after or {}))
        return {name: values[value] for name, value in self._outputs.items()}

    def _run(self, steps: Sequence[_Step], scope: _Scope) -> None:
        for step in steps:
            read = scope.read(step.node)
            if step.entry is None:
                control = self._if if step.node.op_type == "If" else self._loop
                written = control(step.node, read, scope)
            else:
                if self._device.type != "cpu":
                    read = self._together(read, step.entry.host)
                written = step.entry.function(step.call, *read)
            scope.write(step.node, written if isinstance(written, tuple) else (written,))
            del read, written  # or they would live until the next step has run
            for value in step.dead:
                scope.values.pop(value, None)

    def _enter(
        self, node: ir.Node, name: str, entered: Sequence[Tensor], scope: _Scope
    ) -> tuple[Tensor, ...]:
        """Run a body of ``node``, which reads the values around it; what it yields."""
        body = self._bodies[id(node.attributes[name].as_graph())]
        scope.values.update(zip(body.graph.inputs, entered, strict=True))
        self._run(body.steps, scope)
        yielded = tuple(scope.values[value] for value in body.graph.outputs)
        for value in body.left:
            scope.values.pop(value, None)
        return yielded

    def _if(
        self, node: ir.Node, read: Sequence[Tensor | None], scope: _Scope
    ) -> tuple[Tensor, ...]:
        (condition,) = read
        return self._enter(node, "then_branch" if condition else "else_branch", (), scope)

    def _loop(
        self, node: ir.Node, read: Sequence[Tensor | None], scope: _Scope
    ) -> tuple[Tensor, ...]:
        """The last of what is carried, and what each turn yields stacked."""
        limit, condition, *rest = read
        carried = tuple(tensor for tensor in rest if tensor is not None)
        going, count = condition is None or bool(condition), 0
        gathered: list[tuple[Tensor, ...]] = []
        while going and (limit is None or count < int(limit)):
            turn = (torch.tensor(count), torch.tensor(True), *carried)
            again, *yielded = self._enter(node, "body", turn, scope)
            carried = tuple(yielded[: len(carried)])
            gathered.append(tuple(yielded[len(carried) :]))
            going, count = bool(again), count + 1
        if not gathered:
            scanned = node.attributes["body"].as_graph().outputs[1 + len(carried) :]
            return (*carried, *map(_nothing, scanned))
        return (*carried, *(torch.stack(turns) for turns in zip(*gathered, strict=True)))

    def _together(self, read: Sequence[Tensor | None], host: frozenset[int]) -> list[Tensor | None]:
        """Numbers on the CPU, and all else on the device if any of it is there."""
        others = [t for i, t in enumerate(read) if t is not None and i not in host]
        device = next((t.device for t in others if t.device.type != "cpu"), torch.device("cpu"))
        return [
            None if t is None else t.to("cpu" if i in host else device) for i, t in enumerate(read)
        ]


def _nothing(value: ir.Value) -> Tensor:
    """What a loop without a turn stacks of ``value``."""
    sizes = [size if isinstance(size, int) else 0 for size in value.shape or ()]
    return torch.zeros(0, *sizes, dtype=dtype_of(value.dtype or ir.DataType.FLOAT))


def _values(model: ir.Model) -> dict[str, ir.Value]:
    """The values of the main graph, by name."""
    graph = model.graph
    found = [*graph.inputs, *graph.initializers.values(), *(o for n in graph for o in n.outputs)]
    return {value.name: value for value in found if value.name}
