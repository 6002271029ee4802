"""kill -9 at random moments of a run: ``--resume`` ends in the same bytes.

python tests/benchmarks/kill.py [--moments 20] [--json FILE]
"""

from __future__ import annotations

import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import common
import killed
from common import Claim

from qcompile.models import fashion


def main() -> int:
    """Print a line a moment; exit 1 if one ends in other bytes."""
    parser = common.parser(__doc__)
    parser.add_argument("--moments", type=int, default=20)
    wanted = parser.parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
        model, calib = fashion.path(fashion.VIT), fashion.path(fashion.CALIBRATION)
        runs = killed.kill_and_resume(model, calib, pathlib.Path(folder), wanted.moments)
        for moment, same, said in runs:
            resumed = next(
                (line for line in said.splitlines() if "resumed" in line), "from the start"
            )
            print(f"killed after {moment:5.2f} s: {'same bytes' if same else 'DIFFERS'}, {resumed}")
            rows.append({"moment": moment, "same": same, "resumed": resumed})
    good = sum(bool(row["same"]) for row in rows)
    text = "runs killed at random moments end in the same bytes with --resume"
    return common.finish([Claim(text, good == len(rows), good, len(rows))], wanted.json, rows=rows)


if __name__ == "__main__":
    sys.exit(main())
