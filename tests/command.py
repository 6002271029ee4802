"""The command line as tests call it."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple


class Result(NamedTuple):
    """The exit code, and what was printed."""

    code: int
    out: str
    err: str


Command = Callable[..., Result]


def process(*words: object, cwd: pathlib.Path | None = None) -> Result:
    """The command line as a process of its own."""
    command = [sys.executable, "-m", "qcompile.cli", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    assert "Traceback" not in done.stdout + done.stderr
    return Result(done.returncode, done.stdout, done.stderr)


def names(folder: pathlib.Path) -> list[str]:
    """The names of what lies in ``folder``."""
    return sorted(p.name for p in folder.iterdir())
