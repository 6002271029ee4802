"""The passes and targets that exist, by name: built in, and from plugins by entry point.

A built-in pass is the one Pass class of a module in ``passes/``; a built-in target is a Target
class of a module in ``backends/``. A plugin is any installed package with entry points in the
groups ``qcompile.passes`` and ``qcompile.targets``, each named as its class names itself.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
import traceback
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Generic, TypeVar

import qcompile.backends
import qcompile.passes
from qcompile.backends.base import Target
from qcompile.errors import PassBug, PluginError
from qcompile.pipeline import Pass

T = TypeVar("T", bound=Pass | Target)

OURS = "qcompile"


@functools.cache
def passes() -> Catalog[Pass]:
    """Every pass class by its text name, sorted."""
    return Catalog("pass", Pass, qcompile.passes, "qcompile.passes")  # type: ignore[type-abstract]


@functools.cache
def targets() -> Catalog[Target]:
    """Every target class by its text name, sorted."""
    return Catalog("target", Target, qcompile.backends, "qcompile.targets")  # type: ignore[type-abstract]


class Catalog(Mapping[str, type[T]], Generic[T]):
    """Classes by name. Those of plugins are loaded when they are asked for, and only then.

    So an installed plugin neither slows down nor breaks a command that does not use it. Asking for
    a name raises PluginError if the plugin cannot be loaded, holds the wrong thing, or claims a
    name that is taken: which of the two was meant is for the user to say, not for us to guess.
    """

    def __init__(self, what: str, base: type[T], package: ModuleType, group: str) -> None:
        self._what, self._base = what, base
        self._built_in = dict(_built_in(package, base))
        self._points: dict[str, list[EntryPoint]] = {}
        for point in importlib.metadata.entry_points(group=group):
            self._points.setdefault(point.name, []).append(point)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._built_in, *self._points}))

    def __len__(self) -> int:
        return len({*self._built_in, *self._points})

    def __contains__(self, name: object) -> bool:
        return name in self._built_in or name in self._points

    def __getitem__(self, name: str) -> type[T]:
        packages = self.packages(name)
        if len(packages) > 1:
            raise PluginError(
                f"{' and '.join(packages)} each have a {self._what} {name!r}; "
                f"remove one of them: pip uninstall {packages[-1]}"
            )
        return self._load(self._points[name][0]) if name in self._points else self._built_in[name]

    def packages(self, name: str) -> list[str]:
        """The packages that define ``name``, ours first; one of them unless there is a clash."""
        ours = [OURS] if name in self._built_in else []
        return [*ours, *sorted(package_of(point) for point in self._points.get(name, []))]

    def homes(self) -> dict[str, str]:
        """The packages of plugins by the name of the top module of their code."""
        points = [point for points in self._points.values() for point in points]
        return {point.module.partition(".")[0]: package_of(point) for point in points}

    def _load(self, point: EntryPoint) -> type[T]:
        package = package_of(point)
        try:
            kind = point.load()
        except Exception as error:  # the code of a stranger raises what it likes
            said = f"{type(error).__name__}: {error}"
            raise PluginError(
                f"the {self._what} {point.name!r} of the package {package} cannot be loaded "
                f"({said}); repair the package or remove it: pip uninstall {package}"
            ) from error
        fault = self._fault(kind, point.name)
        if fault:
            raise PluginError(
                f"the {self._what} {point.name!r} of the package {package} cannot be used: "
                f"{point.value} {fault}"
            )
        return kind

    def _fault(self, kind: object, name: str) -> str:
        """What is wrong with what the entry point ``name`` names; "" if nothing is."""
        base = self._base
        if not (isinstance(kind, type) and issubclass(kind, base)) or inspect.isabstract(kind):
            return f"is no complete subclass of {base.__module__}.{base.__name__}"
        if "__dataclass_fields__" not in vars(kind):
            return "is not decorated with @dataclasses.dataclass(frozen=True)"
        if getattr(kind, "name", "") != name:
            return f"calls itself {getattr(kind, 'name', '')!r}"
        for field in dataclasses.fields(kind):
            if field.init and field.default is dataclasses.MISSING:
                return f"has no default for its option {field.name!r}"
        return ""


def _built_in(package: ModuleType, base: type[T]) -> Iterator[tuple[str, type[T]]]:
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for _, kind in inspect.getmembers(module, inspect.isclass):
            ours = kind.__module__ == module.__name__
            if ours and issubclass(kind, base) and not inspect.isabstract(kind):
                yield kind.name, kind


def package_of(point: EntryPoint) -> str:
    """The name of the package that an entry point belongs to, as pip calls it."""
    return point.dist.name if point.dist is not None else point.module


def blame(error: BaseException) -> str:
    """The package that a bug should be reported to: a plugin whose code it went through, or ours.

    A pass that breaks the graph is found out behind its back: there its name tells.
    """
    homes = {**passes().homes(), **targets().homes()}
    culprit = OURS
    link: BaseException | None = error
    while link is not None:
        for frame, _ in traceback.walk_tb(link.__traceback__):
            top = str(frame.f_globals.get("__name__", "")).partition(".")[0]
            if top in homes:
                return homes[top]
        if isinstance(link, PassBug):
            culprit = passes().packages(link.name.partition("{")[0])[0]
        link = link.__cause__ or link.__context__
    return culprit
