"""A budget of latency against rules that a hand would set, all of the same measured latency.

    python tests/benchmarks/latency.py [--quick] [--only WORD] [--seeds N] [--json FILE]

Layers have int8 weights and int8 inputs, rounded to the nearest, or stay float. *Assigned* is
assign-bits under the budget; *most work first* quantizes the layers with the most MACs, as few as
meet the budget; *ends in float* leaves layers from both ends in float, as many as the budget lets.
Each rule is measured as assign-bits measures, until it meets the budget; *all* quantizes every
layer. Then float and all of a model are run in turn, one thread. *Latency* is the ratio of medians
to float by the clock of the thread, *wall* by that of the wall, which shows what else the machine
did; *null* is float against float by the former. *Predicted* is what assign-bits expected of its
choice, and *in the pass* what it measured. SQNR is over all judge samples together, which
calibrated nothing, with a 95 % interval of a bootstrap over them. ``--quick`` takes the shipped CNN
with fewer samples. Nothing is drawn at random but the bootstrap; latencies differ from run to run,
and choices with them.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import common
import int8
import numpy as np
import onnx_ir as ir
from common import Claim
from int8 import LITE0, MINILM, SHIPPED, Work
from rich.table import Table

from qcompile import bench, graph, pipeline, registry
from qcompile.backends.onnxruntime import OrtCpu
from qcompile.calibrate import Calibration
from qcompile.capture import capture
from qcompile.deciding import WEIGHTED
from qcompile.execute import Session
from qcompile.pipeline import Context
from qcompile.ports import inputs_of
from qcompile.sources import Sample, load

FRONT = "simplify,recompose,fold-bn,calibrate"
# Rounds of the last comparison, in which all of a model take turns.
ROUNDS = 40
# What the noise of a shared machine may add to a median, as the null shows it.
NOISE = 0.04


@dataclasses.dataclass(frozen=True)
class Row:
    """One choice for one model; latencies are in those of float."""

    work: str
    choice: str
    budget: float
    decide: str
    in_float: int
    layers: int
    latency: float
    wall: float
    null: float
    predicted: float | None
    in_pass: float | None
    sqnr: float
    interval: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Decided:
    """A model with its decisions, the pass that made them, and what that counted."""

    model: ir.Model
    text: str
    counted: pipeline.Stats


class Bench:
    """One model behind FRONT, with what decides it."""

    def __init__(self, work: Work) -> None:
        self.model = capture(work.source)
        data = Calibration(load(work.calibration, inputs_of(self.model)))
        self.context = Context(calibration=data, target=OrtCpu(), reference=self.model.clone())
        pipeline.run(self.model, pipeline.parse(FRONT, registry.passes()), self.context)
        every = [layer for layer in graph.layers(self.model) if layer.kind in WEIGHTED]
        self.layers = [layer.name for layer in every]
        shapes = data.shapes(self.model)
        macs = {layer.name: layer.macs(shapes) for layer in every}
        self.by_work = sorted(self.layers, key=lambda name: -macs[name])
        # First, last, second, last but one, and so on.
        pairs = zip(self.layers, reversed(self.layers), strict=True)
        self.from_ends = list(dict.fromkeys(name for pair in pairs for name in pair))

    def decided(self, text: str) -> Decided:
        """The model as the pass ``text`` decides it."""
        model = self.model.clone()
        [step] = pipeline.run(model, pipeline.parse(text, registry.passes()), self.context)
        return Decided(model, text, step.counters)

    def quantized(self, names: Sequence[str]) -> Decided:
        """The model with the layers called ``names`` in int8."""
        globs = ",".join(map(graph.glob_of, names))
        return self.decided(f"quantize{{method=mse include={globs}}}")

    def rule(self, make: Callable[[int], list[str]], budget: float) -> Decided:
        """``make(n)``, ever more layers, in int8, with the least ``n`` that meets the budget."""
        low, high = 1, len(self.layers)
        best = self.quantized(make(high))
        while low < high:
            middle = (low + high) // 2
            found = self.quantized(make(middle))
            if self.ratio(found.model) <= budget:
                high, best = middle, found
            else:
                low = middle + 1
        return best

    def ratio(self, decided: ir.Model) -> float:
        """The latency of ``decided`` in that of float, as assign-bits measures it."""
        return OrtCpu().ratio(decided, self.model, self.context.data())


def measure(work: Work, budget: float, quick: bool, seed: int) -> list[Row]:
    """A row for each choice."""
    made = Bench(work)
    samples = "samples=4 " if quick else ""
    found = {
        "assigned": made.decided(
            f"assign-bits{{choices=8,float input=int8 {samples}budget=latency={budget:g}x}}"
        ),
        "most work first": made.rule(lambda n: made.by_work[:n], budget),
        "ends in float": made.rule(lambda n: made.from_ends[-n:], budget),
        "all": made.quantized(made.layers),
    }
    lowered = [made.model.clone(), made.model.clone(), *(d.model.clone() for d in found.values())]
    for model in lowered:
        OrtCpu().lower(model)
    sessions = [Session(model, threads=1) for model in lowered]
    calibration = made.context.data().samples
    clocks = (time.thread_time, time.perf_counter)
    busy, wall = (ratios(sessions, calibration, clock) for clock in clocks)
    reference = made.context.reference
    assert reference is not None
    judges = list(work.judge())[: 300 if quick else None]
    rows: list[Row] = []
    for place, (name, decided) in enumerate(found.items(), 2):
        session = sessions[place]
        signal, noise, _, _ = int8.powers(Session(reference), session, judges)
        counted = decided.counted
        specs = [layer.weight.spec for layer in graph.layers(decided.model)]
        predicted, in_pass = (counted.get(f"{w} latency") for w in ("predicted", "measured"))
        rows.append(
            Row(
                work.name, name, budget, decided.text,
                len(made.layers) - sum(s is not None for s in specs), len(made.layers),
                busy[place], wall[place], busy[1],
                None if predicted is None else float(predicted),
                None if in_pass is None else float(in_pass),
                float(10 * np.log10(signal.sum() / noise.sum())),
                int8.bootstrap(signal, noise, seed),
            )
        )  # fmt: skip
    return rows


def ratios(
    sessions: Sequence[Session], samples: Sequence[Sample], clock: Callable[[], float]
) -> list[float]:
    """The median time of each session in that of the first, run in turn."""
    times = bench.in_turn(sessions, [samples] * len(sessions), ROUNDS, clock)
    medians = [statistics.median(each) for each in times]
    return [median / medians[0] for median in medians]


def claims(rows: Sequence[Row], seeds: int) -> list[Claim]:
    """What must hold of these rows."""
    found: list[Claim] = []

    def say(claim: str, value: float, control: float, above: bool, row: Row | None = None) -> None:
        holds = value >= control if above else value <= control
        interval = None if row is None else row.interval
        found.append(Claim(claim, bool(holds), float(value), float(control), interval, seeds))

    by = {(row.work, row.choice): row for row in rows}
    for work in dict.fromkeys(row.work for row in rows):
        row = by[work, "assigned"]
        assert row.predicted is not None and row.in_pass is not None
        say(f"{work}: latency in the pass", row.in_pass, row.budget, False)
        say(f"{work}: latency beside all", row.latency, row.budget + NOISE, False)
        off = abs(row.predicted / row.in_pass - 1)
        say(f"{work}: predicted is off by", off, 0.15, False)
        for rule in ("most work first", "ends in float"):
            say(f"{work}: SQNR against {rule}", row.sqnr, by[work, rule].sqnr, True, row)
    return found


def table(rows: Sequence[Row]) -> Table:
    """The rows for people."""
    shown = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("model", "choice"):
        shown.add_column(column)
    for column in ("in float", "latency", "wall", "null", "predicted", "in the pass", "SQNR dB"):
        shown.add_column(column, justify="right")
    for row in rows:
        low, high = row.interval
        shown.add_row(
            row.work, row.choice, f"{row.in_float} of {row.layers}", f"{row.latency:.3f}",
            f"{row.wall:.3f}", f"{row.null:.3f}",
            "" if row.predicted is None else f"{row.predicted:.3f}",
            "" if row.in_pass is None else f"{row.in_pass:.3f}",
            f"{row.sqnr:.1f} [{low:.1f}, {high:.1f}]",
        )  # fmt: skip
    return shown


def main() -> int:
    """Measure, print, write."""
    parser = common.parser(__doc__, quick="the shipped CNN only")
    parser.add_argument("--only", help="the models with this word in their names alone")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of the bootstrap")
    arguments = parser.parse_args()
    works = SHIPPED[:1] if arguments.quick else (LITE0, MINILM)
    word = (arguments.only or "").lower()
    rows: list[Row] = []
    for work in (w for w in works if word in w.name.lower()):
        rows += measure(work, 0.6, arguments.quick, arguments.seeds - 1)
    said = claims(rows, arguments.seeds)
    return common.finish(said, arguments.json, [table(rows)], rows=rows)


if __name__ == "__main__":
    sys.exit(main())
