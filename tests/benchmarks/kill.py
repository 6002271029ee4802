"""kill -9 at random moments of a run: ``--resume`` ends in the same bytes.

python tests/benchmarks/kill.py [--moments 20] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import killed

from qcompile import report
from qcompile.models import fashion


def main() -> int:
    """Print a line a moment; exit 1 if one ends in other bytes."""
    parser = argparse.ArgumentParser(description="kill -9, then --resume")
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--json", type=pathlib.Path)
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
    claim = {
        "claim": "runs killed at random moments end in the same bytes with --resume",
        "holds": good == len(rows), "value": good, "control": len(rows),
    }  # fmt: skip
    print(f"{good} of {len(rows)} end in the same bytes")
    if wanted.json:
        found = {"rows": rows, "claims": [claim], "versions": report.versions()}
        wanted.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if claim["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
