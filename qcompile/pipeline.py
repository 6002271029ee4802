"""Passes in order: the contract, the text, the checks before anything runs, and the run.

A pass changes a model in place. What a pass relies on is said in words (``ranges``, ``specs``,
...): ``requires`` must hold before it, ``produces`` holds after it, ``invalidates`` no longer
holds. The whole list is checked by simulating the words before anything runs.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import importlib.util
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence, Sized
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import joblib
import networkx as nx
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile import graph, spec, syntax, text, threads, verify
from qcompile.errors import PassBug, PassError, QCompileError, VerifyError

if TYPE_CHECKING:
    from qcompile.backends.base import Target
    from qcompile.calibrate import Calibration

Stats = dict[str, int | float | str]
Arrays = dict[str, npt.NDArray[Any]]
A = TypeVar("A")
B = TypeVar("B")


@dataclasses.dataclass(frozen=True)
class Pass(abc.ABC):
    """A rewrite of a model, in place; a frozen dataclass whose fields are the options.

    * ``requires``, ``produces``, ``invalidates``: words, see the module.
    * ``keeps_float``: the float function is kept (``--check-numerics`` tests it).
    * ``per_target``: the result depends on the target; the pipeline forks before the first such
      pass.
    * ``reads_data``: calibration data is needed (see ``needs_data``).
    * ``needs``: extras, such as ``torch``.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()
    produces: ClassVar[frozenset[str]] = frozenset()
    invalidates: ClassVar[frozenset[str]] = frozenset()
    keeps_float: ClassVar[bool] = False
    per_target: ClassVar[bool] = False
    reads_data: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()
    source: ClassVar[str] = ""

    @abc.abstractmethod
    def run(self, model: ir.Model, ctx: Context) -> Stats:
        """Rewrite ``model`` in place and return counters; zero matches is normal.

        Raises PassError for what the user asked and cannot be had.
        """

    def relies_on(self) -> frozenset[str]:
        """The words that must hold before this pass with its options; ``requires`` or fewer."""
        return self.requires

    def needs_data(self) -> bool:
        """Whether this pass with its options reads calibration data."""
        return self.reads_data

    def lacks(self) -> str:
        """What this machine lacks for this pass with its options, and what to do; "" if nothing."""
        for need in sorted(self.needs):
            if importlib.util.find_spec(need) is None:
                return f"{self.name} needs {need}: pip install 'qcompile[{need}]'"
        return ""

    def measures(self) -> bool:
        """Whether this pass with its options measures time on its target, and so depends on it."""
        return False

    def chosen(self, model: ir.Model) -> Sequence[Pass]:
        """What made ``model`` as this pass did, and makes it again without measuring anything."""
        return [self]

    def weight_formats(self) -> tuple[str, ...]:
        """The weight formats that this pass will ask for; checked against the targets first."""
        return ()

    def input_formats(self) -> tuple[str, ...]:
        """The activation formats that this pass will ask for."""
        return ()

    def float_formats(self) -> tuple[str, ...]:
        """The half floats that this pass will compute in."""
        return ()

    def scales(self) -> tuple[str, ...]:
        """Where this pass wants scales of activations from, beside ``static``."""
        return ()

    def starts_at(self, least: float, *options: str) -> None:
        """Raise PassError for the first of ``options`` that is below ``least``, or NaN."""
        for option in options:
            value = getattr(self, option)
            if not value >= least:
                said = option.replace("_", "-")
                raise PassError(f"{said} starts at {least:g}, got {value:g}")

    def is_above(self, bound: float, *options: str) -> None:
        """Raise PassError for the first of ``options`` that is not above ``bound``."""
        for option in options:
            value = getattr(self, option)
            if not value > bound:
                said = option.replace("_", "-")
                raise PassError(f"{said} must be above {bound:g}, got {value:g}")

    def __str__(self) -> str:
        return syntax.render(self.name, self)


def silent(_: str) -> None:
    """A log that says nothing."""


def no_progress(items: Iterable[A], _label: str, _total: int | None = None) -> Iterable[A]:
    """Progress that shows nothing."""
    return items


@dataclasses.dataclass
class Context:
    """The services that a pass may use. Results of passes live on the model, never here.

    ``reference`` is the float model as captured. ``jobs`` is the number of worker processes that
    ``map`` may use; its result does not depend on it. ``parts`` is what ``checkpoint`` keeps.
    """

    seed: int = 0
    calibration: Calibration | None = None
    target: Target | None = None
    reference: ir.Model | None = None
    jobs: int = 1
    log: Callable[[str], None] = silent
    progress: Callable[..., Iterable[Any]] = no_progress
    parts: MutableMapping[str, Arrays] | None = None

    def rng(self, key: str) -> np.random.Generator:
        """Randomness that depends on the seed and ``key`` only."""
        digest = hashlib.sha256(f"{self.seed}/{key}".encode()).digest()
        return np.random.default_rng(np.frombuffer(digest, np.uint32))

    def map(
        self, function: Callable[[A], B], items: Iterable[A], label: str, total: int | None = None
    ) -> list[B]:
        """``function`` of every item, in order; spread over processes by joblib's configuration.

        ``function`` is pure: arrays and names in, arrays out, no IR objects, no sessions. Items are
        drawn as workers are free: a generator of ``total`` of them need not fit into memory.
        """
        library: Any = joblib  # untyped
        lazy: Iterable[B] = library.Parallel(n_jobs=self.jobs, return_as="generator")(
            library.delayed(threads.with_one)(function, item) for item in items
        )
        count = len(items) if isinstance(items, Sized) else total
        return list(self.progress(lazy, label, count))

    def checkpoint(self, key: str, compute: Callable[[], Arrays]) -> Arrays:
        """What ``compute`` returns, or what it did when a run that was killed was here.

        It depends on ``key``, and on what the state behind this pass depends on (see checkpoints).
        """
        found = None if self.parts is None else self.parts.get(key)
        if found is None:
            found = compute()
            if self.parts is not None:
                self.parts[key] = found
        return found

    def data(self) -> Calibration:
        """The calibration data; raises PassError if there is none."""
        if self.calibration is None:
            raise PassError("this pass needs calibration data: give --calib")
        return self.calibration


# -- text ---------------------------------------------------------------------------------------


def parse(source: str, known: Mapping[str, type[Pass]]) -> list[Pass]:
    """The passes that ``source`` names. Raises PipelineSyntaxError, pointing at the column."""
    return [syntax.build(item, known, "pass", source) for item in syntax.items(source)]


def to_text(passes: Sequence[Pass]) -> str:
    """The text of ``passes``; ``parse`` reads it back to equal passes."""
    return ",".join(str(p) for p in passes)


# -- checks before anything runs ----------------------------------------------------------------


def check(passes: Sequence[Pass], targets: Sequence[Target]) -> None:
    """Raise QCompileError for what cannot work, before anything runs.

    Words: the order of the passes. This machine: packages, or a GPU, that a pass needs. Targets:
    each format of weights, activations and half floats, and each scale taken at run time, that a
    pass will ask for must be one that the target can hold; and what a pass measures must run here.
    """
    problem = _first_problem(passes)
    if problem is not None:
        step, word, spoiler = problem
        if word is None:
            cause = f"{step.name} stands after the lowering, which must be last"
            raise PassError(_with_order(cause, passes))
        raise PassError(_order_message(passes, step, word, spoiler))
    for step in passes:
        if lacking := step.lacks():
            raise PassError(lacking)
    for target in targets:
        for step in passes:
            for form in step.weight_formats():
                target.refuse_weight(form, str(step))
            for form in step.input_formats():
                target.refuse_input(form, str(step))
            for form in step.float_formats():
                target.refuse_float(form, str(step))
            for scale in step.scales():
                target.refuse_scale(scale, str(step))
            if step.measures():
                target.check_measure()


def _first_problem(passes: Sequence[Pass]) -> tuple[Pass, str | None, Pass | None] | None:
    """The first pass that cannot stand where it does, the word it misses, and who spoiled that.

    The word is None for a pass behind the lowering.
    """
    holds: set[str] = set()
    spoiled: dict[str, Pass] = {}
    for step in passes:
        if "lowered" in holds:
            return step, None, None
        for word in sorted(step.relies_on() - holds):
            return step, word, spoiled.get(word)
        for word in step.invalidates & holds:
            spoiled[word] = step
        holds = (holds - step.invalidates) | step.produces
    return None


def _order_message(passes: Sequence[Pass], step: Pass, word: str, spoiler: Pass | None) -> str:
    producers = [p for p in passes if word in p.produces and word not in p.relies_on()]
    if not producers:
        return f"{step.name} requires {word!r}, which no pass of this pipeline produces"
    if spoiler is not None:
        cause = f"{spoiler.name} invalidates the {word!r} that {step.name} requires"
    else:
        cause = f"{step.name} requires {word!r}, which only {producers[0].name} behind it produces"
    return _with_order(cause, passes)


def _with_order(cause: str, passes: Sequence[Pass]) -> str:
    order = working_order(passes)
    return f"{cause}; this order works: {to_text(order)}" if order else cause


def working_order(passes: Sequence[Pass]) -> list[Pass] | None:
    """An order in which every pass finds its words, as near to the given one as may be, or None.

    Producers stand before readers. A spoiler stands before what produces the word anew, unless it
    needs that word itself, as the lowering does; and the lowering is last.
    """
    order: nx.DiGraph[int] = nx.DiGraph()
    order.add_nodes_from(range(len(passes)))
    pairs = [(i, j) for i in range(len(passes)) for j in range(len(passes)) if i != j]
    for i, j in pairs:
        # Two passes that both read and write a word, such as two of set, keep their order.
        mutual = passes[j].produces & passes[i].relies_on()
        if passes[i].produces & passes[j].relies_on() and (i < j or not mutual):
            order.add_edge(i, j)
    for i, j in pairs:
        spoils = passes[i].invalidates & passes[j].produces and not nx.has_path(order, j, i)
        if spoils or ("lowered" in passes[j].produces and "lowered" not in passes[i].produces):
            order.add_edge(i, j)
    if not nx.is_directed_acyclic_graph(order):
        return None
    found = [passes[i] for i in nx.lexicographical_topological_sort(order)]
    return found if _first_problem(found) is None else None


def fork(passes: Sequence[Pass]) -> tuple[list[Pass], list[Pass]]:
    """The passes that run once, and those that run for each target."""
    split = (i for i, p in enumerate(passes) if p.per_target or p.measures())
    first = next(split, len(passes))
    return list(passes[:first]), list(passes[first:])


# -- the run ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Step:
    """What one pass did: seconds, counters, changed lines, SQNR of the outputs before and after."""

    text: str
    seconds: float
    counters: Stats
    changed: tuple[str, ...]
    sqnr_before: float | None
    sqnr_after: float | None


@dataclasses.dataclass
class Watch:
    """What to observe of a run.

    * ``measure``: SQNR in dB of a model against the reference, or None not to measure.
    * ``before``: called with a pass and a copy of the model that it will run on.
    * ``after``: called with (position, pass, model, step) after each pass.
    * ``verify``: check the graph after each pass.
    * ``known``: findings of the model as captured; those that are there at the start if None.
    * ``check_numerics``: raise VerifyError if a pass that keeps the float function did not.
    """

    measure: Callable[[ir.Model], float] | None = None
    before: Callable[[Pass, ir.Model], None] | None = None
    after: Callable[[int, Pass, ir.Model, Step], None] | None = None
    verify: bool = True
    known: Sequence[str] | None = None
    check_numerics: bool = False


# A float rewrite is a reordering of float32 sums; below this SQNR it is not the same function.
SAME_FUNCTION_DB = 60.0


def run(
    model: ir.Model,
    passes: Sequence[Pass],
    ctx: Context,
    watch: Watch | None = None,
    first: int = 0,
) -> list[Step]:
    """Run ``passes`` over ``model`` in place and return what each did.

    Raises QCompileError for what the user can put right, and PassBug for anything else that a pass
    raises, a VerifyError about the graph that it left included. ``first`` is the position of the
    first pass in the whole pipeline, for ``watch.after``.
    """
    watch = watch or Watch()
    steps: list[Step] = []
    known = verify.findings(model) if watch.known is None else watch.known
    ids = {o for node in model.graph for o in graph.origins(node)}
    sqnr = watch.measure(model) if watch.measure and passes else None
    before = text.render(model, weights=True)
    for index, step in enumerate(passes):
        kept = model.clone()  # cheap: the weights are shared
        graph.forget_names(model)
        if watch.before:
            watch.before(step, kept)
        try:
            done = _step(model, step, ctx, watch, known, ids, before, sqnr)
        except QCompileError:
            raise
        except Exception as error:
            raise PassBug(str(step), error, kept, first + index) from error
        steps.append(done.step)
        if watch.after:
            watch.after(first + index, step, model, done.step)
        before, sqnr = done.text, done.step.sqnr_after
    return steps


@dataclasses.dataclass(frozen=True)
class _Done:
    step: Step
    text: str


def _step(
    model: ir.Model,
    step: Pass,
    ctx: Context,
    watch: Watch,
    known: Sequence[str],
    ids: Iterable[str],
    before: str,
    sqnr: float | None,
) -> _Done:
    """Run one pass and check what it left; ``before`` and ``sqnr`` are of the model before it."""
    started = time.perf_counter()
    try:
        with threads.one():
            counters = step.run(model, ctx)
    except PassError as error:
        raise PassError(f"{step}: {error}") from error
    _forget(model, step.invalidates)
    seconds = time.perf_counter() - started
    after = text.render(model, weights=True)
    if watch.verify:
        try:
            verify.verify(model, known, ids, full=after != before)
        except VerifyError as error:
            raise VerifyError(f"broke the graph: {error}") from error
    changed = text.changes(before, after)
    measured = watch.measure(model) if watch.measure and changed else sqnr
    if watch.check_numerics and step.keeps_float and measured is not None:
        kept = min(sqnr if sqnr is not None else np.inf, SAME_FUNCTION_DB)
        # Not "<": the SQNR of outputs that are no longer finite is NaN.
        if not (measured >= kept or np.isnan(kept)):
            raise VerifyError(f"changed the float function: {measured:.1f} dB")
    return _Done(Step(str(step), seconds, counters, tuple(changed), sqnr, measured), after)


def _forget(model: ir.Model, words: frozenset[str]) -> None:
    """Take away the specs or ranges that no longer hold, so that nothing stale can be lowered."""
    if "specs" in words:
        for node in model.graph:
            spec.clear(node)
    if "ranges" in words:
        graph.clear_ranges(model)
    if words & {"specs", "ranges"}:
        graph.remove_dead(model)
