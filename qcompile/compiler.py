"""compile(): capture, pipeline, fork per target, lowering, proof, report, files."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import json
import math
import os
import pathlib
import re
import shlex
from collections.abc import Callable, Generator, Sequence
from typing import Any

import onnx_ir as ir

from qcompile import (
    accuracy,
    capture,
    checkpoints,
    cluster,
    crash,
    execute,
    folders,
    graph,
    halves,
    images,
    measure,
    opset,
    page,
    pipeline,
    ports,
    recipes,
    registry,
    report,
    search,
    simulate,
    sources,
    text,
    verify,
)
from qcompile.accuracy import Bound, Evaluation
from qcompile.backends.base import Target
from qcompile.calibrate import Calibration
from qcompile.errors import (
    CalibrationError,
    CaptureError,
    PassBug,
    PassError,
    QCompileError,
    RequirementError,
    TargetError,
)
from qcompile.images import Image
from qcompile.measure import Judged, Made
from qcompile.options import Options, parse_target
from qcompile.pipeline import Context, Pass, Step, Watch
from qcompile.report import Report


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The result for one target: the lowered graph, its report, and where it was written."""

    model: ir.Model
    report: Report
    folder: pathlib.Path


def compile(
    source: str | os.PathLike[str] | Any, out: str | os.PathLike[str], **options: Any
) -> list[Compiled]:
    """Compile a model for one or several targets.

    Args:
        source: what capture.capture takes.
        out: the folder to write, which appears whole or not at all; with several targets it holds
            one folder a target.
        options: the fields of Options.

    Returns the results in the order of the targets. Raises RequirementError, with the results, if
    one misses a requirement, and QCompileError for what the user can put right; nothing is
    written then. Raises Bug for anything else, with a reproducer beside ``out``.
    """
    return Compiler(Options(**options)).run(source, pathlib.Path(out))


# Each stands for a quantized layer of a lowered graph.
_QUANTIZED = frozenset(
    ("DequantizeLinear", "MatMulNBits", "GatherBlockQuantized", "MatMulIntegerToFloat")
)
# What the file system says that the user can put right.
_OF_THE_SYSTEM = (
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE,
    errno.ENAMETOOLONG,
)  # fmt: skip


class Compiler:
    """One run: everything that can be checked is checked before the model is read."""

    def __init__(self, options: Options) -> None:
        options.check()
        self.options = options
        self.image = None if options.preprocess is None else images.parse(options.preprocess)
        self.state = None if options.state is None else ports.parse_state(options.state)
        self.metric = None if options.metric is None else accuracy.parse(options.metric)
        self.bound = None if options.max_drop is None else Bound.parse(options.max_drop)
        self.reading = options.reading()
        self._findings: list[str] = []
        self.text = recipes.expand(options.passes)
        self.passes = pipeline.parse(self.text, registry.passes())
        self.targets = [parse_target(t) for t in options.targets]
        names = [str(target) for target in self.targets]
        if len(set(names)) < len(names):
            raise QCompileError(f"a target is named twice: {', '.join(names)}")
        pipeline.check(self.passes, self.targets)
        self._promised = {word for p in self.passes for word in p.produces}
        if not options.allow_float and not self._promised & {"lowered", "narrowed"}:
            raise PassError(
                f"{self.text!r} lowers nothing: end it with calibrate,quantize,insert-qdq "
                "(--allow-float writes a float model all the same)"
            )
        for target in self.targets:
            target.available()
            if options.measure:
                target.check_measure()
        known = {p.name for p in self.passes} | {"all"}
        for name in options.print_after:
            if name not in known:
                raise PassError(f"--print-after {name}: the pipeline has no such pass")

    def run(self, source: Any, out: pathlib.Path) -> list[Compiled]:
        """Compile ``source`` into ``out``. Raises Bug, with a reproducer, for what is our fault."""
        self._part = crash.Part(None, self.text, str(self.targets[0]))
        self._whole = self.passes  # with what a search has put in front of the lowering
        try:
            with _rare_collections(), cluster.spread(self.options.cluster):
                return self._run(source, out)
        except QCompileError:
            raise
        except MemoryError as error:
            raise QCompileError("out of memory; a model this size needs more of it") from error
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _OF_THE_SYSTEM:
                where = f" {error.filename!r}" if error.filename else ""
                raise QCompileError(
                    f"cannot read or write{where}: {error.strerror}; nothing was written"
                ) from error
            part = self._part
            if isinstance(error, PassBug):
                rest = pipeline.to_text(self._whole[error.position :])
                part = dataclasses.replace(part, model=error.model, passes=rest)
            raise crash.write(error, out, part, self.options.seed) from error

    def _run(self, source: Any, out: pathlib.Path) -> list[Compiled]:
        folders.check(out)
        if self.options.snapshots is not None:
            folders.check_writable(self.options.snapshots)
        model, image, calibration = self.opened(source)
        for target in self.targets:
            target.check_shapes(model, calibration)
        reference = model.clone()
        self._known = verify.findings(model)
        self._findings = [f"the model as captured: {f}" for f in self._known]
        self._part = crash.Part(reference, self.text, str(self.targets[0]), calibration)
        judge = simulate.Judge(reference, calibration.judges) if calibration else None
        self._check_conversion(source, model, reference, judge)
        self._evaluation = self._evaluated(model, image, reference)
        shared, forked = pipeline.fork(self.passes)
        context = self._context(calibration, reference, self.targets[0])
        self._states = checkpoints.Checkpoints(self.options.resume, self.options.log)
        data = calibration.digest if calibration else ""
        first = checkpoints.first_key(
            model, data, str(self.options.seed), " ".join(self.options.shape)
        )
        keys = checkpoints.keys(first, shared)
        model, steps = self._through(model, shared, context, judge, "", 0, keys)
        results: list[Compiled] = []
        with folders.appearing(out) as folder:
            for target in self.targets:
                place = folder / self._named(target) if len(self.targets) > 1 else folder
                place.mkdir(exist_ok=True)
                self.options.log(f"lowering for {target}")
                done = self._lower(
                    _name(source), model.clone(), forked, target, place, steps,
                    self._context(calibration, reference, target), judge, len(shared),
                    keys[-1] if keys else first,
                )  # fmt: skip
                results.append(dataclasses.replace(done, folder=out / place.relative_to(folder)))
        self._require(results)
        return results

    def _named(self, target: Target) -> str:
        """The name of the folder of ``target``, with its options if another has its name."""
        alike = [other for other in self.targets if other.name == target.name]
        return target.name if len(alike) == 1 else re.sub(r"[^\w.]+", "-", str(target)).strip("-")

    def opened(self, source: Any) -> tuple[ir.Model, Image | None, Calibration | None]:
        """The model as captured, the preprocessing left outside of it, and calibration data."""
        model = capture.capture(source, self.options.requantize)
        ports.choose_shapes(model, self.options.shape)
        image = self._fold(model)
        calibration = self._calibration(model, image)
        if calibration is not None:
            execute.survive(model, calibration.samples[0])
            execute.complete_types(model, calibration.samples[0])
        return model, image, calibration

    def _through(
        self,
        model: ir.Model,
        passes: Sequence[Pass],
        context: Context,
        judge: simulate.Judge | None,
        place: str,
        position: int,
        keys: Sequence[str],
        before: Callable[[Pass, ir.Model], None] | None = None,
    ) -> tuple[ir.Model, list[Step]]:
        """``model`` behind ``passes``, as far as may be from a state that a killed run left.

        ``keys`` are those of the states behind the first passes; those behind them keep none.
        """
        states, steps = self._states, list[Step]()
        found = states.resumed(keys)
        if found is not None:
            count, model, steps = found
            passes, keys, position = passes[count:], keys[count:], position + count
        behind = iter(keys)
        key: str | None = None

        def start(step: Pass, model: ir.Model) -> None:
            nonlocal key
            key = next(behind, None)
            context.parts = states.parts(key)
            if before is not None:
                before(step, model)

        def keep(model: ir.Model, done: Step) -> None:
            steps.append(done)
            if key is not None:
                states.save(key, model, steps)
            if context.parts is not None:
                context.parts.clear()

        assert context.target is not None
        watch = self._watch(judge, context.target, place, keep)
        watch.before, watch.known = start, self._known
        pipeline.run(model, passes, context, watch, position)
        return model, steps

    def _check_conversion(
        self, source: Any, model: ir.Model, reference: ir.Model, judge: simulate.Judge | None
    ) -> None:
        """Run the file as it came against the captured ``model``, if its opset was converted."""
        given = capture.given_opset(model)
        if given is None or given >= opset.CONVERTED:
            return
        what = f"converting opset {given} to {opset.CONVERTED}"
        if judge is None:
            self._findings.append(f"{what} was not checked by running: there is no data")
            return
        original = capture.read(source)
        assert original is not None  # it has an opset
        self._fold(original)
        try:
            session = execute.Session(original, optimize=False)
        except TargetError as error:
            self._findings.append(f"{what} was not checked by running: {error}")
            return
        # Both as written: what the runtime rounds otherwise, a selection of boxes amplifies.
        plain = execute.Session(reference, optimize=False)
        worst = min(judge.between(session, plain).values(), default=math.inf)
        if math.isnan(worst):
            self._findings.append(f"{what} was not checked: the outputs are not finite")
        elif not worst >= pipeline.SAME_FUNCTION_DB:
            raise CaptureError(
                f"{what} changed the function ({worst:.1f} dB); export the model at opset "
                f"{opset.CONVERTED} or above"
            )

    def _require(self, results: Sequence[Compiled]) -> None:
        """Raise RequirementError for the first result that misses a requirement."""
        for result in results:
            missed = self._missed(result.report)
            if missed:
                raise RequirementError(f"{result.report.target}: {missed}", results)

    def _missed(self, found: Report) -> str:
        """The first requirement that a result misses, in words; "" if there is none."""
        fused, sqnr = self.options.require_fused, self.options.min_sqnr
        if fused is not None and found.fused() * 100 < fused:
            return (
                f"{found.fused() * 100:.1f} % of the MACs run in integers, {fused:g} % are required"
            )
        if sqnr is not None and not found.outputs:
            return f"no output holds floats, {sqnr:g} dB of SQNR are required"
        for output in found.outputs:
            if sqnr is not None and not output.sqnr >= sqnr:  # NaN misses it
                what = "no" if math.isnan(output.sqnr) else f"{output.sqnr:.1f} dB of"
                return f"output {output.name!r} has {what} SQNR, {sqnr:g} dB are required"
        kept = found.accuracy
        if kept is not None and kept.met is False:
            best = "the best with a layer quantized is " if kept.given_back else ""
            return f"a drop of {kept.wanted} at most is required, {best}{kept.words()}"
        return ""

    def _lower(
        self,
        name: str,
        model: ir.Model,
        passes: Sequence[Pass],
        target: Target,
        folder: pathlib.Path,
        shared: Sequence[Step],
        context: Context,
        judge: simulate.Judge | None,
        position: int,
        key: str,
    ) -> Compiled:
        # Each target runs the passes behind the fork: their snapshots need names of their own.
        place = f"-{self._named(target)}" if len(self.targets) > 1 else ""
        last = next((i for i, p in enumerate(passes) if "lowered" in p.produces), len(passes))
        keys = checkpoints.keys(key, passes[:last], str(target))
        self._part = crash.Part(model, pipeline.to_text(passes), str(target), context.calibration)
        decided = model

        def before(step: Pass, model: ir.Model) -> None:
            nonlocal decided
            if "lowered" in step.produces:
                decided = model

        self._whole = self.passes
        count = self._evaluation.count if self._evaluation else 0
        found: search.Found | None = None
        done: list[Step] = []
        while (timed := next((i for i, p in enumerate(passes[:last]) if p.measures()), -1)) >= 0:
            # No two measurements are alike: the text that makes the file again has their choice.
            behind, whole = timed + 1, self._whole
            model, more = self._through(
                model, passes[:behind], context, judge, place, position, keys[:behind]
            )
            done += more
            chosen = passes[timed].chosen(model)
            self._whole = [*whole[: position + timed], *chosen, *whole[position + behind :]]
            position += timed + len(chosen)
            passes, keys, last = passes[behind:], keys[behind:], last - behind
        front = position + last
        if self.options.measure and context.calibration is not None:
            model, more = self._through(model, passes[:last], context, judge, place, position, keys)
            done += more
            texts = target.measure(model, context.calibration, self.options.log)
            chosen = pipeline.parse(",".join(texts), registry.passes()) if texts else []
            self._whole = [*self._whole[:front], *chosen, *self._whole[front:]]
            position, keys, passes, last = front, [], self._whole[front:], len(chosen)
            front += last
        if self._evaluation is not None and self.bound is not None and last < len(passes):
            # What is given back stands in front of the lowering, as if the user had written it.
            model, more = self._through(model, passes[:last], context, judge, place, position, keys)
            done += more
            found = search.meet(model, context, self._evaluation, self.bound)
            self._whole = [*self._whole[:front], *found.passes, *self._whole[front:]]
            position, keys, passes = front, [], self._whole[front:]
        model, steps = self._through(model, passes, context, judge, place, position, keys, before)
        if "lowered" not in self._promised:
            decided = model
        self._part = crash.Part(model, "", str(target), context.calibration)
        self._refuse_float(model)
        written = self.text if self._whole == self.passes else pipeline.to_text(self._whole)
        stamp(model, written, target, self.options.seed, context.calibration)
        main = target.emit(model, folder, context.calibration)
        made = Made(name, decided, model, main, written, [*shared, *done, *steps])
        judged = Judged(judge, self._evaluation, self.bound, found, count)
        finished = measure.report_of(made, context, judged, self._findings, self.options.latency)
        (folder / "report.json").write_text(finished.to_json())
        (folder / "report.html").write_text(page.render(finished), encoding="utf-8")
        command = shlex.join(self.options.data_words(target, written))
        (folder / "pipeline.txt").write_text(f"{command}\n")
        return Compiled(model, finished, folder)

    def _context(
        self, calibration: Calibration | None, reference: ir.Model, target: Target
    ) -> Context:
        options = self.options
        return Context(
            seed=options.seed, calibration=calibration, target=target, reference=reference,
            jobs=options.jobs, log=options.log, progress=options.progress,
        )  # fmt: skip

    def _fold(self, model: ir.Model) -> Image | None:
        """Fold the preprocessing into ``model`` if asked to; return what is left outside."""
        folded = self.image is not None and self.image.fold
        return images.fold(model, self.image) if self.image and folded else self.image

    def _calibration(self, model: ir.Model, image: Image | None) -> Calibration | None:
        options = self.options
        if options.calib is None:
            if any(p.needs_data() for p in self.passes):
                raise CalibrationError(
                    "no calibration data: give --calib with an .npz file or "
                    "package.module:iterable (nothing is calibrated on noise unless you say "
                    "--calib random)"
                )
            return None
        inputs, outputs = ports.inputs_of(model), ports.outputs_of(model)
        if self.state is not None:
            ports.check_state(self.state, inputs, outputs)
        if options.mask is not None:
            ports.check_mask(options.mask, inputs)
        data = sources.load(
            options.calib, inputs, options.seed,
            preprocess=image, state=self.state, outputs=outputs, log=options.log,
            text=self.reading,
        )  # fmt: skip
        return Calibration(data, options.progress, options.mask)

    def _evaluated(
        self, model: ir.Model, image: Image | None, reference: ir.Model
    ) -> Evaluation | None:
        """The user's metric on the user's data, measured in float; None if none is asked for."""
        options = self.options
        if options.eval is None or self.metric is None:
            return None
        pictures = isinstance(options.eval, str | os.PathLike) and os.path.isdir(options.eval)
        data = sources.load(
            options.eval, ports.inputs_of(model), options.seed,
            preprocess=image if pictures else None, state=self.state,
            outputs=ports.outputs_of(model), log=options.log, labelled=True,
            text=self.reading if str(options.eval).endswith(".txt") else None,
        )  # fmt: skip
        return Evaluation(self.metric, reference, data, options.mask)

    def _watch(
        self,
        judge: simulate.Judge | None,
        target: Target,
        place: str,
        keep: Callable[[ir.Model, Step], None],
    ) -> Watch:
        def measure(model: ir.Model) -> float:
            assert judge is not None
            return judge.worst(judge.simulated(simulate.lowered(model, target)))

        def after(position: int, step: Pass, model: ir.Model, done: Step) -> None:
            self._observe(position, step, model, done, place)
            keep(model, done)

        return Watch(
            measure=measure if judge is not None else None,
            after=after,
            verify=self.options.verify,
            check_numerics=self.options.check_numerics,
        )

    def _observe(self, position: int, step: Pass, model: ir.Model, done: Step, place: str) -> None:
        options = self.options
        counters = ", ".join(f"{v} {k}" for k, v in done.counters.items())
        moved = ""
        if done.sqnr_after is not None and done.sqnr_after != done.sqnr_before:
            moved = f"; SQNR {done.sqnr_before:.1f} -> {done.sqnr_after:.1f} dB"
        options.log(f"{done.text}: {counters or 'nothing to count'}{moved} ({done.seconds:.1f} s)")
        if options.print_changes:
            options.log("\n".join(done.changed))
        if step.name in options.print_after or "all" in options.print_after:
            options.log(text.render(model))
        if options.snapshots is not None:
            options.snapshots.mkdir(parents=True, exist_ok=True)
            stem = options.snapshots / f"{position:02d}-{step.name}{place}"
            stem.with_suffix(".txt").write_text(text.render(model, weights=True))
            execute.save(model, stem.with_suffix(".onnx"))

    def _refuse_float(self, model: ir.Model) -> None:
        if self.options.allow_float:
            return
        if "lowered" not in self._promised:
            if not any(halves.of(v.dtype) for v in graph.values(model)):
                raise PassError(
                    f"nothing is a half float after {self.text!r}: all of the model must stay "
                    "float32 (--allow-float writes the model all the same)"
                )
            return
        if any(n.op_type in _QUANTIZED for n in model.graph):
            return
        raise PassError(
            f"nothing is quantized by {self.text!r}: no layer was found that the passes and the "
            "target can quantize (--allow-float writes the model all the same)"
        )


@contextlib.contextmanager
def _rare_collections() -> Generator[None]:
    """Look for cyclic garbage a hundred times more rarely.

    A graph is a million small objects that live on, and each look goes through all of them.
    """
    before = gc.get_threshold()
    gc.set_threshold(before[0] * 100, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Read an ONNX file as it is, without the repairs of capture."""
    try:
        return execute.load(path)
    except Exception as error:  # protobuf, onnx-ir and the file system raise their own kinds
        raise QCompileError(f"{os.fspath(path)!r} is not a readable ONNX model: {error}") from error


def diff(a: str | os.PathLike[str], b: str | os.PathLike[str], weights: bool = False) -> list[str]:
    """The changed lines between two ONNX files; ``weights`` compares the numbers as well."""
    return text.changes(text.render(load(a), weights), text.render(load(b), weights))


def stamp(
    model: ir.Model, passes: str, target: Target, seed: int, calibration: Calibration | None
) -> None:
    """Write into the metadata of ``model`` how it was made."""
    model.metadata_props["qcompile"] = json.dumps(
        {
            "pipeline": passes,
            "target": str(target),
            "seed": seed,
            "data": calibration.data.digest if calibration else None,
            "random_calibration": bool(calibration and calibration.data.random),
            "versions": report.versions(),
        },
        sort_keys=True,
    )


def _name(source: Any) -> str:
    return os.fspath(source) if isinstance(source, str | os.PathLike) else type(source).__name__
