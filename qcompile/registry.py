"""The passes and targets that exist, by name: built in, and from plugins by entry point.

A built-in pass is the one Pass class of a module in ``passes/``; a built-in target is a Target
class of a module in ``backends/``. Plugins use the entry-point groups ``qcompile.passes`` and
``qcompile.targets``; a name that clashes is an error.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
from types import ModuleType
from typing import TypeVar

import qcompile.backends
import qcompile.passes
from qcompile.backends.base import Target
from qcompile.errors import QCompileError
from qcompile.pipeline import Pass

T = TypeVar("T")


@functools.cache
def passes() -> dict[str, type[Pass]]:
    """Every pass class by its text name, sorted."""
    return _collect(qcompile.passes, Pass, "qcompile.passes")  # type: ignore[type-abstract]


@functools.cache
def targets() -> dict[str, type[Target]]:
    """Every target class by its text name, sorted."""
    return _collect(qcompile.backends, Target, "qcompile.targets")  # type: ignore[type-abstract]


def _collect(package: ModuleType, base: type[T], group: str) -> dict[str, type[T]]:
    found: dict[str, type[T]] = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for _, kind in inspect.getmembers(module, inspect.isclass):
            ours = kind.__module__ == module.__name__ and issubclass(kind, base)
            if ours and not inspect.isabstract(kind):
                found[kind.name] = kind  # type: ignore[attr-defined]
    for point in importlib.metadata.entry_points(group=group):
        if point.name in found:
            raise QCompileError(
                f"the plugin {point.value!r} calls itself {point.name!r}, which exists already"
            )
        found[point.name] = point.load()
    return dict(sorted(found.items()))
