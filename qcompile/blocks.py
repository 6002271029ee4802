"""The parts of a graph that are fitted one after the other.

A block is a set of nodes that reads what blocks before it write. Its bounds are where a network is
narrow: residual blocks, branches that come together again, the modules that an exporter left in
the names of nodes. What carries a state from run to run is never cut.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import networkx as nx
import onnx_ir as ir
from networkx.utils import UnionFind

from qcompile import graph
from qcompile.graph import Layer

Granularity = Literal["layer", "block"]

# Layers in a region that is still taken as one block. A residual block or a layer of a transformer
# has two to ten; what is larger is a skip over half of the network, whose inside is divided.
MOST_LAYERS = 10


@dataclasses.dataclass(frozen=True)
class Block:
    """Nodes, in the order of the graph, that are run and fitted together.

    ``inputs`` are what they read of other blocks, and inputs of the graph; ``outputs`` what other
    blocks read or the graph returns. What depends on no layer (masks, positions, shapes) belongs
    to no block: each block computes anew what it needs of that, from the inputs of the graph.
    """

    name: str
    nodes: tuple[ir.Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def layers(self) -> list[Layer]:
        """The layers in it."""
        found = (graph.layer_of(node) for node in self.nodes)
        return [layer for layer in found if layer is not None]

    @property
    def factored(self) -> bool:
        """Whether a captured layer became two in it, which may compute something else."""
        captured = [ids for layer in self.layers if (ids := graph.origins(layer.node))]
        return len(set(captured)) < len(captured)


def partition(
    model: ir.Model,
    state: Mapping[str, str] | None = None,
    granularity: Granularity = "block",
    most: int = MOST_LAYERS,
    alone: Collection[ir.Node] = (),
) -> list[Block]:
    """The blocks of the main graph, each behind those that it reads from.

    With ``block``: (1) the nodes between a join (a node that reads two values which depend on
    layers) and its immediate dominator are one block, if there are at most ``most`` layers in it;
    (2) nodes of one numbered module (``layers.3``) are one block, likewise. With ``layer`` each
    layer is one. Layers that stand for one that was captured (factors of low rank) are never apart,
    and count as one. What is no layer goes to the block that it reads from, or else to the one that
    reads it. Blocks that need each other's outputs, in one run or over ``state`` in the next, are
    one, however many layers are on a path from the input of a state to its output.

    Nodes of ``alone`` are kept apart from layers, and what would be one block around one of them is
    divided into layers.
    """
    flow = _flow(model, state or {})
    together: Any = UnionFind(flow)  # untyped
    regions: Iterable[Collection[ir.Node]] = _factors(flow)
    if granularity == "block":
        regions = itertools.chain(regions, _modules(flow, most), _joined(flow, most))
    for region in regions:
        if not set(alone).intersection(region):
            together.union(*region)
    _attach(flow, together, set(alone))
    readers = _readers(model)
    edges = [*flow.edges, *_carried(model, flow, readers, state or {})]
    parts = [set(part) for part in together.to_sets()]
    ordered = list(_ordered(flow, parts, edges))
    return [
        _block(name, flow, readers, nodes)
        for name, nodes in zip(_names(flow, ordered), ordered, strict=True)
    ]


def whole(model: ir.Model) -> Block:
    """The main graph as one block."""
    inputs = tuple(value.name or "" for value in model.graph.inputs)
    outputs = tuple(value.name or "" for value in model.graph.outputs)
    return Block("model", tuple(model.graph), inputs, outputs)


def _flow(model: ir.Model, state: Mapping[str, str]) -> nx.DiGraph[ir.Node]:
    """The nodes that are layers or depend on one, in the order of the graph; an edge to a reader.

    So is what gives a state, that of a counter as well. What the bodies of a node read counts as
    read by the node.
    """
    flow: nx.DiGraph[ir.Node] = nx.DiGraph()
    giving = {v.producer() for v in model.graph.outputs if v.name in state.values()}
    for node in model.graph:
        before = [p for p in map(ir.Value.producer, graph.reads(node)) if p in flow]
        if before or graph.layer_of(node) is not None or node in giving:
            flow.add_node(node)
            flow.add_edges_from((p, node) for p in before if p is not None)
    return flow


def _size(nodes: Iterable[ir.Node]) -> int:
    """How many captured layers there are in ``nodes``."""
    layers = [node for node in nodes if graph.layer_of(node) is not None]
    return len({graph.origins(node) or node for node in layers})


def _factors(flow: nx.DiGraph[ir.Node]) -> Iterator[list[ir.Node]]:
    """The layers that stand for one captured layer together."""
    of: dict[tuple[str, ...], list[ir.Node]] = {}
    for node in flow:
        if graph.layer_of(node) is not None and graph.origins(node):
            of.setdefault(graph.origins(node), []).append(node)
    yield from of.values()


def _joined(flow: nx.DiGraph[ir.Node], most: int) -> Iterator[set[ir.Node]]:
    """For each join the nodes behind its immediate dominator, of at most ``most`` layers."""
    library: Any = nx  # partly untyped
    rooted: Any = library.DiGraph(flow)
    entry = "entry"  # stands in front of all that reads no other node
    rooted.add_node(entry)
    rooted.add_edges_from((entry, node) for node in flow if not flow.in_degree(node))
    above: Mapping[ir.Node, ir.Node | str] = library.immediate_dominators(rooted, entry)
    for join in flow:
        if flow.in_degree(join) < 2:
            continue
        region, waiting = {join}, [join]
        while waiting and _size(region) <= most:
            before = {n for n in flow.predecessors(waiting.pop()) if n is not above[join]}
            waiting += before - region
            region |= before
        if _size(region) <= most:
            yield region


def _modules(flow: nx.DiGraph[ir.Node], most: int) -> Iterator[list[ir.Node]]:
    """The nodes of each numbered module, where there are at most ``most`` layers in it."""
    members: dict[str, list[ir.Node]] = {}
    for node in flow:
        module = _module(node.name or "")
        if module:
            members.setdefault(module, []).append(node)
    for nodes in members.values():
        if _size(nodes) <= most and nx.is_weakly_connected(flow.subgraph(nodes)):
            yield nodes


def _module(name: str) -> str:
    """The path of the outermost numbered module of a node: ``layers.3`` of ``layers.3.fc/Gemm``."""
    path, _, _ = name.strip("/").rpartition("/")
    found = re.match(r"(.*?[./_]\d+)(?=[./]|$)", path)
    return found[1] if found else ""


def _carried(
    model: ir.Model,
    flow: nx.DiGraph[ir.Node],
    readers: Mapping[ir.Value, set[ir.Node]],
    state: Mapping[str, str],
) -> Iterator[tuple[ir.Node, ir.Node]]:
    """From what gives a state to each node that takes it one run later, through what is no part."""
    entered = {value.name: value for value in model.graph.inputs}
    given = {value.name: value for value in model.graph.outputs}
    for taken, name in state.items():
        producer, behind = given[name].producer(), set(readers.get(entered[taken], ()))
        for node in model.graph:
            if node in behind and node not in flow:
                behind.update(*(readers.get(value, ()) for value in node.outputs))
        if producer is not None and producer in flow:
            yield from ((producer, node) for node in behind if node in flow)


def _readers(model: ir.Model) -> Mapping[ir.Value, set[ir.Node]]:
    """The nodes of the main graph that read each value, themselves or in a body."""
    found: dict[ir.Value, set[ir.Node]] = {}
    for node in model.graph:
        for value in graph.reads(node):
            found.setdefault(value, set()).add(node)
    return found


def _attach(flow: nx.DiGraph[ir.Node], together: Any, alone: set[ir.Node]) -> None:
    """Put parts without a layer to what they read from, or else to their reader, if it is one."""
    parts = [part for part in map(set, together.to_sets()) if not _size(part) and not part & alone]
    place = {node: index for index, node in enumerate(flow)}
    parts.sort(key=lambda part: min(place[node] for node in part))
    left: list[set[ir.Node]] = []
    for part in parts:
        sources = {together[n] for node in part for n in flow.predecessors(node) if n not in part}
        if len(sources) == 1:
            together.union(sources.pop(), *part)
        else:
            left.append(part)
    for part in reversed(left):
        targets = {together[n] for node in part for n in flow.successors(node) if n not in part}
        if len(targets) == 1:
            together.union(targets.pop(), *part)


def _ordered(
    flow: nx.DiGraph[ir.Node],
    parts: Sequence[set[ir.Node]],
    edges: Iterable[tuple[ir.Node, ir.Node]],
) -> Iterator[set[ir.Node]]:
    """``parts``, those on a cycle of ``edges`` as one, behind what they read."""
    of = {node: index for index, part in enumerate(parts) for node in part}
    place = {node: index for index, node in enumerate(flow)}
    between: nx.DiGraph[int] = nx.DiGraph()
    between.add_nodes_from(range(len(parts)))
    between.add_edges_from((of[a], of[b]) for a, b in edges if of[a] != of[b])
    library: Any = nx  # partly untyped
    whole = library.condensation(between)
    nodes: dict[int, set[ir.Node]] = {
        number: {node for index in _members(whole, number) for node in parts[index]}
        for number in whole
    }
    first = {number: min(place[node] for node in part) for number, part in nodes.items()}
    for number in library.lexicographical_topological_sort(whole, key=first.__getitem__):
        yield nodes[number]


def _members(condensed: Any, number: int) -> set[int]:
    return condensed.nodes[number]["members"]


def _block(
    name: str,
    flow: nx.DiGraph[ir.Node],
    readers: Mapping[ir.Value, set[ir.Node]],
    nodes: set[ir.Node],
) -> Block:
    ordered = tuple(node for node in flow if node in nodes)
    inputs: dict[str, None] = {}
    waiting = [value for node in reversed(ordered) for value in reversed(list(graph.reads(node)))]
    seen: set[ir.Value] = set()
    while waiting:
        value = waiting.pop()
        producer = value.producer()
        if value in seen or producer in nodes:
            continue
        seen.add(value)
        if producer in flow or (value.is_graph_input() and value.graph is ordered[0].graph):
            inputs[value.name or ""] = None
        elif producer is not None and producer.graph is ordered[0].graph:  # depends on no layer
            waiting += graph.reads(producer)
    outputs = [
        value.name or ""
        for node in ordered
        for value in node.outputs
        if value.is_graph_output() or readers.get(value, set()) - nodes
    ]
    return Block(name, ordered, tuple(inputs), tuple(outputs))


def _names(flow: nx.DiGraph[ir.Node], parts: Sequence[set[ir.Node]]) -> Iterator[str]:
    """For each part the module that its layers are in, alone; or else the name of its first layer.

    Of a part without a layer, that of its first node.
    """
    inside = [{_module(n.name or "") for n in part if graph.layer_of(n)} for part in parts]
    shared = collections.Counter(module for modules in inside for module in modules)
    place = {node: index for index, node in enumerate(flow)}
    for part, modules in zip(parts, inside, strict=True):
        if len(modules) == 1 and shared[module := next(iter(modules))] == 1 and module:
            yield module
        else:
            layers = [node for node in part if graph.layer_of(node) is not None]
            yield min(layers or part, key=place.__getitem__).name or ""
