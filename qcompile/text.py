"""The stable text form of a graph, and the changed lines between two.

    opset onnx 21
    graph (%image: f32[batch,1,28,28]) -> (%logits: f32[batch,10])
    w %stem.weight: f32[16,1,3,3]
    %stem: f32[batch,16,28,28] = Conv(%image{int8}, %stem.weight{int8 axis=0}) {pads=[1,1,1,1]}

Equal over clone, save and load. Decisions stand in braces behind the operand that they belong to.
Bodies of control flow are indented below their node. The form is for people and for tests; it is
not read back.
"""

from __future__ import annotations

import bisect
import difflib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile import graph, spec

_TYPES = {
    "FLOAT": "f32", "DOUBLE": "f64", "FLOAT16": "f16", "BFLOAT16": "bf16", "STRING": "str",
    "INT8": "i8", "INT16": "i16", "INT32": "i32", "INT64": "i64", "BOOL": "bool",
    "UINT8": "u8", "UINT16": "u16", "UINT32": "u32", "UINT64": "u64", "INT4": "i4", "UINT4": "u4",
}  # fmt: skip


def render(model: ir.Model, weights: bool = False) -> str:
    """The graph as text, one line a node; ``weights`` adds a digest of each initializer."""
    opsets = ", ".join(f"{d or 'onnx'} {v}" for d, v in sorted(model.opset_imports.items()))
    return "\n".join([f"opset {opsets}", *_graph(model.graph, weights, "")]) + "\n"


def changes(before: str, after: str) -> list[str]:
    """The lines of ``before`` that are gone (``-``) and those of ``after`` that are new (``+``).

    Lines that stand once on each side are matched first, as many as keep their order, so that the
    time grows with the number of lines; the general comparison is left for what lies between.
    """
    old, new = before.splitlines(), after.splitlines()
    found: list[str] = []
    i = j = 0
    for next_i, next_j in [*_anchors(old, new), (len(old), len(new))]:
        found += _between(old[i:next_i], new[j:next_j])
        i, j = next_i + 1, next_j + 1
    return found


def _anchors(old: Sequence[str], new: Sequence[str]) -> list[tuple[int, int]]:
    """The longest run of pairs of equal lines, rising on both sides, of lines that occur once."""
    once = {line for line, count in Counter(old).items() if count == 1}
    once &= {line for line, count in Counter(new).items() if count == 1}
    place = {line: j for j, line in enumerate(new) if line in once}
    pairs = [(i, place[line]) for i, line in enumerate(old) if line in once]
    # The longest rising run of j: for each length the pair with the least j that ends one.
    least: list[int] = []
    ends: list[int] = []
    back: list[int] = []
    for number, (_, j) in enumerate(pairs):
        length = bisect.bisect_left(least, j)
        back.append(ends[length - 1] if length else -1)
        if length == len(least):
            least.append(j)
            ends.append(number)
        else:
            least[length], ends[length] = j, number
    run: list[tuple[int, int]] = []
    number = ends[-1] if ends else -1
    while number >= 0:
        run.append(pairs[number])
        number = back[number]
    return run[::-1]


def _between(old: Sequence[str], new: Sequence[str]) -> Iterator[str]:
    if not old and not new:
        return
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    for kind, i, next_i, j, next_j in matcher.get_opcodes():
        if kind != "equal":
            yield from (f"-{line}" for line in old[i:next_i])
            yield from (f"+{line}" for line in new[j:next_j])


def _graph(body: ir.Graph, weights: bool, indent: str) -> Iterator[str]:
    inputs = ", ".join(_typed(v) for v in body.inputs)
    outputs = ", ".join(_typed(v) for v in body.outputs)
    yield f"{indent}graph ({inputs}) -> ({outputs})"
    for name in sorted(body.initializers):
        value = body.initializers[name]
        digest = f" #{_digest(value)}" if weights else ""
        yield f"{indent}w {_typed(value)}{digest}"
    for node in body:
        yield f"{indent}{_node(node, weights)}"
        for attr in node.attributes.values():
            if attr.type == ir.AttributeType.GRAPH:
                yield from _graph(attr.value, weights, f"{indent}  {attr.name}: ")
            elif attr.type == ir.AttributeType.GRAPHS:
                for inner in attr.value:
                    yield from _graph(inner, weights, f"{indent}  {attr.name}: ")


def _node(node: ir.Node, weights: bool) -> str:
    specs = spec.all_specs(node)
    operands = ", ".join(
        "" if v is None else f"%{v.name}" + (f"{{{specs[i]}}}" if i in specs else "")
        for i, v in enumerate(node.inputs)
    )
    domain = "" if node.domain in ("", "ai.onnx") else f"{node.domain}::"
    attributes = ", ".join(
        f"{name}={_attribute(node.attributes[name], weights)}"
        for name in sorted(node.attributes)
        if node.attributes[name].type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    )
    tail = f" {{{attributes}}}" if attributes else ""
    if spec.bias(node):
        tail += f" bias=%{spec.bias(node)}"
    written = ", ".join(_typed(v) for v in node.outputs)
    return f"{written} = {domain}{node.op_type}({operands}){tail}"


def _typed(value: ir.Value) -> str:
    if value.dtype is None:
        return f"%{value.name}"
    kind = _TYPES.get(value.dtype.name, value.dtype.name.lower())
    if value.shape is None:
        return f"%{value.name}: {kind}[...]"
    return f"%{value.name}: {kind}[{','.join(_dimension(d) for d in value.shape)}]"


def _dimension(dimension: Any) -> str:
    if isinstance(dimension, int):
        return str(dimension)
    return str(dimension.value) if dimension.value is not None else "?"


def _attribute(attr: ir.Attr, weights: bool) -> str:
    if attr.is_ref():
        return f"@{attr.ref_attr_name}"
    value: Any = attr.value
    if attr.type == ir.AttributeType.FLOAT:
        return str(np.float32(value))
    if attr.type == ir.AttributeType.FLOATS:
        return f"[{','.join(str(np.float32(v)) for v in value)}]"
    if attr.type == ir.AttributeType.TENSOR:
        digest = f" #{graph.tensor_digest(value)[:12]}" if weights else ""
        return f"{value.dtype.name.lower()}{list(value.shape)}{digest}"
    if isinstance(value, (tuple, list)):
        return f"[{','.join(str(v) for v in value)}]"  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    return str(value)


def _digest(value: ir.Value) -> str:
    if value.const_value is None:
        return "none"
    return graph.tensor_digest(value.const_value)[:12]
