"""Latency of two models as a ratio, measured interleaved in one process."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence

from qcompile.execute import Session
from qcompile.sources import Sample


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
) -> Latency:
    """Run the three sessions in turn ``rounds`` times (after a warm-up) and compare.

    In its turn each session runs twice and the second run counts: on a device a model runs again
    and again, and does not find the caches as another model left them.

    ``again`` is a second session of the float model, for the null.
    """
    sessions = (float_model, compiled, again)
    times: list[list[float]] = [[] for _ in sessions]
    for number in range(rounds + 3):
        sample = samples[number % len(samples)]
        for session, kept in zip(sessions, times, strict=True):
            session.run(sample)
            started = time.perf_counter()
            session.run(sample)
            if number >= 3:
                kept.append(time.perf_counter() - started)
    base, quantized, null = (statistics.median(t) for t in times)
    return Latency(
        float_ms=base * 1e3,
        compiled_ms=quantized * 1e3,
        ratio=quantized / base,
        ratio_of_minima=min(times[1]) / min(times[0]),
        null=null / base,
        rounds=rounds,
    )
