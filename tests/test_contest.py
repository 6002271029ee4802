"""Laws of ``qcompile bench``: what is measured is said, and a file against itself is one."""

from __future__ import annotations

import json
import pathlib

import graphs
import numpy as np
import pytest
from command import Command

import qcompile as qcompile_api
from qcompile import contest, execute
from qcompile.models import fashion

pytestmark = pytest.mark.filterwarnings("ignore:Cyclopts application invoked")

WIDE = "(float[N,512] x) => (float[N,512] y) <float[512,512] w> { y = MatMul(x, w) }"


@pytest.fixture
def here(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A float model, its compiled folder, and data for both."""
    model = graphs.graph(WIDE)
    execute.save(model, tmp_path / "m.onnx")
    samples = graphs.samples(model, 20)
    np.savez(tmp_path / "x.npz", x=np.stack([s["x"] for s in samples]))
    qcompile_api.compile(model, tmp_path / "out", calib=samples)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_files_and_folders_are_measured_against_each_other(
    here: pathlib.Path, qcompile: Command
) -> None:
    done = qcompile("bench", "m.onnx", "out", "--rounds", 5, "--data", "x.npz", "--json", "b.json")
    assert done.code == 0
    found = json.loads((here / "b.json").read_text())
    assert (found["vs"], found["rounds"], found["threads"]) == ("m.onnx", 5, 1)
    assert (found["data"], found["samples"]) == ("x.npz", 20)
    first, second = found["rows"]
    assert (first["file"], first["ratio"], first["ratio_of_minima"]) == ("m.onnx", 1.0, 1.0)
    assert second["file"] == "out"
    assert second["bytes"] == (here / "out" / "model.onnx").stat().st_size
    for row in found["rows"]:
        assert 0 < row["minimum_ms"] <= row["median_ms"]
        assert row["ratio"] == pytest.approx(row["median_ms"] / first["median_ms"])
    assert "noise" not in done.out
    assert "m.onnx, which is" in done.out and "of itself" in done.out


def test_noise_is_said(here: pathlib.Path, qcompile: Command) -> None:
    done = qcompile("bench", "m.onnx", "--rounds", 2)
    assert done.code == 0
    assert "no --data: the inputs are noise (whole numbers are 0 and 1)" in done.out


def test_the_ratio_is_to_the_file_that_is_named(here: pathlib.Path, qcompile: Command) -> None:
    done = qcompile("bench", "out", "--vs", "m.onnx", "--rounds", 3, "--json", "b.json")
    assert done.code == 0
    found = json.loads((here / "b.json").read_text())
    assert found["vs"] == "m.onnx"
    assert [row["file"] for row in found["rows"]] == ["out"]
    assert found["rows"][0]["ratio"] > 0 and found["null"] > 0


def test_packed_weights_are_measured_too(here: pathlib.Path, qcompile: Command) -> None:
    passes = "quantize{weight=int4 input=float granularity=block},insert-qdq"
    model = graphs.graph(WIDE)
    qcompile_api.compile(model, here / "packed", calib=graphs.samples(model, 5), passes=passes)
    done = qcompile("bench", "m.onnx", "packed", "--rounds", 2, "--json", "b.json")
    assert done.code == 0
    first, second = json.loads((here / "b.json").read_text())["rows"]
    assert second["bytes"] < first["bytes"] / 4
    assert qcompile("verify", "packed").code == 0


def test_what_runs_elsewhere_is_not_measured_here(here: pathlib.Path, qcompile: Command) -> None:
    (here / "out" / "model.engine").write_bytes(b"engine")
    done = qcompile("bench", "out")
    assert done.code == 1
    assert "'out' holds an engine, which runs on its device" in done.err
    (here / "out" / "model.engine").unlink()
    (here / "both").mkdir()
    (here / "out").rename(here / "both" / "ort-cpu")
    done = qcompile("bench", "both")
    assert done.code == 1
    assert "'both' holds several targets: name one, 'both/ort-cpu'" in done.err


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="no VmHWM")
def test_memory_grows_with_the_weights_and_not_with_the_process_that_asks(
    tmp_path: pathlib.Path,
) -> None:
    ballast = np.ones(50_000_000, np.float32)  # 200 MB in this process
    small = contest.peak_memory(
        fashion.path(fashion.CNN), {"image": np.zeros((1, 1, 28, 28), np.float32)}, 1
    )
    assert small is not None and small < ballast.nbytes
    large = graphs.graph(WIDE.replace("512", "4096"))
    execute.save(large, tmp_path / "large.onnx")
    feeds = {"x": np.zeros((1, 4096), np.float32)}
    found = contest.peak_memory(tmp_path / "large.onnx", feeds, 1)
    assert found is not None and found > small + 4 * 4096**2


def test_sequences_carry_their_state(tmp_path: pathlib.Path) -> None:
    cell = """(float[N,3] x, float[N,4] h) => (float[N,2] y, float[N,4] hn)
    <float[3,4] u, float[4,4] v, float[4,2] w> {
        a = MatMul(x, u) b = MatMul(h, v) c = Add(a, b) hn = Tanh(c) y = MatMul(hn, w) }"""
    execute.save(graphs.graph(cell), tmp_path / "cell.onnx")
    x = np.random.default_rng(0).standard_normal((2, 6, 1, 3)).astype(np.float32)
    np.savez(tmp_path / "long.npz", x=x)
    found = contest.run([tmp_path / "cell.onnx"], data=str(tmp_path / "long.npz"), rounds=14)
    assert found.samples == 12
