"""Accuracy on the user's terms: their data, their metric, and how much worse than float it may be.

A metric is text, as passes are: ``top1``, ``perplexity{output=logits}``, or ``package.module:name``
of a function of the user's own, which is given what was read and written, one run at a time:

    def mean_error(runs):
        errors = [abs(outputs["y"] - sample["labels"]).mean() for sample, outputs in runs]
        return sum(errors) / len(errors)
    mean_error.lower_is_better = True      # without it, higher is better
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile import capture, sequences, syntax
from qcompile.archives import LABELS
from qcompile.errors import CalibrationError, QCompileError
from qcompile.execute import Session
from qcompile.sequences import Sample, State
from qcompile.simulate import Judge
from qcompile.sources import Data

Array = npt.NDArray[Any]
# What a run was fed (with its labels), and its outputs.
Run = tuple[Sample, dict[str, Array]]


@dataclasses.dataclass(frozen=True)
class Metric(abc.ABC):
    """One number of a model on samples; a frozen dataclass whose fields are the options."""

    name: ClassVar[str]
    lower_is_better: ClassVar[bool] = False

    @abc.abstractmethod
    def measure(self, session: Session, evaluation: Evaluation) -> float:
        """The number for ``session``; raise QCompileError if the samples do not allow it."""

    def __str__(self) -> str:
        return syntax.render(self.name, self)


@dataclasses.dataclass(frozen=True)
class Top1(Metric):
    """The share of rows whose largest score is that of the label, 0 to 1.

    ``output``, the first of the model if empty, holds scores [..., classes], and ``labels`` of a
    sample a class for each row. A negative label does not count.
    """

    name: ClassVar[str] = "top1"
    output: str = ""

    def measure(self, session: Session, evaluation: Evaluation) -> float:
        right = count = 0
        for scores, labels in _rows(session, evaluation, self.output, str(self)):
            right += int(np.sum(scores.argmax(axis=-1) == labels))
            count += len(labels)
        return right / count if count else math.nan


@dataclasses.dataclass(frozen=True)
class Perplexity(Metric):
    """``exp`` of the mean negative log-likelihood of the next token; lower is better.

    ``output``, the first of the model if empty, holds logits [..., tokens, vocabulary]. What comes
    next is read from ``labels``, which stand for the same position as the logits and do not count
    if negative; without labels it is the next of the tokens in ``input``, the only input of whole
    numbers of the shape of the logits if empty (``input_ids`` if there is one). Padding does not
    count with ``--mask``.
    """

    name: ClassVar[str] = "perplexity"
    lower_is_better: ClassVar[bool] = True
    output: str = ""
    input: str = ""

    def measure(self, session: Session, evaluation: Evaluation) -> float:
        lost, count = 0.0, 0
        for logits, labels in _rows(session, evaluation, self.output, str(self), self._next):
            scores = logits.astype(np.float64)
            scores = scores - scores.max(axis=-1, keepdims=True)
            chosen = np.take_along_axis(scores, labels[:, None], axis=-1)[:, 0]
            lost += float(np.sum(np.log(np.exp(scores).sum(axis=-1)) - chosen))
            count += len(labels)
        return math.exp(min(lost / count, 700.0)) if count else math.nan

    def _next(self, sample: Sample, logits: Array, mask: str | None) -> Array:
        """For each position of ``logits`` the next token, -1 where there is none."""
        fits = [
            name
            for name, array in sample.items()
            if array.dtype.kind in "iu" and array.shape == logits.shape[:-1] and name != mask
        ]
        name = self.input or ("input_ids" if "input_ids" in fits else "".join(fits[:1]))
        if name not in fits or (not self.input and len(fits) > 1 and name != "input_ids"):
            raise CalibrationError(
                f"{self}: which input holds the tokens? {', '.join(fits) or 'none'} has the shape "
                f"{list(logits.shape[:-1])}; say perplexity{{input=NAME}}, or give labels"
            )
        tokens, counts = sample[name], np.ones(sample[name].shape, bool)
        if mask is not None and sample[mask].shape == tokens.shape:
            counts = sample[mask].astype(bool)
        found = np.full(tokens.shape, -1, np.int64)
        found[..., :-1] = np.where(counts[..., 1:] & counts[..., :-1], tokens[..., 1:], -1)
        return found


@dataclasses.dataclass(frozen=True)
class Cosine(Metric):
    """Mean cosine similarity to the outputs in float, of the worst output; 1 for float itself."""

    name: ClassVar[str] = "cosine"

    def measure(self, session: Session, evaluation: Evaluation) -> float:
        return min(evaluation.judge.cosine(session).values(), default=math.nan)


@dataclasses.dataclass(frozen=True)
class Sqnr(Metric):
    """The share of the power of the outputs that is no noise, of the worst output; 1 for float.

    So a drop of 1 % is an SQNR of 20 dB, and one of 0.1 % is 30 dB.
    """

    name: ClassVar[str] = "sqnr"

    def measure(self, session: Session, evaluation: Evaluation) -> float:
        found = evaluation.judge.worst(session)
        return 1.0 - 10.0 ** (-found / 10.0)


@dataclasses.dataclass(frozen=True)
class Own(Metric):
    """A function of the user's: an iterable of (sample, outputs) in, a number out."""

    text: str
    function: Callable[[Iterable[Run]], object]

    @property
    def lower_is_better(self) -> bool:  # type: ignore[override]
        """What the attribute of that name of the function says."""
        return bool(getattr(self.function, "lower_is_better", False))

    def measure(self, session: Session, evaluation: Evaluation) -> float:
        try:
            found = self.function(evaluation.runs(session))
            return float(cast("Any", found))
        except QCompileError:
            raise
        except Exception as error:  # whatever the user's code raises
            raise CalibrationError(
                f"metric {self.text!r} raises {type(error).__name__}: {error}"
            ) from error

    def __str__(self) -> str:
        return self.text


METRICS: dict[str, type[Metric]] = {m.name: m for m in (Top1, Cosine, Sqnr, Perplexity)}


def parse(text: str) -> Metric:
    """The metric that ``text`` names. Raises QCompileError, pointing at what is wrong."""
    if ":" in text.partition("{")[0]:
        function = capture.load_object(text, "metric")
        if not callable(function):
            raise QCompileError(f"metric {text!r} is {type(function).__name__}, no function")
        return Own(text, cast("Callable[[Iterable[Run]], object]", function))
    [first, *more] = syntax.items(text)
    if more:
        raise QCompileError(f"--metric {text}: one metric is measured, not {1 + len(more)}")
    return syntax.build(first, METRICS, "metric", text)


@dataclasses.dataclass(frozen=True)
class Bound:
    """How much worse than float a metric may be: ``1%`` of its value in float, or ``0.5`` of it."""

    text: str
    most: float
    relative: bool

    @staticmethod
    def parse(text: str) -> Bound:
        """Read ``1%`` or ``0.5``; raise QCompileError for what is neither, or negative."""
        try:
            most = float(text.removesuffix("%"))
        except ValueError:
            most = math.nan
        if not 0.0 <= most < math.inf:
            raise QCompileError(
                f"--max-drop is a percentage of the metric in float (1%) or a number in its "
                f"units (0.5), from 0; got {text!r}"
            )
        relative = text.endswith("%")
        return Bound(text, most / 100.0 if relative else most, relative)

    def allows(self, drop: float, in_float: float) -> bool:
        """Whether ``drop`` is within this bound; one that is not a number is not."""
        # What the metric itself rounds does not count.
        slack = 1e-12 * max(abs(in_float), 1.0)
        return drop <= self.most * (abs(in_float) if self.relative else 1.0) + slack


class Evaluation:
    """A metric on samples, and what it is in float. ``count`` says how often it was measured."""

    def __init__(
        self, metric: Metric, reference: ir.Model, data: Data, mask: str | None = None
    ) -> None:
        self.metric, self.data, self.mask = metric, data, mask
        self.outputs = [v.name or "" for v in reference.graph.outputs]
        self._reference, self._judge = reference, cast("Judge | None", None)
        self.count = 0
        self.in_float = self.measure(Session(reference))
        if math.isnan(self.in_float):
            raise CalibrationError(f"metric {metric} of the float model is not a number")

    @property
    def judge(self) -> Judge:
        """Compares outputs with those in float, which are kept in a file."""
        if self._judge is None:
            self._judge = Judge(self._reference, self.data.samples)
        return self._judge

    @property
    def state(self) -> State:
        """What flows from frame to frame."""
        return self.data.samples.state

    def runs(self, session: Session) -> Iterator[Run]:
        """What each run was fed, and its outputs."""
        yield from sequences.carry(session, self.data.samples, self.state, self.outputs)

    def measure(self, session: Session) -> float:
        """The metric of ``session`` on all samples."""
        self.count += 1
        return self.metric.measure(session, self)

    def drop(self, value: float) -> float:
        """How much worse ``value`` is than float; negative if it is better."""
        worse = value - self.in_float
        return worse if self.metric.lower_is_better else 0.0 - worse


def _rows(
    session: Session,
    evaluation: Evaluation,
    output: str,
    what: str,
    otherwise: Callable[[Sample, Array, str | None], Array] | None = None,
) -> Iterator[tuple[Array, Array]]:
    """Scores [rows, classes] and labels [rows] of each run, those that count.

    Raises CalibrationError if there is no such output, or labels are missing or do not fit.
    """
    name = output or evaluation.outputs[0]
    if name not in evaluation.outputs:
        known = ", ".join(evaluation.outputs)
        raise CalibrationError(f"metric {what}: no output is called {name!r}; known are {known}")
    samples = evaluation.data.samples
    for number, (sample, outputs) in enumerate(evaluation.runs(session)):
        scores = outputs[name]
        where = f"metric {what}, {samples.where(number)} of {evaluation.data.source!r}"
        if scores.ndim < 2:
            raise CalibrationError(f"{where}: output {name!r} has no rows of scores")
        if LABELS in sample:
            labels = sample[LABELS]
        elif otherwise is not None:
            labels = otherwise(sample, scores, evaluation.mask)
        else:
            raise CalibrationError(f"{where} has no array 'labels'")
        rows, classes = scores.reshape(-1, scores.shape[-1]), scores.shape[-1]
        if labels.size != len(rows) or labels.dtype.kind not in "iu":
            raise CalibrationError(
                f"{where}: labels are {labels.dtype} {list(labels.shape)}, output {name!r} has "
                f"{len(rows)} rows and wants a whole number for each"
            )
        labels = labels.ravel().astype(np.int64)
        if labels.max(initial=-1) >= classes:
            raise CalibrationError(
                f"{where}: label {labels.max()}, and output {name!r} has {classes} classes"
            )
        yield rows[labels >= 0], labels[labels >= 0]
