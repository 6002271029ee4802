"""Broken models through the whole compiler: each is compiled, or refused in a sentence.

python tests/benchmarks/fuzz.py [--count 1000] [--seed 0] [--jobs 2] [--case N] [--json FILE]

``--case`` runs one mutant alone and shows all that it says; ``--keep DIR`` writes its files.
"""

from __future__ import annotations

import collections
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import common
import fuzzing
from common import Claim


def main() -> int:
    """Print a line a fault and the counts by exit code; exit 1 if there is a fault."""
    parser = common.parser(__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--case", type=int)
    parser.add_argument("--keep", type=pathlib.Path)
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
    print(f"slowest: {slowest.number}, {slowest.seconds:.1f} s")
    text = "a broken model is compiled to a valid one or refused in a sentence"
    claim = Claim(text, good == len(cases), good, len(cases))
    return common.finish([claim], wanted.json, rows=cases)


if __name__ == "__main__":
    sys.exit(main())
