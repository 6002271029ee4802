"""Decoding with a model whose cache goes in and comes out: ``past_*`` in, ``present_*`` out."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.execute import Session
from qcompile.sequences import Sample

Array = npt.NDArray[Any]


def empty_past(session: Session, batch: int = 1) -> Sample:
    """The inputs that say that nothing came before, by name."""
    empty: Sample = {}
    for name, shape in session.shapes.items():
        if name.startswith("past_"):
            heads, width = int(shape[1]), int(shape[3])
            empty[name] = np.zeros((batch, heads, 0, width), np.float32)
    return empty


def step(session: Session, ids: Array, past: Sample) -> tuple[Array, Sample]:
    """The logits of ``ids`` [batch, tokens] behind ``past``, and the past of the next step."""
    found = session.run({"input_ids": ids, **past})
    return found["logits"], {name: found[name.replace("past", "present", 1)] for name in past}


def greedy(session: Session, ids: Array, count: int) -> list[int]:
    """The ``count`` most likely tokens behind ``ids`` [1, tokens], one after the other."""
    past, chosen = empty_past(session), list[int]()
    for _ in range(count):
        logits, past = step(session, ids, past)
        chosen.append(int(logits[0, -1].argmax()))
        ids = np.array([[chosen[-1]]], np.int64)
    return chosen
