"""What was asked, what runs, what it costs: one set of figures for JSON and terminal."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.resources
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qcompile import graph, halves, numerics, packing
from qcompile.backends.base import Ran
from qcompile.bench import Latency
from qcompile.graph import Layer, Shapes, Use
from qcompile.pipeline import Step
from qcompile.search import GivenBack

SCHEMA_VERSION = 1
_NOT_FUSED = frozenset(("float", "unknown", *halves.TYPES))
PACKAGES = ("qcompile", "onnx", "onnx-ir", "onnxruntime", "numpy", "tensorrt-rtx", "torch")


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One captured layer. ``weight`` and ``input`` are what was asked; ``runs`` is by proof."""

    name: str
    op: str
    kind: str
    weight_shape: tuple[int, ...]
    macs: int
    weight: str
    input: str
    nominal_bits: float
    effective_bits: float
    stored_bytes: int
    float_bytes: int
    sqnr: float | None
    runs: str
    kernel: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Output:
    """One output of the model against float, on the samples kept to judge.

    ``sqnr`` is as it runs here, ``simulated`` without the runtime's optimizations; both in dB.
    ``uneven`` samples are left out, because the output has another size than in float.
    """

    name: str
    sqnr: float
    simulated: float
    cosine: float
    uneven: int = 0


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """The user's metric on the user's data, of what was written against float.

    ``drop`` is how much worse it is, ``wanted`` the bound as given, ``met`` whether it is kept.
    ``given_back`` are the layers that were given back for it, chosen on calibration samples; how
    many was decided on this data, so that these figures are a little too good if there are any.
    ``unnamed`` layers could not be given back, because no glob fits them alone. ``evaluations`` of
    the metric and ``probes``, models run on a few calibration samples, are what it took.
    """

    metric: str
    lower_is_better: bool
    source: str
    digest: str
    samples: int
    in_float: float
    compiled: float
    drop: float
    wanted: str | None
    met: bool | None
    given_back: tuple[GivenBack, ...]
    unnamed: int
    evaluations: int
    probes: int

    def words(self) -> str:
        """The figures in one line."""
        share = f", {self.drop / abs(self.in_float):.2%}" if self.in_float else ""
        return (
            f"{self.metric} {self.in_float:.6g} in float, {self.compiled:.6g} compiled: "
            f"a drop of {self.drop:.3g}{share}"
        )


@dataclasses.dataclass(frozen=True)
class LeftAlone:
    """What qcompile did not quantize, and why."""

    name: str
    op: str
    macs: int
    reason: str


@dataclasses.dataclass(frozen=True)
class DataReport:
    """Where the samples came from. ``judged_apart`` is false if there were too few to keep any.

    Samples are counted by runs; ``sequences`` are those of all, and ``state`` flows inside them.
    """

    source: str
    digest: str
    samples: int
    judged: int
    judged_apart: bool
    random: bool
    sequences: int
    state: dict[str, str]
    mask: str | None


@dataclasses.dataclass(frozen=True)
class Size:
    """Bytes on disk of the float model (as captured) and of what was written."""

    float_bytes: int
    compiled_bytes: int


@dataclasses.dataclass(frozen=True)
class Report:
    """The content of ``report.json``; ``report.schema.json`` describes it."""

    model: str
    pipeline: str
    target: str
    seed: int
    versions: dict[str, str]
    data: DataReport | None
    passes: tuple[Step, ...]
    layers: tuple[LayerReport, ...]
    outputs: tuple[Output, ...]
    accuracy: Accuracy | None
    left_alone: tuple[LeftAlone, ...]
    added: dict[str, float]
    share: dict[str, dict[str, float]]
    size: Size
    latency: Latency | None
    simulated_against_run: float | None
    warnings: tuple[str, ...]
    schema: int = SCHEMA_VERSION

    def share_of_macs(self, *precisions: str) -> float:
        """The share of MACs that runs in one of ``precisions``, by proof; 0 to 1."""
        return sum(self.share["macs"].get(p, 0.0) for p in precisions)

    def fused(self) -> float:
        """The share of MACs that runs in integers or in few bits, by proof; 0 to 1."""
        return sum(v for k, v in self.share["macs"].items() if k not in _NOT_FUSED)

    def to_json(self) -> str:
        """The report as JSON; figures that are not finite become null."""
        return json.dumps(_plain(dataclasses.asdict(self)), indent=1) + "\n"


def schema() -> dict[str, Any]:
    """The JSON schema of ``report.json``."""
    text = importlib.resources.files("qcompile").joinpath("report.schema.json").read_text()
    return json.loads(text)


def versions() -> dict[str, str]:
    """The versions of what the result may depend on."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def layer_reports(
    reference: ir.Model,
    decided: ir.Model,
    lowered: ir.Model,
    proof: Mapping[str, Ran],
    shapes: Shapes,
    sqnr: Mapping[str, float],
) -> list[LayerReport]:
    """A row for each layer as captured in ``reference``, whatever passes made of it.

    ``decided`` is the model just before its lowering, ``shapes`` are those of ``reference``, and
    ``sqnr`` is by the name of a value of ``decided``.
    """
    stands_for: dict[str, list[Layer]] = {}
    for layer in graph.layers(decided):
        for name in graph.origins(layer.node):
            stands_for.setdefault(name, []).append(layer)
    stored = _stored_bytes(lowered)
    lost = Ran("unknown", "", "nothing in the lowered graph stands for it")
    return [
        _row(
            layer, stands_for.get(layer.name, []), proof.get(layer.name, lost),
            layer.macs(shapes), stored.get(layer.name, 0), sqnr,
        )
        for layer in graph.layers(reference)
    ]  # fmt: skip


def _row(
    captured: Layer,
    parts: Sequence[Layer],
    ran: Ran,
    macs: int,
    stored: int,
    sqnr: Mapping[str, float],
) -> LayerReport:
    shape = graph.shape_of(captured.weight.value) or ()
    dtype = captured.weight.value.dtype
    itemsize = 0 if dtype is None else dtype.itemsize
    count = sum(math.prod(shape) for shape in captured.weight_shapes())
    weights = [part.weight for part in parts if graph.is_constant(part.weight.value)]
    widths = [_bits(part, itemsize * 8.0) for part in parts]
    outputs = [sqnr[n] for part in parts if (n := part.biased_output.name or "") in sqnr]
    return LayerReport(
        name=captured.name,
        op=captured.node.op_type,
        kind=captured.kind,
        weight_shape=tuple(shape),
        macs=macs,
        weight=_asked([*weights] or [part.weight for part in parts]),
        input=_asked([part.input for part in parts if part.input is not None]),
        nominal_bits=min((nominal for nominal, _ in widths), default=itemsize * 8.0),
        effective_bits=sum(total for _, total in widths) / max(count, 1) if count else 0.0,
        stored_bytes=stored,
        float_bytes=count * int(itemsize),
        sqnr=outputs[-1] if outputs else None,
        runs=ran.precision,
        kernel=ran.kernel,
        reason=ran.reason,
    )


def _asked(uses: Sequence[Use]) -> str:
    """What was asked of the parts of a layer, each once."""
    return " + ".join(dict.fromkeys(str(u.spec or _float(u)) for u in uses)) or "float"


def _float(use: Use) -> str:
    half = halves.of(use.value.dtype)
    return half.dtype.name.lower() if half else "float"


def _bits(part: Layer, width: float) -> tuple[float, float]:
    """Nominal bits a weight of ``part``, and all its bits with scales and zero points."""
    decided, shape = part.weight.spec, graph.shape_of(part.weight.value) or ()
    count = math.prod(shape)
    if decided is None:
        half = halves.of(part.weight.value.dtype)
        width = half.dtype.bitwidth if half else width
        return width, width * count
    nominal = float(numerics.parse_format(decided.format).bits)
    groups = _groups(shape, decided.axis, decided.block)
    return nominal, nominal * count + 32.0 * groups + (
        nominal * groups if decided.zero_point else 0
    )


def _groups(shape: Sequence[int], axis: int | None, block: int | None) -> int:
    if axis is None:
        return 1
    return shape[axis] if block is None else math.prod(shape) // block


def _stored_bytes(lowered: ir.Model) -> dict[str, int]:
    """Bytes of the weight of each captured layer: codes, scales and zero points, or floats."""
    found: dict[str, int] = {}
    for node in lowered.graph:
        for name in graph.origins(node):
            total = 0
            more = node.op_type in (*graph.RECURRENT, "MatMulNBits", "GatherBlockQuantized")
            read = node.inputs[: 3 if more else 2]
            if node.op_type == "MatMulIntegerToFloat":
                read = node.inputs[1:6:2]  # codes, scale and zero point of the weight
            for value in read:
                producer = value.producer() if value is not None else None
                parts = [value] if producer is None else []
                if producer is not None and producer.op_type == "DequantizeLinear":
                    parts = list(producer.inputs)
                    if parts[0] is not None and not parts[0].is_initializer():
                        parts = []  # an activation
                for part in parts:
                    if part is not None and part.const_value is not None:
                        total += part.const_value.nbytes
                if parts and producer is not None:
                    total -= packing.saved(producer)
            total -= packing.saved(node)
            found[name] = max(found.get(name, 0), total)
    return found


def shares(rows: Sequence[LayerReport]) -> dict[str, dict[str, float]]:
    """The share of MACs and of weights (by float bytes) at each precision, by proof."""
    macs: dict[str, float] = {}
    weights: dict[str, float] = {}
    for row in rows:
        macs[row.runs] = macs.get(row.runs, 0.0) + row.macs
        weights[row.runs] = weights.get(row.runs, 0.0) + row.float_bytes
    return {"macs": _normalized(macs), "weights": _normalized(weights)}


def _normalized(parts: dict[str, float]) -> dict[str, float]:
    total = sum(parts.values())
    return {k: v / total for k, v in sorted(parts.items()) if v} if total else {}


# Operators that multiply, whether or not qcompile knows their form.
_MULTIPLY = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul", *graph.RECURRENT))
_UNKNOWN_FORM = frozenset(("Einsum", "Attention", "DeformConv"))


def left_alone(reference: ir.Model, rows: Sequence[LayerReport]) -> list[LeftAlone]:
    """Layers that run in float, and what is never entered or not understood in ``reference``.

    What multiplies but is no layer (a weight on the left, or computed) has no MACs here and in the
    shares, because its form is not known.
    """
    found = [
        LeftAlone(row.name, row.op, row.macs, row.reason)
        for row in rows
        if row.runs in ("float", "unknown")
    ]
    for node in reference.graph:
        constant = all(v is None or graph.is_constant(v) for v in node.inputs)
        bodies = [a for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
        if bodies:
            found.append(LeftAlone(node.name or "", node.op_type, 0, "control flow is not entered"))
        elif node.domain not in ("", "ai.onnx"):
            kind = f"{node.domain}::{node.op_type}"
            found.append(LeftAlone(node.name or "", kind, 0, "a custom operator"))
        elif node.op_type in _MULTIPLY and graph.layer_of(node) is None and not constant:
            reason = "no constant weight where a layer of this kind has it"
            found.append(LeftAlone(node.name or "", node.op_type, 0, reason))
        elif node.op_type in _UNKNOWN_FORM:
            found.append(LeftAlone(node.name or "", node.op_type, 0, "no quantized form yet"))
    return found


# -- for people ---------------------------------------------------------------------------------


def show(report: Report, console: Console, verbose: bool = False) -> None:
    """Print the summary; every layer if ``verbose``, else those that do not run as asked."""
    title = escape(f"{report.model} -> {report.target}")
    console.print(f"[bold]{title}[/bold]", highlight=False)
    summary = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for what, parts in report.share.items():
        text = ", ".join(f"{v:.1%} {k}" for k, v in sorted(parts.items(), key=lambda p: -p[1]))
        summary.add_row(f"share of {what}", text)
    for output in report.outputs:
        judged = report.data.judged if report.data else 0
        where = (
            "judge samples" if report.data and report.data.judged_apart else "calibration samples"
        )
        text = f"SQNR {output.sqnr:.1f} dB, cosine {output.cosine:.5f} ({judged} {where})"
        summary.add_row(escape(f"output {output.name}"), text)
    if report.accuracy is not None:
        _show_accuracy(report.accuracy, summary)
    size = report.size
    text = f"{bytes_of(size.float_bytes)} -> {bytes_of(size.compiled_bytes)}"
    summary.add_row("size", f"{text} ({size.compiled_bytes / max(size.float_bytes, 1):.2f}x)")
    if report.latency is not None:
        latency = report.latency
        text = f"{latency.ratio:.2f} of float ({latency.compiled_ms:.2f} ms against "
        text += f"{latency.float_ms:.2f} ms; float against itself {latency.null:.2f})"
        summary.add_row("latency", text)
    console.print(summary)
    _show_layers(report, console) if verbose else _show_float(report, console)
    named = {row.name for row in report.layers}
    others = [item for item in report.left_alone if item.name not in named]
    for item in others:
        line = f"left alone: {item.name} ({item.op}): {item.reason}"
        console.print(line, highlight=False, markup=False)
    for role, more in report.added.items():
        line = f"added: {role}, {more:.1%} more MACs in float, which the shares do not count"
        console.print(line, highlight=False, markup=False)
    for warning in report.warnings:
        console.print(f"[bold red]warning:[/bold red] {escape(warning)}", highlight=False)


def _show_accuracy(found: Accuracy, summary: Table) -> None:
    """The user's metric, and what was given back for it."""
    wanted = (
        ""
        if found.wanted is None
        else f" ({found.wanted} at most: " + ("met)" if found.met else "not met)")
    )
    summary.add_row("accuracy", escape(f"{found.words()}{wanted}, {found.samples} samples"))
    groups: dict[str, list[str]] = {}
    for item in found.given_back:
        groups.setdefault(f"{item.was} -> {item.now}", []).append(item.layer)
    for change, names in groups.items():
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        count = "1 layer" if len(names) == 1 else f"{len(names)} layers"
        summary.add_row("given back", escape(f"{count}, {change} ({shown})"))
    if found.given_back:
        note = "how many layers to give back was decided on this data: judge anew on other data"
        summary.add_row("", f"{note} ({found.evaluations} evaluations, {found.probes} probes)")


def _show_layers(report: Report, console: Console) -> None:
    """Every layer in a row."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("layer", "asked", "runs", "kernel", "SQNR", "MACs", "why"):
        table.add_column(column, justify="right" if column in ("SQNR", "MACs") else "left")
    for row in report.layers:
        sqnr = "" if row.sqnr is None or not math.isfinite(row.sqnr) else f"{row.sqnr:.1f}"
        asked = "float" if row.weight == "float" else f"{row.weight} x {row.input}"
        cells = (row.name, asked, row.runs, row.kernel, sqnr, f"{row.macs:,}", row.reason)
        table.add_row(*map(escape, cells))
    console.print(table)


def _show_float(report: Report, console: Console) -> None:
    """The layers that stay float or are unknown, gathered by reason."""
    total = sum(row.macs for row in report.layers) or 1
    groups: dict[tuple[str, str], list[LayerReport]] = {}
    for row in report.layers:
        if row.runs in ("float", "unknown"):
            groups.setdefault((row.runs, row.reason), []).append(row)
    for (runs, reason), rows in groups.items():
        share = sum(row.macs for row in rows) / total
        names = ", ".join(row.name for row in rows[:3]) + (", ..." if len(rows) > 3 else "")
        count = "1 layer" if len(rows) == 1 else f"{len(rows)} layers"
        line = f"{runs}: {count}, {share:.1%} of the MACs: {reason} ({names})"
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def bytes_of(count: int) -> str:
    """``count`` bytes for people."""
    return f"{count / 1e6:.2f} MB" if count >= 10_000 else f"{count} B"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
