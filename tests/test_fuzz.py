"""Broken models are compiled to valid ones or refused in a sentence; the benchmark has more."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

import fuzzing
import mutate
import numpy as np
import pytest
from command import process

from qcompile import compiler

SCRIPT = pathlib.Path(__file__).parent / "benchmarks" / "fuzz.py"
SEED = 7


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What became of 40 mutants."""
    # In a process without threads, since each mutant is compiled in one that is forked off.
    file = tmp_path_factory.mktemp("fuzz") / "cases.json"
    command = [sys.executable, SCRIPT, "--count", "40", "--seed", str(SEED), "--json", file]
    subprocess.run(command, capture_output=True, check=False)
    return json.loads(file.read_text())["rows"]


@pytest.mark.parametrize("seed", mutate.seeds(), ids=lambda seed: seed.name)
def test_a_seed_is_sound(seed: mutate.Seed, tmp_path: pathlib.Path) -> None:
    arrays: Any = seed.data
    np.savez(tmp_path / "data.npz", **arrays)
    [done] = compiler.compile(seed.model, tmp_path / "out", calib=str(tmp_path / "data.npz"))
    assert any(layer.runs != "float" for layer in done.report.layers)


def test_a_mutant_is_compiled_or_refused(cases: list[dict[str, Any]]) -> None:
    assert [case for case in cases if case["faults"]] == []
    assert {case["code"] for case in cases} == {0, 1}


def test_a_mutant_ends_on_the_command_line_as_where_it_is_watched(
    cases: list[dict[str, Any]], tmp_path: pathlib.Path
) -> None:
    for case in cases[:4]:
        folder = tmp_path / str(case["number"])
        folder.mkdir()
        fuzzing.prepare(case["number"], SEED, folder)
        done = process(*fuzzing.command(case["number"]), cwd=folder)
        assert done.code == case["code"]
        assert done.err.partition("error: ")[2] == case["said"].partition("error: ")[2]


def test_a_mutant_depends_on_its_numbers_alone() -> None:
    for number in range(9):
        one, other = mutate.mutant(number, 3), mutate.mutant(number, 3)
        assert one.content == other.content
        assert one.changes == other.changes
    assert mutate.mutant(1, 3).content != mutate.mutant(1, 4).content
