"""Samples in order, and the state that flows between them.

A *sample* is a dict of inputs, one run of a model. A *sequence* is samples whose runs belong
together, such as the chunks of one recording; most have length one. The samples of a longer one are
its *frames*, and its *state* is what a run leaves for the next: an input that takes what an output
was one frame earlier. The first frame of a sequence holds all inputs; later ones lack the state.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, overload

import numpy.typing as npt
import onnx_ir as ir

from qcompile import execute, spill
from qcompile.spill import Spill

Array = npt.NDArray[Any]
Sample = dict[str, Array]
# From the input that takes a state to the output that gives it.
State = Mapping[str, str]


class Samples(Sequence[Sample]):
    """Samples of one or more sequences, read from ``store`` as they are asked for.

    Args:
        store: the samples.
        starts: the numbers of those that start a sequence, ascending; all if None.
        state: what flows from one frame to the next.
        numbers: which of ``store`` these are; all if None.

    A slice is as lazy as the whole; it should begin where a sequence does, or has no state there.
    """

    def __init__(
        self,
        store: Sequence[Sample],
        starts: Sequence[int] | None = None,
        state: State | None = None,
        numbers: range | None = None,
    ) -> None:
        self._store = store
        self._starts = range(len(store)) if starts is None else starts
        self._numbers = range(len(store)) if numbers is None else numbers
        self.state: State = state or {}

    @staticmethod
    def of(samples: Sequence[Sample]) -> Samples:
        """``samples`` themselves, or a list of them as sequences of length one."""
        return samples if isinstance(samples, Samples) else Samples(samples)

    @property
    def sequences(self) -> int:
        """How many sequences there are."""
        return sum(number in self._numbers for number in self._starts)

    def sequence(self, number: int) -> Samples:
        """The frames of sequence ``number``."""
        starts = [start for start in self._starts if start in self._numbers]
        first = self._numbers.index(starts[number])
        behind = starts[number + 1 : number + 2]
        return self[first : self._numbers.index(behind[0]) if behind else len(self)]

    def spans(self) -> list[range]:
        """The numbers of the frames of each sequence."""
        starts = [self._numbers.index(n) for n in self._starts if n in self._numbers]
        return [range(a, b) for a, b in zip(starts, [*starts[1:], len(self)], strict=True)]

    def split(self, last: int) -> tuple[Samples, Samples]:
        """All but the ``last`` sequences, and those."""
        starts = [number for number in self._starts if number in self._numbers]
        cut = self._numbers.index(starts[-last]) if last else len(self)
        return self[:cut], self[cut:]

    def some(self, most: int) -> Samples:
        """At most ``most`` samples, evenly apart; with state the first whole sequences instead.

        At least one sequence, however long.
        """
        if len(self) <= most:
            return self
        if not self.state:
            return self[:: -(-len(self) // most)]
        starts = [self._numbers.index(n) for n in self._starts if n in self._numbers]
        ends = [*starts[1:], len(self)]
        return self[: max([end for end in ends if end <= most], default=ends[0])]

    def parted(self, most: int) -> tuple[list[int], list[int]]:
        """The numbers of those that ``some`` takes, and of the others."""
        taken = set(self.some(most)._numbers)
        parts: tuple[list[int], list[int]] = [], []
        for index, number in enumerate(self._numbers):
            parts[number not in taken].append(index)
        return parts

    def where(self, index: int) -> str:
        """Sample ``index`` in the user's words."""
        number = self._numbers[index]
        if len(self._starts) == len(self._store):
            return f"sample {number}"
        sequence = bisect.bisect_right(self._starts, number) - 1
        return f"frame {number - self._starts[sequence]} of sequence {sequence}"

    def shapes(self, name: str) -> list[tuple[int, ...]]:
        """The shapes of the input ``name`` in the samples that hold it."""
        if isinstance(self._store, Spill) and len(self._numbers) == len(self._store):
            return self._store.shapes(name)
        return [sample[name].shape for sample in self if name in sample]

    @functools.cached_property
    def digest(self) -> str:
        """A hash of all samples, of where sequences start, and of the state."""
        whole = spill.digest(self._store)
        if len(self._starts) == len(self._store) and not self.state:
            return whole
        text = f"{whole}{list(self._starts)}{sorted(self.state.items())}"
        return hashlib.sha256(text.encode()).hexdigest()

    def close(self) -> None:
        """Remove the file behind the samples."""
        if isinstance(self._store, Spill):
            self._store.close()

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...
    def __getitem__(self, index: int | slice) -> Sample | Samples:
        if isinstance(index, slice):
            return Samples(self._store, self._starts, self.state, self._numbers[index])
        return self._store[self._numbers[index]]


class Runs(Protocol):
    """What runs a sample: a Session, or what stands around one."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of all outputs."""
        ...

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """The values of ``outputs`` for ``feeds``."""
        ...


def carry(
    session: Runs,
    samples: Iterable[Sample],
    state: State,
    outputs: Sequence[str] | None = None,
) -> Iterator[tuple[Sample, dict[str, Array]]]:
    """Run ``samples`` in order and yield what each was fed and the values of ``outputs``.

    What a sample lacks comes from the outputs of the run before, so that every session carries its
    own state; what a sample holds counts, so that the first frame of a sequence starts anew. The
    session must have the outputs of ``state`` (see ``fetch``). ``outputs`` are all if None.
    """
    wanted = list(session.outputs if outputs is None else outputs)
    asked = list(dict.fromkeys([*wanted, *state.values()]))
    kept: Sample = {}
    for sample in samples:
        feeds = {**kept, **sample}
        results = session.run(feeds, asked)
        kept = {taken: results[giver] for taken, giver in state.items()}
        given = {name: results[name] for name in wanted}
        del results  # what is large is not to be there twice while the next sample runs
        yield feeds, given
        del given


def fetch(model: ir.Model, values: Iterable[str], state: State) -> ir.Model:
    """A clone of ``model`` whose outputs are ``values`` and those that ``carry`` needs."""
    return execute.fetch(model, list(dict.fromkeys([*values, *state.values()])))
