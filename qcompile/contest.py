"""``qcompile bench``: files against each other in latency, size and memory, on the CPU."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
import subprocess
import tempfile
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qcompile import bench, capture, execute, ports, sources
from qcompile.errors import QCompileError, TargetError
from qcompile.execute import Session
from qcompile.sequences import Sample, Samples

ROUNDS = 60
NOISE = (
    "no --data: the inputs are noise (whole numbers are 0 and 1), so this is latency alone, and "
    "that of a model whose work depends on its data is not that of your data"
)
MEMORY = (
    "memory is the peak of a process that loads the file and runs it three times, with Python and "
    "the runtime, which take about 50 MB"
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One file. ``ratio`` and ``ratio_of_minima`` are its latency over that of the file ``vs``.

    ``bytes`` is its size on disk with its external weights, ``peak_bytes`` the peak resident memory
    of a process that loads and runs it, or None where the system does not tell.
    """

    file: str
    median_ms: float
    minimum_ms: float
    ratio: float
    ratio_of_minima: float
    bytes: int
    peak_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Contest:
    """The ``rows``, and ``null``: the file ``vs`` against itself in the same rounds."""

    vs: str
    null: float
    rounds: int
    threads: int
    data: str | None
    samples: int
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def run(
    files: Sequence[pathlib.Path],
    vs: pathlib.Path | None = None,
    data: str | None = None,
    rounds: int = ROUNDS,
    threads: int = 1,
) -> Contest:
    """Measure ``files``, ONNX files or folders that qcompile wrote, against ``vs`` or the first.

    Raises QCompileError for a file that cannot be run, and data that does not fit it.
    """
    for what, number in (("--rounds", rounds), ("--threads", threads)):
        if number < 1:
            raise QCompileError(f"{what} is a number from 1; got {number}")
    if not files:
        raise QCompileError("name the .onnx files, or the folders that qcompile wrote, to measure")
    named = {str(file): model_in(file) for file in files}
    base = str(vs) if vs is not None else str(files[0])
    measured = named | ({base: model_in(vs)} if vs is not None else {})
    read = {name: _samples(path, data) for name, path in measured.items()}
    # In a process of its own first: what kills the runtime does not kill this one.
    memory = {name: peak_memory(path, read[name][0], threads) for name, path in named.items()}
    sessions = [Session(path, threads=threads) for path in measured.values()]
    sessions.append(Session(measured[base], threads=threads))
    samples = [read[name] for name in [*measured, base]]
    times = bench.in_turn(sessions, samples, rounds)
    of = dict(zip(measured, times[:-1], strict=True))
    half, least = statistics.median(of[base]), min(of[base])
    rows = tuple(
        Row(
            name,
            statistics.median(of[name]) * 1e3,
            min(of[name]) * 1e3,
            statistics.median(of[name]) / half,
            min(of[name]) / least,
            sum(p.stat().st_size for p in path.parent.glob(f"{path.name}*")),
            memory[name],
        )
        for name, path in named.items()
    )
    null = statistics.median(times[-1]) / half
    notes = (*([] if data else [NOISE]), MEMORY)
    return Contest(base, null, rounds, threads, data, len(samples[0]), rows, notes)


def model_in(path: pathlib.Path) -> pathlib.Path:
    """The ONNX file that ``path`` is or holds; raise QCompileError if there is none to run here."""
    if not path.is_dir():
        if not path.exists():
            raise QCompileError(f"there is no file {str(path)!r}")
        return path
    inside = sorted(p.parent for p in path.glob("*/report.json"))
    if inside and not (path / "model.onnx").is_file():
        names = " or ".join(repr(str(p)) for p in inside)
        raise QCompileError(f"{str(path)!r} holds several targets: name one, {names}")
    if not (path / "model.onnx").is_file():
        raise QCompileError(f"the folder {str(path)!r} holds no model.onnx")
    if (path / "model.engine").exists():
        raise QCompileError(
            f"{str(path)!r} holds an engine, which runs on its device; its model.onnx is slow on "
            "ONNX Runtime by intention, and its time there says nothing"
        )
    return path / "model.onnx"


def _samples(path: pathlib.Path, data: str | None) -> Samples:
    model = capture.read(path)
    assert model is not None  # it is a file
    inputs, outputs = ports.inputs_of(model), ports.outputs_of(model)
    return sources.load(data or "random", inputs, outputs=outputs).samples


def peak_memory(path: pathlib.Path, sample: Sample, threads: int) -> int | None:
    """The peak resident bytes of a process that loads ``path`` and runs it three times.

    None where the system does not tell. Raises TargetError if the runtime refuses the file, or dies
    of it.
    """
    with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
        feeds = pathlib.Path(folder) / "feeds.npz"
        np.savez(feeds, *sample.values())
        words = [str(path), str(feeds), str(threads), *sample]
        done = execute.apart(_PEAK, *words)
    if done.returncode:
        return _refused(path, done)
    return int(done.stdout) or None


def _refused(path: pathlib.Path, done: subprocess.CompletedProcess[str]) -> None:
    Session(path)  # says why in its words, if it is the file
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    raise TargetError(f"ONNX Runtime fails to run {str(path)!r}: {lines[-1]}")


# Imports nothing of qcompile, so that its memory is that of the runtime. Not ru_maxrss on Linux: a
# process inherits that of the one that started it.
_PEAK = """
import sys
import numpy
import onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
options.intra_op_num_threads = int(sys.argv[3])
options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
arrays = numpy.load(sys.argv[2])
feeds = {name: arrays[f"arr_{number}"] for number, name in enumerate(sys.argv[4:])}
for _ in range(3):
    session.run(None, feeds)
peak = 0
try:
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) << 10
except OSError:
    try:
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
    except ImportError:
        pass
print(peak)
"""


def show(contest: Contest, console: Console) -> None:
    """Print the table."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("file", "median ms", "min ms", "ratio", "of minima", "MB", "peak MB"):
        table.add_column(column, justify="left" if column == "file" else "right")
    for row in contest.rows:
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"
        table.add_row(
            escape(row.file), f"{row.median_ms:.3f}", f"{row.minimum_ms:.3f}", f"{row.ratio:.2f}",
            f"{row.ratio_of_minima:.2f}", f"{row.bytes / 1e6:.2f}", peak,
        )  # fmt: skip
    console.print(table)
    threads = "1 thread" if contest.threads == 1 else f"{contest.threads} threads"
    said = f"ratio to {contest.vs}, which is {contest.null:.2f} of itself in the same "
    said += f"{contest.rounds} rounds; {threads}"
    for line in (said, *contest.notes):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
