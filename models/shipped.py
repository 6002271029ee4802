"""Where the shipped files lie."""

from __future__ import annotations

import importlib.resources
import pathlib
from collections.abc import Sequence


def path(name: str, files: Sequence[str]) -> pathlib.Path:
    """Where the shipped file ``name`` lies, one of ``files``.

    Raises:
        FileNotFoundError: no such file is shipped.
    """
    if name not in files:
        raise FileNotFoundError(f"no shipped file {name!r}; known are {', '.join(files)}")
    return pathlib.Path(str(importlib.resources.files("qcompile.models") / name))
