"""Packed codes: what files of few bits save, and what a session takes longer to make.

    python tests/benchmarks/packing.py [--quick] [--only WORD] [--json FILE]

Weights of 4 bits beside 8-bit activations, a scale a channel, first and last in 8 bits, rounded to
the nearest, for ONNX Runtime: the same lowered model, with its codes in types of 8 bits and packed.
*To make* is the ratio of the medians of making a session of each, in turns, one thread. Results of
both must be equal to the bit. ``--quick`` takes the shipped models only. No seed: nothing is drawn.
"""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import sys
import tempfile
import time

import common
import numpy as np
from common import Claim
from int8 import LITE0, MINILM, SHIPPED, Work
from rich.table import Table

from qcompile import execute, pipeline, registry
from qcompile.backends.onnxruntime import OrtCpu
from qcompile.calibrate import Calibration
from qcompile.capture import capture
from qcompile.execute import Session
from qcompile.pipeline import Context
from qcompile.ports import inputs_of
from qcompile.sources import load

PASSES = (
    "simplify,recompose,fold-bn,calibrate,quantize{weight=int4 method=mse ends=int8},insert-qdq"
)
ROUNDS = 9


@dataclasses.dataclass(frozen=True)
class Row:
    """One model: MB of both files, how much longer a session takes to make, and equal results."""

    work: str
    held_mb: float
    packed_mb: float
    to_make: float
    equal: bool


def measure(work: Work) -> Row:
    """Both files of ``work``, opened in turns."""
    model, target = capture(work.model), OrtCpu()
    data = Calibration(load(work.calibration, inputs_of(model)))
    context = Context(calibration=data, target=target, reference=model.clone())
    pipeline.run(model, pipeline.parse(PASSES, registry.passes()), context)
    with tempfile.TemporaryDirectory() as folder:
        paths = [pathlib.Path(folder) / name for name in ("held.onnx", "packed.onnx")]
        execute.save(model, paths[0])
        execute.save(target.written(model), paths[1])
        times: list[list[float]] = [[], []]
        for _ in range(ROUNDS):
            for path, taken in zip(paths, times, strict=True):
                started = time.perf_counter()
                Session(path, threads=1)
                taken.append(time.perf_counter() - started)
        one, other = (Session(path, threads=1).run(data.judges[0]) for path in paths)
        held, packed = (path.stat().st_size / 1e6 for path in paths)
    equal = all(np.array_equal(one[name], other[name]) for name in one)
    held_s, packed_s = map(statistics.median, times)
    return Row(work.name, held, packed, packed_s / held_s, equal)


def main() -> int:
    """Measure, print, write."""
    parser = common.parser(__doc__, quick="the shipped models only")
    parser.add_argument("--only", help="the models with this word in their names alone")
    arguments = parser.parse_args()
    works = SHIPPED if arguments.quick else (*SHIPPED, LITE0, MINILM)
    word = (arguments.only or "").lower()
    rows = [measure(work) for work in works if word in work.name.lower()]
    claims = [
        claim
        for row in rows
        for claim in (
            Claim(f"{row.work}: equal results", row.equal, float(row.equal), 1.0),
            Claim(f"{row.work}: MB", row.packed_mb < row.held_mb, row.packed_mb, row.held_mb),
        )
    ]
    shown = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("model", "MB held", "MB packed", "to make"):
        shown.add_column(column)
    for row in rows:
        cells = (f"{row.held_mb:.2f}", f"{row.packed_mb:.2f}", f"{row.to_make:.1f}")
        shown.add_row(row.work, *cells)
    return common.finish(claims, arguments.json, [shown], rows=rows)


if __name__ == "__main__":
    sys.exit(main())
