"""States of a run: a killed run goes on and ends in the same bytes; nothing else is left behind."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess

import killed
import pytest

from qcompile import checkpoints, compiler
from qcompile.models import fashion

MODEL, DATA = fashion.path(fashion.CNN), fashion.path(fashion.CALIBRATION)


@pytest.fixture(autouse=True)
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path / "states"))
    return tmp_path / "states"


def compiled(out: pathlib.Path, **options: object) -> tuple[bytes, list[str]]:
    """The bytes of the compiled CNN, and what was logged."""
    said: list[str] = []
    wanted = {"calib": str(DATA), "resume": True, "log": said.append, **options}
    compiler.compile(MODEL, out, **wanted)
    return (out / "model.onnx").read_bytes(), said


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(tmp_path: pathlib.Path) -> None:
    for moment, same, said in killed.kill_and_resume(MODEL, DATA, tmp_path, moments=3):
        assert same, f"killed after {moment:.2f} s: {said}"


@pytest.mark.parametrize("behind", [1, 2, 3])
def test_a_run_from_any_state_ends_in_the_same_bytes(
    behind: int, tmp_path: pathlib.Path, cache: pathlib.Path
) -> None:
    passes = "simplify,fold-bn,calibrate,quantize,insert-qdq"
    whole, _ = compiled(tmp_path / "whole", passes=passes)
    counts = {p: len(json.loads((p / "steps.json").read_text())) for p in cache.iterdir()}
    for place, count in counts.items():
        if count > behind:
            for file in place.iterdir():
                file.unlink()
            place.rmdir()
    again, said = compiled(tmp_path / "again", passes=passes)
    assert said[0] == f"resumed behind {passes.split(',')[behind - 1]}"
    assert again == whole


def test_the_report_of_a_resumed_run_has_every_pass(tmp_path: pathlib.Path) -> None:
    compiled(tmp_path / "a")
    compiled(tmp_path / "b")
    one, other = (json.loads((tmp_path / n / "report.json").read_text()) for n in "ab")
    for step in (*one["passes"], *other["passes"]):
        del step["seconds"]
    assert one["passes"] == other["passes"]


@pytest.mark.parametrize("change", [{"seed": 1}, {"passes": "@int8-fast"}])
def test_another_run_takes_no_state_of_this_one(
    change: dict[str, object], tmp_path: pathlib.Path
) -> None:
    compiled(tmp_path / "a", passes="@int8")
    _, said = compiled(tmp_path / "b", **change)
    shared = [line for line in said if line.startswith("resumed behind")]
    # What both pipelines begin with may be shared, but nothing behind another seed.
    assert shared == [] if "seed" in change else "calibrate" not in "".join(shared)


def test_without_resume_short_work_leaves_no_state(
    tmp_path: pathlib.Path, cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "SECONDS", 1e9)
    compiled(tmp_path / "a", resume=False)
    assert not cache.exists()


def test_a_damaged_state_is_said_and_not_used(tmp_path: pathlib.Path, cache: pathlib.Path) -> None:
    whole, _ = compiled(tmp_path / "a")
    for place in cache.iterdir():
        (place / "model.onnx").write_bytes(b"nothing")
    again, said = compiled(tmp_path / "b")
    assert again == whole
    assert any("is damaged" in line for line in said)


def test_states_stay_within_their_limit(
    tmp_path: pathlib.Path, cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "LIMIT_BYTES", 1_000_000)
    compiled(tmp_path / "a")
    sizes = [sum(f.stat().st_size for f in p.iterdir()) for p in cache.iterdir()]
    assert len(sizes) == 1 or sum(sizes) <= 1_000_000


def test_the_scratch_folder_of_a_dead_process_goes(tmp_path: pathlib.Path) -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    stale, ours = tmp_path / f".a-{gone.pid}-x", tmp_path / f".a-{os.getpid()}-y"
    stale.mkdir()
    ours.mkdir()
    compiled(tmp_path / "a")
    assert not stale.exists()
    assert ours.exists()
