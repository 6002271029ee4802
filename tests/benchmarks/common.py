"""What the benchmarks share: their arguments, claims, and what they print and write at the end."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from qcompile import report


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim, whether it holds, and the value against its control, with the value's interval."""

    claim: str
    holds: bool
    value: float
    control: float
    interval: tuple[float, float] | None = None
    seeds: int = 1


def parser(doc: str | None, quick: str = "") -> argparse.ArgumentParser:
    """A parser with ``--json``, and with ``--quick`` if it is said what that takes."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if quick:
        made.add_argument("--quick", action="store_true", help=quick)
    made.add_argument("--json", type=pathlib.Path, help="write rows and claims to this file")
    return made


def finish(
    claims: Sequence[Claim],
    path: pathlib.Path | None,
    tables: Sequence[Table] = (),
    failed_only: bool = False,
    **found: Sequence[Any],
) -> int:
    """Print ``tables`` and ``claims``, all or the failed; write to ``path`` what was ``found``.

    What was found are dicts or dataclasses, by name; claims and versions stand beside them. Returns
    the exit code: 1 if a claim does not hold.
    """
    console = Console(markup=False, width=200)
    for table in tables:
        console.print(table)
    for claim in (one for one in claims if not (failed_only and one.holds)):
        mark = "holds" if claim.holds else "FAILS"
        line = f"{mark}: {claim.claim}: {claim.value:.3g} against {claim.control:.3g}"
        console.print(line, highlight=False)
    if path is not None:
        kept = {name: [_plain(one) for one in rows] for name, rows in found.items()}
        kept["claims"] = [dataclasses.asdict(claim) for claim in claims]
        content = {**kept, "versions": report.versions()}
        path.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if all(claim.holds for claim in claims) else 1


def _plain(row: Any) -> dict[str, Any]:
    return dict(row) if hasattr(row, "keys") else dataclasses.asdict(row)
