"""Numbers that say how well a model does its task, from what it wrote and what was right."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Rows of logits that are float64 at once: 64 of 50,000 words are 25 MB.
_ROWS = 64


def next_token_loss(logits: Array, ids: Array) -> tuple[float, int]:
    """The negative log-likelihood of each token but the first, in nats, summed; and their number.

    ``logits`` [batch, tokens, vocabulary] at a position are about the token of ``ids`` [batch,
    tokens] at the next one. The sum of exponentials is taken in float64, behind the maximum.
    """
    scores = logits[:, :-1].reshape(-1, logits.shape[-1])
    wanted = ids[:, 1:].reshape(-1)
    lost = 0.0
    for start in range(0, len(wanted), _ROWS):
        rows = scores[start : start + _ROWS].astype(np.float64)
        rows -= rows.max(axis=-1, keepdims=True)
        right = np.take_along_axis(rows, wanted[start : start + _ROWS, None], axis=-1)
        lost += float(np.sum(np.log(np.exp(rows).sum(axis=-1))) - np.sum(right))
    return lost, len(wanted)


def perplexity(lost: float, count: int) -> float:
    """``exp`` of the mean loss a token, NaN of no tokens; infinite where a float cannot hold it."""
    if not count:
        return math.nan
    mean = lost / count
    return math.exp(mean) if mean < 700 else math.inf if not math.isnan(mean) else math.nan
