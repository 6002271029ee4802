"""The states of a run on disk, so that a killed run goes on where it was.

After each pass the model and what the passes did are kept in ``folder()/<key>/``, which appears
whole or not at all. The key is a hash of all that the state depends on: the captured model, the
data, the seed, the text of each pass so far, the code, the versions, and the target behind the
fork. With ``--resume`` a state is written behind every pass; without, when ``SECONDS`` of work
would be lost and the weights are below an eighth of ``LIMIT_BYTES``. The oldest go when all
together exceed that limit.

What a long pass keeps inside (``Context.checkpoint``) lies in ``<key>.parts/``, with ``--resume``
only, until the pass is done.

The folder is ``$QCOMPILE_CACHE``, or ``~/.cache/qcompile/runs``; it may be deleted at any time.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import onnx_ir as ir

import qcompile
from qcompile import execute, folders, report, text
from qcompile.pipeline import Arrays, Pass, Step

SECONDS = 2.0
LIMIT_BYTES = 8 << 30


def folder() -> pathlib.Path:
    """Where states are kept."""
    named = os.environ.get("QCOMPILE_CACHE")
    return pathlib.Path(named) if named else pathlib.Path.home() / ".cache" / "qcompile" / "runs"


@dataclasses.dataclass
class Checkpoints:
    """The states of one run.

    * ``resume``: go on from states that are there, and write one after every pass.
    * ``log``: told what is resumed, and that a state could not be written.
    """

    resume: bool
    log: Callable[[str], None]
    _since: float = dataclasses.field(default_factory=time.monotonic)

    def resumed(self, keys: Sequence[str]) -> tuple[int, ir.Model, list[Step]] | None:
        """The latest state that is there: how many passes it has behind it, model and steps."""
        if not self.resume:
            return None
        for count in range(len(keys), 0, -1):
            place = folder() / keys[count - 1]
            if not place.is_dir():
                continue
            try:
                model = execute.load(place / "model.onnx")
                execute.read_external(model)
                steps = [_step(s) for s in json.loads((place / "steps.json").read_text())]
            except Exception as error:  # a damaged state is as good as none
                self.log(f"the state in {place} is damaged ({error}); it is not used")
                continue
            os.utime(place)
            self.log(f"resumed behind {steps[-1].text}")
            return count, model, steps
        return None

    def save(self, key: str, model: ir.Model, steps: Sequence[Step]) -> None:
        """Keep the state ``key`` if enough work would be lost; a full disk is said, no error."""
        large = execute.weight_bytes(model) > LIMIT_BYTES // 8
        if not self.resume and (large or time.monotonic() - self._since < SECONDS):
            return
        try:
            with folders.appearing(folder() / key) as place:
                execute.save(model, place / "model.onnx", beside=True)
                done = json.dumps([dataclasses.asdict(step) for step in steps])
                (place / "steps.json").write_text(done)
            _trim()
        except OSError as error:
            self.log(f"no state is kept: {error}")
        self._since = time.monotonic()

    def parts(self, key: str | None) -> Parts | None:
        """What the pass in front of the state ``key`` keeps inside; None without ``--resume``."""
        if key is None or not self.resume:
            return None
        found = Parts(folder() / f"{key}.parts", self.log)
        if len(found):
            self.log(f"resumed inside a pass, of which {len(found)} parts were done")
        return found


class Parts(MutableMapping[str, Arrays]):
    """Arrays by key, each in a file that appears whole; a full disk is said, no error."""

    def __init__(self, place: pathlib.Path, log: Callable[[str], None]) -> None:
        self._place = place
        self._log = log

    def __getitem__(self, key: str) -> Arrays:
        try:
            with np.load(self._file(key)) as archive:
                return dict(archive)
        except FileNotFoundError:
            raise KeyError(key) from None
        except Exception as error:  # a damaged part is as good as none
            self._log(f"the part {key!r} in {self._place} is damaged ({error}); it is not used")
            raise KeyError(key) from error

    def __setitem__(self, key: str, arrays: Arrays) -> None:
        file = self._file(key)
        try:
            self._place.mkdir(parents=True, exist_ok=True)
            scratch = file.with_suffix(f".{os.getpid()}")
            with scratch.open("wb") as opened:
                np.savez(opened, **arrays)  # type: ignore[arg-type]
            os.replace(scratch, file)
        except OSError as error:
            self._log(f"a part is not kept: {error}")

    def __delitem__(self, key: str) -> None:
        self._file(key).unlink()

    def __iter__(self) -> Iterator[str]:
        return (unquote(file.stem) for file in sorted(self._place.glob("*.npz")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def clear(self) -> None:
        """Remove all of them."""
        shutil.rmtree(self._place, ignore_errors=True)

    def _file(self, key: str) -> pathlib.Path:
        return self._place / f"{quote(key, safe='')}.npz"


def first_key(model: ir.Model, *parts: str) -> str:
    """The key of a captured ``model`` and of what all its states depend on."""
    return _hash(_code(), json.dumps(report.versions()), text.render(model, weights=True), *parts)


def keys(first: str, passes: Sequence[Pass], target: str = "") -> list[str]:
    """The key behind each of ``passes``, run one after the other from the state ``first``."""
    found: list[str] = []
    for step in passes:
        first = _hash(first, target, str(step), _source(type(step)))
        found.append(first)
    return found


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


@functools.cache
def _code() -> str:
    """A hash of the code of qcompile."""
    root = pathlib.Path(qcompile.__file__).parent
    files = sorted(root.rglob("*.py")) + sorted(p for d in root.iterdir() for p in d.glob("*.py"))
    return _hash(*(f"{p.name}\n{p.read_text()}" for p in files))


def _source(kind: type[Pass]) -> str:
    """The code of a pass, which may be that of a plugin."""
    try:
        return inspect.getsource(inspect.getmodule(kind) or kind)
    except (OSError, TypeError):
        return ""


def _step(fields: dict[str, Any]) -> Step:
    fields["changed"] = tuple(fields["changed"])
    return Step(**fields)


def _trim() -> None:
    """Delete the oldest states until all together are within the limit."""
    whole = [p for p in folder().iterdir() if p.is_dir() and not p.name.startswith(".")]
    places = sorted(whole, key=lambda p: p.stat().st_mtime)
    sizes = {p: sum(f.stat().st_size for f in p.rglob("*") if f.is_file()) for p in places}
    total = sum(sizes.values())
    for place in places[:-1]:
        if total <= LIMIT_BYTES:
            return
        total -= sizes[place]
        shutil.rmtree(place, ignore_errors=True)
