"""MLoRQ under a budget: products of low rank and widths, widths alone, one width, by one rounding.

    python tests/benchmarks/mlorq.py [--quick] [--only WORD] [--choices WORD ...] [--seeds N]
        [--json FILE]

Weights alone are quantized, activations are float, one scale a channel, ranges by mean squared
error, then gptq (of SmolLM2 to the nearest, by lazy tables); all rows of a model differ in the
widths only. Bits are those of codes on average over all Convs and linear layers (none is exempt),
MB the size of the file; *mixed, as stored* has the bytes of the weights in 4 bits as its budget, in
place of bits. The surrogate is summed noise-to-signal with each layer alone rounded, by gptq as
well, from a whole table, in which every candidate of a smaller set is one of the larger. Passes are
forward passes over the samples against one for each width of each layer. SQNR is over all judge
samples together, which calibrated nothing, with a 95 % interval of a bootstrap over them. The slope
is that of the logarithm of the singular values against that of their number, the median over the
layers: low rank pays only where spectra decay (about -1 and below). *At best* is the SQNR that one
width would gain by widths that need not be whole, if costs added up and fell by 4 a bit: with ``c``
those of the one width and ``w`` the shares of the weights, ``10 log10(sum c / prod (c / w)^w)``.
``--quick`` takes the shipped models with fewer samples; SmolLM2, which takes more than an hour, is
measured with ``--only smollm`` alone. Nothing is drawn at random but the bootstrap.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import common
import int8
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from common import Claim
from int8 import LITE0, MINILM, SHIPPED, Work
from rich.table import Table

from qcompile import deciding, execute, factors, graph, pareto, pipeline, registry, sensitivity
from qcompile.backends.base import Target
from qcompile.backends.onnxruntime import OrtCpu
from qcompile.calibrate import Calibration
from qcompile.candidates import Costs, Items
from qcompile.capture import capture
from qcompile.deciding import Weights
from qcompile.execute import Session
from qcompile.passes.gptq import Gptq
from qcompile.pipeline import Context
from qcompile.ports import inputs_of
from qcompile.sensitivity import Sensitivity
from qcompile.sources import Data, load

# Widths under a budget of stored bytes, those of 4 bits for all.
STORED = "mixed, as stored"
# Bytes of a file that all packed weights share, which are in no budget.
SHARED = 1000
FRONT, BEHIND = "simplify,recompose,fold-bn", ",gptq{damping=0.1},insert-qdq"
SMOLLM = Work(
    "SmolLM2-135M", "qcompile.models.language:smollm2_prefill",
    "qcompile.models.language:smollm2_calibration", lambda: language().smollm2_judge(),
)  # fmt: skip
# Of so many layers all is rounded to the nearest, and no whole table is measured.
LARGE = (SMOLLM.name,)


def language() -> Any:
    """Its module, which needs the extra ``public``."""
    return importlib.import_module("qcompile.models.language")


@dataclasses.dataclass(frozen=True)
class Row:
    """One choice for one model; ``cost`` is the surrogate, ``share`` of the passes of a table.

    ``stored_mb`` is of the decided weights alone, ``file_mb`` of the whole file.
    """

    work: str
    choice: str
    budget: float
    passes: str
    bits: float
    stored_mb: float
    file_mb: float
    cost: float | None
    forward_passes: float
    share: float
    trials: int
    products: int
    sqnr: float
    interval: tuple[float, float]
    slope: float
    at_best: float | None


def choices(budget: float, methods: Sequence[str], options: str) -> dict[str, str]:
    """The passes that decide, by what they are called."""
    known = {
        "mixed": f"assign-bits{{budget=bits={budget:g}{options}}}",
        "mixed, whole table": f"assign-bits{{budget=bits={budget:g} table=full{options}}}",
        "products": f"assign-bits{{budget=bits={budget:g} factors=4,8 table=full{options}}}",
        "fmpq": f"assign-bits{{budget=bits={budget:g} method=fmpq{options}}}",
        "greedy": f"assign-bits{{budget=bits={budget:g} method=greedy{options}}}",
        "products, lazily": f"assign-bits{{budget=bits={budget:g} factors=4,8{options}}}",
    }
    return {name: known[name] for name in methods}


def measure(
    work: Work,
    budgets: Sequence[float],
    methods: Sequence[str],
    quick: bool,
    seed: int,
    words: Sequence[str] = (),
) -> list[Row]:
    """A row for each of ``methods`` and the one width, at each of ``budgets``.

    Of ``methods`` only those with one of ``words``, if there are any.
    """
    model, target = capture(work.model), OrtCpu()
    data = Calibration(load(work.calibration, inputs_of(model)))
    reference, judges = Session(model.clone()), list(work.judge())[: 300 if quick else None]
    context = Context(calibration=data, target=target, reference=model.clone())
    pipeline.run(model, pipeline.parse(FRONT, registry.passes()), context)
    slope = decay(list(graph.layers(model)))
    rows: list[Row] = []
    large = work.name in LARGE
    behind = ",insert-qdq" if large else BEHIND
    for budget in budgets:
        options = " samples=4" if large else " rounding=gptq" + (" samples=8" if quick else "")
        listed = choices(budget, methods, options)
        if budget == int(budget):
            one = f"quantize{{weight=int{budget:g} input=float method=mse}}"
            listed = {"uniform": one.replace("weight=int8 ", ""), **listed}
        if budget == 4 and not large:
            listed[STORED] = ""  # its budget is what the one width stores
        whole = 0.0
        for name, text in listed.items():
            if name != "uniform" and words and not any(word in name for word in words):
                continue
            if name == STORED:
                least = whole - SHARED / 1e6
                text = f"assign-bits{{budget=size={least:.6f}MB table=full{options}}}"
            started, decided = time.perf_counter(), model.clone()
            # A calibration of its own, so that every row pays for what it measures.
            own = Context(calibration=Calibration(data.data), target=target, reference=model)
            [step] = pipeline.run(decided, pipeline.parse(text, registry.passes()), own)
            bits = pareto.bits_of(model, decided)
            stored = pareto.stored_of(decided, target)
            whole = stored / 1e6 if name == "uniform" else whole
            rest = pipeline.parse(behind.strip(","), registry.passes())
            pipeline.run(decided, rest, context)
            signal, noise, _, _ = int8.powers(reference, Session(decided), judges)
            counted = step.counters
            cost = counted.get("cost")
            table = float(counted.get("of a whole table of", 0))
            spent = float(counted.get("forward passes", 0))
            rows.append(
                Row(
                    work.name, name, budget, FRONT + "," + text + behind, bits, stored / 1e6,
                    file_size(decided, target) / 1e6,
                    None if cost is None else float(cost),
                    spent, spent / table if table else 0.0, int(table),
                    int(counted.get("products", 0)),
                    float(10 * np.log10(signal.sum() / noise.sum())),
                    int8.bootstrap(signal, noise, seed), slope,
                    at_best(model, int(budget), own)
                    if name == "uniform" and budget <= 4 and not large else None,
                )
            )  # fmt: skip
            say = f"{work.name}, {name}, {budget:g} bits: {rows[-1].sqnr:.1f} dB"
            print(f"{say}, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return rows


def at_best(model: ir.Model, bits: int, context: Context) -> float:
    """What widths that need not be whole would gain in dB on ``bits`` for all, at equal bits.

    Of ``sum c_l 4^-d_l`` with ``sum w_l d_l = 0`` the least has all ``c_l 4^-d_l / w_l`` equal.
    """
    fit, apart = context.data().to_fit(len(context.data().samples))
    seen = Calibration(Data(context.data().data.source, fit), mask=context.data().mask)
    layers = [layer for layer in graph.layers(model) if layer.kind in deciding.WEIGHTED]
    rounding = dataclasses.replace(context, calibration=seen)
    items = Items(
        model, layers, (bits,), Weights("int8", "channel", 32, "mse"), rounding,
        fit=Gptq(damping=0.1),
    )  # fmt: skip
    costs = Costs(items, Sensitivity(model, apart.some(16), sensitivity.metric("nsr")))
    places = [(item, 0) for item in range(len(items))]
    costs.measure(places)
    found = np.array([costs.guess(*place) for place in places])
    sizes: npt.NDArray[np.float64] = np.array([float(math.prod(items.shape(i))) for i, _ in places])
    shares = sizes / sizes.sum()
    least = np.exp(shares @ np.log(np.maximum(found, 1e-30) / shares))
    return float(10 * np.log10(found.sum() / least))


def file_size(lowered: ir.Model, target: Target) -> int:
    """Bytes of the file of a ``lowered`` model."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model.onnx"
        execute.save(target.written(lowered), path)
        return path.stat().st_size


def decay(layers: Sequence[graph.Layer]) -> float:
    """The median slope of the spectra of the layers that can be factorized."""
    slopes: list[float] = []
    for layer in layers:
        if factors.factorable(layer):
            values = np.linalg.svd(factors.matrix(layer), compute_uv=False)
            kept = values[: max(2, len(values) // 2)]  # the rest may be exact zeros
            places = np.log(np.arange(1, len(kept) + 1))
            slopes.append(float(np.polyfit(places, np.log(np.maximum(kept, 1e-12)), 1)[0]))
    return float(np.median(slopes)) if slopes else 0.0


def claims(rows: Sequence[Row], seeds: int) -> list[Claim]:
    """What must hold of these rows."""
    found: list[Claim] = []
    by = {(row.work, row.budget, row.choice): row for row in rows}

    def say(claim: str, value: float, control: float, above: bool, row: Row | None = None) -> None:
        holds = value >= control if above else value <= control
        interval = None if row is None else row.interval
        found.append(Claim(claim, bool(holds), float(value), float(control), interval, seeds))

    for (work, budget, choice), row in by.items():
        where = f"{work}, {choice}, {budget:g} bits"
        if choice == STORED:
            control = by[work, budget, "uniform"]
            say(f"{where}: MB against one width", row.file_mb, control.file_mb, False)
            say(f"{where}: SQNR against one width", row.sqnr, control.sqnr + 2.0, True, row)
        elif choice != "uniform":
            say(f"{where}: within the budget", row.bits, budget, False)
        if choice in ("mixed", "fmpq") and row.trials >= 100:  # the run in float counts as well
            say(f"{where}: share of the passes of a table", row.share, 0.25, False)
        uniform = by.get((work, budget, "uniform"))
        if (
            uniform is not None
            and choice in ("mixed", "products", "products, lazily")
            and budget <= 4
        ):
            more = 2.0 if budget == 4 and choice == "mixed" else 0.0
            say(f"{where}: SQNR against one width", row.sqnr, uniform.sqnr + more, True, row)
        mixed = by.get((work, budget, "mixed, whole table"))
        if choice == "products" and mixed is not None:
            assert row.cost is not None and mixed.cost is not None
            say(f"{where}: surrogate against widths alone", row.cost, mixed.cost * 1.0002, False)
        ends = [by.get((work, width, "uniform")) for width in (4, 8)]
        if choice == "mixed" and 4 < budget < 8 and ends[0] is not None and ends[1] is not None:
            line = ends[0].sqnr + (budget - 4) / 4 * (ends[1].sqnr - ends[0].sqnr)
            say(f"{where}: SQNR above the line of 4 and 8", row.sqnr, line, True, row)
    return found


def table(rows: Sequence[Row]) -> Table:
    """The rows for people."""
    shown = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("model", "choice"):
        shown.add_column(column)
    for column in (
        "bits", "MB", "SQNR dB", "at best", "surrogate", "passes", "of table", "products", "slope",
    ):  # fmt: skip
        shown.add_column(column, justify="right")
    for row in rows:
        low, high = row.interval
        shown.add_row(
            row.work, row.choice, f"{row.bits:.2f} of {row.budget:g}", f"{row.file_mb:.3f}",
            f"{row.sqnr:.1f} [{low:.1f}, {high:.1f}]",
            "" if row.at_best is None else f"+{row.at_best:.1f}",
            "" if row.cost is None else f"{row.cost:.3g}", f"{row.forward_passes:.0f}",
            f"{row.share:.0%}", str(row.products), f"{row.slope:.2f}",
        )  # fmt: skip
    return shown


def main() -> int:
    """Measure, print, write."""
    parser = common.parser(__doc__, quick="the shipped models only")
    parser.add_argument("--only", help="the models with this word in their names alone")
    parser.add_argument("--choices", nargs="+", default=[], help="words in the names of choices")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of the bootstrap")
    arguments = parser.parse_args()
    word = (arguments.only or "").lower()
    works = SHIPPED if arguments.quick else (*SHIPPED, MINILM, LITE0, *([SMOLLM] if word else []))
    rows: list[Row] = []
    for work in (w for w in works if word in w.name.lower()):
        methods = ("mixed", "mixed, whole table", "products", "greedy")
        methods = methods[:3] if arguments.quick else methods
        budgets = (3,) if arguments.quick else (3, 4)
        if work.name in LARGE:
            methods = ("mixed", "products, lazily")
        chosen = arguments.choices
        rows += measure(work, budgets, methods, arguments.quick, arguments.seeds - 1, chosen)
        if not arguments.quick and work.name not in LARGE:
            between = (5, 6, 8)
            rows += measure(work, between, ("mixed",), False, arguments.seeds - 1, chosen)
    said = claims(rows, arguments.seeds)
    return common.finish(said, arguments.json, [table(rows)], rows=rows)


if __name__ == "__main__":
    sys.exit(main())
