"""Bounds on what the layers of a model take together."""

from __future__ import annotations

import dataclasses
import re

from qcompile.errors import PassError

# Units of each kind of budget; ``x`` is that of the float model.
UNITS = {
    "bits": {"": 1.0},
    "size": {"": 1.0, "B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9},
    "bops": {"": 1.0, "M": 1e6, "G": 1e9, "T": 1e12, "x": 1.0},
    "latency": {"x": 1.0},
}


@dataclasses.dataclass(frozen=True)
class Budget:
    """A bound on the layers together.

    * ``bits`` a weight on average: codes alone, as papers count.
    * ``size`` in bytes as stored: codes in the type that holds them, scales and zero points.
    * ``bops``: bit operations of a run: multiplications, times the bits of the weight, times those
      of the activation; 32 for a float.
    * ``latency``: of a run of the whole model.

    ``relative``: the amount is a share of what the float model takes.
    """

    kind: str
    amount: float
    relative: bool = False

    @staticmethod
    def parse(text: str) -> Budget:
        """Read ``4.5``, ``bits=4.5``, ``size=4MB``, ``bops=20G``, ``bops=0.3x``, ``latency=0.6x``.

        Units are ``B``, ``kB``, ``MB`` and ``GB``, or ``M``, ``G`` and ``T`` operations.
        """
        kind, _, amount = text.rpartition("=")
        match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)([A-Za-z]*)", amount)
        units = UNITS.get(kind or "bits", {})
        if match is None or match[2] not in units:
            raise PassError(
                f"budget {text!r} is no bits=4.5 and no size=4MB (B, kB, MB, GB), "
                "no bops=20G (M, G, T) or bops=0.3x and no latency=0.6x, of float"
            )
        scale = units[match[2]]
        return Budget(kind or "bits", float(match[1]) * scale, match[2] == "x")

    def __str__(self) -> str:
        return f"{self.kind}={self.amount:.10g}{'x' if self.relative else ''}"
