"""``qcompile pareto``: one model under many budgets, for a person to choose from.

One calibration and one table of sensitivities serve all budgets; every point has the text of the
pipeline that makes it again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from rich.console import Console
from rich.table import Table

from qcompile import cluster, execute, graph, numerics, pipeline, plotting, report, simulate
from qcompile.backends.base import Target
from qcompile.budget import Budget
from qcompile.candidates import size_of
from qcompile.compiler import Compiler
from qcompile.errors import CalibrationError, PassError, QCompileError
from qcompile.options import Options
from qcompile.passes.assign_bits import AssignBits
from qcompile.passes.quantize import Quantize
from qcompile.pipeline import Context, Pass

PASSES = "simplify,recompose,fold-bn,assign-bits,gptq{damping=0.1},insert-qdq"
BUDGETS = "bits=3,3.5,4,5,6,8"
ENDINGS = (".html", ".png", ".json")


@dataclasses.dataclass(frozen=True)
class Point:
    """One pipeline and what it gives.

    ``bits`` a weight of codes alone, ``bytes`` of all weights as they are written, ``sqnr`` in dB
    of the worst output on judge samples, which calibrated nothing. ``kind`` is that of the choice:
    ``assigned`` or ``uniform``. ``latency`` is that of the whole model in that of float, measured
    where one of the budgets is of latency.
    """

    kind: str
    budget: str
    bits: float
    bytes: int
    sqnr: float
    passes: str
    latency: float | None = None

    def merits(self) -> tuple[float, ...]:
        """Numbers of which more is better."""
        return -self.bits, -self.bytes, self.sqnr, -(self.latency or 0.0)


@dataclasses.dataclass(frozen=True)
class Front:
    """The points of one model, and the forward passes that the table of sensitivities took."""

    model: str
    target: str
    float_bytes: int
    forward_passes: float
    points: tuple[Point, ...]

    def to_json(self) -> str:
        """All of it."""
        return json.dumps({**dataclasses.asdict(self), "versions": report.versions()}, indent=1)

    def is_best(self, point: Point) -> bool:
        """Whether no other point is nowhere worse and better in one of its merits."""
        mine, others = point.merits(), (p.merits() for p in self.points)
        return not any(
            o != mine and all(a >= b for a, b in zip(o, mine, strict=True)) for o in others
        )


def budgets(text: str) -> list[Budget]:
    """Read ``bits=3,3.5,4`` or ``latency=0.5x,0.7x``: a kind holds until the next is named."""
    found: list[Budget] = []
    for part in filter(None, text.split(",")):
        kind = found[-1].kind if found and "=" not in part else ""
        found.append(Budget.parse(f"{kind}={part}" if kind else part))
    if not found:
        raise QCompileError(f"--budgets {text!r} names no budget, such as {BUDGETS}")
    return found


def run(source: Any, options: Options, wanted: Sequence[Budget]) -> Front:
    """A point for each of ``wanted``, and one for each uniform width.

    ``options.passes`` holds one assign-bits; its budget is replaced. Raises QCompileError for what
    the user can put right.
    """
    compiler = Compiler(options)
    places = [i for i, step in enumerate(compiler.passes) if isinstance(step, AssignBits)]
    if len(places) != 1 or len(compiler.targets) != 1:
        raise PassError(
            f"pareto needs one assign-bits, whose budget it replaces, and one target; "
            f"got {options.passes!r}"
        )
    model, _, calibration = compiler.opened(source)
    if calibration is None:
        raise CalibrationError("pareto measures on data: give --calib")
    target, reference = compiler.targets[0], model.clone()
    context = Context(
        seed=options.seed, calibration=calibration, target=target, reference=reference,
        jobs=options.jobs, progress=options.progress,
    )  # fmt: skip
    judge = simulate.Judge(reference, calibration.judges)
    first, chosen = compiler.passes[: places[0]], compiler.passes[places[0]]
    rest = compiler.passes[places[0] + 1 :]
    assert isinstance(chosen, AssignBits)
    points: list[Point] = []
    spent, timed = 0.0, any(budget.kind == "latency" for budget in wanted)
    if timed:
        target.check_measure()

    def point(kind: str, budget: str, step: Pass) -> None:
        nonlocal spent
        decided = model.clone()
        [done] = pipeline.run(decided, [step], context)
        spent += float(done.counters.get("forward passes", 0.0))
        bits = bits_of(model, decided)
        latency = target.ratio(decided, model, calibration) if timed else None
        pipeline.run(decided, rest, context)
        sqnr = judge.worst(judge.simulated(target.computed(decided)))
        text = pipeline.to_text([*first, step, *rest])
        size = execute.weight_bytes(target.written(decided))
        points.append(Point(kind, budget, bits, size, sqnr, text, latency))
        said = "" if latency is None else f", {latency:.2f} of the latency of float"
        options.log(f"{kind} {budget}: {bits:.2f} bits, {size / 1e6:.2f} MB, {sqnr:.1f} dB{said}")

    with cluster.spread(options.cluster):
        pipeline.run(model, first, context)
        for width in reversed(chosen.widths()):
            point("uniform", f"int{width}", uniform(chosen, width))
        for budget in wanted:
            point("assigned", str(budget), dataclasses.replace(chosen, budget=(str(budget),)))
    name = str(source) if isinstance(source, str | pathlib.Path) else type(source).__name__
    return Front(name, str(target), execute.weight_bytes(reference), round(spent, 1), tuple(points))


def uniform(chosen: AssignBits, width: int) -> Quantize:
    """The same decisions with one width for all."""
    return Quantize(
        f"int{width}", chosen.input, chosen.granularity, chosen.block, chosen.range,
        include=chosen.include, exclude=chosen.exclude,
    )  # fmt: skip


def bits_of(model: ir.Model, decided: ir.Model) -> float:
    """Bits of codes for each weight of ``model`` whose layer is decided in ``decided``."""
    bits, names = 0, set[str]()
    for layer in graph.layers(decided):
        form = layer.weight.spec
        if form is not None and graph.is_constant(layer.weight.value):
            width = numerics.parse_format(form.format).bits
            bits += width * math.prod(graph.shape_of(layer.weight.value) or ())
            names |= {*graph.origins(layer.node)}
    count = sum(
        math.prod(graph.shape_of(layer.weight.value) or ())
        for layer in graph.layers(model)
        if names & {*graph.origins(layer.node)}
    )
    return bits / max(count, 1)


def stored_of(decided: ir.Model, target: Target) -> float:
    """Bytes of all decided weights in a file for ``target``, scales counted."""
    unpacks = target.kernels().unpacks
    total = 0.0
    for layer in graph.layers(decided):
        if layer.weight.spec is not None and graph.is_constant(layer.weight.value):
            shape = graph.shape_of(layer.weight.value) or ()
            wide = layer.input is not None and layer.input.spec is not None
            total += size_of(shape, layer.weight.spec, unpacks, wide).stored
    return total


# -- for people ---------------------------------------------------------------------------------


def show(front: Front, console: Console) -> None:
    """Print the table, and the texts of the points that nothing beats."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("choice", "budget", "bits", "MB", "of float", "latency", "SQNR dB", ""):
        table.add_column(column, justify="left" if column in ("choice", "budget", "") else "right")
    for point in front.points:
        table.add_row(
            point.kind, point.budget, f"{point.bits:.2f}", f"{point.bytes / 1e6:.2f}",
            f"{point.bytes / max(front.float_bytes, 1):.3f}",
            "" if point.latency is None else f"{point.latency:.2f}", f"{point.sqnr:.1f}",
            "on the front" if front.is_best(point) else "",
        )  # fmt: skip
    console.print(table)
    said = f"{front.forward_passes:g} forward passes; bits are those of codes, MB of all weights"
    console.print(said, highlight=False, markup=False, soft_wrap=True)
    for point in front.points:
        if front.is_best(point):
            line = f"{point.kind} {point.budget}: --passes '{point.passes}'"
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def write(front: Front, path: pathlib.Path) -> None:
    """Write ``front`` as JSON, as a picture, or as a page with picture, table and texts."""
    if path.suffix == ".json":
        path.write_text(front.to_json() + "\n")
    elif path.suffix == ".png":
        _figure(front).savefig(path, dpi=150, metadata={"Software": None})
    else:
        path.write_text(_page(front))


def _figure(front: Front) -> Any:
    """SQNR against bits a weight, what is written, and latency where it was measured."""
    asked = [_bits, _megabytes]
    if any(point.latency is not None for point in front.points):
        asked.append(_latency)
    drawn: Any = plotting.matplotlib().figure.Figure(
        figsize=(5 * len(asked), 4.2), layout="constrained"
    )
    axes: Any = drawn.subplots(1, len(asked), sharey=True)
    for kind, mark in (("uniform", "s--"), ("assigned", "o-")):
        points = [p for p in front.points if p.kind == kind]
        for axis, across in zip(axes, asked, strict=True):
            ordered = sorted(points, key=across)
            axis.plot([across(p) for p in ordered], [p.sqnr for p in ordered], mark, label=kind)
            for point in ordered:
                place = (across(point), point.sqnr)
                axis.annotate(
                    point.budget, place, textcoords="offset points", xytext=(4, -9), size=7
                )
    axes[0].set(xlabel="bits of codes a weight", ylabel="SQNR of the worst output, dB")
    axes[1].set(xlabel="MB of all weights as written")
    axes[-1].set(**({"xlabel": "latency, of float"} if _latency in asked else {}))
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend()
    drawn.suptitle(f"{pathlib.PurePath(front.model).name} for {front.target}", size=10)
    return drawn


def _bits(point: Point) -> float:
    return point.bits


def _megabytes(point: Point) -> float:
    return point.bytes / 1e6


def _latency(point: Point) -> float:
    return point.latency or 0.0


def _page(front: Front) -> str:
    import html
    import io

    picture = io.StringIO()
    _figure(front).savefig(picture, format="svg", metadata={"Date": None})
    svg = picture.getvalue()
    rows = "\n".join(
        f"<tr{' class=best' if front.is_best(p) else ''}><td>{p.kind}<td>{html.escape(p.budget)}"
        f"<td>{p.bits:.2f}<td>{p.bytes / 1e6:.2f}"
        f"<td>{'' if p.latency is None else f'{p.latency:.2f}'}<td>{p.sqnr:.1f}"
        f"<td><code>--passes '{html.escape(p.passes)}'</code>"
        for p in front.points
    )
    return f"""<!doctype html>
<meta charset="utf-8"><title>{html.escape(front.model)}</title>
<style>body{{font:15px sans-serif;margin:2em}}td,th{{padding:.2em .8em;text-align:left}}
.best{{font-weight:bold}}code{{font-weight:normal;font-size:12px}}</style>
<h1>{html.escape(front.model)}</h1>
<p>{html.escape(front.target)}; {front.forward_passes:g} forward passes. Bold: nothing beats it.</p>
{svg[svg.index("<svg") :]}
<table><tr><th>choice<th>budget<th>bits<th>MB<th>latency<th>SQNR dB<th>pipeline
{rows}
</table>
"""
