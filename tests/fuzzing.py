"""The command line on broken models, each in a process that is watched; for test_fuzz.py and
benchmarks/fuzz.py.

A process of its own for each file is forked off this one, which has imported everything already.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import mutate
import numpy as np

from qcompile import cli, execute

# Seconds after which a file counts as a hang; the longest sound one takes a few.
PATIENCE = 60.0
# Bytes of address space: what asks for more is refused memory, as on a small machine.
MEMORY = 12 << 30
# Lines and letters of a complaint: a sentence, and the block that points at a column.
LINES, LETTERS = 4, 1200
# What a run logs: each pass with its seconds, and the targets.
_LOGGED = re.compile(r".* \(\d+\.\d s\)|lowering for .*|  rotating .* of the MACs")
# The recipe, and at times what else reads the graph.
PIPELINES = (
    *["@int8"] * 7,
    "simplify,fold-bn,smooth-hadamard{block=2},calibrate{method=mse},quantize,insert-qdq",
    "simplify,calibrate,quantize{attention=int8},insert-qdq",
    "quantize{weight=int4 input=float},insert-qdq",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """What became of one mutant: its exit code (None if it was killed), and why that is bad."""

    number: int
    model: str
    changes: tuple[str, ...]
    code: int | None
    seconds: float
    said: str
    faults: tuple[str, ...]


def command(number: int) -> list[str]:
    """The words for the mutant ``number``."""
    passes = PIPELINES[number % len(PIPELINES)]
    return ["model.onnx", "--calib", "data.npz", "-o", "result", "--passes", passes]


def prepare(number: int, seed: int, folder: pathlib.Path) -> mutate.Mutant:
    """Write the mutant ``number`` and the data of its seed into ``folder``."""
    made = mutate.mutant(number, seed)
    (folder / "model.onnx").write_bytes(made.content)
    arrays: Any = made.seed.data  # savez has a parameter that is no array
    np.savez(folder / "data.npz", **arrays)
    (folder / "tmp").mkdir()
    return made


def run(numbers: Iterable[int], seed: int, jobs: int = 1) -> Iterator[Case]:
    """Compile the mutants ``numbers``, ``jobs`` at a time, and say what became of each."""
    mutate.seeds()  # once, and not in every process
    waiting = iter(numbers)
    running: list[_Run] = []
    while True:
        while len(running) < jobs and (number := next(waiting, None)) is not None:
            running.append(_Run(number, seed))
        if not running:
            return
        multiprocessing.connection.wait([r.process.sentinel for r in running], timeout=0.5)
        for done in [r for r in running if not r.process.is_alive() or r.late()]:
            running.remove(done)
            yield done.end()


class _Run:
    """A mutant that is being compiled in a process of its own, in a folder of its own."""

    def __init__(self, number: int, seed: int) -> None:
        self.number = number
        self._scratch = tempfile.TemporaryDirectory(prefix="fuzz-")
        self.folder = pathlib.Path(self._scratch.name)
        self.mutant = prepare(number, seed, self.folder)
        self.started = time.monotonic()
        context = multiprocessing.get_context("fork")
        self.process: BaseProcess = context.Process(target=_compile, args=(number, self.folder))
        self.process.start()

    def late(self) -> bool:
        """Whether this is a hang."""
        return time.monotonic() - self.started > PATIENCE

    def end(self) -> Case:
        """What became of it; kills what still runs."""
        late = self.process.is_alive()
        assert self.process.pid is not None
        if late:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        code = self.process.exitcode
        said = (self.folder / "tmp" / "err").read_text(errors="replace")
        faults = ["it hangs"] if late else list(_faults(self.folder, code, said))
        with contextlib.suppress(OSError):
            self._scratch.cleanup()
        return Case(
            self.number, self.mutant.seed.name, self.mutant.changes,
            None if late else code, time.monotonic() - self.started, said, tuple(faults),
        )  # fmt: skip


def _compile(number: int, folder: pathlib.Path) -> None:
    """The command line, in the process that is watched; what it compiled must be a model."""
    os.setpgid(0, 0)  # killed together with what it starts
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # By number, because what is written in C goes there too.
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / "tmp" / name, os.O_CREAT | os.O_WRONLY), stream)
    os.chdir(folder)
    os.mkdir("scratch")
    tempfile.tempdir = str(folder / "scratch")
    os.environ["TMPDIR"] = tempfile.tempdir
    sys.argv = ["qcompile", *command(number)]
    try:
        cli.main()
    except SystemExit as ended:
        if not ended.code:
            execute.Session(folder / "result" / "model.onnx")
        sys.stdout.flush()
        raise


def _faults(folder: pathlib.Path, code: int | None, said: str) -> Iterator[str]:
    """What is bad about an end: a signal, a code, words that are none, files that are left."""
    shown = said + (folder / "tmp" / "out").read_text(errors="replace")
    if code is not None and code < 0:
        yield f"died by {signal.Signals(-code).name}"
    elif code not in (0, 1, 3):
        yield f"exit code {code}"
    for word in ("Traceback", "Warning:", "/onnxruntime_src/", "/project/onnx/"):
        if word in shown:
            yield f"says {word!r}"
    log, _, complaint = said.partition("error: ")
    if not all(_LOGGED.fullmatch(line) for line in log.splitlines()):
        yield "says what is no log and no error"
    if (code == 1) != bool(complaint):
        yield "says an error and has none, or has one and says none"
    if len(complaint) > LETTERS or len(complaint.strip().splitlines()) > LINES:
        yield "is long-winded"
    left = {p.name for p in folder.iterdir()} - {"model.onnx", "data.npz", "tmp", "scratch"}
    # The runtime keeps a file of its own in the folder for temporary ones.
    left |= {f"scratch/{p.name}" for p in (folder / "scratch").iterdir() if p.name != ".ses"}
    if left != ({"result"} if code in (0, 3) else set()):
        yield f"leaves {sorted(left)}"
