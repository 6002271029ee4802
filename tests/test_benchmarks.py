"""The quick form of each benchmark runs, and its claims hold."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent


def test_int8_quick_claims_hold(tmp_path: pathlib.Path) -> None:
    script, result = ROOT / "benchmarks" / "int8.py", tmp_path / "int8.json"
    command = [sys.executable, str(script), "--quick", "--json", str(result)]
    subprocess.run(command, check=True, capture_output=True)
    content = json.loads(result.read_text())
    assert {row["work"] for row in content["rows"]} == {"CNN", "ViT"}
    assert content["claims"]
    assert [claim["claim"] for claim in content["claims"] if not claim["holds"]] == []


def test_int4_quick_claims_hold(tmp_path: pathlib.Path) -> None:
    script, result = ROOT / "benchmarks" / "int4.py", tmp_path / "int4.json"
    command = [sys.executable, str(script), "--quick", "--json", str(result)]
    subprocess.run(command, check=True, capture_output=True)
    content = json.loads(result.read_text())
    assert {(row["work"], row["target"]) for row in content["rows"]} == {
        ("ViT", "ort-cpu"), ("ViT", "tensorrt-rtx")
    }  # fmt: skip
    assert [claim["claim"] for claim in content["claims"] if not claim["holds"]] == []


def test_ptq4vm_quick_claims_hold(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("cv2")
    script, result = ROOT / "benchmarks" / "ptq4vm.py", tmp_path / "ptq4vm.json"
    command = [sys.executable, str(script), "--quick", "--json", str(result)]
    subprocess.run(command, check=True, capture_output=True)
    content = json.loads(result.read_text())
    assert {row["setting"] for row in content["rows"]} == {"float", "W8A8", "W4A4"}
    assert len(content["rows"]) == 12
    assert len(content["claims"]) == 6
    assert [claim["claim"] for claim in content["claims"] if not claim["holds"]] == []


def test_zoo_quick_claims_hold(tmp_path: pathlib.Path) -> None:
    script, result = ROOT / "benchmarks" / "zoo.py", tmp_path / "zoo.json"
    command = [sys.executable, str(script), "--quick", "--json", str(result)]
    subprocess.run(command, check=True, capture_output=True)
    content = json.loads(result.read_text())
    done = {(row["model"], row["target"], row["result"]) for row in content["rows"]}
    assert done == {
        (name, *what)
        for name in ("CNN", "ViT")
        for what in (("ort-cpu", "runs"), ("tensorrt-rtx", "builds"))
    }
    assert len(content["claims"]) == 8
    assert [claim["claim"] for claim in content["claims"] if not claim["holds"]] == []


@pytest.mark.parametrize("name", ["mlorq", "w4a8"])
def test_quick_claims_of_the_shipped_models_hold(name: str, tmp_path: pathlib.Path) -> None:
    script, result = ROOT / "benchmarks" / f"{name}.py", tmp_path / f"{name}.json"
    command = [sys.executable, str(script), "--quick", "--json", str(result)]
    subprocess.run(command, check=True, capture_output=True)
    content = json.loads(result.read_text())
    assert {row["work"] for row in content["rows"]} == {"CNN", "ViT"}
    assert [claim["claim"] for claim in content["claims"] if not claim["holds"]] == []


def test_spread_quick_claims_hold(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("distributed")
    script, result = ROOT / "benchmarks" / "spread.py", tmp_path / "spread.json"
    command = [sys.executable, str(script), "--quick", "--only", "CNN", "--json", str(result)]
    subprocess.run(command, check=True, capture_output=True)
    content = json.loads(result.read_text())
    assert len(content["rows"]) == len(content["claims"]) == 3
    assert [claim["claim"] for claim in content["claims"] if not claim["holds"]] == []
