"""What the layers of a model take on a target, in each form that they may have."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from qcompile.solve import Edge

# A form is ``int8`` and the like, or this.
FLOAT = "float"


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds of one run, where any of the layers may have any of the forms.

    * ``layers``: of each layer, by form and name.
    * ``whole``: of the float model.
    * ``rest``: of all that is alike whatever is chosen.
    * ``borders``: edges of a ``solve.Network`` whose first side is that of the integers: what it
      takes to get from one side to the other, and what lies between the layers on either side.
    """

    layers: Mapping[str, Mapping[str, float]]
    whole: float
    rest: float
    borders: tuple[Edge, ...] = ()
