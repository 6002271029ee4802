"""Laws of texts as data: windows of tokens in order, and every other input of a language model."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
from command import Command
from graphs import graph

from qcompile import execute, sources
from qcompile.errors import CalibrationError
from qcompile.ports import Port, inputs_of
from qcompile.texts import Text

library: Any = pytest.importorskip("tokenizers")
WORDS = ("[CLS]", "[SEP]", "a", "b", "c", "d")


@pytest.fixture
def tokenizer(tmp_path: pathlib.Path) -> str:
    """One token a word, as the number of its place in WORDS."""
    return _save(library.Tokenizer(_words()), tmp_path / "tokenizer.json")


@pytest.fixture
def framing(tmp_path: pathlib.Path) -> str:
    """The same with [CLS] in front and [SEP] behind, and padding to 50."""
    made = library.Tokenizer(_words())
    made.post_processor = library.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    made.enable_padding(length=50)
    return _save(made, tmp_path / "framing.json")


def _words() -> Any:
    return library.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="d")


def _save(made: Any, path: pathlib.Path) -> str:
    made.pre_tokenizer = library.pre_tokenizers.Whitespace()
    made.save(str(path))
    return str(path)


@pytest.fixture
def text(tmp_path: pathlib.Path) -> pathlib.Path:
    """Ten words: a b c a b c a b c a."""
    path = tmp_path / "text.txt"
    path.write_text(" ".join("abc"[i % 3] for i in range(10)))
    return path


def port(name: str, *shape: int | None, dtype: str = "int64") -> Port:
    return Port(name, np.dtype(dtype), shape)


IDS = port("input_ids", None, None)


def load(text: pathlib.Path, how: Text, *inputs: Port) -> list[dict[str, Any]]:
    return list(sources.load(str(text), inputs, text=how).samples)


def test_windows_are_the_tokens_in_order_and_a_rest_is_left_out(
    text: pathlib.Path, tokenizer: str
) -> None:
    samples = load(text, Text(tokenizer, 4), IDS)
    assert [sample["input_ids"].tolist() for sample in samples] == [[[2, 3, 4, 2]], [[3, 4, 2, 3]]]
    assert samples[0]["input_ids"].dtype == np.int64


def test_a_text_of_one_window_is_taken_whole(text: pathlib.Path, tokenizer: str) -> None:
    [sample] = load(text, Text(tokenizer), IDS)
    assert sample["input_ids"].shape == (1, 10)


def test_a_model_of_fixed_size_says_how_many_tokens(text: pathlib.Path, tokenizer: str) -> None:
    samples = load(text, Text(tokenizer), port("words", 1, 3, dtype="int32"))
    assert [s["words"].shape for s in samples] == [(1, 3)] * 3
    assert samples[0]["words"].dtype == np.int32


def test_every_window_has_what_the_tokenizer_puts_around_a_text(
    text: pathlib.Path, framing: str
) -> None:
    samples = load(text, Text(framing, 5), IDS)
    assert [s["input_ids"][0, [0, -1]].tolist() for s in samples] == [[0, 1]] * 3
    inner = np.concatenate([s["input_ids"][0, 1:-1] for s in samples])
    assert inner.tolist() == [2, 3, 4, 2, 3, 4, 2, 3, 4]


def test_mask_positions_types_and_an_empty_past_are_filled_in(
    text: pathlib.Path, tokenizer: str
) -> None:
    inputs = (
        IDS,
        port("attention_mask", None, None),
        port("position_ids", None, None),
        port("token_type_ids", None, None),
        port("past_key_values.0.key", None, 3, None, 8, dtype="float32"),
    )
    sample = load(text, Text(tokenizer, 4), *inputs)[0]
    assert sample["attention_mask"].tolist() == [[1, 1, 1, 1]]
    assert sample["position_ids"].tolist() == [[0, 1, 2, 3]]
    assert sample["token_type_ids"].tolist() == [[0, 0, 0, 0]]
    assert sample["past_key_values.0.key"].shape == (1, 3, 0, 8)


def test_a_model_with_an_empty_past_runs(text: pathlib.Path, tokenizer: str) -> None:
    model = graph("""(int64[B,T] input_ids, float[B,P,4] past) => (float[B,Q,4] present)
        <float[6,4] w> { e = Gather(w, input_ids) present = Concat<axis=1>(past, e) }""")
    data = sources.load(str(text), inputs_of(model), text=Text(tokenizer, 4))
    results = execute.execute(model, data.samples[0])
    assert results["present"].shape == (1, 4, 4)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ((port("x", None, None, dtype="float32"),), "which input reads the tokens"),
        ((port("a", None, None), port("b", None, None)), "which input reads the tokens"),
        ((IDS, port("image", None, 3, 8, 8, dtype="float32")), "does not say what .* image"),
        ((IDS, port("flag")), "does not say what .* flag"),
        ((port("input_ids", 1, 30),), "has 10 tokens, fewer than the 30"),
    ],
)
def test_what_a_text_cannot_feed_is_an_error(
    inputs: tuple[Port, ...], said: str, text: pathlib.Path, tokenizer: str
) -> None:
    with pytest.raises(CalibrationError, match=said):
        load(text, Text(tokenizer), *inputs)


def test_what_cannot_be_read_is_an_error(text: pathlib.Path, tokenizer: str) -> None:
    empty = text.with_name("empty.txt")
    empty.write_text("")
    with pytest.raises(CalibrationError, match="has 0 tokens"):
        load(empty, Text(tokenizer), IDS)
    with pytest.raises(CalibrationError, match=r"there is no file 'nowhere\.json'"):
        load(text, Text("nowhere.json"), IDS)
    with pytest.raises(CalibrationError, match="cannot be read"):
        load(text, Text(str(text)), IDS)
    with pytest.raises(CalibrationError, match=r"no text file 'nothing\.txt'"):
        load(pathlib.Path("nothing.txt"), Text(tokenizer), IDS)
    with pytest.raises(CalibrationError, match="a number of tokens, from 1; got 0"):
        Text(tokenizer, 0)
    text.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(CalibrationError, match="is not readable text"):
        load(text, Text(tokenizer), IDS)


def test_the_command_line_calibrates_on_a_text(
    text: pathlib.Path, tokenizer: str, tmp_path: pathlib.Path, qcompile: Command
) -> None:
    model = tmp_path / "model.onnx"
    execute.save(
        graph("""(int64[1,T] input_ids) => (float[1,T,6] y) <float[6,16] w, float[16,6] v> {
            e = Gather(w, input_ids) y = MatMul(e, v) }"""),
        model,
    )
    out = tmp_path / "out"
    words = (model, "--calib", text, "--tokens", 2, "-o", out)
    assert "give --tokenizer" in qcompile(*words).err
    done = qcompile(*words, "--tokenizer", tokenizer)
    assert done.code == 0
    assert f"--tokenizer {tokenizer} --tokens 2" in (out / "pipeline.txt").read_text()
    said = qcompile(model, "--calib", text, "-o", out).err
    assert "a text needs --tokenizer tokenizer.json" in " ".join(said.split())
