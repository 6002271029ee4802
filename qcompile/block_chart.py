"""The partition of a model into blocks as a table and as a picture.

The picture needs the extra ``pictures``.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qcompile import graph, plotting
from qcompile.blocks import Block
from qcompile.errors import QCompileError

# Inches: of a box, from row to row, from box to box in a row, and from one skip to the next.
_WIDTH, _HEIGHT, _ROW, _COLUMN, _LANE = 2.6, 0.42, 0.75, 2.9, 0.22
_LETTERS = 32


def shares(model: ir.Model, parts: Sequence[Block]) -> list[float] | None:
    """The share of each block in the MACs; None if a shape is not known.

    An axis that comes first and is not known is the batch, and counts as 1.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for value in graph.values(model):
        sizes = list(value.shape or ())
        if sizes and not isinstance(sizes[0], int):
            sizes[0] = 1
        known = [size for size in sizes if isinstance(size, int)]
        if value.name and value.shape is not None and len(known) == len(sizes):
            shapes[value.name] = tuple(known)
    counts = [[(layer.kind, layer.macs(shapes)) for layer in part.layers] for part in parts]
    if any(macs == 0 and kind != "embedding" for part in counts for kind, macs in part):
        return None
    macs = [sum(count for _, count in part) for part in counts]
    return [count / max(sum(macs), 1) for count in macs]


def show(model: ir.Model, parts: Sequence[Block], console: Console) -> None:
    """Print a row for each block, and what they are in all."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    known = shares(model, parts)
    for column in ("block", "layers", "MACs", "reads", "writes"):
        table.add_column(column, justify="right" if column in ("layers", "MACs") else "left")
    for number, part in enumerate(parts):
        share = "?" if known is None else f"{known[number]:.1%}"
        reads, writes = (", ".join(names) for names in (part.inputs, part.outputs))
        cells = (part.name, str(len(part.layers)), share, reads, writes)
        table.add_row(*map(escape, cells))
    console.print(table)
    layers = [len(part.layers) for part in parts]
    line = f"{len(parts)} blocks, {sum(layers)} layers, at most {max(layers, default=0)} in one"
    console.print(line, highlight=False, markup=False)


ENDINGS = (".svg", ".png", ".pdf")


def draw(model: ir.Model, parts: Sequence[Block], path: pathlib.Path) -> None:
    """Write the graph of blocks as a picture, in the format that the name of ``path`` ends with.

    A row holds the blocks of one depth, the longest way from the start. What a block in the row
    below reads is a straight line, what one further down reads a curve at the side. The darker a
    box, the larger its share in the MACs, or in the layers where shapes are not known.

    Raises QCompileError without the extra, and if the file cannot be written.
    """
    library = plotting.matplotlib()
    edges = _edges(parts)
    depths = _depths(len(parts), edges)
    places = _places(depths, edges)
    lanes = _lanes(depths, edges)
    right = max((x for x, _ in places), default=0.0) + _WIDTH / 2
    left = min((x for x, _ in places), default=0.0) - _WIDTH / 2
    right_most = right + _LANE * (max(lanes.values(), default=-1) + 2)
    rows = max(depths, default=0) + 1
    figure: Any = library.figure.Figure(figsize=(right_most - left + 0.2, rows * _ROW + 0.2))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(left - 0.1, right_most + 0.1), ylim=(-(rows - 0.5) * _ROW - 0.1, _ROW / 2 + 0.1))
    axes.axis("off")
    for edge in edges:
        side = None if edge not in lanes else right + _LANE * (lanes[edge] + 1)
        _line(axes, places[edge[0]], places[edge[1]], side)
    _boxes(axes, parts, places, shares(model, parts))
    drawn = {"Date": None} if path.suffix == ".svg" else {}
    try:
        with library.rc_context({"svg.hashsalt": "qcompile", "svg.fonttype": "none"}):
            figure.savefig(path, dpi=100, metadata=drawn)
    except OSError as error:
        raise QCompileError(f"cannot write {os.fspath(path)!r}: {error.strerror}") from error


Edge = tuple[int, int]


def _edges(parts: Sequence[Block]) -> list[Edge]:
    """Pairs of blocks, of which the second reads what the first writes."""
    writer = {name: number for number, part in enumerate(parts) for name in part.outputs}
    found = {
        (writer[name], number): None
        for number, part in enumerate(parts)
        for name in part.inputs
        if name in writer
    }
    return list(found)


def _depths(count: int, edges: Sequence[Edge]) -> list[int]:
    """The longest way to each block from one that reads no other."""
    depths = [0] * count
    for number in range(count):
        before = [depths[source] + 1 for source, target in edges if target == number]
        depths[number] = max(before, default=0)
    return depths


def _places(depths: Sequence[int], edges: Sequence[Edge]) -> list[tuple[float, float]]:
    """The middle of each box; in a row they stand in the order of what they read."""
    places = [(0.0, 0.0)] * len(depths)
    for depth in range(max(depths, default=-1) + 1):
        row = [number for number, found in enumerate(depths) if found == depth]
        row.sort(key=lambda number: _mean([places[a][0] for a, b in edges if b == number]))
        for index, number in enumerate(row):
            places[number] = (index - (len(row) - 1) / 2) * _COLUMN, -depth * _ROW
    return places


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0


def _lanes(depths: Sequence[int], edges: Sequence[Edge]) -> dict[Edge, int]:
    """For each edge over more than one row a lane at the side, shared where rows do not meet."""
    long = [edge for edge in edges if depths[edge[1]] - depths[edge[0]] > 1]
    ends: list[list[tuple[int, int]]] = []
    lanes: dict[Edge, int] = {}
    for edge in sorted(long, key=lambda edge: depths[edge[1]] - depths[edge[0]]):
        first, last = depths[edge[0]], depths[edge[1]]
        free = (n for n, taken in enumerate(ends) if all(last <= a or b <= first for a, b in taken))
        lane = next(free, len(ends))
        if lane == len(ends):
            ends.append([])
        ends[lane].append((first, last))
        lanes[edge] = lane
    return lanes


def _line(
    axes: Any, start: tuple[float, float], end: tuple[float, float], side: float | None
) -> None:
    """From below one box to above another, or from the right of both over ``side``."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path

    (x, y), (u, v) = start, end
    if side is None:
        corners = [(x, y - _HEIGHT / 2), (u, v + _HEIGHT / 2)]
        codes = [Path.MOVETO, Path.LINETO]
    else:
        x, u, bend = x + _WIDTH / 2, u + _WIDTH / 2, min(_ROW, (y - v) / 2)
        y, v = y - 0.08, v + 0.08
        corners = [
            (x, y), (side, y), (side, y), (side, y - bend),
            (side, v + bend), (side, v), (side, v), (u, v),
        ]  # fmt: skip
        codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3]
    way: Any = Path(corners, codes)
    arrow = FancyArrowPatch(
        path=way, arrowstyle="-|>", mutation_scale=8, color="0.45", linewidth=0.9, zorder=1
    )
    axes.add_patch(arrow)


def _boxes(
    axes: Any,
    parts: Sequence[Block],
    places: Sequence[tuple[float, float]],
    known: Sequence[float] | None,
) -> None:
    from matplotlib.patches import FancyBboxPatch

    layers = [len(part.layers) for part in parts]
    weights: Sequence[float] = layers if known is None else known
    most = max(weights, default=0) or 1
    for part, (x, y), weight, count in zip(parts, places, weights, layers, strict=True):
        corner = x - _WIDTH / 2 + 0.06, y - _HEIGHT / 2 + 0.06
        box = FancyBboxPatch(
            corner, _WIDTH - 0.12, _HEIGHT - 0.12, boxstyle="round,pad=0.06",
            facecolor=_blue(weight / most), edgecolor="0.25", linewidth=0.8, zorder=2,
        )  # fmt: skip
        axes.add_patch(box)
        label = "1 layer" if count == 1 else f"{count} layers"
        said = label if known is None else f"{label}, {weight:.1%} of the MACs"
        style: Mapping[str, Any] = {
            "ha": "center",
            "va": "center",
            "zorder": 3,
            "parse_math": False,
        }
        axes.text(x, y + 0.08, _short(part.name), fontsize=7.5, **style)
        axes.text(x, y - 0.1, said, fontsize=6.5, color="0.3", **style)


def _blue(share: float) -> tuple[float, float, float]:
    """From white to a blue on which black can be read."""
    return 1 - 0.45 * share, 1 - 0.25 * share, 1.0


def _short(name: str) -> str:
    return name if len(name) <= _LETTERS else f"...{name[3 - _LETTERS :]}"
