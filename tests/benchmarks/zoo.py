"""Any model, one command, no special option: what comes out for each target.

    python tests/benchmarks/zoo.py [--quick] [--only NAME ...] [--json FILE]

Every model is compiled with the default recipe for both targets in one run; if that fails, for
each target alone, so that one does not hide the other. The file for ``ort-cpu`` is opened and run
by ONNX Runtime alone, without qcompile. SQNR is against the model as it came, on judge data that
calibrated nothing, worst and best output; an output whose size the data sets has none where the
sizes differ. *Task* is what the labels of the judge data say, where there are any, of float and
compiled. Latency is the median ratio to float, one thread, interleaved. What multiplies and is
neither a layer of the report nor named as left alone would be *silent*: there must be nothing.
``--quick`` takes the shipped models only, ``--only`` the models whose name holds one of the words.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
import itertools
import math
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import common
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
from common import Claim
from rich.table import Table

import qcompile
from qcompile import capture, execute, graph, ports, report, sequences, sources
from qcompile.errors import Bug, QCompileError
from qcompile.models import fashion

Array = npt.NDArray[Any]
Results = Sequence[Mapping[str, Array]]

TARGETS = ("ort-cpu", "tensorrt-rtx")
# Operators that multiply, or hold others that may.
LOUD = frozenset(
    (
        "Conv", "ConvTranspose", "DeformConv", "MatMul", "Gemm", "Einsum", "Attention",
        *graph.RECURRENT, "If", "Loop", "Scan",
    )
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Work:
    """One model with its data.

    ``model`` is a source of capture, or a function that returns or writes (into the given folder)
    an ONNX file. ``score`` says of the outputs for all judge samples, in order, how many are right.
    """

    name: str
    model: str | Callable[[pathlib.Path], str | pathlib.Path]
    calibration: str
    judge: Callable[[], Iterable[Any]]
    score: Callable[[Results], float] | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """One model for one target; figures are None where ``error`` says why there are none."""

    model: str
    target: str
    result: str
    error: str | None
    seconds: float
    sqnr: dict[str, float | None]
    float_score: float | None
    score: float | None
    latency: float | None
    null: float | None
    macs: dict[str, float]
    float_mb: float | None
    mb: float | None
    left_alone: dict[str, int]
    silent: tuple[str, ...]
    warnings: tuple[str, ...]


# -- the models ---------------------------------------------------------------------------------


def fashion_work(name: str, file: str) -> Work:
    """A shipped model with the first 500 test pictures."""

    def judge() -> Iterator[dict[str, Array]]:
        return ({"image": picture[None]} for picture in fashion.test()[0][:500])

    def score(results: Results) -> float:
        found = [int(next(iter(result.values())).argmax()) for result in results]
        return float(np.mean(np.equal(found, fashion.test()[1][: len(found)])))

    data = fashion.path(fashion.CALIBRATION)
    return Work(name, str(fashion.path(file)), str(data), judge, score)


def module(name: str) -> Any:
    """A module of models, loaded when it is needed, because most need an extra."""
    return importlib.import_module(f"qcompile.models.{name}")


def public(name: str, file: str, factory: str, data: str, most: int = 40) -> Work:
    """A torch factory of ``qcompile.models.<file>``, judged on ``most`` samples."""
    place = f"qcompile.models.{file}"
    return Work(
        name, f"{place}:{factory}", f"{place}:{data}_calibration",
        lambda: itertools.islice(getattr(module(file), f"{data}_judge")(), most),
    )  # fmt: skip


def labelled(name: str, file: str, model: str, right: Callable[[Any, Any, Array], float]) -> Work:
    """An ONNX file with labels: ``right`` says of a module, a label and an output how right it is.

    A label that has nothing to say weighs nothing: ``right`` is NaN then.
    """

    def pairs() -> Iterator[tuple[Any, Any]]:
        return getattr(module(file), f"{model}_labelled")("judge")

    def score(results: Results) -> float:
        labels = [label for _, label in pairs()]
        outputs = [next(iter(result.values())) for result in results]
        marks = [right(module(file), *pair) for pair in zip(labels, outputs, strict=True)]
        return float(np.nanmean(marks))

    return Work(
        name, lambda _: getattr(module(file), model)(),
        f"qcompile.models.{file}:{model}_calibration", lambda: (s for s, _ in pairs()), score,
    )  # fmt: skip


def words_found(_: Any, centres: Sequence[tuple[int, int]], output: Array) -> float:
    """The share of the words with a mark of the detector near their centre."""
    marked = output[0, 0] > 0.3
    found = [bool(marked[y - 3 : y + 4, x - 3 : x + 4].any()) for y, x in centres]
    return float(np.mean(found)) if found else math.nan


def text_read(ocr: Any, text: str, output: Array) -> float:
    """1 if the recognizer reads ``text``, else 0."""
    return float(ocr.read(output[0], ocr.characters()) == text)


def type_told(filetypes: Any, kind: str, output: Array) -> float:
    """1 if the best class is ``kind``, else 0."""
    return float(filetypes.types()[int(output[0].argmax())] == kind)


def turn_told(_: Any, turned: int, output: Array) -> float:
    """1 if the classifier sees which way up the line is, else 0."""
    return float(int(output[0].argmax()) == turned)


def speech_heard(results: Results) -> float:
    """The share of sequences in which a tenth of the frames sounds like speech if some is in it."""
    labels = [label for _, label in module("speech").silero_labelled("judge")]
    frames = np.reshape([result["output"].item() for result in results], (len(labels), -1))
    return float(np.mean(np.equal((frames > 0.5).mean(axis=1) > 0.1, labels)))


SHIPPED = (fashion_work("CNN", fashion.CNN), fashion_work("ViT", fashion.VIT))
PUBLIC = (
    public("EfficientNet-Lite0", "public", "efficientnet_lite0", "efficientnet", 100),
    public("EfficientNet-Lite1", "public", "efficientnet_lite1", "efficientnet_lite1", 100),
    public("MiniLM", "public", "minilm", "minilm", 100),
    labelled("PP-OCR det", "ocr", "det", words_found),
    labelled("PP-OCR rec", "ocr", "rec", text_read),
    labelled("PP-OCR cls", "ocr", "cls", turn_told),
    labelled("Magika", "filetypes", "magika", type_told),
    Work(
        "Silero VAD", lambda _: module("speech").silero(),
        "qcompile.models.speech:silero_calibration", lambda: module("speech").silero_judge(),
        speech_heard,
    ),
    public("SSDlite", "vision", "ssdlite", "ssdlite"),
    Work(
        "Faster R-CNN", lambda folder: module("vision").faster_rcnn(folder),
        "qcompile.models.vision:faster_rcnn_calibration",
        lambda: module("vision").faster_rcnn_judge(),
    ),
    public("DeepLabV3", "vision", "deeplabv3", "segmentation"),
    public("LR-ASPP", "vision", "lraspp", "segmentation"),
    public("U-Net", "vision", "unet", "segmentation"),
)  # fmt: skip


# -- measuring ----------------------------------------------------------------------------------


class Plain:
    """A file in ONNX Runtime as a user opens it, without qcompile."""

    def __init__(self, path: pathlib.Path, optimize: bool = True) -> None:
        runtime: Any = onnxruntime  # untyped
        options = runtime.SessionOptions()
        if not optimize:
            options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session: Any = runtime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self.outputs: tuple[str, ...] = tuple(o.name for o in self._session.get_outputs())
        self._inputs = [i.name for i in self._session.get_inputs()]

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """The values of ``outputs``, of all if None."""
        names = list(self.outputs if outputs is None else outputs)
        read = {name: feeds[name] for name in self._inputs}
        return dict(zip(names, self._session.run(names, read), strict=True))


class Split:
    """An engine's graph and the tail that is run behind it, as one session."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._head = Plain(folder / "model.onnx", optimize=False)
        self._tail = Plain(folder / "tail.onnx")

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of all outputs, of what the tail reads as well."""
        return (*self._head.outputs, *self._tail.outputs)

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """``outputs`` (all if None) for ``feeds``."""
        found = self._head.run(feeds)
        found |= self._tail.run({**feeds, **found})
        return {name: found[name] for name in outputs or self.outputs}


def sqnr(wanted: Results, actual: Results) -> dict[str, float | None]:
    """SQNR in dB of each floating-point output over all samples; None where a size differs."""
    found: dict[str, float | None] = {}
    for name in wanted[0]:
        pairs = [(one[name], other[name]) for one, other in zip(wanted, actual, strict=True)]
        if pairs[0][0].dtype.kind != "f":
            continue
        if any(one.shape != other.shape for one, other in pairs):
            found[name] = None
            continue
        signal = sum(float(np.sum(one.astype(np.float64) ** 2)) for one, _ in pairs)
        noise = sum(float(np.sum((one.astype(np.float64) - other) ** 2)) for one, other in pairs)
        found[name] = 10 * math.log10(signal / noise) if signal and noise else math.inf
    return found


def silent(model: ir.Model, here: report.Report) -> tuple[str, ...]:
    """What multiplies in ``model`` as captured and has no line in the report."""
    named = {row.name for row in here.layers} | {item.name for item in here.left_alone}
    return tuple(
        node.name or ""
        for node in model.graph
        if (node.op_type in LOUD or node.domain not in ("", "ai.onnx"))
        and node.name not in named
        and not all(v is None or graph.is_constant(v) for v in node.inputs)
    )


class Bench:
    """One model on its judge data: the float answers once, then a row for each target."""

    def __init__(self, work: Work, folder: pathlib.Path) -> None:
        self.work, self.folder = work, folder
        source = work.model if isinstance(work.model, str) else str(work.model(folder))
        self.source = source
        self.captured = capture.capture(source)
        inputs, outputs = ports.inputs_of(self.captured), ports.outputs_of(self.captured)
        self.samples = sources.load(work.judge(), inputs, outputs=outputs).samples
        original = pathlib.Path(source)
        if original.suffix != ".onnx":
            original = folder / "captured.onnx"
            execute.save(self.captured, original)
        self.wanted = self.results(Plain(original))

    def results(self, session: Plain | Split) -> list[dict[str, Array]]:
        """The outputs of ``session`` for all judge samples, with its own state carried."""
        runs = sequences.carry(session, self.samples, self.samples.state)
        return [outputs for _, outputs in runs]

    def rows(self) -> Iterator[Row]:
        """Compile for both targets in one run, or else for each alone."""
        started = time.perf_counter()
        try:
            results = self.compiled("both", TARGETS)
        except (QCompileError, Bug):
            for target in TARGETS:
                started = time.perf_counter()
                try:
                    results = self.compiled(target, (target,))
                except (QCompileError, Bug) as error:
                    seconds = time.perf_counter() - started
                    yield failed(self.work, target, error, seconds)
                    continue
                yield from self.judged(results, time.perf_counter() - started)
            return
        yield from self.judged(results, time.perf_counter() - started)

    def compiled(self, name: str, targets: tuple[str, ...]) -> list[qcompile.Compiled]:
        """What qcompile makes of the model by default."""
        return qcompile.compile(
            self.source, self.folder / name,
            targets=targets, calib=self.work.calibration, latency=True,
        )  # fmt: skip

    def judged(self, results: Iterable[qcompile.Compiled], seconds: float) -> Iterator[Row]:
        """A row for each result of one run that took ``seconds``."""
        for result in results:
            here, runs = result.report, result.report.target.startswith("ort")
            split = (result.folder / "tail.onnx").exists()
            whole = Plain(result.folder / "model.onnx", optimize=runs)
            actual = self.results(Split(result.folder) if split else whole)
            score, latency = self.work.score, here.latency
            yield Row(
                model=self.work.name,
                target=here.target.partition("{")[0],
                result="runs" if runs else "builds",
                error=None,
                seconds=seconds,
                sqnr=sqnr(self.wanted, actual),
                float_score=score(self.wanted) if score else None,
                score=score(actual) if score else None,
                latency=latency.ratio if latency else None,
                null=latency.null if latency else None,
                macs=here.share["macs"],
                float_mb=here.size.float_bytes / 1e6,
                mb=here.size.compiled_bytes / 1e6,
                left_alone=dict(
                    collections.Counter(f"{i.op}: {i.reason}" for i in here.left_alone)
                ),
                silent=silent(self.captured, here),
                warnings=here.warnings,
            )


def failed(work: Work, target: str, error: Exception, seconds: float) -> Row:
    """The row of a run that raised ``error``."""
    return Row(
        model=work.name, target=target, result=type(error).__name__,
        error=" ".join(str(error).split()), seconds=seconds, sqnr={}, float_score=None, score=None,
        latency=None, null=None, macs={}, float_mb=None, mb=None, left_alone={}, silent=(),
        warnings=(),
    )  # fmt: skip


def measure(work: Work) -> list[Row]:
    """A row for each target; what escapes from anything is an error of both."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            return list(Bench(work, pathlib.Path(folder)).rows())
        except Exception as error:  # one model must not end the run of the others
            seconds = time.perf_counter() - started
            return [failed(work, target, error, seconds) for target in TARGETS]


# -- saying -------------------------------------------------------------------------------------


def claims(rows: Iterable[Row]) -> list[Claim]:
    """Each model goes through for each target, and nothing is left alone in silence."""
    found: list[Claim] = []
    for row in rows:
        name = f"{row.model} on {row.target}"
        verb = "runs" if row.target == "ort-cpu" else "builds"
        done = row.result == verb
        found.append(Claim(f"{name}: {verb}", done, float(done), 1.0))
        if done:
            count = len(row.silent)
            text = f"{name}: nothing is left alone in silence"
            found.append(Claim(text, not count, float(count), 0.0))
    return found


def table(rows: Iterable[Row]) -> Table:
    """The rows for people."""
    shown = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("model", "target", "result"):
        shown.add_column(column)
    for column in ("SQNR dB", "task (float)", "latency", "MACs", "MB"):
        shown.add_column(column, justify="right")
    shown.add_column("left alone")
    for row in rows:
        if row.error is not None:
            shown.add_row(row.model, row.target, row.result, "", "", "", "", "", row.error)
            continue
        task = "" if row.score is None else f"{row.score:.1%} ({row.float_score:.1%})"
        macs = ", ".join(f"{v:.0%} {k}" for k, v in sorted(row.macs.items(), key=lambda p: -p[1]))
        left = grouped(row.left_alone) + [f"SILENT {name}" for name in row.silent]
        shown.add_row(
            row.model, row.target, row.result, spread(row.sqnr), task,
            "" if row.latency is None else f"{row.latency:.2f}", macs,
            f"{row.float_mb:.2f} -> {row.mb:.2f}", "\n".join(left),
        )  # fmt: skip
    return shown


def grouped(left_alone: Mapping[str, int]) -> list[str]:
    """Reasons with their counts; those that differ in a number alone are one."""
    found: collections.Counter[str] = collections.Counter()
    for reason, count in left_alone.items():
        found[re.sub(r"\b\d+\b", "n", reason)] += count
    return [f"{count} {reason}" for reason, count in found.items()]


def spread(found: Mapping[str, float | None]) -> str:
    """The lowest and the highest SQNR."""
    known = [value for value in found.values() if value is not None]
    if not known:
        return "sizes differ" if found else "no float output"
    low, high = min(known), max(known)
    text = f"{low:.1f}" if low == high else f"{low:.1f} to {high:.1f}"
    return text if len(known) == len(found) else f"{text}, sizes differ"


def plain(row: Row) -> dict[str, Any]:
    """A row for JSON, which knows no infinity: an SQNR that is not finite becomes null."""
    found = {k: v if v is not None and math.isfinite(v) else None for k, v in row.sqnr.items()}
    return dataclasses.asdict(row) | {"sqnr": found}


def main() -> int:
    """Measure, print, write."""
    parser = common.parser(__doc__, quick="the shipped models only")
    parser.add_argument("--only", nargs="+", help="words in the names of the models to take")
    arguments = parser.parse_args()
    works = SHIPPED if arguments.quick else (*SHIPPED, *PUBLIC)
    if arguments.only:
        words = [word.lower() for word in arguments.only]
        works = [work for work in works if any(word in work.name.lower() for word in words)]
        if not works:
            parser.error(f"no model has {' or '.join(arguments.only)} in its name")
    rows: list[Row] = []
    for work in works:
        rows += measure(work)
        if sys.stdout.isatty():
            print(f"{work.name}: {rows[-1].seconds:.0f} s")
    return common.finish(
        claims(rows), arguments.json, [table(rows)], failed_only=True, rows=list(map(plain, rows))
    )


if __name__ == "__main__":
    sys.exit(main())
