"""The output folder: it appears whole or not at all, and never replaces foreign files."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Generator

from qcompile.errors import QCompileError


def check(out: pathlib.Path) -> None:
    """Raise QCompileError if ``out`` cannot become our folder."""
    if out.is_file():
        raise QCompileError(f"{str(out)!r} is a file; name a folder to write")
    if out.is_dir() and any(out.iterdir()) and not list(out.rglob("report.json")):
        raise QCompileError(
            f"the folder {str(out)!r} holds files that qcompile did not write; name another"
        )
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise QCompileError(f"cannot write into {str(parent)!r}")


@contextlib.contextmanager
def appearing(out: pathlib.Path) -> Generator[pathlib.Path]:
    """A folder beside ``out`` that becomes ``out`` when the block ends well, and else goes."""
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        if out.exists():
            old = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=parent))
            os.replace(out, old / "old")
            os.replace(scratch, out)
            shutil.rmtree(old)
        else:
            os.replace(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
