"""The report as a page: ``report.html``, one file that needs no other, no network and no script."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from qcompile.report import LayerReport, Report, bytes_of

# Precisions from good to bad, and how they are painted; halves and others are between.
_COLOURS = {"int8": "#2a9d6f", "int4 weights": "#3b7dd8", "int8 weights": "#6c9be0"}
_FLOAT, _UNKNOWN, _OTHER = "#d98c2b", "#c8453c", "#8a7fc4"
# What shares are of.
_SHARES = {"macs": "MACs"}
# SQNR of a layer in dB at which its bar is full.
_FULL = 60.0

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; width: 100%; }
.wide { overflow-x: auto; }
th, td { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.name { overflow-wrap: anywhere; min-width: 12rem; }
.stack { display: flex; height: 1.1rem; border-radius: 3px; overflow: hidden; min-width: 14rem; }
.bar { display: inline-block; height: .6rem; border-radius: 2px; background: #7a8; }
.dot { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%;
  margin-right: .4rem; }
.warning { border-left: 4px solid #c8453c; padding: .3rem .8rem; margin: .4rem 0;
  background: var(--soft); }
.quiet { opacity: .7; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: .6rem; }
"""


def render(report: Report) -> str:
    """``report`` as a page of HTML; the figures are those of ``report.json``."""
    parts = [
        f"<h1>{escape(report.model)}</h1>",
        f"<p class=quiet>for {escape(report.target)}, seed {report.seed}</p>",
        *(f"<p class=warning>{escape(text)}</p>" for text in report.warnings),
        "<h2>What runs, by proof</h2>",
        _shares(report.share),
        _added(report.added),
        "<h2>What it costs</h2>",
        _table(("", ""), _summary(report)),
        _accuracy(report),
        f"<h2>Layers ({len(report.layers)})</h2>",
        _layers(report.layers),
        _left_alone(report),
        "<h2>Passes</h2>",
        _passes(report),
        f"<h2>Pipeline</h2><pre>{escape(report.pipeline)}</pre>",
        _data(report),
    ]
    title = escape(f"{report.model}: {report.target}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def _colour(precision: str) -> str:
    known = {"float": _FLOAT, "unknown": _UNKNOWN, **_COLOURS}
    return known.get(precision, _OTHER)


def _shares(share: Mapping[str, Mapping[str, float]]) -> str:
    rows: list[str] = []
    for what, found in share.items():
        ordered = sorted(found.items(), key=lambda pair: -pair[1])
        pieces = "".join(
            f'<span style="width:{100 * value:.2f}%;background:{_colour(name)}" '
            f'title="{escape(name)} {value:.1%}"></span>'
            for name, value in ordered
        )
        words = ", ".join(f"{_dot(name)}{value:.1%} {escape(name)}" for name, value in ordered)
        stack = f"<div class=stack>{pieces}</div>"
        rows.append(
            f"<tr><td>{_SHARES.get(what, what)}</td><td>{stack}</td><td>{words or 'none'}</td></tr>"
        )
    return f"<table>{''.join(rows)}</table>"


def _added(added: Mapping[str, float]) -> str:
    return "".join(
        f"<p>added: {escape(role)}, {more:.1%} more MACs in float, not in the shares</p>"
        for role, more in added.items()
    )


def _summary(report: Report) -> Iterable[Sequence[str]]:
    size = report.size
    for output in report.outputs:
        text = f"SQNR {_decibel(output.sqnr)} dB, cosine {output.cosine:.5f}"
        uneven = f", {output.uneven} samples of another size left out" if output.uneven else ""
        yield f"output {escape(output.name)}", text + uneven
    text = f"{bytes_of(size.float_bytes)} → {bytes_of(size.compiled_bytes)}"
    yield "size", f"{text} ({size.compiled_bytes / max(size.float_bytes, 1):.2f} of float)"
    if report.latency is not None:
        found = report.latency
        yield (
            "latency",
            f"{found.ratio:.2f} of float ({found.compiled_ms:.2f} against {found.float_ms:.2f} ms; "
            f"float against itself {found.null:.2f})",
        )


def _accuracy(report: Report) -> str:
    found = report.accuracy
    if found is None:
        return ""
    wanted = f"{found.wanted} at most: {'met' if found.met else 'not met'}" if found.wanted else ""
    lines = [f"<p>{escape(found.words())} ({found.samples} samples) {escape(wanted)}</p>"]
    if found.given_back:
        rows = [(escape(i.layer), escape(i.was), escape(i.now)) for i in found.given_back]
        lines.append(_table(("given back", "was", "is"), rows))
        lines.append("<p class=quiet>How many was decided on this data: judge on other data.</p>")
    return "".join(lines)


def _layers(rows: Sequence[LayerReport]) -> str:
    whole = sum(row.macs for row in rows) or 1
    cells: list[Sequence[str]] = []
    for row in rows:
        asked = "float" if row.weight == "float" else f"{row.weight} x {row.input}"
        share = row.macs / whole
        reason = f"<div class=quiet>{escape(row.reason)}</div>" if row.reason else ""
        cells.append(
            (
                f"{escape(row.name)}<div class=quiet>{escape(row.op)}</div>",
                f"{_dot(row.runs)}{escape(row.runs)} {escape(row.kernel)}{reason}",
                escape(asked),
                f"{row.nominal_bits:g}",
                f"{row.stored_bytes / 1000:,.1f}",
                f"{share:.1%}",
                "" if row.sqnr is None else f"{_decibel(row.sqnr)} {_bar(row.sqnr)}",
            )
        )
    heads = ("layer", "runs", "asked", "#bits", "#stored kB", "#MACs", "#SQNR dB")
    return f"<div class=wide>{_table(heads, cells)}</div>"


def _left_alone(report: Report) -> str:
    named = {row.name for row in report.layers}
    others = [item for item in report.left_alone if item.name not in named]
    if not others:
        return ""
    rows = [(escape(i.name), escape(i.op), escape(i.reason)) for i in others]
    return "<h2>Left alone</h2>" + _table(("node", "operator", "why"), rows)


def _passes(report: Report) -> str:
    rows: list[Sequence[str]] = []
    for step in report.passes:
        did = {name: value for name, value in step.counters.items() if value}
        counted = ", ".join(f"{value} {name}" for name, value in did.items()) or "nothing"
        before, after = step.sqnr_before, step.sqnr_after
        moved = ""
        if before is not None and after is not None:
            moved = f"{_decibel(before)} → {_decibel(after)}"
        rows.append((escape(step.text), escape(counted), moved, f"{step.seconds:.1f}"))
    return _table(("pass", "did", "#SQNR dB", "#seconds"), rows)


def _data(report: Report) -> str:
    lines = [f"{name} {version}" for name, version in report.versions.items()]
    data = report.data
    said = "no calibration data"
    if data is not None:
        said = f"{data.samples} samples of {data.source}, {data.judged} of them to judge"
        said += "" if data.judged_apart else " (which calibrated as well)"
    return f"<p class=quiet>{escape(said)}<br>{escape(', '.join(lines))}</p>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML; columns whose head starts with # hold numbers."""
    kinds = [" class=n" if head.startswith("#") else "" for head in heads]
    top = "".join(
        f"<th{kind}>{escape(head.removeprefix('#'))}</th>"
        for kind, head in zip(kinds, heads, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{kind or (' class=name' if not column else '')}>{cell}</td>"
            for column, (kind, cell) in enumerate(zip(kinds, row, strict=True))
        )
        + "</tr>\n"
        for row in rows
    )
    head = f"<thead><tr>{top}</tr></thead>" if any(heads) else ""
    return f"<table>{head}<tbody>{body}</tbody></table>"


def _dot(precision: str) -> str:
    return f'<span class=dot style="background:{_colour(precision)}"></span>'


def _bar(sqnr: float) -> str:
    share = min(max(sqnr / _FULL, 0.0), 1.0) if not math.isnan(sqnr) else 0.0
    return (
        f'<span style="display:inline-block;width:4rem;text-align:left">'
        f'<span class=bar style="width:{100 * share:.0f}%"></span></span>'
    )


def _decibel(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "exact" if value > 0 else "none"
