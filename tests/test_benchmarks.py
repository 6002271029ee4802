"""The quick form of each benchmark runs, and its claims hold."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parent


def quick(name: str, folder: pathlib.Path, *words: str) -> Any:
    """What the benchmark ``name`` writes with ``--quick`` and ``words``; its claims must hold.

    With one thread: threads that have to share a core wait for each other.
    """
    script, result = ROOT / "benchmarks" / f"{name}.py", folder / f"{name}.json"
    command = [sys.executable, str(script), "--quick", *words, "--json", str(result)]
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=one)
    content = json.loads(result.read_text())
    assert content["claims"]
    assert [claim["claim"] for claim in content["claims"] if not claim["holds"]] == []
    return content


def test_int8_quick_claims_hold(tmp_path: pathlib.Path) -> None:
    content = quick("int8", tmp_path)
    assert {row["work"] for row in content["rows"]} == {"CNN", "ViT"}


def test_int4_quick_claims_hold(tmp_path: pathlib.Path) -> None:
    content = quick("int4", tmp_path)
    assert {(row["work"], row["target"]) for row in content["rows"]} == {
        ("ViT", "ort-cpu"), ("ViT", "tensorrt-rtx")
    }  # fmt: skip


def test_packing_quick_claims_hold(tmp_path: pathlib.Path) -> None:
    content = quick("packing", tmp_path)
    assert all(row["equal"] and row["packed_mb"] < row["held_mb"] for row in content["rows"])


def test_ptq4vm_quick_claims_hold(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("cv2")
    content = quick("ptq4vm", tmp_path)
    assert {row["setting"] for row in content["rows"]} == {"float", "W8A8", "W4A4"}
    assert len(content["rows"]) == 14
    assert len(content["claims"]) == 6


def test_zoo_quick_claims_hold(tmp_path: pathlib.Path) -> None:
    content = quick("zoo", tmp_path)
    done = {(row["model"], row["target"], row["result"]) for row in content["rows"]}
    assert done == {
        (name, *what)
        for name in ("CNN", "ViT")
        for what in (("ort-cpu", "runs"), ("tensorrt-rtx", "builds"))
    }
    assert len(content["claims"]) == 8


@pytest.mark.parametrize("name", ["mlorq", "w4a8"])
def test_quick_claims_of_the_shipped_models_hold(name: str, tmp_path: pathlib.Path) -> None:
    content = quick(name, tmp_path)
    assert {row["work"] for row in content["rows"]} == {"CNN", "ViT"}


def test_spread_quick_claims_hold(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("distributed")
    content = quick("spread", tmp_path, "--only", "CNN")
    assert len(content["rows"]) == len(content["claims"]) == 3
