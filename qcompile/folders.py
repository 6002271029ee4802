"""The output folder: it appears whole or not at all, and never replaces foreign files."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Generator

from qcompile import registry
from qcompile.errors import QCompileError


def check(out: pathlib.Path) -> None:
    """Raise QCompileError if ``out`` cannot become our folder."""
    if out.resolve() in (here := pathlib.Path.cwd(), *here.parents):
        raise QCompileError(f"{str(out)!r} is a folder that you work in; name another to write")
    if out.is_dir() and any(out.iterdir()) and not _ours(out):
        raise QCompileError(
            f"the folder {str(out)!r} holds files that qcompile did not write; name another"
        )
    check_writable(out)


def check_writable(folder: pathlib.Path) -> None:
    """Raise QCompileError if ``folder`` is no folder and cannot become one."""
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise QCompileError(f"{str(place)!r} is a file; name a folder to write")
    try:
        # Trying is the only test: not every folder that may be written to takes files.
        os.rmdir(tempfile.mkdtemp(prefix=".qcompile-", dir=place))
    except OSError as error:
        raise QCompileError(f"cannot write into {str(place)!r}: {error.strerror}") from error


def _ours(folder: pathlib.Path) -> bool:
    """Whether a run wrote ``folder``: files of one target, or a folder for each of several."""
    if all((folder / name).is_file() for name in ("report.json", "pipeline.txt")):
        return True
    return all(p.name in registry.targets() and p.is_dir() and _ours(p) for p in folder.iterdir())


@contextlib.contextmanager
def appearing(out: pathlib.Path) -> Generator[pathlib.Path]:
    """A folder beside ``out`` that becomes ``out`` when the block ends well, and else goes.

    What a killed process left behind goes as well.
    """
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    _sweep(parent, out.name)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}-{os.getpid()}-", dir=parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        if out.exists():
            old = pathlib.Path(
                tempfile.mkdtemp(prefix=f".{out.name}-{os.getpid()}-old-", dir=parent)
            )
            os.replace(out, old / "old")
            os.replace(scratch, out)
            shutil.rmtree(old)
        else:
            os.replace(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sweep(parent: pathlib.Path, name: str) -> None:
    """Remove the scratch folders of ``name`` whose process is gone."""
    for left in parent.glob(f".{name}-*"):
        owner = left.name.removeprefix(f".{name}-").split("-")[0]
        if left.is_dir() and owner.isdigit() and not _alive(int(owner)):
            shutil.rmtree(left, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
