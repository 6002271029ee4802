"""A transformer with a cache, of random weights: captured, decoded step by step, quantized."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

import qcompile
from qcompile import capture, execute, metrics
from qcompile.execute import Session

torch = pytest.importorskip("torch")
from qcompile.models import decoding, language  # noqa: E402  (they need torch)

TINY = language.Config(vocabulary=512, width=32, depth=2, heads=4, kv_heads=2, hidden=64)
IDS = np.random.default_rng(0).integers(0, 512, (2, 9))
INT4 = "simplify,recompose,quantize{weight=int4 input=float granularity=block block=16 "


@pytest.fixture(scope="module")
def model() -> Iterator[language.Llama]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield language.Llama(TINY).eval()


@pytest.fixture(scope="module")
def file(model: language.Llama, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The decoder as captured."""
    path = tmp_path_factory.mktemp("tiny") / "model.onnx"
    execute.save(capture.capture(language.decoder(model)), path)
    return path


def expected(model: language.Llama) -> npt.NDArray[np.float32]:
    with torch.no_grad():
        return language.Prefill(model)(torch.from_numpy(IDS))["logits"].numpy()


def test_inputs_outputs_and_dimensions_have_the_names_of_the_factory(file: pathlib.Path) -> None:
    graph = qcompile.load(file).graph
    kept = [f"{what}_{i}" for what in ("key", "value") for i in range(2)]
    assert [v.name for v in graph.inputs] == ["input_ids", *(f"past_{name}" for name in kept)]
    assert [v.name for v in graph.outputs] == ["logits", *(f"present_{name}" for name in kept)]
    assert str(graph.inputs[1].shape) == "[batch,2,past,8]"
    assert str(graph.outputs[1].shape) == "[batch,2,past + tokens,8]"


def test_the_table_is_the_head_as_well(file: pathlib.Path) -> None:
    graph = qcompile.load(file).graph
    tables = [v for v in graph.initializers.values() if v.shape is not None and 512 in v.shape]
    assert [len(v.uses()) for v in tables] == [2]


def test_prefill_is_what_torch_computes(model: language.Llama, file: pathlib.Path) -> None:
    found = Session(file).run({"input_ids": IDS, **decoding.empty_past(Session(file), 2)})
    np.testing.assert_allclose(found["logits"], expected(model), atol=1e-5)


@pytest.mark.parametrize("steps", [[1] * 9, [4, 5], [9], [3, 1, 5]])
def test_decoding_in_any_steps_equals_prefill(
    steps: list[int], model: language.Llama, file: pathlib.Path
) -> None:
    session, start, found = Session(file), 0, list[npt.NDArray[np.float32]]()
    past = decoding.empty_past(session, 2)
    for count in steps:
        logits, past = decoding.step(session, IDS[:, start : start + count], past)
        found.append(logits)
        start += count
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected(model), atol=1e-5)


def test_the_loss_is_the_cross_entropy_of_torch(model: language.Llama) -> None:
    logits = expected(model)
    lost, count = metrics.next_token_loss(logits, IDS)
    scores = torch.from_numpy(logits[:, :-1]).double().flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(scores, torch.from_numpy(IDS[:, 1:]).flatten())
    assert count == 16
    assert lost / count == pytest.approx(float(wanted), rel=1e-12)
    assert metrics.perplexity(lost, count) == pytest.approx(math.exp(float(wanted)))


def test_equal_logits_have_the_perplexity_of_the_vocabulary() -> None:
    lost, count = metrics.next_token_loss(
        np.full((1, 200, 50), 1e4, np.float32), np.ones((1, 200), np.int64)
    )
    assert metrics.perplexity(lost, count) == pytest.approx(50)
    assert math.isnan(metrics.perplexity(0.0, 0))
    assert metrics.perplexity(1e9, 1) == math.inf


@pytest.mark.parametrize("embedding", ["int8", "int4"])
def test_every_weight_of_a_decoder_runs_in_few_bits(
    embedding: str, file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out, passes = tmp_path / "out", f"{INT4}embedding={embedding}}},insert-qdq"
    [done] = qcompile.compile(file, out, passes=passes)
    runs = {r.name: r.runs for r in done.report.layers if r.kind in ("linear", "embedding")}
    assert len(runs) == 2 * 7 + 2
    assert runs.pop("words/Gather") == f"{embedding} weights"
    assert set(runs.values()) == {"int4 weights"}
    session = Session(out / "model.onnx")
    whole, _ = decoding.step(session, IDS, decoding.empty_past(session, 2))
    first, past = decoding.step(session, IDS[:, :5], decoding.empty_past(session, 2))
    rest, _ = decoding.step(session, IDS[:, 5:], past)
    np.testing.assert_allclose(np.concatenate([first, rest], 1), whole, atol=1e-4)


def test_the_norms_of_a_decoder_are_one_operator(
    file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    [done] = qcompile.compile(file, tmp_path / "out", passes=f"{INT4}}},insert-qdq")
    shown = tmp_path / "shown.onnx"
    execute.optimize(done.folder / "model.onnx", shown)
    kinds = [node.op_type for node in qcompile.load(shown).graph]
    assert kinds.count("SimplifiedLayerNormalization") == 2 * 2 + 1
    assert "Reciprocal" not in kinds
