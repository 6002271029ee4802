"""How to compile: the options, their check before anything runs, and the command that they are."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import shlex
from collections.abc import Callable, Iterable
from typing import Any, cast

from qcompile import cluster, pipeline, registry, syntax
from qcompile.backends.base import Target
from qcompile.errors import CalibrationError, QCompileError
from qcompile.texts import Text


@dataclasses.dataclass(frozen=True)
class Options:
    """How to compile; every field is an option of the command line.

    * ``passes``: pipeline text or ``@recipe``; ``targets``: target texts.
    * ``calib``: a source (see sources.load) or an iterable of samples or sequences.
    * ``preprocess``: what makes images samples (see images.Image), as text; ``state``: pairs
      ``INPUT=OUTPUT,...`` that flow from frame to frame; ``mask``: the input that says which
      positions count; ``shape``: texts ``INPUT=1x3x224x224`` that fix dynamic dimensions of random
      data, images and profiles (see ports.choose_shapes); ``tokenizer``, ``tokens``: what makes a
      text samples (see texts.Text).
    * ``allow_float``: accept a result in which nothing is quantized.
    * ``print_after``: pass names (or ``all``) after which the graph is printed;
      ``print_changes``: print the changed lines of every pass; ``snapshots``: a folder for the
      graph after each pass.
    * ``require_fused``: percentage of the MACs that must run below float precision, by proof;
      ``min_sqnr``: dB of SQNR that every output must have.
    * ``eval``, ``metric``, ``max_drop``: the user's own data, what is measured on it, and how much
      worse than float it may be; layers are given back until it is met (see accuracy, search).
    * ``measure``: time layers on this machine and take the faster decision (``ort-cpu`` only).
    * ``latency``: measure latency against float, interleaved (``ort-cpu`` only).
    * ``jobs``, ``cluster``: worker processes here, or the address of a Dask scheduler instead.
    * ``requantize``: take the Q/DQ of a model away that is quantized already.
    * ``resume``: keep the state after every pass, and go on from what a killed run left.
    """

    passes: str = "@int8"
    targets: tuple[str, ...] = ("ort-cpu",)
    calib: str | os.PathLike[str] | Iterable[Any] | None = None
    preprocess: str | None = None
    state: str | None = None
    mask: str | None = None
    shape: tuple[str, ...] = ()
    tokenizer: str | None = None
    tokens: int | None = None
    seed: int = 0
    jobs: int = 1
    cluster: str | None = None
    allow_float: bool = False
    require_fused: float | None = None
    min_sqnr: float | None = None
    eval: str | os.PathLike[str] | Iterable[Any] | None = None
    metric: str | None = None
    max_drop: str | None = None
    check_numerics: bool = False
    verify: bool = True
    print_after: tuple[str, ...] = ()
    print_changes: bool = False
    snapshots: pathlib.Path | None = None
    latency: bool = False
    measure: bool = False
    requantize: bool = False
    resume: bool = False
    log: Callable[[str], None] = pipeline.silent
    progress: Callable[..., Iterable[Any]] = pipeline.no_progress

    def check(self) -> None:
        """Raise QCompileError for a number that none can be, and for what needs another option."""
        least = self.require_fused
        if least is not None and not 0 <= least <= 100:
            raise QCompileError(f"--require-fused is a percentage from 0 to 100, got {least:g}")
        if self.jobs < 1:
            raise QCompileError(f"--jobs is a number of processes, from 1; got {self.jobs}")
        if self.cluster is not None:
            cluster.check()
        for what in ("state", "mask", "tokenizer"):
            if getattr(self, what) is not None and self.calib is None:
                raise CalibrationError(f"--{what} says how to read calibration data: give --calib")
        if self.measure and self.calib is None:
            raise CalibrationError("--measure runs the model on calibration data: give --calib")
        if self.min_sqnr is not None and math.isnan(self.min_sqnr):
            raise QCompileError("--min-sqnr is a number of dB, got nan")
        for what in ("min_sqnr", "eval"):
            if getattr(self, what) is not None and self.calib is None:
                option = what.replace("_", "-")
                raise CalibrationError(f"--{option} compares with float on data: give --calib")
        for what, other in (("metric", "eval"), ("eval", "metric"), ("max_drop", "eval")):
            if getattr(self, what) is not None and getattr(self, other) is None:
                raise QCompileError(f"--{what.replace('_', '-')} needs --{other}")

    def reading(self) -> Text | None:
        """How a text becomes samples, if that is what the options say."""
        if self.tokenizer is None:
            if self.tokens is not None:
                raise CalibrationError("--tokens says how to cut a text: give --tokenizer")
            return None
        if self.preprocess is not None:
            raise CalibrationError("--preprocess is for images, --tokenizer for a text")
        return Text(self.tokenizer, self.tokens)

    def data_words(self, target: Target, passes: str) -> list[str]:
        """The options that make the same file of the same model and data by the same passes."""
        words = ["--passes", passes, "--target", str(target)]
        return words + self._words("preprocess", "state", "mask", "shape", "tokenizer", "tokens")

    def words(self) -> list[str]:
        """All options of the command line that are not at their default."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in ("log", "progress")]
        return self._words(*names)

    def _words(self, *names: str) -> list[str]:
        words: list[str] = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in names or value == field.default:
                continue
            option = {"targets": "target"}.get(field.name, field.name).replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{option}" if value else f"--no-{option}")
            else:
                given = cast("tuple[object, ...]", value if isinstance(value, tuple) else (value,))
                for one in given:
                    # A value that begins with a dash is not taken for an option.
                    said = str(one)
                    words += (
                        [f"--{option}={said}"] if said.startswith("-") else [f"--{option}", said]
                    )
        return words


def script(model: str, out: pathlib.Path, options: Options) -> str:
    """A shell script that runs the command again; its paths are relative as they were given."""
    command = shlex.join(["qcompile", model, "-o", str(out), *options.words()])
    return f"#!/bin/sh\n# run in the folder that the command ran in\n{command}\n"


def parse_target(source: str) -> Target:
    """The target that ``source`` names, as in ``tensorrt-rtx{cc=89,120}``."""
    items = syntax.items(source)
    if len(items) > 1:
        raise QCompileError(f"{source!r} names several targets; give --target once for each")
    return syntax.build(items[0], registry.targets(), "target", source)
