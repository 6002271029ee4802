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
import shlex
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import onnx_ir as ir

from qcompile import (
    bench,
    capture,
    checkpoints,
    crash,
    execute,
    folders,
    graph,
    images,
    opset,
    pipeline,
    ports,
    recipes,
    registry,
    report,
    simulate,
    sources,
    syntax,
    text,
    verify,
)
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
from qcompile.pipeline import Context, Pass, Step, Watch
from qcompile.report import Report

# Below this the compiled model is hardly the same model; the report says so in red.
POOR_DB = 10.0
# How far the SQNR of the optimized run may lie from that of the simulation. Their outputs differ by
# more (a rounding that flips early makes the roundings behind it independent), their distance to
# float does not: a sound file moves by at most 0.25 dB.
SIMULATION_MARGIN_DB = 0.5


@dataclasses.dataclass(frozen=True)
class Options:
    """How to compile; every field is an option of the command line.

    * ``passes``: pipeline text or ``@recipe``; ``targets``: target texts.
    * ``calib``: a source (see sources.load) or an iterable of samples or sequences.
    * ``preprocess``: what makes images samples (see images.Image), as text; ``state``: pairs
      ``INPUT=OUTPUT,...`` that flow from frame to frame; ``mask``: the input that says which
      positions count; ``shape``: texts ``INPUT=1x3x224x224`` that fix dynamic dimensions of random
      data, images and profiles.
    * ``allow_float``: accept a result in which nothing is quantized.
    * ``print_after``: pass names (or ``all``) after which the graph is printed;
      ``print_changes``: print the changed lines of every pass; ``snapshots``: a folder for the
      graph after each pass.
    * ``require_fused``: percentage of the MACs that must run below float precision, by proof.
    * ``latency``: measure latency against float, interleaved (``ort-cpu`` only).
    * ``measure``: time layers on this machine and take the faster decision (``ort-cpu`` only).
    * ``requantize``: take the Q/DQ of a model away that is quantized already.
    * ``resume``: keep the state after every pass, and go on from what a killed run left.
    """

    passes: str = "@int8"
    targets: tuple[str, ...] = ("ort-cpu",)
    calib: str | os.PathLike[str] | Iterable[Any] | None = None
    preprocess: str | None = None
    state: str | None = None
    mask: str | None = None
    shape: tuple[str, ...] = ()
    seed: int = 0
    jobs: int = 1
    allow_float: bool = False
    require_fused: float | None = None
    check_numerics: bool = False
    verify: bool = True
    print_after: tuple[str, ...] = ()
    print_changes: bool = False
    snapshots: pathlib.Path | None = None
    latency: bool = False
    measure: bool = False
    requantize: bool = False
    resume: bool = False
    log: Callable[[str], None] = pipeline.silent
    progress: Callable[..., Iterable[Any]] = pipeline.no_progress


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
    one misses ``require_fused``, and QCompileError for what the user can put right; nothing is
    written then. Raises Bug for anything else, with a reproducer beside ``out``.
    """
    return Compiler(Options(**options)).run(source, pathlib.Path(out))


# Each stands for a quantized layer of a lowered graph.
_QUANTIZED = frozenset(("DequantizeLinear", "MatMulNBits", "MatMulIntegerToFloat"))
# What the file system says that the user can put right.
_OF_THE_SYSTEM = (
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE,
    errno.ENAMETOOLONG,
)  # fmt: skip


class Compiler:
    """One run: everything that can be checked is checked before the model is read."""

    def __init__(self, options: Options) -> None:
        least = options.require_fused
        if least is not None and not 0 <= least <= 100:
            raise QCompileError(f"--require-fused is a percentage from 0 to 100, got {least:g}")
        self.options = options
        self.image = None if options.preprocess is None else images.parse(options.preprocess)
        self.state = None if options.state is None else ports.parse_state(options.state)
        for what in ("state", "mask"):
            if getattr(options, what) is not None and options.calib is None:
                raise CalibrationError(f"--{what} says how to read calibration data: give --calib")
        if options.jobs < 1:
            raise QCompileError(f"--jobs is a number of processes, from 1; got {options.jobs}")
        self._findings: list[str] = []
        self.text = recipes.expand(options.passes)
        self.passes = pipeline.parse(self.text, registry.passes())
        self.targets = [parse_target(t) for t in options.targets]
        names = [str(target) for target in self.targets]
        if len(set(names)) < len(names):
            raise QCompileError(f"a target is named twice: {', '.join(names)}")
        pipeline.check(self.passes, self.targets)
        if not options.allow_float and not any("lowered" in p.produces for p in self.passes):
            raise PassError(
                f"{self.text!r} lowers nothing: end it with calibrate,quantize,insert-qdq "
                "(--allow-float writes a float model all the same)"
            )
        for target in self.targets:
            target.available()
            if options.measure:
                target.check_measure()
        if options.measure and options.calib is None:
            raise CalibrationError("--measure runs the model on calibration data: give --calib")
        known = {p.name for p in self.passes} | {"all"}
        for name in options.print_after:
            if name not in known:
                raise PassError(f"--print-after {name}: the pipeline has no such pass")

    def run(self, source: Any, out: pathlib.Path) -> list[Compiled]:
        """Compile ``source`` into ``out``. Raises Bug, with a reproducer, for what is our fault."""
        self._part = crash.Part(None, self.text, str(self.targets[0]))
        try:
            with _rare_collections():
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
                rest = pipeline.to_text(self.passes[error.position :])
                part = dataclasses.replace(part, model=error.model, passes=rest)
            raise crash.write(error, out, part, self.options.seed) from error

    def _run(self, source: Any, out: pathlib.Path) -> list[Compiled]:
        folders.check(out)
        if self.options.snapshots is not None:
            folders.check_writable(self.options.snapshots)
        model = capture.capture(source, self.options.requantize)
        ports.choose_shapes(model, self.options.shape)
        image = self._fold(model)
        calibration = self._calibration(model, image)
        if calibration is not None:
            execute.survive(model, calibration.samples[0])
            execute.complete_types(model, calibration.samples[0])
        reference = model.clone()
        self._known = verify.findings(model)
        self._findings = [f"the model as captured: {f}" for f in self._known]
        self._part = crash.Part(reference, self.text, str(self.targets[0]), calibration)
        judge = simulate.Judge(reference, calibration.judges) if calibration else None
        self._check_conversion(source, reference, judge)
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
                place = folder / target.name if len(self.targets) > 1 else folder
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

        def keep(model: ir.Model, done: Step) -> None:
            steps.append(done)
            key = next(behind, None)
            if key is not None:
                states.save(key, model, steps)

        assert context.target is not None
        watch = self._watch(judge, context.target, place, keep)
        watch.before, watch.known = before, self._known
        pipeline.run(model, passes, context, watch, position)
        return model, steps

    def _check_conversion(
        self, source: Any, reference: ir.Model, judge: simulate.Judge | None
    ) -> None:
        """Run the file as it came against the model as captured, if its opset was converted."""
        original = capture.read(source)
        if original is None or opset.of(original) >= opset.CONVERTED:
            return
        what = f"converting opset {opset.of(original)} to {opset.CONVERTED}"
        if judge is None:
            self._findings.append(f"{what} was not checked by running: there is no data")
            return
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
        least = self.options.require_fused
        for result in results:
            reached = result.report.fused() * 100
            if least is not None and reached < least:
                raise RequirementError(
                    f"{result.report.target}: {reached:.1f} % of the MACs run in integers, "
                    f"{least:g} % are required",
                    results,
                )

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
        place = f"-{target.name}" if len(self.targets) > 1 else ""
        last = next((i for i, p in enumerate(passes) if "lowered" in p.produces), len(passes))
        keys = checkpoints.keys(key, passes[:last], str(target))
        self._part = crash.Part(model, pipeline.to_text(passes), str(target), context.calibration)
        decided = model

        def before(step: Pass, model: ir.Model) -> None:
            nonlocal decided
            if "lowered" in step.produces:
                decided = model

        chosen: list[Pass] = []
        steps: list[Step] = []
        if self.options.measure and context.calibration is not None:
            first = passes[:last]
            model, steps = self._through(model, first, context, judge, place, position, keys)
            texts = target.measure(model, context.calibration, self.options.log)
            chosen = pipeline.parse(",".join(texts), registry.passes()) if texts else []
            passes, keys, position = [*chosen, *passes[last:]], [], position + last
        model, more = self._through(model, passes, context, judge, place, position, keys, before)
        steps = [*steps, *more]
        self._part = crash.Part(model, "", str(target), context.calibration)
        self._refuse_float(model)
        assert context.reference is not None
        words = self._text_with(chosen)
        stamp(model, words, target, self.options.seed, context.calibration)
        main = target.emit(model, folder, context.calibration)
        finished = self._report(
            name, context, target, decided, model, main, [*shared, *steps], judge, words
        )
        (folder / "report.json").write_text(finished.to_json())
        (folder / "pipeline.txt").write_text(self._command(target, words))
        return Compiled(model, finished, folder)

    def _text_with(self, chosen: Sequence[Pass]) -> str:
        """The pipeline with the passes that were ``chosen`` by measurement before the lowering."""
        if not chosen:
            return self.text
        last = next(i for i, p in enumerate(self.passes) if "lowered" in p.produces)
        return pipeline.to_text([*self.passes[:last], *chosen, *self.passes[last:]])

    def _command(self, target: Target, passes: str) -> str:
        """The options that make the same file of the same model and data."""
        options, words = self.options, ["--passes", passes, "--target", str(target)]
        for what in ("preprocess", "state", "mask"):
            given: str | None = getattr(options, what)
            words += [] if given is None else [f"--{what}", given]
        for given in options.shape:
            words += ["--shape", given]
        return shlex.join(words) + "\n"

    def _report(
        self,
        name: str,
        context: Context,
        target: Target,
        decided: ir.Model,
        lowered: ir.Model,
        main: pathlib.Path,
        steps: Sequence[Step],
        judge: simulate.Judge | None,
        words: str,
    ) -> Report:
        calibration, reference = context.calibration, context.reference
        assert reference is not None
        proof = target.prove(lowered, main.parent)
        shapes = calibration.shapes(reference) if calibration else {}
        values = [layer.biased_output.name or "" for layer in graph.layers(decided)]
        sqnr = simulate.layer_sqnr(reference, lowered, values, judge.samples[:4]) if judge else {}
        rows = report.layer_reports(reference, decided, lowered, proof, shapes, sqnr)
        size = report.Size(execute.weight_bytes(reference), _bytes_of(main))
        outputs: list[report.Output] = []
        apart: float | None = None
        latency: bench.Latency | None = None
        if judge is not None:
            simulated = simulate.Session(lowered, optimize=False)
            runs_here = main.suffix == ".onnx"
            actual = execute.Session(main) if runs_here else simulated
            found, cosine = judge.sqnr(actual), judge.cosine(actual)
            expected = judge.sqnr(simulated) if runs_here else found
            uneven = judge.uneven(actual)
            nan = math.nan
            outputs = [
                report.Output(
                    n, found.get(n, nan), expected.get(n, nan), cosine.get(n, nan), uneven[n]
                )
                for n in judge.outputs
            ]
            if runs_here:
                apart = min(judge.between(simulated, actual).values(), default=math.inf)
            if self.options.latency and runs_here:
                floats = [execute.Session(reference, threads=1) for _ in range(2)]
                compiled = execute.Session(main, threads=1)
                latency = bench.interleaved(floats[0], floats[1], compiled, judge.samples)
        warnings = _warnings(calibration, outputs, size, latency)
        return Report(
            model=name,
            pipeline=words,
            target=str(target),
            seed=self.options.seed,
            versions=report.versions(),
            data=_data_report(calibration) if calibration else None,
            passes=tuple(steps),
            layers=tuple(rows),
            outputs=tuple(outputs),
            left_alone=tuple(report.left_alone(reference, rows)),
            share=report.shares(rows),
            size=size,
            latency=latency,
            simulated_against_run=apart,
            warnings=(*self._findings, *target.notes(lowered), *warnings),
        )

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
            if any(p.reads_data for p in self.passes):
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
        )  # fmt: skip
        return Calibration(data, options.progress, options.mask)

    def _watch(
        self,
        judge: simulate.Judge | None,
        target: Target,
        place: str,
        keep: Callable[[ir.Model, Step], None],
    ) -> Watch:
        def measure(model: ir.Model) -> float:
            assert judge is not None
            return judge.worst(simulate.simulate(model, target))

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
        quantized = any(n.op_type in _QUANTIZED for n in model.graph)
        if quantized or self.options.allow_float:
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


def parse_target(source: str) -> Target:
    """The target that ``source`` names, as in ``tensorrt-rtx{cc=89,120}``."""
    items = syntax.items(source)
    if len(items) > 1:
        raise QCompileError(f"{source!r} names several targets; give --target once for each")
    return syntax.build(items[0], registry.targets(), "target", source)


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


def _warnings(
    calibration: Calibration | None,
    outputs: Sequence[report.Output],
    size: report.Size,
    latency: bench.Latency | None,
) -> list[str]:
    found: list[str] = []
    if calibration is not None and calibration.data.random:
        found.append("calibrated on random noise: ranges and accuracy say nothing about your data")
    if calibration is not None and not calibration.apart:
        what = "sequences" if calibration.state else "samples"
        found.append(f"too few {what} to keep any apart: accuracy is on the calibration samples")
    for output in outputs:
        if output.uneven:
            found.append(
                f"output {output.name!r} has another size than in float for {output.uneven} "
                "samples, which its figures leave out"
            )
        if math.isnan(output.sqnr):
            if not output.uneven:
                found.append(f"output {output.name!r} is not finite: its accuracy is unknown")
            continue
        if not output.sqnr >= POOR_DB:
            found.append(f"output {output.name!r} has only {output.sqnr:.1f} dB of SQNR")
        moved = output.sqnr != output.simulated  # equal infinities have no difference
        if moved and not abs(output.sqnr - output.simulated) <= SIMULATION_MARGIN_DB:
            found.append(
                f"output {output.name!r} has {output.sqnr:.1f} dB as the runtime optimizes it and "
                f"{output.simulated:.1f} dB without: the runtime changes the result"
            )
    if size.compiled_bytes >= size.float_bytes:
        found.append("the file did not shrink: it has more bytes than the weights in float")
    if latency is not None and latency.ratio > 1.0:
        found.append(f"the compiled model is slower than float: {latency.ratio:.2f}")
    return found


def _data_report(calibration: Calibration) -> report.DataReport:
    return report.DataReport(
        source=calibration.data.source,
        digest=calibration.data.digest,
        samples=len(calibration.samples),
        judged=len(calibration.judges),
        judged_apart=calibration.apart,
        random=calibration.data.random,
        sequences=calibration.data.samples.sequences,
        state=dict(calibration.state),
        mask=calibration.mask,
    )


def _bytes_of(main: pathlib.Path) -> int:
    return sum(p.stat().st_size for p in main.parent.glob(f"{main.name}*"))


def _name(source: Any) -> str:
    return os.fspath(source) if isinstance(source, str | os.PathLike) else type(source).__name__
