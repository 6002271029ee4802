"""Laws of trials that are spread over processes: here, on two workers of joblib, and of Dask."""

from __future__ import annotations

import json
import os
import pathlib
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import graphs
import joblib
import numpy as np
import onnx_ir as ir
import pytest
from command import Command

from qcompile import capture, cluster, execute, graph, pipeline, registry, sensitivity, text, trials
from qcompile.backends.onnxruntime import OrtCpu
from qcompile.calibrate import Calibration
from qcompile.errors import CalibrationError
from qcompile.models import fashion
from qcompile.numerics import Floats, Grid, IntFormat
from qcompile.pipeline import Context
from qcompile.ports import inputs_of
from qcompile.sensitivity import Sensitivity
from qcompile.sources import load
from qcompile.spill import Spill
from qcompile.trials import Lent

library: Any = joblib  # untyped
HERE = "test_sensitivity"
SPREAD = ("here", "processes", "dask")


@pytest.fixture(scope="module")
def scheduler() -> Iterator[Any]:
    """The scheduler of a Dask cluster of two workers on this machine."""
    distributed: Any = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=":0", memory_limit=0
    ) as made:
        yield made


@pytest.fixture(params=SPREAD)
def where(request: pytest.FixtureRequest) -> Iterator[int]:
    """The number of jobs, in a place where ``Context.map`` spreads as the parameter says."""
    if request.param != "dask":
        yield 1 if request.param == "here" else 2
        return
    address = request.getfixturevalue("scheduler").scheduler_address
    with cluster.spread(address):
        yield 1


def cnn() -> tuple[ir.Model, Calibration]:
    model = capture.capture(str(fashion.path(fashion.CNN)))
    return model, Calibration(load(str(fashion.path(fashion.CALIBRATION)), inputs_of(model)))


def loudness(runs: Iterable[tuple[Any, Mapping[str, Floats]]]) -> float:
    """A metric of a user."""
    return float(np.mean([np.abs(array).mean() for _, found in runs for array in found.values()]))


def broken(runs: Iterable[tuple[Any, Mapping[str, Floats]]]) -> float:
    """A metric of a user that does not work."""
    raise ValueError("no such luck")


@pytest.mark.parametrize("metric", ["nsr", "kl", f"{HERE}:loudness"])
def test_costs_are_equal_to_the_bit_wherever_they_are_measured(where: int, metric: str) -> None:
    model, data = cnn()
    pipeline.run(model, pipeline.parse("simplify,fold-bn", registry.passes()), Context())
    layers = [[layer] for layer in graph.layers(model)]
    first = layers[0][0]
    read = first.input.value.name if first.input is not None else None
    grid = Grid(IntFormat(8, signed=False), np.array(0.01, np.float32), np.array(100, np.int32))
    grids = {first.name: {read or "": grid}}
    asked: list[tuple[list[graph.Layer], list[Floats]]] = [
        (readers, [graph.constant(readers[0].weight.value) * np.float32(w) for w in (0.9, 1.1)])
        for readers in layers
    ]
    samples = data.samples.some(4)
    spread, alone = (
        Sensitivity(model, samples, sensitivity.metric(metric), grids) for _ in range(2)
    )
    found = spread.costs(iter(asked), Context(jobs=where), len(asked))
    assert found == [[alone.cost(readers, w) for w in weights] for readers, weights in asked]
    assert spread.trials == alone.trials == 2 * len(layers)
    np.testing.assert_allclose(spread.passes, alone.passes)
    assert len({cost for costs in found for cost in costs}) == 2 * len(layers)


def test_a_search_chooses_the_same_wherever_it_is_spread(where: int) -> None:
    passes = pipeline.parse(
        "simplify,fold-bn,assign-bits{samples=4 method=fmpq rounding=gptq}", registry.passes()
    )

    def chosen(jobs: int) -> tuple[str, pipeline.Stats]:
        model, data = cnn()
        context = Context(calibration=data, target=OrtCpu(), jobs=jobs)
        counters = pipeline.run(model, passes, context)[-1].counters
        return text.render(model, weights=True), counters

    with library.parallel_config(backend="sequential"):
        wanted = chosen(1)
    assert chosen(where) == wanted


def test_a_spill_is_read_by_its_path_for_as_long_as_it_is_there() -> None:
    spill = Spill()
    rows = [{"x": np.arange(n, dtype=np.float32), "y": np.array(n)} for n in (3, 0, 5)]
    for row in rows[:2]:
        spill.append(row)
    copy = pickle.loads(pickle.dumps(spill))
    again = pickle.loads(pickle.dumps(copy))
    spill.append(rows[2])
    assert len(copy) == len(again) == 2 and len(spill) == 3
    for kept in (spill, copy, again):
        for row, wanted in zip(kept, rows, strict=False):
            assert {n: a.tolist() for n, a in row.items()} == {
                n: a.tolist() for n, a in wanted.items()
            }
    late = pickle.loads(pickle.dumps(spill))
    spill.close()
    with pytest.raises(CalibrationError, match=r"has no file .*set TMPDIR"):
        late[0]


def test_a_model_is_lent_by_its_path_with_the_same_numbers() -> None:
    model = graphs.graph(graphs.CONV)
    lent = Lent(model)
    assert lent.get() is model
    borrowed = pickle.loads(pickle.dumps(lent))
    assert text.render(borrowed.get(), weights=True) == text.render(model, weights=True)
    sample = graphs.samples(model, 1)[0]
    one, other = (execute.execute(m, sample) for m in (model, borrowed.get()))
    assert all(np.array_equal(one[name], other[name]) for name in one)
    with pytest.raises(CalibrationError, match=r"has no file .*set TMPDIR"):
        Lent(pathlib.Path("nowhere/model.onnx")).get()


def test_what_is_behind_a_layer_is_what_reads_it_and_no_more() -> None:
    model = graphs.graph(graphs.CHAIN)
    layers = list(graph.layers(model))
    counts = [len(trials.behind(model, [layer])[0]) for layer in layers]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1] >= 1


# -- the command line ---------------------------------------------------------------------------

PASSES = "simplify,fold-bn,assign-bits{samples=4 metric=METRIC},gptq{damping=0.1},insert-qdq"


def compiled(qcompile: Command, out: pathlib.Path, *more: object, metric: str = "nsr") -> Any:
    model, data = fashion.path(fashion.CNN), fashion.path(fashion.CALIBRATION)
    passes = PASSES.replace("METRIC", metric)
    return qcompile(model, "--calib", data, "-o", out, "--passes", passes, *more)


def test_a_cluster_writes_the_same_file(
    qcompile: Command, tmp_path: pathlib.Path, scheduler: Any
) -> None:
    address = scheduler.scheduler_address
    script = tmp_path / "again.sh"
    there = ("--cluster", address, "--save-command", script)
    for name, more in (("here", ()), ("there", there)):
        assert compiled(qcompile, tmp_path / name, *more).code == 0
    one, other = (tmp_path / name for name in ("here", "there"))
    assert (one / "model.onnx").read_bytes() == (other / "model.onnx").read_bytes()
    assert (one / "pipeline.txt").read_text() == (other / "pipeline.txt").read_text()
    counted = [json.loads((p / "report.json").read_text())["passes"] for p in (one, other)]
    assert counted[0][2]["counters"] == counted[1][2]["counters"]
    assert f"--cluster {address}" in script.read_text()


def test_what_a_worker_finds_wrong_is_said_as_here(
    qcompile: Command, tmp_path: pathlib.Path, scheduler: Any
) -> None:
    said = [
        compiled(qcompile, tmp_path / "out", *more, metric=f"{HERE}:broken")
        for more in ((), ("--cluster", scheduler.scheduler_address))
    ]
    assert said[0].code == said[1].code == 1
    message = f"metric '{HERE}:broken' raises ValueError: no such luck"
    assert all(message in done.err for done in said)


@pytest.mark.parametrize("address", ["nonsense", "foo://host:1", "", "tcp://127.0.0.1:PORT"])
def test_where_no_scheduler_answers_is_the_users_error(
    qcompile: Command, tmp_path: pathlib.Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(cluster, "_ANSWER", 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and does not listen
        address = address.replace("PORT", str(free.getsockname()[1]))
        done = compiled(qcompile, tmp_path / "out", "--cluster", address)
    assert done.code == 1 and not (tmp_path / "out").exists()
    assert f"error: no Dask scheduler answers at --cluster '{address}'" in done.err


def test_a_cluster_without_workers_is_the_users_error(
    qcompile: Command, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributed: Any = pytest.importorskip("distributed")
    monkeypatch.setattr(cluster, "_START", 1)
    with distributed.LocalCluster(n_workers=0, dashboard_address=":0") as made:
        done = compiled(qcompile, tmp_path / "out", "--cluster", made.scheduler_address)
        assert done.code == 1
        assert f"has no worker; start one with 'dask worker {made.scheduler_address}'" in done.err


def test_workers_of_another_version_are_refused(
    qcompile: Command, tmp_path: pathlib.Path, scheduler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcompile.__version__", "9.9.9")
    address = scheduler.scheduler_address
    done = compiled(qcompile, tmp_path / "out", "--cluster", address)
    assert done.code == 1 and not (tmp_path / "out").exists()
    assert f"a worker of the cluster '{address}' has qcompile 0" in done.err
    assert "here is 9.9.9" in done.err


def fatal(runs: Iterable[tuple[Any, Mapping[str, Floats]]]) -> float:
    """A metric that takes the scheduler with it, where it is run by a worker."""
    if "QCOMPILE_TEST_SCHEDULER" in os.environ:
        os.kill(int(os.environ["QCOMPILE_TEST_SCHEDULER"]), signal.SIGKILL)
    return loudness(runs)


def test_a_scheduler_that_goes_away_is_said(
    qcompile: Command, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setenv("DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT", "2s")
    dask, place = [sys.executable, "-m", "dask"], tmp_path / "scheduler.json"
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    file = ["--scheduler-file", str(place), "--no-dashboard"]
    made = [subprocess.Popen([*dask, "scheduler", "--port", "0", *file], **quiet)]
    try:
        environment = os.environ | {
            "QCOMPILE_TEST_SCHEDULER": str(made[0].pid),
            "PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parent), *sys.path]),
        }
        for _ in range(300):
            if place.is_file() and place.read_text().endswith("}"):
                break
            time.sleep(0.1)
        worker = [*dask, "worker", *file, "--nthreads", "1", "--no-nanny"]
        made += [subprocess.Popen(worker, env=environment, **quiet) for _ in range(2)]
        address = json.loads(place.read_text())["address"]
        done = compiled(qcompile, tmp_path / "out", "--cluster", address, metric=f"{HERE}:fatal")
    finally:
        for process in made:
            process.kill()
            process.wait()
    assert done.code == 1 and not (tmp_path / "out").exists()
    assert f"error: the scheduler of the cluster '{address}' went away in assign-bits" in done.err


def test_without_dask_the_command_that_installs_it_is_said(
    qcompile: Command, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    done = compiled(qcompile, tmp_path / "out", "--cluster", "tcp://127.0.0.1:8786")
    assert done.code == 1
    assert "--cluster needs Dask: pip install 'qcompile[cluster]'" in done.err
