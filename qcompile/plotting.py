"""matplotlib, which is in the extra ``pictures``."""

from __future__ import annotations

import importlib
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
