"""What is no fault of the user leaves a reproducer that crashes again, and one sentence."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from typing import Any

import onnx_ir as ir
import pytest

from qcompile import compiler, crash
from qcompile.errors import Bug, PassBug, QCompileError
from qcompile.models import fashion
from qcompile.passes import quantize

MODEL, DATA = fashion.path(fashion.CNN), fashion.path(fashion.CALIBRATION)


def broken(model: ir.Model, *_: Any) -> None:
    raise KeyError("no such thing")


@pytest.fixture
def bug(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Bug:
    """A run in which the pass ``quantize`` raises what it should not."""
    monkeypatch.setattr(quantize, "decide_weights", broken)
    with pytest.raises(Bug) as caught:
        compiler.compile(MODEL, tmp_path / "out", calib=str(DATA))
    return caught.value


def test_a_crash_is_told_in_a_sentence_and_leaves_no_output(
    bug: Bug, tmp_path: pathlib.Path
) -> None:
    assert str(bug) == "pass quantize{least=0.1} failed with KeyError: 'no such thing'"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out-crash"]


def test_the_reproducer_holds_all_that_is_needed(bug: Bug) -> None:
    assert bug.folder is not None
    names = sorted(p.name for p in bug.folder.iterdir())
    assert names == ["data.npz", "model.onnx", "run.json", "traceback.txt"]
    assert "KeyError: 'no such thing'" in (bug.folder / "traceback.txt").read_text()


def test_the_replay_crashes_in_the_same_place(bug: Bug) -> None:
    assert bug.folder is not None
    wanted = r"pass quantize\{least=0.1\} failed with KeyError: 'no such thing'"
    with pytest.raises(PassBug, match=wanted):
        crash.replay(bug.folder)


def test_the_replay_runs_once_the_bug_is_gone(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert bug.folder is not None
    done = subprocess.run(
        [sys.executable, "-m", "qcompile.cli", "replay", str(bug.folder)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "insert-qdq" in done.stderr
    assert done.stdout == "the reproducer runs without a crash\n"


def test_a_crash_behind_the_passes_keeps_the_lowered_model(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qcompile.backends.onnxruntime import OrtCpu

    monkeypatch.setattr(OrtCpu, "prove", broken)
    with pytest.raises(Bug, match="KeyError") as caught:
        compiler.compile(MODEL, tmp_path / "out", calib=str(DATA))
    assert caught.value.folder is not None
    with pytest.raises(KeyError):
        crash.replay(caught.value.folder)


@pytest.mark.parametrize("content", [None, "no json", "{}"])
def test_what_is_no_reproducer_is_rejected(content: str | None, tmp_path: pathlib.Path) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(QCompileError, match=r"is no reproducer|holds no model"):
        crash.replay(tmp_path)


def test_a_full_disk_is_the_users_to_put_right(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    from qcompile import execute

    monkeypatch.setattr(execute, "save", full)
    with pytest.raises(QCompileError, match=r"cannot read or write.*No space left on device"):
        compiler.compile(MODEL, tmp_path / "out", calib=str(DATA))
    assert not list(tmp_path.iterdir())
