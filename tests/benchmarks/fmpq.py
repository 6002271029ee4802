"""After FMPQ: one tolerance for all layers under a budget, against one width and the knapsack.

    python tests/benchmarks/fmpq.py [--quick] [--only WORD] [--seeds N] [--json FILE]

Rows, data, rounding and figures as in ``mlorq.py``. The scalar is noise-to-signal at the outputs,
in place of the rate-distortion loss of the paper, which is for learned codecs. The knapsack
(``mixed``) works on the same costs; that it loses less in them is exact, that it does so at the
outputs is measured.
"""

from __future__ import annotations

import sys

import common
import mlorq
from int8 import LITE0, MINILM, SHIPPED


def main() -> int:
    """Measure, print, write."""
    parser = common.parser(__doc__, quick="the shipped models only")
    parser.add_argument("--only", help="the models with this word in their names alone")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of the bootstrap")
    arguments = parser.parse_args()
    works = SHIPPED if arguments.quick else (*SHIPPED, MINILM, LITE0)
    word = (arguments.only or "").lower()
    rows: list[mlorq.Row] = []
    for work in (w for w in works if word in w.name.lower()):
        methods = ("fmpq", "mixed")
        rows += mlorq.measure(work, (3, 4), methods, arguments.quick, arguments.seeds - 1)
    said = mlorq.claims(rows, arguments.seeds)
    return common.finish(said, arguments.json, [mlorq.table(rows)], rows=rows)


if __name__ == "__main__":
    sys.exit(main())
