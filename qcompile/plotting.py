"""Pictures: matplotlib, which is in the extra ``pictures``, and the files that it writes."""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Sequence
from typing import Any

from qcompile.errors import QCompileError


def matplotlib() -> Any:
    """The library with its module ``figure``; raise QCompileError without the extra."""
    try:
        library = importlib.import_module("matplotlib")
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise QCompileError(
            "a picture needs matplotlib: pip install 'qcompile[pictures]'"
        ) from error
    return library


def check_ending(path: pathlib.Path, endings: Sequence[str], option: str = "-o") -> None:
    """Raise QCompileError for a file whose name ends in none of ``endings``, before any work.

    Also if it is a picture and matplotlib is missing.
    """
    if path.suffix not in endings:
        raise QCompileError(f"{option} {str(path)!r}: the name must end in {', '.join(endings)}")
    if path.suffix != ".json":
        matplotlib()
