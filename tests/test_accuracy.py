"""Laws of metrics on the user's data: what each counts, what it needs, and what bounds allow."""

from __future__ import annotations

import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import graphs
import numpy as np
import numpy.typing as npt
import pytest

from qcompile import accuracy, ports, sources
from qcompile.accuracy import Bound, Evaluation
from qcompile.errors import CalibrationError, QCompileError
from qcompile.execute import Session

Array = npt.NDArray[Any]

# What is read is what is written, so that scores are chosen by the test.
SCORES = "(float[N,3] x) => (float[N,3] y) { y = Identity(x) }"
TOKENS = """(int64[N,T] input_ids, int64[N,T] keep, float[N,T,4] x)
=> (float[N,T,4] y, int64[N,T] k) { y = Identity(x) k = Add(input_ids, keep) }"""


def evaluation(
    metric: str, samples: Sequence[dict[str, Array]], source: str = SCORES, mask: str | None = None
) -> Evaluation:
    model = graphs.graph(source)
    data = sources.load(samples, ports.inputs_of(model), labelled=True)
    return Evaluation(accuracy.parse(metric), model, data, mask)


def floats(*rows: Sequence[float]) -> Array:
    return np.array(rows, np.float32)


def test_top1_is_the_share_of_rows_whose_largest_score_is_the_label() -> None:
    samples = [
        {"x": floats([1, 2, 0], [3, 1, 1]), "labels": np.array([1, 2])},
        {"x": floats([0, 0, 5], [0, 1, 0]), "labels": np.array([2, -1])},
    ]
    # A negative label does not count: two of three.
    assert evaluation("top1", samples).in_float == pytest.approx(2 / 3)
    assert evaluation("top1{output=y}", samples).in_float == pytest.approx(2 / 3)


def test_perplexity_is_that_of_the_next_token() -> None:
    rng = np.random.default_rng(0)
    tokens, x = rng.integers(0, 4, (2, 5)), rng.standard_normal((2, 5, 4)).astype(np.float32)
    keep = np.ones((2, 5), np.int64)
    keep[1, 3:] = 0
    sample = {"input_ids": tokens, "keep": keep, "x": x}
    likely = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    each = -np.log(np.take_along_axis(likely[:, :-1], tokens[:, 1:, None], -1)[..., 0])
    found = evaluation("perplexity{input=input_ids}", [sample], TOKENS)
    assert found.metric.lower_is_better
    assert found.in_float == pytest.approx(math.exp(each.mean()), rel=1e-5)
    padded = evaluation("perplexity", [sample], TOKENS, mask="keep").in_float
    counted = [*each[0], *each[1, :2]]
    assert padded == pytest.approx(math.exp(np.mean(counted)), rel=1e-5)
    labels = np.full((2, 5), -100)
    labels[0, :4], labels[1, :2] = tokens[0, 1:], tokens[1, 1:3]
    said = evaluation("perplexity", [sample | {"labels": labels}], TOKENS).in_float
    assert said == pytest.approx(padded, rel=1e-6)


def test_equal_scores_have_the_perplexity_of_their_number() -> None:
    sample = {"x": floats([0, 0, 0], [1, 1, 1]), "labels": np.array([0, 2])}
    assert evaluation("perplexity", [sample]).in_float == pytest.approx(3.0)


@pytest.mark.parametrize("metric", ["cosine", "sqnr"])
def test_float_agrees_with_itself(metric: str) -> None:
    samples = [{"x": floats([1, 2, 3])}]
    found = evaluation(metric, samples)
    assert found.in_float == 1.0
    scaled = graphs.graph("(float[N,3] x) => (float[N,3] y) <float h = {1.1}> { y = Mul(x, h) }")
    value = found.measure(Session(scaled))
    # The angle is kept; a tenth of the amplitude is a hundredth of the power, 20 dB.
    assert value == pytest.approx(1.0 if metric == "cosine" else 0.99, rel=1e-5)
    assert found.drop(value) == pytest.approx(1.0 - value)


OWN = """
def error(runs):
    return sum(float(abs(o["y"] - s["labels"]).sum()) for s, o in runs)
error.lower_is_better = True
def broken(runs): return next(iter(runs))[1]["z"]
def words(runs): return "fine"
number = 3
"""


def test_a_function_of_the_user_is_a_metric(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_metrics.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    samples = [{"x": floats([1, 2, 3]), "labels": floats([1, 1, 1])}] * 2
    found = evaluation("own_metrics:error", samples)
    assert (found.in_float, found.metric.lower_is_better) == (6.0, True)
    assert found.drop(7.0) == 1.0
    for name, says in (
        ("broken", "metric 'own_metrics:broken' raises KeyError"),
        ("words", "raises ValueError: could not convert"),
        ("number", "is int, no function"),
        ("gone", "own_metrics has no 'gone'"),
    ):
        with pytest.raises(QCompileError, match=says):
            evaluation(f"own_metrics:{name}", samples)


@pytest.mark.parametrize(
    ("metric", "labels", "says"),
    [
        ("top1", None, "has no array 'labels'"),
        ("top1", np.array([1, 1]), "output 'y' has 1 rows and wants a whole number for each"),
        ("top1", np.array([1.0]), "labels are float64"),
        ("top1", np.array([3]), "label 3, and output 'y' has 3 classes"),
        ("top1{output=z}", np.array([0]), "no output is called 'z'; known are y"),
        ("perplexity", None, "which input holds the tokens"),
        ("top1", np.array([-1]), "of the float model is not a number"),
    ],
)
def test_labels_that_do_not_fit_are_said(metric: str, labels: Array | None, says: str) -> None:
    sample = {"x": floats([1, 2, 3])} | ({} if labels is None else {"labels": labels})
    with pytest.raises(CalibrationError, match=says):
        evaluation(metric, [sample])


# -- bounds ----------------------------------------------------------------------------------------


def test_a_percentage_is_of_the_metric_in_float_and_a_number_in_its_units() -> None:
    assert Bound.parse("1%").allows(0.5, 50.0) and not Bound.parse("1%").allows(0.51, 50.0)
    assert Bound.parse("0.5").allows(0.5, 50.0) and not Bound.parse("0.5").allows(0.51, 50.0)
    assert Bound.parse("0").allows(-1.0, 1.0)
    assert not Bound.parse("1%").allows(math.nan, 1.0)


@pytest.mark.parametrize("text", ["", "%", "one", "-1%", "nan", "inf"])
def test_a_bound_that_is_none_is_said(text: str) -> None:
    with pytest.raises(QCompileError, match="--max-drop is a percentage"):
        Bound.parse(text)


# -- labels of a source ----------------------------------------------------------------------------


def labelled(source: object, model: str = SCORES) -> sources.Data:
    inputs = ports.inputs_of(graphs.graph(model))
    return sources.load(source, inputs, labelled=True)  # type: ignore[arg-type]


def test_labels_of_an_archive_are_cut_as_its_samples_are(tmp_path: pathlib.Path) -> None:
    x = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    path = tmp_path / "x.npz"
    np.savez(path, x=x, labels=np.arange(6))
    assert [s["labels"].tolist() for s in labelled(str(path)).samples] == [[i] for i in range(6)]
    np.savez(path, x=x.reshape(3, 2, 3), labels=np.arange(6).reshape(3, 2))
    found = labelled(str(path)).samples
    assert [s["labels"].ravel().tolist() for s in found] == [[0, 1], [2, 3], [4, 5]]
    np.savez(path, x=x, labels=np.arange(5))
    with pytest.raises(CalibrationError, match="cannot be cut into 6 samples"):
        labelled(str(path))
    with pytest.raises(CalibrationError, match="an array 'labels', which is no input"):
        sources.load(str(path), ports.inputs_of(graphs.graph(SCORES)))


def test_pictures_in_folders_have_the_number_of_their_folder(tmp_path: pathlib.Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for name, count in (("cats", 2), ("dogs", 1)):
        (tmp_path / name).mkdir()
        for number in range(count):
            image.new("RGB", (4, 4)).save(tmp_path / name / f"{number}.png")
    model = graphs.graph("(float[N,3,4,4] x) => (float[N,3,4,4] y) { y = Identity(x) }")
    from qcompile import images

    data = sources.load(
        tmp_path, ports.inputs_of(model), preprocess=images.parse("image"), labelled=True
    )
    assert [s["labels"].tolist() for s in data.samples] == [[0], [0], [1]]
