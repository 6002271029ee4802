"""After FMPQ: one tolerance for all layers under a budget, against one width and the knapsack.

    python tests/benchmarks/fmpq.py [--quick] [--only WORD] [--seeds N] [--plot FILE] [--json FILE]

Of the classifiers and encoders, rows, data, rounding and figures are as in ``mlorq.py``, and the
scalar is noise-to-signal at the outputs. The knapsack (``mixed``) works on the same costs; that it
loses less in them is exact, that it does so at the outputs is measured.

Of the codec (``--only codec``) the scalar is the rate-distortion loss that it was trained with, as
in the paper. Weights alone are quantized, all of them, one scale a channel by mean squared error,
rounded to the nearest, and run in float (simulated); bits are those of codes on average. The
BD-rate is against float: how many percent more bits the four rate points take for the same PSNR on
crops of the judge pictures. It is the mean over ``--seeds`` draws of 16 calibration crops, with the
least and the greatest, and the 95 % interval of a bootstrap over the pictures at the first draw;
the interval of the claim is that of the ratio. It is infinite where curves share no PSNR. The loss
beside it is how much that of training grows, a mean over the points. Shares are forward passes over
the crops against one for each width of each layer, at the first draw. ``--plot`` draws the curves
at 3 bits.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import common
import mlorq
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from common import Claim
from int8 import LITE0, MINILM, SHIPPED
from rich.table import Table

from qcompile import decisions, graph, pareto, pipeline, plotting, registry
from qcompile.backends.onnxruntime import OrtCpu
from qcompile.calibrate import Calibration
from qcompile.capture import capture
from qcompile.errors import CalibrationError
from qcompile.execute import Session
from qcompile.models import codec
from qcompile.models.codec import Quality
from qcompile.pipeline import Context
from qcompile.ports import inputs_of
from qcompile.sources import load

Images = list[npt.NDArray[np.float32]]  # of each picture, [crops, 3, height, width]
UNIFORM, FMPQ = "uniform", "fmpq"
ENDS = "uniform, ends in 8 bits"  # the rule of thumb; above the budget
POINTS = range(1, len(codec.MODELS) + 1)
SWEEP = (2.5, 3.0, 3.5, 4.0, 5.0, 6.0)  # budgets whose sizes are compared
CROPS = 16  # to calibrate with


@dataclasses.dataclass(frozen=True)
class Coded:
    """One choice for one rate point; ``pictures`` are bits a pixel and squared error of each."""

    point: int
    choice: str
    budget: float
    draw: int
    bits: float
    stored_mb: float
    share: float
    passes: str
    pictures: tuple[tuple[float, float], ...]


@dataclasses.dataclass(frozen=True)
class Curve:
    """A choice over all rate points; ``bd_rate`` and ``loss`` are means over draws, in percent.

    ``loss`` is how much the rate-distortion loss grows, a mean over the points. It is finite where
    a BD-rate is not, because curves share no PSNR.
    """

    choice: str
    budget: float
    draws: int
    bits: float
    stored_mb: float
    share: float
    loss: float
    bd_rate: float
    span: tuple[float, float]
    interval: tuple[float, float]


# -- measuring ----------------------------------------------------------------------------------


def choices(budget: float, point: int, quick: bool) -> dict[str, str]:
    """The passes that decide, by what they are called."""
    assign = f"assign-bits{{budget=bits={budget:g} choices=2,3,4,5,6,7,8"
    loss = f"metric=qcompile.models.codec:rate_distortion_{point}"
    listed = {
        UNIFORM: f"quantize{{weight=int{budget:g} input=float method=mse}}",
        FMPQ: f"{assign} method=fmpq {loss}}}",
        "knapsack": f"{assign} {loss}}}",
        "knapsack, noise to signal": f"{assign}}}",
        "greedy": f"{assign} method=greedy {loss}}}",
        ENDS: f"quantize{{weight=int{budget:g} input=float method=mse ends=int8}}",
    }
    return {name: listed[name] for name in (UNIFORM, FMPQ)} if quick else listed


def judged(model: ir.Model, images: Images) -> tuple[tuple[float, float], ...]:
    """Bits a pixel and squared error of each picture."""
    session = Session(model)
    found = (codec.quality(image, session.run({"image": image})) for image in images)
    return tuple((each.bpp, each.mse) for each in found)


def judges(quick: bool) -> Images:
    """The crops to judge with, by picture."""
    crops = [sample["image"] for sample in codec.judge()]
    count = len(codec.pictures("judge"))
    return [np.concatenate(crops[n::count][: 4 if quick else None]) for n in range(count)]


def coded(budgets: Sequence[float], draws: int, quick: bool) -> list[Coded]:
    """Each choice at each rate point, budget and draw, and float as a choice of 32 bits."""
    images, rows = judges(quick), list[Coded]()
    known = registry.passes()
    for point, name in zip(POINTS, codec.MODELS, strict=True):
        model = capture(str(codec.path(name)))
        pipeline.run(model, pipeline.parse(mlorq.FRONT, known), Context(target=OrtCpu()))
        rows.append(Coded(point, "float", 32, 0, 32.0, 0.0, 0.0, "", judged(model, images)))
        for draw in range(draws):
            crops = ({"image": each[None]} for each in codec.crops("calibration", CROPS, draw))
            data = Calibration(load(crops, inputs_of(model)))
            for budget in budgets:
                for choice, text in choices(budget, point, quick).items():
                    if draw == 0 or choice not in (UNIFORM, ENDS):  # which no data decide
                        # At the first draw every row pays for what it measures.
                        own = data if draw else Calibration(data.data)
                        rows.append(one(model, text, own, images, (point, choice, budget, draw)))
                        print(rows[-1].choice, point, budget, draw, file=sys.stderr, flush=True)
    return rows


def one(
    model: ir.Model,
    text: str,
    data: Calibration,
    images: Images,
    what: tuple[int, str, float, int],
) -> Coded:
    """``model`` decided by the pass ``text``, with its weights rounded."""
    decided = model.clone()
    context = Context(calibration=data, target=OrtCpu(), reference=model)
    [step] = pipeline.run(decided, pipeline.parse(text, registry.passes()), context)
    bits, stored = pareto.bits_of(model, decided), pareto.stored_of(decided, OrtCpu())
    read_rounded(decided)
    table = float(step.counters.get("of a whole table of", 0))
    share = float(step.counters.get("forward passes", 0)) / table if table else 0.0
    return Coded(*what, bits, stored / 1e6, share, text, judged(decided, images))


def read_rounded(decided: ir.Model) -> None:
    """Let each layer read what its codes stand for: no target keeps ConvTranspose in few bits."""
    for layer in list(graph.layers(decided)):
        if layer.weight.spec is not None:
            array = decisions.rounded(decided, layer.weight.value, layer.weight.spec)
            layer.weight.read_from(graph.add_constant(decided, "rounded", array))


def sizes() -> list[tuple[int, list[float]]]:
    """Of each rate point, the bits that FMPQ gives at the budgets of SWEEP."""
    found: list[tuple[int, list[float]]] = []
    for point, name in zip(POINTS, codec.MODELS, strict=True):
        model = capture(str(codec.path(name)))
        data = Calibration(load("qcompile.models.codec:calibration", inputs_of(model)))
        context = Context(calibration=data, target=OrtCpu(), reference=model)
        bits: list[float] = []
        for budget in SWEEP:
            decided = model.clone()
            text = choices(budget, point, quick=True)[FMPQ]
            pipeline.run(decided, pipeline.parse(text, registry.passes()), context)
            bits.append(pareto.bits_of(model, decided))
        found.append((point, bits))
    return found


# -- curves -------------------------------------------------------------------------------------


def qualities(rows: Iterable[Coded], picks: npt.NDArray[np.intp] | None = None) -> list[Quality]:
    """The mean over pictures, all or ``picks``, at each rate point of ``rows``."""
    ordered = sorted(rows, key=lambda row: row.point)
    every = [np.array(row.pictures) for row in ordered]
    return [Quality(*map(float, (e if picks is None else e[picks]).mean(0))) for e in every]


def bd_rate(base: Sequence[Quality], other: Sequence[Quality]) -> float:
    """That of ``codec``; infinite where no rate of ``other`` buys the PSNR of ``base``."""
    try:
        return codec.bd_rate(base, other)
    except CalibrationError:
        return float("inf")


def growth(base: Sequence[Quality], other: Sequence[Quality]) -> float:
    """How much the loss of each point grows in percent, on average."""
    losses = [
        [point.bpp + trade * point.mse for point, trade in zip(points, codec.TRADES, strict=True)]
        for points in (base, other)
    ]
    return float(100 * np.mean(np.array(losses[1]) / losses[0] - 1))


def resampled(reference: Sequence[Coded], rows: Sequence[Coded]) -> npt.NDArray[np.float64]:
    """BD-rates over drawn pictures, the same ones for all choices."""
    random, count = np.random.default_rng(0), len(reference[0].pictures)
    picks = random.integers(0, count, (1000, count))
    return np.array([bd_rate(qualities(reference, p), qualities(rows, p)) for p in picks])


def interval(drawn: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Where 95 % of what was ``drawn`` lie; of values that were drawn, since some are infinite."""
    low, high = np.percentile(drawn, [2.5, 97.5], method="nearest")
    return float(low), float(high)


def curves(rows: Sequence[Coded]) -> tuple[list[Curve], dict[tuple[str, float], Any]]:
    """A line for each choice and budget, and its BD-rates over drawn pictures."""
    reference = [row for row in rows if row.choice == "float"]
    found: list[Curve] = []
    drawn: dict[tuple[str, float], Any] = {}
    for choice, budget in dict.fromkeys((r.choice, r.budget) for r in rows if r.draw == 0):
        if choice == "float":
            continue
        mine = [row for row in rows if (row.choice, row.budget) == (choice, budget)]
        draws = sorted({row.draw for row in mine})
        by_draw = [[row for row in mine if row.draw == draw] for draw in draws]
        base, found_by_draw = qualities(reference), [qualities(each) for each in by_draw]
        lost = [bd_rate(base, each) for each in found_by_draw]
        drawn[choice, budget] = resampled(reference, by_draw[0])
        found.append(
            Curve(
                choice, budget, len(draws), float(np.mean([row.bits for row in mine])),
                float(np.mean([row.stored_mb for row in mine])),
                float(np.mean([row.share for row in by_draw[0]])),
                float(np.mean([growth(base, each) for each in found_by_draw])),
                float(np.mean(lost)), (min(lost), max(lost)), interval(drawn[choice, budget]),
            )
        )  # fmt: skip
    return found, drawn


def codec_claims(
    rows: Sequence[Coded],
    lines: Sequence[Curve],
    drawn: dict[tuple[str, float], Any],
    swept: Sequence[tuple[int, list[float]]],
) -> list[Claim]:
    """What must hold, and what FMPQ says of itself."""
    found: list[Claim] = []
    for choice, budget in dict.fromkeys((r.choice, r.budget) for r in rows if r.budget < 32):
        if choice == ENDS:
            continue
        worst = max(r.bits for r in rows if (r.choice, r.budget) == (choice, budget))
        where = f"codec, {choice}, {budget:g} bits"
        found.append(Claim(f"{where}: within the budget", worst <= budget, worst, budget))
    for point, bits in swept:
        over = max(b - limit for b, limit in zip(bits, SWEEP, strict=True))
        falls = float(np.diff(bits).min())
        found.append(Claim(f"codec {point}: never above {SWEEP} bits", over <= 0, over, 0.0))
        found.append(Claim(f"codec {point}: size falls with the budget", falls >= 0, falls, 0.0))
    by = {(line.choice, line.budget): line for line in lines}
    for (choice, budget), line in by.items():
        if choice == FMPQ:
            where = f"codec, fmpq, {budget:g} bits"
            one = by[UNIFORM, budget]
            if np.isfinite(one.bd_rate):
                what, value, half = "BD-rate", line.bd_rate, one.bd_rate / 2
                span = interval(drawn[FMPQ, budget] / np.maximum(drawn[UNIFORM, budget], 1e-9))
            else:  # a claim that could not fail
                what, value, half = "loss, no BD-rate being finite,", line.loss, one.loss / 2
                span = None
            said = f"{where}: {what} at most half of that of one width"
            found.append(Claim(said, value <= half, value, half, span, line.draws))
            share = f"{where}: share of the passes of a table"
            found.append(Claim(share, line.share < 1, line.share, 1.0, seeds=line.draws))
    return found


def codec_table(lines: Sequence[Curve], rows: Sequence[Coded]) -> list[Table]:
    """The curves for people, and the points in float."""
    shown = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    shown.add_column("codec")
    for column in ("bits", "MB", "loss %", "BD-rate %", "of draws", "of pictures", "of table"):
        shown.add_column(column, justify="right")
    for line in sorted(lines, key=lambda line: line.budget):
        shown.add_row(
            line.choice, f"{line.bits:.2f} of {line.budget:g}", f"{line.stored_mb:.3f}",
            f"{line.loss:+.1f}", f"{line.bd_rate:+.1f}", "[{:+.1f}, {:+.1f}]".format(*line.span),
            "[{:+.1f}, {:+.1f}]".format(*line.interval), f"{line.share:.0%}",
        )  # fmt: skip
    points = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    points.add_column("float")
    for column in ("bpp", "PSNR dB"):
        points.add_column(column, justify="right")
    found = qualities(row for row in rows if row.choice == "float")
    for name, each in zip(codec.MODELS, found, strict=True):
        points.add_row(name, f"{each.bpp:.3f}", f"{each.psnr:.2f}")
    return [points, shown]


def draw(rows: Sequence[Coded], path: pathlib.Path) -> None:
    """Write PSNR over rate of float, one width and FMPQ at the fewest bits."""
    made: Any = plotting.matplotlib().figure.Figure(figsize=(6, 4.2), layout="constrained")
    axis: Any = made.subplots()
    least = min(row.budget for row in rows)
    for choice, budget, mark in (
        ("float", 32.0, "ko-"),
        (FMPQ, least, "C0s-"),
        (UNIFORM, least, "C3^-"),
    ):
        mine = [r for r in rows if (r.choice, r.budget, r.draw) == (choice, budget, 0)]
        found = qualities(mine)
        label = choice if choice == "float" else f"{choice}, {budget:g} bits a weight"
        axis.plot([q.bpp for q in found], [q.psnr for q in found], mark, label=label, markersize=5)
    axis.set(xlabel="bits a pixel", ylabel="PSNR, dB")
    axis.grid(alpha=0.3)
    made.legend(loc="outside upper center", ncols=3)
    made.savefig(path, dpi=150)


def main() -> int:
    """Measure, print, write."""
    parser = common.parser(__doc__, quick="the shipped models only, the codec at 3 bits")
    parser.add_argument("--only", help="the models with this word in their names alone")
    parser.add_argument("--seeds", type=int, default=1, help="draws, or seeds of the bootstrap")
    parser.add_argument("--plot", type=pathlib.Path, help="draw the curves of the codec (.png)")
    arguments = parser.parse_args()
    if arguments.plot:
        plotting.check_ending(arguments.plot, (".png", ".svg"), "--plot")
    works = SHIPPED if arguments.quick else (*SHIPPED, MINILM, LITE0)
    word = (arguments.only or "").lower()
    rows: list[mlorq.Row] = []
    for work in (w for w in works if word in w.name.lower()):
        methods = (FMPQ, "mixed")
        rows += mlorq.measure(work, (3, 4), methods, arguments.quick, arguments.seeds - 1)
    said, tables = mlorq.claims(rows, arguments.seeds), [mlorq.table(rows)] if rows else []
    points: list[Coded] = []
    lines: list[Curve] = []
    if word in "codec":
        points = coded((3,) if arguments.quick else (3, 4), arguments.seeds, arguments.quick)
        lines, drawn = curves(points)
        said += codec_claims(points, lines, drawn, sizes())
        tables += codec_table(lines, points)
        if arguments.plot:
            draw(points, arguments.plot)
    return common.finish(said, arguments.json, tables, rows=rows, codec=lines, points=points)


if __name__ == "__main__":
    sys.exit(main())
