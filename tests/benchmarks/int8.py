"""INT8, one command and no option a model: accuracy, what runs in integers, size and latency.

    python tests/benchmarks/int8.py [--quick] [--only WORD ...] [--seeds N] [--json FILE]

Every row is the default recipe unless it says otherwise. The judge data calibrated nothing. SQNR is
over all judge samples together, with the 95 % interval of a bootstrap over samples. The bounds
beside it: ``weights`` at 8 bits with every activation in float; ``activations``, against a model
with the same weights and float activations; and ``both``, the sum of the two noise powers. Shares
are of the MACs, by the proof. Latency is the median ratio to float, one thread, interleaved, with
the float-to-float null beside it. ``--quick`` takes the shipped models only. The recipe draws
nothing at random, so seeds change the bootstrap alone. Right is top-1 or the share of lines read
without a fault; ``as float`` is the share of lines that are read as by the float model, rightly or
not, and in brackets the two bounds of it: with the weights alone at 8 bits, and what is read alike
with the activations in 8 bits as well.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import common
import numpy as np
import numpy.typing as npt
from common import Claim
from rich.table import Table

import qcompile
from qcompile import capture, compiler, execute, pipeline, recipes, registry, report, simulate
from qcompile.calibrate import Calibration
from qcompile.models import fashion
from qcompile.passes.quantize import Quantize
from qcompile.ports import inputs_of
from qcompile.sources import Sample, load

Array = npt.NDArray[Any]
FACTORIES = "qcompile.models.public"


@dataclasses.dataclass(frozen=True)
class Work:
    """One model with its data; ``labels`` or ``texts`` of the judge samples where they say one."""

    name: str
    model: str | Callable[[], pathlib.Path]
    calibration: str
    judge: Callable[[], Iterable[Sample]]
    labels: Callable[[], Array] | None = None
    texts: Callable[[], list[str]] | None = None
    passes: str = "@int8"
    targets: tuple[str, ...] = ("ort-cpu", "tensorrt-rtx")

    @property
    def source(self) -> str:
        """The model as a command line names it."""
        return self.model if isinstance(self.model, str) else str(self.model())


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    work: str
    target: str
    passes: str
    sqnr: float
    interval: tuple[float, float]
    weights: float
    activations: float
    accuracy: float | None
    float_accuracy: float | None
    equal: float | None
    equal_weights: float | None
    equal_activations: float | None
    share_int8: float
    linear_int8: str
    float_mb: float
    mb: float
    latency: float | None
    null: float | None

    @property
    def both(self) -> float:
        """The SQNR of the noise of weights and that of activations, if neither knew the other."""
        return -10 * float(np.log10(10 ** (-self.weights / 10) + 10 ** (-self.activations / 10)))


def fashion_judge() -> list[Sample]:
    """The test pictures, one a sample."""
    return [{"image": picture[None]} for picture in fashion.test()[0]]


def public(name: str) -> Callable[[], Iterable[Sample]]:
    """The judge data ``name`` of the public models, loaded when it is needed."""

    def samples() -> Iterable[Sample]:
        from qcompile.models import public as module

        return getattr(module, name)()

    return samples


def vision(name: str) -> Iterable[Sample]:
    """The data ``name`` of the torchvision networks."""
    from qcompile.models import vision as module

    return getattr(module, name)()


def ocr() -> Any:
    """The module of the text recognizer, which is optional."""
    from qcompile.models import ocr as module

    return module


def fashion_work(name: str, file: str) -> Work:
    path, data = fashion.path(file), fashion.path(fashion.CALIBRATION)
    return Work(name, str(path), str(data), fashion_judge, lambda: fashion.test()[1])


SHIPPED = (fashion_work("CNN", fashion.CNN), fashion_work("ViT", fashion.VIT))
RESNET = Work(
    "ResNet-18, random weights", f"{FACTORIES}:resnet18", f"{FACTORIES}:resnet18_calibration",
    lambda: itertools.islice(public("resnet18_calibration")(), 48, None),
)  # fmt: skip
LITE0 = Work(
    "EfficientNet-Lite0", f"{FACTORIES}:efficientnet_lite0",
    f"{FACTORIES}:efficientnet_calibration", public("efficientnet_judge"),
)  # fmt: skip
MINILM = Work(
    "MiniLM", f"{FACTORIES}:minilm", f"{FACTORIES}:minilm_calibration", public("minilm_judge")
)
# The control: the same without rotations and without fitting, rounded to the nearest.
NEAREST = "simplify,recompose,fold-bn,calibrate,quantize,insert-qdq"


def again(work: Work, what: str, passes: str) -> Work:
    """``work`` by other ``passes``, on ONNX Runtime."""
    return dataclasses.replace(
        work, name=f"{work.name}, {what}", passes=passes, targets=("ort-cpu",)
    )


VARIANTS = tuple(
    again(work, what, passes)
    for work in (LITE0, MINILM)
    for what, passes in (("nearest", NEAREST), ("fast", "@int8-fast"), ("best", "@int8-best"))
)
DYNAMIC = again(MINILM, "dynamic", "@int8-dynamic")
MOBILENET, VIT_B = (
    Work(
        f"{name}, random weights", f"qcompile.models.vision:{factory}",
        "qcompile.models.vision:classification_calibration",
        lambda: vision("classification_judge"), targets=("ort-cpu",),
    )
    for name, factory in (("MobileNetV2", "mobilenet_v2"), ("ViT-B/16", "vit_b_16"))
)  # fmt: skip

LINES = 400
REC = Work(
    "PP-OCR rec, blurred lines", lambda: ocr().rec(), "qcompile.models.ocr:blurred_calibration",
    lambda: (sample for sample, _ in ocr().blurred_labelled("judge", LINES)),
    texts=lambda: [text for _, text in ocr().blurred_pictures("judge", LINES)],
)  # fmt: skip


def powers(
    reference: execute.Session, compiled: execute.Session, samples: Iterable[Sample]
) -> tuple[Array, Array, Array, Array]:
    """Signal and noise power of the first output for each sample, and both arg max."""
    signal: list[float] = []
    noise: list[float] = []
    one: list[int] = []
    other: list[int] = []
    for sample in samples:
        [wanted, *_] = reference.run(sample).values()
        [actual, *_] = compiled.run(sample).values()
        signal.append(float(np.sum(wanted.astype(np.float64) ** 2)))
        noise.append(float(np.sum((actual.astype(np.float64) - wanted) ** 2)))
        one.append(int(wanted.argmax()))
        other.append(int(actual.argmax()))
    return np.array(signal), np.array(noise), np.array(one), np.array(other)


def lines(
    work: Work, reference: execute.Session, compiled: execute.Session, samples: list[Sample]
) -> tuple[float | None, float | None, float | None]:
    """Shares of the lines read right, right in float, and by both alike; None without texts."""
    if work.texts is None:
        return None, None, None

    def first_output(session: execute.Session) -> Iterator[Array]:
        return (next(iter(session.run(sample).values())) for sample in samples)

    found = ocr().compare(first_output(reference), first_output(compiled), work.texts())
    return found.right / found.count, found.float_right / found.count, found.equal / found.count


def bootstrap(signal: Array, noise: Array, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the SQNR over resampled samples; of its mean if ``noise`` has many rows."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(signal), (1000, len(signal)))
    drawn = 10 * np.log10(signal[picks].sum(axis=1) / noise[..., picks].sum(axis=-1))
    low, high = np.percentile(np.atleast_2d(drawn).mean(axis=0), [2.5, 97.5])
    return float(low), float(high)


def with_weights_alone(work: Work, target: str) -> execute.Session:
    """``work`` with only the weights of what ``target`` quantizes at 8 bits, by the same passes."""
    model = capture.capture(work.source)
    data = load(work.calibration, inputs_of(model))
    context = pipeline.Context(
        calibration=Calibration(data), target=compiler.parse_target(target), reference=model.clone()
    )
    passes = [
        dataclasses.replace(step, input="float", scale="static")
        if isinstance(step, Quantize)
        else step
        for step in pipeline.parse(recipes.expand(work.passes), registry.passes())
    ]
    pipeline.run(model, passes, context)
    return execute.Session(model, optimize=False)


def measure(work: Work, seed: int) -> tuple[list[Row], list[report.Report]]:
    """Compile ``work`` for its targets in one run and judge each."""
    judges = list(work.judge())
    reference = execute.Session(capture.capture(work.source))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        results = qcompile.compile(
            work.source, pathlib.Path(folder) / "out",
            passes=work.passes, targets=work.targets, calib=work.calibration, latency=True,
        )  # fmt: skip
        for result in results:
            here = result.report
            compiled = execute.Session(
                result.folder / "model.onnx", optimize=here.target.startswith("ort")
            )
            signal, noise, one, other = powers(reference, compiled, judges)
            right, float_right, equal = lines(work, reference, compiled, judges)
            if work.labels is not None:
                labels = work.labels()
                right, float_right = (float(np.mean(np.equal(i, labels))) for i in (other, one))
            weighted = [r for r in here.layers if r.kind in ("conv", "depthwise", "linear")]
            alone = with_weights_alone(work, here.target)
            judge = simulate.Judge(capture.capture(work.source), judges[:64])
            rows.append(
                Row(
                    work=work.name,
                    target=here.target.partition("{")[0],
                    passes=work.passes,
                    sqnr=float(10 * np.log10(signal.sum() / noise.sum())),
                    interval=bootstrap(signal, noise, seed),
                    weights=judge.worst(alone),
                    activations=min(judge.between(alone, compiled).values()),
                    accuracy=right,
                    float_accuracy=float_right,
                    equal=equal,
                    equal_weights=lines(work, reference, alone, judges)[2],
                    equal_activations=lines(work, alone, compiled, judges)[2],
                    share_int8=here.share_of_macs("int8"),
                    linear_int8=f"{sum(r.runs == 'int8' for r in weighted)}/{len(weighted)}",
                    float_mb=here.size.float_bytes / 1e6,
                    mb=here.size.compiled_bytes / 1e6,
                    latency=here.latency.ratio if here.latency else None,
                    null=here.latency.null if here.latency else None,
                )
            )
    return rows, [result.report for result in results]


def claims(rows: list[Row], seeds: int) -> list[Claim]:
    """What the README says of these rows."""
    found: list[Claim] = []

    def say(claim: str, value: float | None, control: float, above: bool, row: Row) -> None:
        if value is not None:
            holds = value >= control if above else value <= control
            interval = row.interval if "SQNR" in claim else None
            found.append(Claim(claim, bool(holds), value, control, interval, seeds))

    by_name = {(row.work, row.target): row for row in rows}
    fast = f"{MINILM.name}, fast"
    least = {LITE0.name: 24.0, MINILM.name: 25.0, fast: 20.0}
    slowest = {
        LITE0.name: 0.46, MINILM.name: 0.5, fast: 0.42, RESNET.name: 0.29, MOBILENET.name: 0.42,
        VIT_B.name: 0.33,
    }  # fmt: skip
    for (name, target), row in by_name.items():
        if target != "ort-cpu":
            continue
        if name in least:
            say(f"{name}: SQNR", row.sqnr, least[name], True, row)
        if name in slowest:
            say(f"{name}: latency ratio", row.latency, slowest[name], False, row)
        say(f"{name}: share of the MACs in int8", row.share_int8, 0.95, True, row)
        if row.equal is not None:
            say(f"{name}: lines read as by float", row.equal, 0.95, True, row)
        elif row.accuracy is not None and row.float_accuracy is not None:
            say(f"{name}: accuracy", row.accuracy, row.float_accuracy - 0.01, True, row)
    for work in (LITE0, MINILM):
        row = by_name.get((work.name, "ort-cpu"))
        control = by_name.get((f"{work.name}, nearest", "ort-cpu"))
        if row and control:
            gain = row.sqnr - control.sqnr
            say(f"{work.name}: gain over rounding to the nearest, dB", gain, 3.0, True, row)
    return found


def table(rows: list[Row]) -> Table:
    """The rows for people."""
    shown = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("model", "target"):
        shown.add_column(column)
    for column in ("SQNR dB", "weights", "activations", "both", "right (float)", "as float"):
        shown.add_column(column, justify="right")
    for column in ("MACs int8", "layers", "MB"):
        shown.add_column(column, justify="right")
    for column in ("latency", "null"):
        shown.add_column(column, justify="right")
    for row in rows:
        accuracy = "" if row.accuracy is None else f"{row.accuracy:.2%} ({row.float_accuracy:.2%})"
        equal = ""
        if row.equal is not None:
            equal = f"{row.equal:.1%} ({row.equal_weights:.1%}, {row.equal_activations:.1%})"
        latency = "" if row.latency is None else f"{row.latency:.2f}"
        null = "" if row.null is None else f"{row.null:.2f}"
        interval = f"[{row.interval[0]:.1f}, {row.interval[1]:.1f}]"
        shown.add_row(
            row.work, row.target, f"{row.sqnr:.1f} {interval}", f"{row.weights:.1f}",
            f"{row.activations:.1f}", f"{row.both:.1f}", accuracy, equal, f"{row.share_int8:.1%}",
            row.linear_int8, f"{row.float_mb:.2f} -> {row.mb:.2f}", latency, null,
        )  # fmt: skip
    return shown


def main() -> int:
    """Measure, print, write."""
    parser = common.parser(__doc__, quick="the shipped models only")
    parser.add_argument("--only", nargs="+", help="words in the names of the models to take")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of the bootstrap")
    arguments = parser.parse_args()
    works = SHIPPED if arguments.quick else (
        *SHIPPED, RESNET, MOBILENET, VIT_B, LITE0, MINILM, *VARIANTS, DYNAMIC, REC,
    )  # fmt: skip
    if arguments.only:
        words = [word.lower() for word in arguments.only]
        works = [work for work in works if any(word in work.name.lower() for word in words)]
    rows: list[Row] = []
    for work in works:
        rows += measure(work, arguments.seeds - 1)[0]
    said = claims(rows, arguments.seeds)
    return common.finish(said, arguments.json, [table(rows)], rows=rows)


if __name__ == "__main__":
    sys.exit(main())
