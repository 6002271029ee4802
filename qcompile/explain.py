"""What ``qcompile passes`` and ``qcompile targets`` print: the lists, and one explained.

Nothing is written twice: what a pass does is the first line of its module, the algebra is the
docstring of its class, and a line ``* ``option``: meaning`` there is what the option means.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from rich.console import Console
from rich.text import Text

from qcompile import pipeline, recipes, registry, syntax
from qcompile.backends.base import Target
from qcompile.errors import PluginError, QCompileError, nearest
from qcompile.pipeline import Pass
from qcompile.registry import Catalog

T = TypeVar("T", bound=Pass | Target)
Rows = Iterable[tuple[str, str]]

# Longer lines are hard to read, however wide the terminal is.
WIDEST = 100


def list_passes(out: Console) -> None:
    """Print every pass by the package it comes from, and every recipe."""
    _list(out, registry.passes(), lambda kind: _told(kind)[0])
    _section(out, "recipes", ((f"@{name}", what) for name, what in recipes.MEANINGS.items()))
    _line(out, "explain:  qcompile passes NAME")
    _line(out, "run:      qcompile MODEL --calib DATA --passes 'NAME,NAME{option=value}'")


def list_targets(out: Console) -> None:
    """Print every target by the package it comes from."""
    _list(out, registry.targets(), lambda kind: _paragraphs(inspect.getdoc(kind))[0])
    _line(out, "explain:  qcompile targets NAME")
    _line(out, "run:      qcompile MODEL --calib DATA --target NAME --target NAME")


def explain_pass(out: Console, name: str) -> None:
    """Print what a pass does, its options, its words and a pipeline with it; or a recipe."""
    if name.startswith("@"):
        _explain_recipe(out, name)
        return
    kind = _named(registry.passes(), name, "pass")
    meanings = _explain(out, name, _told(kind))
    _section(out, "options", _options(kind, meanings))
    _section(out, "contract", _contract(kind))
    source = [("source", kind.source)] if kind.source else []
    _section(out, "origin", [*source, *_origin(registry.passes(), name, kind)])
    _usage(out, f"--passes '{_pipeline_with(kind)}'")


def explain_target(out: Console, name: str) -> None:
    """Print what a target holds, its options, and the rules of its dialect."""
    kind = _named(registry.targets(), name, "target")
    meanings = _explain(out, name, _paragraphs(inspect.getdoc(kind)))
    _section(out, "options", _options(kind, meanings))
    held = [
        ("weights", ", ".join(kind.weight_formats) or "float alone"),
        ("activations", ", ".join(kind.input_formats) or "float alone"),
        ("opset", f"up to {kind.newest_opset}"),
    ]
    _section(out, "holds", held)
    _section(out, "rules, in order", ((rule.name, rule.why) for rule in kind.dialect))
    _section(out, "origin", _origin(registry.targets(), name, kind))
    _usage(out, f"--target {name}")


def _explain_recipe(out: Console, name: str) -> None:
    """What a recipe is for, what each of its passes does, and its text."""
    text = recipes.expand(name)
    steps = pipeline.parse(text, registry.passes())
    meaning = recipes.MEANINGS.get(name[1:])
    if meaning is not None:
        _wrapped(out, "", f"{name}: {meaning}")
        out.print()
    _section(out, "passes, in order", ((str(step), _told(type(step))[0]) for step in steps))
    _usage(out, f"--passes '{text}'", any(step.needs_data() for step in steps))


# -- what there is to say -----------------------------------------------------------------------


def _named(known: Catalog[T], name: str, what: str) -> type[T]:
    if name not in known:
        raise QCompileError(f"unknown {what} {name!r}; {nearest(name, known)}")
    return known[name]


def _told(kind: type[Pass]) -> list[str]:
    """What the module of a pass says (what it does, its source), and then its class (how)."""
    module = sys.modules[kind.__module__]
    return [*_paragraphs(inspect.getdoc(module)), *_paragraphs(inspect.getdoc(kind))]


def _paragraphs(doc: str | None) -> list[str]:
    """The paragraphs of a docstring, each on one line; so is each item of a list."""
    blocks = re.split(r"\n\s*\n|\n(?=\* )", inspect.cleandoc(doc or ""))
    return [" ".join(block.split()) for block in blocks if block.strip()]


def _options(kind: type[Any], meanings: dict[str, str]) -> Rows:
    """Each option with its default, the values that it takes, and what it means."""
    types_of = syntax.options_of(kind)
    for field in dataclasses.fields(kind):
        if field.init:
            key = field.name.replace("_", "-")
            said = [syntax.describe(types_of[field.name]), meanings.get(key, "")]
            yield f"{key}={syntax.plain(field.default)}", "; ".join(filter(None, said))
    if not types_of:
        yield "none", ""


def _contract(kind: type[Pass]) -> Rows:
    for what in ("requires", "produces", "invalidates"):
        yield what, ", ".join(sorted(getattr(kind, what))) or "nothing"
    yield "float model", "same function" if kind.keeps_float else "may be changed"
    yield "data", "needed" if kind.reads_data else "not needed"
    yield "runs", "for each target" if kind.per_target else "once for all targets"
    if kind.needs:
        yield "needs", ", ".join(sorted(kind.needs))


def _origin(known: Catalog[T], name: str, kind: type[T]) -> Rows:
    [package] = known.packages(name)
    yield "package", _package(package)
    yield "module", kind.__module__


def _package(name: str) -> str:
    return f"{name} {importlib.metadata.version(name)}"


def _pipeline_with(kind: type[Pass]) -> str:
    """The default pipeline with a pass of ``kind`` in it, where its words let it stand."""
    passes = pipeline.parse(recipes.expand("@int8"), registry.passes())
    if any(isinstance(step, kind) for step in passes):
        return pipeline.to_text(passes)
    order = pipeline.working_order([*passes, _example(kind)])
    return pipeline.to_text(order) if order else f"...,{kind.name},..."


def _example(kind: type[Pass]) -> Pass:
    """A pass with its defaults; an option that must be given has its own name as value."""
    try:
        return kind()
    except QCompileError:
        empty = {f.name: (f.name.upper(),) for f in dataclasses.fields(kind) if f.default == ()}
        return kind(**empty)


# -- how it is printed --------------------------------------------------------------------------


def _list(out: Console, known: Catalog[T], summary: Callable[[type[T]], str]) -> None:
    groups: dict[str, list[tuple[str, str]]] = {}
    for name in known:
        try:
            said = summary(known[name])
        except PluginError as error:
            said = f"error: {error}"
        packages = known.packages(name)
        ours = packages == [registry.OURS]
        heading = "built in" if ours else f"from {' and '.join(map(_package, packages))}"
        groups.setdefault(heading, []).append((name, said))
    for heading in sorted(groups):  # "built in" comes before "from"
        _section(out, heading, groups[heading])


def _explain(out: Console, name: str, paragraphs: list[str]) -> dict[str, str]:
    """Print ``paragraphs`` behind a name, less the meanings of options, which are returned."""
    meanings: dict[str, str] = {}
    paragraphs[0] = f"{name}: {paragraphs[0]}"
    for paragraph in paragraphs:
        match = re.fullmatch(r"\* ((?:``[\w-]+``(?:, )?)+): (.*)", paragraph)
        if match is None:
            _wrapped(out, "", paragraph)
            out.print()
        else:
            meanings |= dict.fromkeys(re.findall(r"[\w-]+", match[1]), match[2])
    return meanings


def _section(out: Console, heading: str, rows: Rows) -> None:
    """Print ``rows`` of two columns below a heading; nothing at all if there are none."""
    shown = list(rows)
    if not shown:
        return
    out.print(Text(heading, "bold"))
    edge = 4 + max(len(left) for left, _ in shown)
    for left, right in shown:
        _wrapped(out, f"  {left:{edge - 2}}", right, edge)
    out.print()


def _wrapped(out: Console, start: str, text: str, indent: int = 0) -> None:
    """Print ``text`` behind ``start``; the lines after the first are indented."""
    plain = text.replace("``", "`")
    width = min(out.width, WIDEST) - 1
    wrapped = textwrap.wrap(
        plain, width, initial_indent=start, subsequent_indent=" " * indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    for line in wrapped or [start.rstrip()]:
        _line(out, line)


def _usage(out: Console, options: str, data: bool = True) -> None:
    out.print(Text("usage", "bold"))
    _line(out, f"  qcompile MODEL {'--calib DATA ' if data else ''}{options}")


def _line(out: Console, text: str) -> None:
    """One line, however long, so that it can be copied."""
    out.print(text, highlight=False, markup=False, soft_wrap=True)
