"""Laws of the search: the bound is met with as little as may be given back, or it says that not."""

from __future__ import annotations

import json
import pathlib
import shlex
from typing import Any

import graphs
import numpy as np
import pytest
from command import Command

import qcompile
from qcompile import compiler, execute, registry
from qcompile.errors import RequirementError
from qcompile.models import fashion
from qcompile.pipeline import parse

pytestmark = pytest.mark.filterwarnings("ignore:Cyclopts application invoked")

PICTURES = 600
LOW = "simplify,recompose,fold-bn,calibrate,quantize{weight=int3},insert-qdq"
NET = """(float[N,32] x) => (float[N,16] z) <float[32,32] u, float[32,32] w, float[32,16] v> {
    a = MatMul(x, u) b = Relu(a) c = MatMul(b, w) d = Relu(c) z = MatMul(d, v) }"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Test pictures with their labels."""
    path = tmp_path_factory.mktemp("data") / "pictures.npz"
    image, labels = fashion.test()
    np.savez(path, image=image[:PICTURES], labels=labels[:PICTURES])
    return path


def small(out: pathlib.Path, drop: str, **options: Any) -> qcompile.Compiled:
    """A tiny graph, judged by its SQNR: deterministic, and every layer counts."""
    model = graphs.graph(NET)
    given: dict[str, Any] = {
        "calib": graphs.samples(model, 30), "eval": graphs.samples(model, 20, seed=5),
        "metric": "sqnr", "max_drop": drop, "passes": "calibrate,quantize{weight=int4},insert-qdq",
    }  # fmt: skip
    [result] = qcompile.compile(model, out, **{**given, **options})
    return result


@pytest.mark.parametrize("name", [fashion.CNN, fashion.VIT])
def test_a_drop_is_met_and_the_pipeline_replays_without_the_search(
    name: str, pictures: pathlib.Path, tmp_path: pathlib.Path, qcompile: Command
) -> None:
    model = fashion.path(name)
    data = ("--calib", fashion.path(fashion.CALIBRATION))
    asked = ("--passes", LOW, "--eval", pictures, "--metric", "top1", "--max-drop", "0.5%")
    done = qcompile(model, *data, *asked, "-o", tmp_path / "one")
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    found = report["accuracy"]
    assert found["met"] and found["drop"] <= 0.005 * found["in_float"]
    assert found["samples"] == PICTURES and found["wanted"] == "0.5%"
    # Without the search it is not met, so that something had to be given back.
    assert found["given_back"]
    given = {item["layer"]: item["now"] for item in found["given_back"]}
    rows = {row["name"]: row for row in report["layers"]}
    assert all(given[n].startswith(rows[n]["weight"]) for n in given if n in rows)
    # Each layer once, and the metric log2(layers) + 2 times and once more for the file.
    layers = len(rows)
    assert found["probes"] <= layers + 1
    assert found["evaluations"] <= np.ceil(np.log2(layers)) + 3
    words = shlex.split((tmp_path / "one" / "pipeline.txt").read_text())
    assert "--eval" not in words and "set{layer=" in " ".join(words)
    assert qcompile(model, *data, *words, "-o", tmp_path / "again").code == 0
    one, again = (tmp_path / n / "model.onnx" for n in ("one", "again"))
    assert one.read_bytes() == again.read_bytes()


def test_the_search_is_deterministic(tmp_path: pathlib.Path) -> None:
    one, two = (small(tmp_path / n, "0.3%").report for n in ("one", "two"))
    assert one.accuracy == two.accuracy and one.pipeline == two.pipeline
    files = [(tmp_path / n / "model.onnx").read_bytes() for n in ("one", "two")]
    assert files[0] == files[1]


def test_what_is_good_already_is_left_as_it_is(tmp_path: pathlib.Path) -> None:
    found = small(tmp_path / "out", "50%").report
    assert found.accuracy is not None and found.accuracy.met
    assert (found.accuracy.given_back, found.accuracy.probes) == ((), 0)
    assert found.pipeline == "calibrate,quantize{weight=int4},insert-qdq"


def test_without_a_bound_it_is_measured_alone(tmp_path: pathlib.Path) -> None:
    model = graphs.graph(NET)
    samples = graphs.samples(model, 30)
    [result] = qcompile.compile(
        model, tmp_path / "out", calib=samples, eval=samples, metric="cosine"
    )
    found = result.report.accuracy
    assert found is not None and found.met is None and found.wanted is None
    assert 0 < found.drop < 0.01 and found.evaluations == 1


def test_wider_formats_come_before_float(tmp_path: pathlib.Path) -> None:
    wider = small(tmp_path / "wider", "0.3%").report.accuracy
    assert wider is not None and wider.met and wider.given_back
    assert all(item.now.startswith("int8") for item in wider.given_back)
    target = registry.targets()["ort-cpu"]
    if "int16" in target.input_formats:
        return  # then there is a level between
    floats = small(tmp_path / "floats", "0.015%").report.accuracy
    assert floats is not None and floats.met
    assert any(item.now == "float x float" for item in floats.given_back)


def test_a_smaller_drop_gives_back_no_less(tmp_path: pathlib.Path) -> None:
    found = [small(tmp_path / d, d).report.accuracy for d in ("2%", "1%", "0.3%")]
    counts = [len(f.given_back) for f in found if f is not None]
    assert counts == sorted(counts) and counts[-1] > 0


def test_what_cannot_be_met_says_what_was_reached_and_something_stays_quantized(
    tmp_path: pathlib.Path,
) -> None:
    with pytest.raises(RequirementError) as caught:
        small(tmp_path / "out", "0")
    said = "a drop of 0 at most is required, the best with a layer quantized is sqnr 1"
    assert said in str(caught.value)
    [result] = caught.value.results
    found = result.report.accuracy
    assert found.met is False and found.given_back
    assert any(row.weight != "float" for row in result.report.layers)
    assert (tmp_path / "out" / "model.onnx").is_file()
    # What was reached is what the file does.
    assert found.drop < small(tmp_path / "other", "50%").report.accuracy.drop  # type: ignore[union-attr]


def test_a_missed_drop_exits_with_three(tmp_path: pathlib.Path, qcompile: Command) -> None:
    model = graphs.graph(NET)
    execute.save(model, tmp_path / "m.onnx")
    x = np.stack([s["x"] for s in graphs.samples(model, 20)])
    np.savez(tmp_path / "x.npz", x=x)
    data = ("--calib", tmp_path / "x.npz", "--eval", tmp_path / "x.npz")
    done = qcompile(
        tmp_path / "m.onnx", *data, "--metric", "sqnr", "--max-drop", 0, "-o", tmp_path / "out"
    )
    assert done.code == 3
    assert "}: a drop of 0 at most is required" in done.err
    assert "not met" in done.out and "given back" in done.out


def test_each_target_gives_back_what_it_needs(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    model = graphs.graph(NET)
    samples = graphs.samples(model, 30)
    results = qcompile.compile(
        model, tmp_path / "out", calib=samples, eval=samples, metric="sqnr", max_drop="0.3%",
        targets=("ort-cpu", "tensorrt-rtx"), passes="calibrate,quantize{weight=int4},insert-qdq",
    )  # fmt: skip
    for result in results:
        found = result.report.accuracy
        assert found is not None and found.met
        written = (result.folder / "pipeline.txt").read_text()
        assert result.report.pipeline in " ".join(shlex.split(written))


def test_names_that_text_cannot_hold_are_matched_all_the_same(tmp_path: pathlib.Path) -> None:
    model = graphs.graph(NET)
    for node, name in zip((model.graph[0], model.graph[2]), ("a, {b}", "a[0]"), strict=True):
        node.name = name
    samples = graphs.samples(model, 30)
    [result] = qcompile.compile(
        model, tmp_path / "out", calib=samples, eval=samples, metric="sqnr", max_drop="0.1%",
        passes="calibrate,quantize{weight=int2},insert-qdq",
    )  # fmt: skip
    found = result.report.accuracy
    assert found is not None and found.met and found.unnamed == 0
    passes = parse(result.report.pipeline, registry.passes())
    assert ",".join(map(str, passes)) == result.report.pipeline
    [again] = compiler.compile(
        model, tmp_path / "again", calib=samples, passes=result.report.pipeline
    )
    assert [row.weight for row in again.report.layers] == [
        row.weight for row in result.report.layers
    ]
