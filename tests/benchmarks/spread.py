"""The same search of widths on a Dask cluster of one and of two single-threaded workers.

    python tests/benchmarks/spread.py [--quick] [--only WORD] [--search WORD] [--rounds N]
                                      [--json FILE]

Both clusters are processes of this machine. The runs take turns, each with calibration data of its
own, so that nothing is known from the run before, and *ratio* is the median over the rounds of one
worker's time to that of two, with a 95 % interval of a bootstrap over rounds. *CPU* are seconds of
all processes together: what two take more is what spreading costs. *Machine* is the same ratio of
arithmetic that shares nothing, once on one worker and then on both, before each round: 2 if nothing
else runs. joblib runs the tasks of a single thread in the calling
process, so that one worker pays nothing for sending. Workers are started without Dask's
MALLOC_TRIM_THRESHOLD_, which makes the allocator map every large array anew. ``--quick`` takes the
shipped models and claims no ratio.
"""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import statistics
import sys
import time
from collections.abc import Generator, Sequence
from typing import Any

import common
import dask.config
import distributed
import joblib
import numpy as np
from common import Claim
from int8 import LITE0, MINILM, SHIPPED, Work
from rich.table import Table

from qcompile import graph, pipeline, registry
from qcompile.backends.onnxruntime import OrtCpu
from qcompile.calibrate import Calibration
from qcompile.capture import capture
from qcompile.pipeline import Context
from qcompile.ports import inputs_of
from qcompile.sources import load

FRONT = "simplify,recompose,fold-bn"
SEARCHES = (
    "assign-bits{budget=bits=4 samples=64 table=full}",
    "assign-bits{budget=bits=4 samples=64}",
    "assign-bits{budget=bits=4 samples=64 method=fmpq}",
)
WANTED = 1.7
library: Any = joblib  # untyped


@dataclasses.dataclass(frozen=True)
class Run:
    """One search: seconds on the wall and of all processes, and what was found."""

    wall: float
    cpu: float
    found: str


@dataclasses.dataclass(frozen=True)
class Row:
    """One search of one model; seconds are medians over the rounds."""

    work: str
    search: str
    rounds: int
    one: float
    two: float
    cpu_one: float
    cpu_two: float
    ratio: float
    interval: tuple[float, float]
    machine: float
    equal: bool


@contextlib.contextmanager
def cluster(workers: int) -> Generator[Any]:
    """A client of a cluster of ``workers`` with one thread each."""
    kind: Any = distributed  # partly untyped
    with (
        dask.config.set({"distributed.nanny.pre-spawn-environ": {"OMP_NUM_THREADS": 1}}),
        kind.LocalCluster(
            n_workers=workers, threads_per_worker=1, memory_limit=0, dashboard_address=":0"
        ) as made,
        kind.Client(made, set_as_default=False) as client,
    ):
        yield client


def cpu() -> float:
    """Seconds of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def arithmetic() -> float:
    """Work that stays in the cache of its core."""
    values = np.linspace(0, 1, 10_000)
    return float(sum(np.sin(values * n).sum() for n in range(10_000)))


def possible(client: Any) -> float:
    """How much more of ``arithmetic`` two workers do in the time of one."""
    times: list[float] = []
    for workers in (list(client.scheduler_info()["workers"])[:1], None):
        started = time.perf_counter()
        client.run(arithmetic, workers=workers)
        times.append(time.perf_counter() - started)
    return 2 * times[0] / times[1]


class Bench:
    """One model behind FRONT, with its data."""

    def __init__(self, work: Work) -> None:
        self.model = capture(work.source)
        self.data = load(work.calibration, inputs_of(self.model))
        context = Context(calibration=Calibration(self.data), target=OrtCpu())
        pipeline.run(self.model, pipeline.parse(FRONT, registry.passes()), context)

    def run(self, search: str, client: Any) -> Run:
        """Run ``search`` on the cluster of ``client``."""
        model, steps = self.model.clone(), pipeline.parse(search, registry.passes())
        context = Context(calibration=Calibration(self.data), target=OrtCpu(), reference=self.model)
        before = cpu() + sum(client.run(cpu).values())
        started = time.perf_counter()
        with library.parallel_config(backend="dask", client=client):
            [done] = pipeline.run(model, steps, context)
        wall = time.perf_counter() - started
        spent = cpu() + sum(client.run(cpu).values()) - before
        widths = {layer.name: str(layer.weight.spec) for layer in graph.layers(model)}
        return Run(wall, spent, f"{done.counters} {widths}")


def measure(work: Work, searches: Sequence[str], clients: Sequence[Any], rounds: int) -> list[Row]:
    """A row for each of ``searches``."""
    bench, rows = Bench(work), list[Row]()
    for search in searches:
        runs, machine = list[list[Run]](), list[float]()
        for _ in range(rounds):
            machine.append(possible(clients[-1]))
            runs.append([bench.run(search, client) for client in clients])
        ones, twos = zip(*runs, strict=True)
        ratios = np.array([one.wall / two.wall for one, two in runs])
        drawn = np.random.default_rng(0).choice(ratios, (10_000, rounds))
        low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
        rows.append(
            Row(
                work.name, search, rounds,
                statistics.median(run.wall for run in ones),
                statistics.median(run.wall for run in twos),
                statistics.median(run.cpu for run in ones),
                statistics.median(run.cpu for run in twos),
                float(np.median(ratios)), (float(low), float(high)),
                statistics.median(machine),
                len({run.found for pair in runs for run in pair}) == 1,
            )
        )  # fmt: skip
    return rows


def claims(rows: Sequence[Row], quick: bool) -> list[Claim]:
    """What must hold of these rows."""
    found: list[Claim] = []
    for row in rows:
        where = f"{row.work}, {row.search}"
        found.append(Claim(f"{where}: equal results", row.equal, float(row.equal), 1.0))
        if not quick:
            holds = row.ratio >= WANTED
            found.append(Claim(f"{where}: two workers", holds, row.ratio, WANTED, row.interval))
    return found


def table(rows: Sequence[Row]) -> Table:
    """The rows for people."""
    shown = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("model", "search"):
        shown.add_column(column)
    for column in ("one s", "two s", "CPU one s", "CPU two s", "ratio", "machine", "equal"):
        shown.add_column(column, justify="right")
    for row in rows:
        low, high = row.interval
        shown.add_row(
            row.work, row.search, f"{row.one:.1f}", f"{row.two:.1f}", f"{row.cpu_one:.1f}",
            f"{row.cpu_two:.1f}", f"{row.ratio:.2f} [{low:.2f}, {high:.2f}]",
            f"{row.machine:.2f}", str(row.equal),
        )  # fmt: skip
    return shown


def main() -> int:
    """Measure, print, write."""
    parser = common.parser(__doc__, quick="the shipped models only, without a ratio")
    parser.add_argument("--only", help="the models with this word in their names alone")
    parser.add_argument("--search", help="the searches with this word in their text alone")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each search")
    arguments = parser.parse_args()
    works = SHIPPED if arguments.quick else (LITE0, MINILM)
    word = (arguments.only or "").lower()
    rounds = 1 if arguments.quick else arguments.rounds
    searches = [search for search in SEARCHES if (arguments.search or "") in search]
    rows: list[Row] = []
    with cluster(1) as one, cluster(2) as two:
        for client in (one, two):
            Bench(SHIPPED[0]).run(SEARCHES[0], client)  # imports what is not to be timed
        for work in (w for w in works if word in w.name.lower()):
            rows += measure(work, searches, (one, two), rounds)
    said = claims(rows, arguments.quick)
    return common.finish(said, arguments.json, [table(rows)], rows=rows)


if __name__ == "__main__":
    sys.exit(main())
