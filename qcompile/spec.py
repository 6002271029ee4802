"""TensorSpec: the decision what one use of a tensor becomes, and its place in the graph.

A spec belongs to a *use* (node, input index), not to a tensor: two readers of one value may differ.
It is stored on the reading node as metadata ``qcompile.spec.<index>``, in JSON of scalars and
names. Arrays are never in the JSON: they are initializers of the graph, and the spec names them.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

import onnx_ir as ir

SPEC = "qcompile.spec."
# The name of the bias that a layer gets with its decisions; see ``bias``.
BIAS = "qcompile.bias"


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """What a use becomes.

    * ``format``: a name of numerics, such as ``int8``.
    * ``axis``, ``block``: granularity; ``axis`` None is one scale a tensor, ``block`` None one a
      channel of ``axis``.
    * ``symmetric``: whether the zero point is 0.
    * ``scale_from``: ``static``, or the run-time granularity of a dynamic scale.
    * ``range``: for an activation, the name of the initializer [low, high] (float32 [2]). A dialect
      derives scale and zero point from it, so one decision serves every target.
    * ``scale``, ``zero_point``: for a weight, the names of the arrays; ``""`` for no zero point.
    * ``codes``: the name of fitted codes, when rounding was not to the nearest.
    """

    format: str
    axis: int | None = None
    block: int | None = None
    symmetric: bool = True
    scale_from: Literal["static", "tensor", "token", "block"] = "static"
    scale_format: str = "fp32"
    range: str = ""
    scale: str = ""
    zero_point: str = ""
    codes: str = ""

    def arrays(self) -> tuple[str, ...]:
        """The names of the initializers that this spec needs."""
        return tuple(n for n in (self.range, self.scale, self.zero_point, self.codes) if n)

    def __str__(self) -> str:
        """A short form for people: the format and what differs from one static scale a tensor."""
        parts = [self.format]
        if self.axis is not None:
            parts.append(f"axis={self.axis}")
        if self.block is not None:
            parts.append(f"block={self.block}")
        if not self.symmetric:
            parts.append("asymmetric")
        if self.scale_from != "static":
            parts.append(self.scale_from)
        if self.codes:
            parts.append("fitted")
        return " ".join(parts)


def read(node: ir.Node, index: int) -> TensorSpec | None:
    """The spec of input ``index`` of ``node``, or None where it stays float."""
    text = node.metadata_props.get(f"{SPEC}{index}")
    return None if text is None else TensorSpec(**json.loads(text))


def write(node: ir.Node, index: int, spec: TensorSpec | None) -> None:
    """Set the spec of input ``index`` of ``node``; None removes it.

    A bias that was fitted to other decisions goes.
    """
    key = f"{SPEC}{index}"
    node.metadata_props.pop(BIAS, None)
    if spec is None:
        node.metadata_props.pop(key, None)
        return
    blank = TensorSpec(spec.format)
    fields: dict[str, Any] = {
        f.name: getattr(spec, f.name)
        for f in dataclasses.fields(spec)
        if f.name == "format" or getattr(spec, f.name) != getattr(blank, f.name)
    }
    node.metadata_props[key] = json.dumps(fields)


def all_specs(node: ir.Node) -> dict[int, TensorSpec]:
    """The specs of ``node`` by input index, in order."""
    found: dict[int, TensorSpec] = {}
    for key in node.metadata_props:
        if key.startswith(SPEC):
            index = int(key.removeprefix(SPEC))
            spec = read(node, index)
            assert spec is not None
            found[index] = spec
    return dict(sorted(found.items()))


def bias(node: ir.Node) -> str:
    """The name of the initializer that is the bias of the layer ``node`` once it is lowered.

    It makes good for what the decisions lose; the bias of the float layer stays. "" if there is
    none.
    """
    return node.metadata_props.get(BIAS, "")


def clear(node: ir.Node) -> None:
    """Remove every spec of ``node``, and its fitted bias."""
    node.metadata_props.pop(BIAS, None)
    for index in all_specs(node):
        write(node, index, None)
