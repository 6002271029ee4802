"""What a model computes of all samples, block after block.

Values are kept in temporary files, and only as long as a later block reads them, so that memory is
that of a few samples however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy.typing as npt

from qcompile.blocks import Block
from qcompile.sequences import Sample, Samples
from qcompile.spill import Spill

Array = npt.NDArray[Any]


class Trajectory:
    """The values that blocks wrote so far, by name and number of the sample.

    What carries a state reads in a later frame of a sequence what the frame before gave, of this
    same trajectory, so that the error of a state is carried as well.
    """

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        self._kept: dict[str, Spill] = {}

    def feeds(self, names: Iterable[str], number: int) -> Sample:
        """``names`` of sample ``number``: of the sample, of the frame before, or of a block."""
        names = list(names)
        found = {name: self.value(name, number) for name in names if name in self._kept}
        rest = [name for name in names if name not in found]
        sample = self.samples[number] if rest else {}  # read only if it is needed
        for name in rest:
            if name in sample:
                found[name] = sample[name]
            else:
                found[name] = self.value(self.samples.state[name], number - 1)
        return found

    def value(self, name: str, number: int) -> Array:
        """What a block wrote as ``name`` for sample ``number``."""
        return self._kept[name][number][name]

    def run(self, block: Block, call: Callable[[Sample], Sample], outputs: Sequence[str]) -> None:
        """Keep those of ``outputs`` that ``call`` makes of what ``block`` reads, of all samples."""
        kept = {name: Spill() for name in outputs}
        self._kept |= kept  # now, because a frame may read the state that the frame before gave
        for number in range(len(self.samples) if kept else 0):
            results = call(self.feeds(block.inputs, number))
            for name, file in kept.items():
                file.append({name: results[name]})

    def keep(self, needed: Callable[[str], bool]) -> None:
        """Forget what is not ``needed``."""
        for name in [name for name in self._kept if not needed(name)]:
            self._kept.pop(name).close()
