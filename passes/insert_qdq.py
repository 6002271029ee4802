"""Lower the decisions to the dialect of the target: the one place where Q/DQ nodes are written."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from qcompile.errors import PassError
from qcompile.pipeline import Context, Pass, Stats


@dataclasses.dataclass(frozen=True)
class InsertQdq(Pass):
    """Apply the rules of the target, in their order; ``qcompile targets NAME`` lists them.

    Counters say how often each rule acted. Raises TargetError for a decision that the target cannot
    hold.
    """

    name: ClassVar[str] = "insert-qdq"
    requires: ClassVar[frozenset[str]] = frozenset({"specs"})
    produces: ClassVar[frozenset[str]] = frozenset({"lowered"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"specs", "ranges"})
    per_target: ClassVar[bool] = True

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        if ctx.target is None:
            raise PassError("there is no target to lower to")
        return dict(ctx.target.lower(model))
