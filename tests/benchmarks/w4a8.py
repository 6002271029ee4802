"""Weights of 4 bits beside activations of 8, by what fits them, against rounding to the nearest.

    python tests/benchmarks/w4a8.py [--quick] [--only WORD ...] [--fits WORD ...] [--seeds N]
        [--json FILE]

One pipeline for all models: rotations where they pay, ranges by percentile, one scale a channel by
mean squared error, first and last weights in 8 bits; rows of a model differ in the pass that fits,
some have channels equalized before, or more rotations. The same with 8 bits stands below. SQNR is
that of the output in simulation for ort-cpu, over all judge samples together, which calibrated
nothing, with a 95 % interval of a bootstrap over them. A fit that draws (``mixup``) is run with
each of ``--seeds``: the SQNR is the mean, the interval is that of the mean, and ``seeds`` are its
values. Codes of 4 bits are stored in 8 and run in int8 kernels: no speed is claimed. ``--quick``
takes the shipped models, fewer pictures and fewer steps.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence

import common
import int8
import numpy as np
import onnx_ir as ir
from common import Claim
from int8 import LITE0, MINILM, SHIPPED, Work
from rich.table import Table

from qcompile import pipeline, registry, simulate
from qcompile.backends.onnxruntime import OrtCpu
from qcompile.calibrate import Calibration
from qcompile.capture import capture
from qcompile.execute import Session
from qcompile.pipeline import Context
from qcompile.ports import inputs_of
from qcompile.sources import load

FOLDED = "simplify,recompose,fold-bn"
RANGES = "smooth-hadamard{block=32},calibrate{method=percentile percentile=99.999}"
# The rotations of @int8-best.
MORE = RANGES.replace("block=32", "max-cost=15")
EQUALIZED = "equalize{weight=int4 input=int8}"
DECIDED = {
    4: "quantize{weight=int4 method=mse ends=int8}",
    8: "quantize",
}
_MIXUP = "gptaq{damping=0.3 rows=256 samples=128 mixup=true}"
_RESCALED = _MIXUP.replace("}", " rescale=true}")


@dataclasses.dataclass(frozen=True)
class Fit:
    """``passes`` fit what was decided, "" rounds to the nearest; ``front`` comes before that."""

    name: str
    passes: str
    front: str = RANGES


# What fits, for each width.
FITS = {
    4: [
        Fit("nearest", ""),
        Fit("gptq", "gptq{damping=0.1}"),
        Fit("reconstruct", "reconstruct"),
        Fit("gptaq", "gptaq{damping=0.3 rows=256}"),
        Fit("gptaq, mixup", _MIXUP),
        Fit("equalize, gptaq, mixup", _MIXUP, f"{EQUALIZED},{RANGES}"),
        Fit("equalize, gptaq, mixup, rescale", _RESCALED, f"{EQUALIZED},{RANGES}"),
        Fit("equalize, rotations, gptaq, mixup, rescale", _RESCALED, f"{EQUALIZED},{MORE}"),
        Fit(
            "gptaq, gains a channel",
            "gptaq{damping=0.3 rows=256},calibrate-affine{gains=channel rate=0.0003 steps=100}",
        ),
    ],
    8: [Fit("nearest", ""), Fit("gptq", "gptq"), Fit("gptaq", "gptaq{damping=0.01}")],
}
# The SQNR that 4 bits are to have.
GOALS = {LITE0.name: 9.0, MINILM.name: 11.0}


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to fit the weights of one model."""

    work: str
    bits: int
    fit: str
    passes: str
    sqnr: float
    interval: tuple[float, float]
    seeds: tuple[float, ...]
    seconds: float


def measure(work: Work, quick: bool, seeds: int, words: Sequence[str]) -> list[Row]:
    """A row for each way to fit whose name has one of ``words``, of all if there are none."""
    model, target = capture(work.source), OrtCpu()
    data = Calibration(load(work.calibration, inputs_of(model)))
    reference, judges = Session(model.clone()), list(work.judge())[: 200 if quick else None]
    context = Context(calibration=data, target=target, reference=model.clone())

    def run(before: ir.Model, text: str, seed: int = 0) -> ir.Model:
        made = before.clone()
        drawn = dataclasses.replace(context, seed=seed)
        pipeline.run(made, pipeline.parse(text, registry.passes()), drawn)
        return made

    fronts = {
        front: f"{FOLDED},{front}"
        for front in {fit.front for fits in FITS.values() for fit in fits}
    }
    ready = {front: run(model, text) for front, text in fronts.items()}
    rows: list[Row] = []
    for bits, fits in FITS.items():
        for fit in fits:
            if words and not any(word in fit.name for word in words):
                continue
            text = fit.passes
            if quick:
                text = text.replace("reconstruct", "reconstruct{steps=100 batch=8}")
            wanted = ",".join(filter(None, (DECIDED[bits], text)))
            started = time.process_time()
            runs = seeds if "mixup" in text else 1
            decided = [run(ready[fit.front], wanted, seed) for seed in range(runs)]
            seconds = (time.process_time() - started) / runs
            found = [
                int8.powers(reference, simulate.simulate(made, target), judges) for made in decided
            ]
            signal, noises = found[0][0], np.stack([noise for _, noise, _, _ in found])
            each = 10 * np.log10(signal.sum() / noises.sum(axis=1))
            rows.append(
                Row(
                    work.name, bits, fit.name, f"{fronts[fit.front]},{wanted},insert-qdq",
                    float(each.mean()), int8.bootstrap(signal, noises), tuple(map(float, each)),
                    seconds,
                )
            )  # fmt: skip
    return rows


def claims(rows: Sequence[Row], seeds: int) -> list[Claim]:
    """What the fits are to win."""
    found: list[Claim] = []
    for work in dict.fromkeys(row.work for row in rows):
        of = {row.fit: row for row in rows if row.work == work and row.bits == 4}
        for name in ("gptq", "reconstruct", "gptaq"):
            if not {name, "nearest"} <= of.keys():
                continue
            row, control = of[name], of["nearest"].sqnr
            said = f"{work}: {name} over the nearest at 4 bits, dB"
            found.append(Claim(said, row.sqnr > control, row.sqnr, control, row.interval, seeds))
        best = max(of.values(), key=lambda row: row.sqnr)
        if work in GOALS:
            said, goal = f"{work}: {best.fit} at 4 bits, dB", GOALS[work]
            found.append(Claim(said, best.sqnr >= goal, best.sqnr, goal, best.interval, seeds))
    return found


def table(rows: Sequence[Row]) -> Table:
    """The rows for people."""
    made = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("model", "bits", "fit", "SQNR dB", "of seeds", "CPU s"):
        made.add_column(column)
    for row in rows:
        low, high = row.interval
        said = f"{row.sqnr:.1f} [{low:.1f}, {high:.1f}]"
        drawn = " ".join(f"{value:.1f}" for value in row.seeds if len(row.seeds) > 1)
        made.add_row(row.work, str(row.bits), row.fit, said, drawn, f"{row.seconds:.0f}")
    return made


def main() -> int:
    parser = common.parser(__doc__, quick="the shipped models, with fewer pictures and steps")
    parser.add_argument("--only", nargs="+", default=[], help="words in the names of models")
    parser.add_argument("--fits", nargs="+", default=[], help="words in the names of fits")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of fits that draw")
    arguments = parser.parse_args()
    works = list(SHIPPED) if arguments.quick else [*SHIPPED, LITE0, MINILM]
    words = [word.lower() for word in arguments.only]
    chosen = [w for w in works if not words or any(word in w.name.lower() for word in words)]
    rows = [
        row
        for work in chosen
        for row in measure(work, arguments.quick, arguments.seeds, arguments.fits)
    ]
    found = claims(rows, arguments.seeds)
    return common.finish(found, arguments.json, [table(rows)], rows=rows)


if __name__ == "__main__":
    sys.exit(main())
