"""What is wrong with a graph: in our words first, then ONNX's own full check.

Run after every pass. Only findings that were not there at capture count; they name the pass that
brought them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir
from onnx_ir.passes import common

from qcompile import graph, spec
from qcompile.errors import VerifyError


def findings(model: ir.Model) -> list[str]:
    """What is wrong with the graph, in our words, then ONNX's own full check; empty if nothing."""
    return structure(model) or _onnx_findings(model)


def structure(model: ir.Model) -> list[str]:
    """What is wrong with names, order and specs, in our words; empty if nothing."""
    found: list[str] = []
    known: set[str] = set()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        if value.name in known and value not in model.graph.inputs:
            found.append(f"two values are named {value.name!r}")
        known.add(value.name or "")
    names: set[str] = set()
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value.name not in known:
                found.append(f"node {node.name!r} reads {value.name!r} before anything writes it")
        for value in node.outputs:
            if value.name and value.name in known:
                found.append(f"two values are named {value.name!r}")
            known.add(value.name or "")
        if node.name in names:
            found.append(f"two nodes are named {node.name!r}")
        names.add(node.name or "")
        for index, decided in spec.all_specs(node).items():
            if index >= len(node.inputs) or node.inputs[index] is None:
                found.append(f"node {node.name!r} has a spec on input {index}, which is not there")
            for array in decided.arrays():
                if array not in model.graph.initializers:
                    found.append(f"a spec of node {node.name!r} names {array!r}, which is lost")
    for value in model.graph.outputs:
        if value.name not in known:
            found.append(f"output {value.name!r} is written by nothing")
    return found


def _onnx_findings(model: ir.Model) -> list[str]:
    try:
        common.CheckerPass(full_check=True)(model.clone())
    except Exception as error:  # the checker raises many types; each is a finding, none is ours
        cause = error.__cause__ or error
        return [f"{_ONNX_CHECK}{str(cause).strip().splitlines()[0]}"]
    return []


_ONNX_CHECK = "ONNX: "


def verify(
    model: ir.Model,
    known: Sequence[str] = (),
    origin_ids: Iterable[str] = (),
    full: bool = True,
) -> None:
    """Raise VerifyError for a finding that is not among ``known``, or a layer lost without trace.

    ``origin_ids`` are the captured layers that some node must still stand for. ONNX's own check is
    left out unless ``full``.
    """
    new = [f for f in (findings if full else structure)(model) if f not in known]
    if any(finding.startswith(_ONNX_CHECK) for finding in known):
        # ONNX's check stops at its first finding, in words that passes change by renaming nodes.
        new = [finding for finding in new if not finding.startswith(_ONNX_CHECK)]
    present = {o for node in model.graph for o in graph.origins(node)}
    new += [f"the captured layer {o!r} is lost" for o in origin_ids if o not in present]
    if new:
        raise VerifyError("; ".join(new[:5]))
