"""How memory and time grow with the model: larger than protobuf holds, and ten times the layers.

    python tests/benchmarks/scale.py [--quick] [--json FILE]

Memory is the peak of the resident set of qcompile and all its child processes together, sampled
every 10 ms, for 4-bit weights of a model with external data (2.5 GiB; 0.3 GiB with ``--quick``).
Time is that of the whole command for 3,000 layers over that for 300, without calibration, runs of
both in turn.
"""

from __future__ import annotations

import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import common
import large
from common import Claim

PASSES = "simplify,fold-bn,quantize{weight=int4 input=float granularity=block},insert-qdq"
WIDTH, LAYERS = 4096, 40
FEW, MANY, NARROW = 300, 3000, 32


def command(model: pathlib.Path) -> list[str]:
    """A run of the command line without data."""
    run = [sys.executable, "-m", "qcompile.cli", str(model), "--passes", PASSES]
    return [*run, "-o", str(model.with_suffix(""))]


def peak(model: pathlib.Path) -> tuple[int, float]:
    """The highest resident set of all processes of a run together, in bytes, and the seconds."""
    most, started = 0, time.monotonic()
    with subprocess.Popen(
        command(model), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as run:
        while run.poll() is None:
            most = max(most, sum(map(_resident, _family(run.pid))))
            time.sleep(0.01)
    if run.returncode:
        raise SystemExit(f"the run failed with {run.returncode}")
    return most, time.monotonic() - started


def _family(process: int) -> list[int]:
    """``process`` and its descendants."""
    found = [process]
    for parent in found:
        try:
            text = pathlib.Path(f"/proc/{parent}/task/{parent}/children").read_text()
        except OSError:
            continue
        found += [int(child) for child in text.split()]
    return found


def _resident(process: int) -> int:
    try:
        return int(pathlib.Path(f"/proc/{process}/statm").read_text().split()[1]) * 4096
    except (OSError, IndexError):
        return 0


def main() -> int:
    """Print two lines, and write rows and claims; exit 1 if a claim does not hold."""
    parser = common.parser(__doc__, quick="a smaller model, one run each")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
        rows, claims = measure(pathlib.Path(folder), wanted.quick)
    return common.finish(claims, wanted.json, rows=rows)


def measure(folder: pathlib.Path, quick: bool) -> tuple[list[dict[str, Any]], list[Claim]]:
    """The rows and claims."""
    size = large.write(folder / "large.onnx", LAYERS // 8 if quick else LAYERS, WIDTH)
    most, seconds = peak(folder / "large.onnx")
    print(f"{size / 2**30:.2f} GiB of weights: peak {most / 2**20:.0f} MiB, {seconds:.0f} s")
    times: dict[int, list[float]] = {FEW: [], MANY: []}
    for count in times:
        large.write(folder / f"layers{count}.onnx", count, NARROW)
    for _ in range(1 if quick else 3):
        for count, kept in times.items():
            started = time.monotonic()
            subprocess.run(command(folder / f"layers{count}.onnx"), check=True, capture_output=True)
            kept.append(time.monotonic() - started)
    few, many = (statistics.median(times[count]) for count in (FEW, MANY))
    print(f"{MANY} layers {many:.1f} s, {FEW} layers {few:.1f} s")
    rows: list[dict[str, Any]] = [
        {"weights": size, "peak": most, "seconds": seconds},
        {"layers": FEW, "seconds": times[FEW]},
        {"layers": MANY, "seconds": times[MANY]},
    ]
    claims = [Claim(f"time of {MANY} layers over that of {FEW}", many / few <= 11, many / few, 11)]
    if not quick:  # imports alone are more than a quarter of a small model
        share = most / size
        claims.append(Claim("peak memory over the bytes of the weights", share < 0.25, share, 0.25))
    return rows, claims


if __name__ == "__main__":
    sys.exit(main())
