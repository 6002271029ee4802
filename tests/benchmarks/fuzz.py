"""Broken models through the whole compiler: each is compiled, or refused in a sentence.

python tests/benchmarks/fuzz.py [--count 1000] [--seed 0] [--jobs 2] [--case N] [--json FILE]

``--case`` runs one mutant alone and shows all that it says; ``--keep DIR`` writes its files.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import fuzzing

from qcompile import report


def main() -> int:
    """Print a line a fault and the counts by exit code; exit 1 if there is a fault."""
    parser = argparse.ArgumentParser(description="broken models through the compiler")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--case", type=int)
    parser.add_argument("--keep", type=pathlib.Path)
    parser.add_argument("--json", type=pathlib.Path)
    wanted = parser.parse_args()
    if wanted.keep is not None:
        wanted.keep.mkdir(parents=True)
        fuzzing.prepare(wanted.case or 0, wanted.seed, wanted.keep)
    numbers = range(wanted.count) if wanted.case is None else [wanted.case]
    cases: list[fuzzing.Case] = []
    for case in fuzzing.run(numbers, wanted.seed, wanted.jobs):
        cases.append(case)
        if case.faults or wanted.case is not None:
            print(f"{case.number} {case.model} {'; '.join(case.changes)}: {', '.join(case.faults)}")
            print("   ", case.said.strip()[-3000:].replace("\n", "\n    "), flush=True)
    cases.sort(key=lambda case: case.number)
    codes = collections.Counter(str(case.code) for case in cases)
    good = sum(not case.faults for case in cases)
    slowest = max(cases, key=lambda case: case.seconds)
    print(f"exit codes: {', '.join(f'{n} of {code}' for code, n in sorted(codes.items()))}")
    print(f"slowest: {slowest.number}, {slowest.seconds:.1f} s; {good} of {len(cases)} are good")
    claim = {
        "claim": "a broken model is compiled to a valid one or refused in a sentence",
        "holds": good == len(cases), "value": good, "control": len(cases),
    }  # fmt: skip
    if wanted.json:
        rows = [dataclasses.asdict(case) for case in cases]
        found = {"rows": rows, "claims": [claim], "versions": report.versions()}
        wanted.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if claim["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
