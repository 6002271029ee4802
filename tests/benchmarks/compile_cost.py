"""What a compilation costs, in runs of the float model over its calibration data, and its memory.

    python tests/benchmarks/compile_cost.py [--quick] [--json FILE]

*Time*: ``qcompile.compile`` of an ONNX file with 512 samples in an ``.npz``, from the call to its
return: reading and checking the data, all passes, proof, self-check and report; without the start
of the interpreter and the capture from torch. It is divided by the time of the bare float model
(optimized by ONNX Runtime) over the same samples, which are in memory: the mean of one sweep before
and one behind. Processor seconds, children included, of a process that may use one core, so that
what else runs on the machine counts for little.

*Memory*: the peak of the resident set (VmHWM) of a process that compiles with
``calibrate{method=percentile}`` 16 and 512 samples, and of one that loads the model and runs the
512, which it reads from the file one by one.

Samples are crops and texts of the calibration side alone. ``--quick`` takes the shipped model.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from typing import Any

import common
import numpy as np
import numpy.typing as npt
from common import Claim
from rich.table import Table

import qcompile
from qcompile import capture, execute
from qcompile.models import fashion
from qcompile.sources import Sample

FACTORIES = "qcompile.models.public"
SAMPLES, FEW = 512, 16
RECIPES = ("@int8", "@int8-best")
HISTOGRAMS = "simplify,fold-bn,calibrate{method=percentile},quantize,insert-qdq"


@dataclasses.dataclass(frozen=True)
class Work:
    """A model, and its samples, as many as are asked for."""

    name: str
    model: str
    samples: Callable[[int], Iterable[Sample]]


@dataclasses.dataclass(frozen=True)
class Row:
    """``seconds`` of ``passes`` over ``bare`` seconds of float runs; peaks in MB."""

    work: str
    passes: str
    seconds: float
    bare: float

    @property
    def ratio(self) -> float:
        """Runs of the float model over the data that the compilation costs."""
        return self.seconds / self.bare


@dataclasses.dataclass(frozen=True)
class Peaks:
    """Peak memory in MB: 16 samples, 512, and the bare run of 512."""

    work: str
    few: float
    many: float
    bare: float


def pictures(count: int) -> Iterable[Sample]:
    """Crops of the calibration pictures: the 64 of the other benchmarks, shifted and darkened."""
    from qcompile.models import public

    crops = list(public.efficientnet_calibration())
    random = np.random.default_rng(0)
    for number in range(count):
        image = crops[number % len(crops)]["image"]
        if number >= len(crops):
            moved = tuple(int(n) for n in random.integers(-40, 41, 2))
            image = np.roll(image, moved, (2, 3)) * np.float32(random.uniform(0.6, 1.0))
        yield {"image": image}


def texts(count: int) -> Iterable[Sample]:
    """Editorials, of which the calibration of the other benchmarks is a part."""
    from qcompile.models import public

    for text in public.editorial_sentences()[:count]:
        yield public.tokenize([text])


def fashion_samples(count: int) -> Iterable[Sample]:
    """The shipped calibration pictures, over again if there are fewer."""
    with np.load(fashion.path(fashion.CALIBRATION)) as arrays:
        images: npt.NDArray[Any] = arrays["image"]
    for image in itertools.islice(itertools.cycle(images), count):
        yield {"image": image.reshape(1, *image.shape[-3:])}


CNN = Work("CNN (shipped)", str(fashion.path(fashion.CNN)), fashion_samples)
LITE0 = Work("EfficientNet-Lite0", f"{FACTORIES}:efficientnet_lite0", pictures)
MINILM = Work("MiniLM", f"{FACTORIES}:minilm", texts)


def write(samples: Iterable[Sample], path: pathlib.Path) -> None:
    """``samples`` as an ``.npz`` with a leading sample axis."""
    kept = list(samples)
    arrays: Any = {name: np.stack([sample[name] for sample in kept]) for name in kept[0]}
    np.savez(path, **arrays)


def seconds() -> float:
    """Processor seconds of this process and the children that it waited for."""
    return sum(os.times()[:4])


def one_core() -> None:
    """Keep this process to one core."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def time_of(model: str, data: str, passes: str) -> tuple[float, float]:
    """Seconds of a compilation, and of a sweep of the bare model; in a process of its own."""
    one_core()
    with np.load(data) as arrays:
        whole: dict[str, npt.NDArray[Any]] = dict(arrays)
    session = execute.Session(model, threads=1)

    def sweep() -> float:
        started = seconds()
        for number in range(len(next(iter(whole.values())))):
            session.run({name: array[number] for name, array in whole.items()})
        return seconds() - started

    session.run({name: array[0] for name, array in whole.items()})
    before = sweep()
    with tempfile.TemporaryDirectory() as folder:
        started = seconds()
        qcompile.compile(model, pathlib.Path(folder) / "out", calib=data, passes=passes)
        spent = seconds() - started
    return spent, (before + sweep()) / 2


def peak_of(model: str, data: str, passes: str) -> float:
    """Peak memory in MB of this process after a compilation; of bare runs if ``passes`` is ""."""
    one_core()
    if passes:
        with tempfile.TemporaryDirectory() as folder:
            qcompile.compile(model, pathlib.Path(folder) / "out", calib=data, passes=passes)
    else:
        bare(model, data)
    status = pathlib.Path("/proc/self/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def bare(model: str, data: str) -> None:
    """Run ``model`` over the samples of ``data``, read one by one."""
    session = execute.Session(model, threads=1)
    with zipfile.ZipFile(data) as archive:
        streams = {name: archive.open(f"{name}.npy") for name in session.inputs}
        library: Any = np.lib.format
        shapes: dict[str, Any] = {}
        for name, stream in streams.items():
            library.read_magic(stream)
            shapes[name] = library.read_array_header_1_0(stream)
        for _ in range(min(shape[0] for shape, _, _ in shapes.values())):
            sample: Sample = {}
            for name, ((_, *shape), _, dtype) in shapes.items():
                size = int(np.prod(shape)) * dtype.itemsize
                sample[name] = np.frombuffer(streams[name].read(size), dtype).reshape(shape)
            session.run(sample)


def apart(what: str, *words: str) -> Any:
    """The result of ``what`` with ``words`` in a process of its own, with one thread a library."""
    one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    # No state of an earlier run; what is kept of this one goes with the folder.
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, __file__, "--child", what, *words],
            env={**os.environ, **one, "QCOMPILE_CACHE": cache},
            check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def measure(work: Work, folder: pathlib.Path) -> tuple[list[Row], Peaks]:
    """Time and memory of ``work``."""
    model = folder / "model.onnx"
    execute.save(capture.capture(work.model), model)
    many, few = folder / "many.npz", folder / "few.npz"
    write(work.samples(SAMPLES), many)
    write(work.samples(FEW), few)
    rows = [
        Row(work.name, passes, *apart("time", str(model), str(many), passes)) for passes in RECIPES
    ]
    peaks = Peaks(
        work.name,
        few=apart("peak", str(model), str(few), HISTOGRAMS),
        many=apart("peak", str(model), str(many), HISTOGRAMS),
        bare=apart("peak", str(model), str(many), ""),
    )
    return rows, peaks


def claims(rows: Iterable[Row], peaks: Iterable[Peaks]) -> list[Claim]:
    """The goals, of the real models; the shipped one is over in a blink."""
    most: dict[str, float] = dict(zip(RECIPES, (3.5, 10.0), strict=True))
    found: list[Claim] = []

    def say(claim: str, value: float, control: float) -> None:
        found.append(Claim(claim, value <= control, value, control))

    for row in rows:
        if row.work != CNN.name:
            say(f"{row.work}, {row.passes}: sweeps of the float model", row.ratio, most[row.passes])
    for peak in peaks:
        say(f"{peak.work}: memory, 512 samples over 16", peak.many / peak.few, 1.1)
        if peak.work != CNN.name:
            say(f"{peak.work}: memory over that of the bare run", peak.many / peak.bare, 1.5)
    return found


def child(what: str, words: list[str]) -> None:
    """Print the result of a measurement that runs in this process."""
    print(json.dumps({"time": time_of, "peak": peak_of}[what](*words)))


def tables(rows: Iterable[Row], peaks: Iterable[Peaks]) -> tuple[Table, Table]:
    """The rows for people."""
    first, second = (Table(box=None, padding=(0, 2, 0, 0), header_style="bold") for _ in range(2))
    for column in ("model", "passes", "compile s", "float sweep s", "ratio"):
        first.add_column(column)
    for row in rows:
        numbers = (f"{n:.2f}" for n in (row.seconds, row.bare, row.ratio))
        first.add_row(row.work, row.passes, *numbers)
    for column in ("model", "16 samples MB", "512 samples MB", "bare run MB"):
        second.add_column(column)
    for peak in peaks:
        second.add_row(peak.work, *(f"{n:.0f}" for n in (peak.few, peak.many, peak.bare)))
    return first, second


def main() -> int:
    """Measure, print, write."""
    parser = common.parser(__doc__, quick="the shipped model only")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], arguments.child[1:])
        return 0
    rows: list[Row] = []
    peaks: list[Peaks] = []
    for work in (CNN,) if arguments.quick else (CNN, LITE0, MINILM):
        with tempfile.TemporaryDirectory() as folder:
            found, peak = measure(work, pathlib.Path(folder))
        rows += found
        peaks.append(peak)
    said = claims(rows, peaks)
    kept = [{**dataclasses.asdict(row), "ratio": row.ratio} for row in rows]
    return common.finish(said, arguments.json, tables(rows, peaks), rows=kept, peaks=peaks)


if __name__ == "__main__":
    sys.exit(main())
