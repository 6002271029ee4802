"""Latency of models as a ratio, measured interleaved in one process."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from qcompile import sequences
from qcompile.execute import Array, Session
from qcompile.sequences import Sample, Samples


@dataclasses.dataclass(frozen=True)
class Latency:
    """Medians and minima in milliseconds, one thread, and the ratio of each to float.

    ``null`` is the ratio of float to itself in the same rounds: how far from 1 noise alone goes.
    """

    float_ms: float
    compiled_ms: float
    ratio: float
    ratio_of_minima: float
    null: float
    rounds: int


def interleaved(
    float_model: Session,
    again: Session,
    compiled: Session,
    samples: Sequence[Sample],
    rounds: int = 60,
    clock: Callable[[], float] = time.perf_counter,
) -> Latency:
    """Run the three sessions in turn ``rounds`` times and compare.

    ``again`` is a second session of the float model, for the null.
    """
    times = in_turn([float_model, compiled, again], [samples] * 3, rounds, clock)
    base, quantized, null = (statistics.median(t) for t in times)
    return Latency(
        float_ms=base * 1e3,
        compiled_ms=quantized * 1e3,
        ratio=quantized / base,
        ratio_of_minima=min(times[1]) / min(times[0]),
        null=null / base,
        rounds=rounds,
    )


def in_turn(
    models: Sequence[Session],
    samples: Sequence[Sequence[Sample]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """The seconds of ``rounds`` runs of each of ``models`` on its ``samples``, behind three more.

    By ``clock``. They take turns, so that what slows the machine down slows all of them. In its
    turn each runs twice and the second run counts: on a device a model runs again and again, and
    does not find the caches as another model left them.
    """
    timed = [_Timed(session, clock) for session in models]
    runs = [
        sequences.carry(each, itertools.cycle(read), Samples.of(read).state)
        for each, read in zip(timed, samples, strict=True)
    ]
    for _ in range(rounds + 3):
        for run in runs:
            next(run)
    return [each.times[3:] for each in timed]


def rounds_for(session: Session, samples: Sequence[Sample], seconds: float) -> int:
    """How many rounds of ``interleaved`` take about ``seconds``: 10 to 100."""
    session.run(samples[0])
    started = time.perf_counter()
    session.run(samples[0])
    each = 6 * (time.perf_counter() - started)  # three sessions, two runs each
    return min(max(int(seconds / max(each, 1e-6)), 10), 100)


class _Timed:
    """A session whose every run is one to warm up and one that is timed, in ``times`` (seconds)."""

    def __init__(self, session: Session, clock: Callable[[], float]) -> None:
        self._session, self._clock = session, clock
        self.outputs = session.outputs
        self.times: list[float] = []

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Run twice; the second run counts."""
        self._session.run(feeds, outputs)
        started = self._clock()
        results = self._session.run(feeds, outputs)
        self.times.append(self._clock() - started)
        return results
