"""Train the two small reference models on Fashion-MNIST and write what this package ships.

    python -m qcompile.models.train_fashion --data FOLDER --out FOLDER [--only cnn|vit] [--seed N]

FOLDER of ``--data`` holds, at any depth, the four ``idx.gz`` files of the Debian package
``dataset-fashion-mnist`` (``qcompile fetch dataset-fashion-mnist``). Only the training set is
trained on; the first 5,000 pictures of the test set are read once, for the printed accuracy.
One thread and a fixed seed make a run repeatable on one machine with one version of torch.
"""

# pyright: basic
# The reason for basic: much of torch's and onnx-ir's surface used here is only partly typed.

from __future__ import annotations

import argparse
import ast
import collections
import dataclasses
import gzip
import math
import pathlib
import time
from collections.abc import Collection
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import onnxscript.optimizer
import torch
from onnx_ir.passes import common
from torch import Tensor, nn
from torch.nn import functional

from qcompile.models import fashion

Pictures: TypeAlias = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]

OPSET = 21
CALIBRATION_PICTURES = 128
TEST_PICTURES = 5000


class Residual(nn.Module):
    """``relu(x + bn2(conv2(relu(bn1(conv1(x))))))`` at constant width and size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(x + self.bn2(self.conv2(y)))


class Separable(nn.Module):
    """Halve the size and change the width: depthwise 3x3 of stride 2, then pointwise."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            channels, channels, 3, stride=2, padding=1, groups=channels, bias=False
        )
        self.bn1 = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, outputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.depthwise(x)))
        return functional.relu(self.bn2(self.pointwise(y)))


class Cnn(nn.Module):
    """Residual CNN with BatchNorm: ``image`` [batch, 1, 28, 28] to ``logits`` [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, stride=2, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(32)
        self.stage1 = Residual(32)
        self.reduce = Separable(32, 64)
        self.stage2 = Residual(64)
        self.head = nn.Linear(64, len(fashion.CLASSES))

    def forward(self, image: Tensor) -> Tensor:
        x = functional.relu(self.stem_bn(self.stem(image)))
        x = self.stage2(self.reduce(self.stage1(x)))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Softmax attention written as two matmuls, so that both can be quantized."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        _, tokens, width = x.shape

        split = (-1, tokens, self.heads, width // self.heads)
        query = self.query(x).reshape(split).permute(0, 2, 1, 3)
        key = self.key(x).reshape(split).permute(0, 2, 3, 1)
        value = self.value(x).reshape(split).permute(0, 2, 1, 3)
        mixed = torch.softmax(query @ key * self.scale, dim=-1) @ value
        return self.output(mixed.permute(0, 2, 1, 3).reshape(-1, tokens, width))


class Block(nn.Module):
    """Pre-norm transformer block with an exact-GELU MLP of four times the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class Vit(nn.Module):
    """Vision transformer, patch 7: ``image`` [batch, 1, 28, 28] to ``logits`` [batch, 10]."""

    def __init__(self, width: int = 64, depth: int = 6, heads: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 7, stride=7)
        self.position = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(fashion.CLASSES))

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        # The class token is a zero token plus its position: the sum of a learned token and a
        # learned position is one learned vector, and no Expand over the batch is needed.
        x = functional.pad(x, (0, 0, 1, 0)) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x.select(1, 0)))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train one model: AdamW, batch 128, 100 warm-up steps, cosine decay, mirroring."""

    model: type[nn.Module]
    epochs: int
    rate: float
    decay: float
    batch: int = 128
    warmup: int = 100
    clip: float = 1.0


RECIPES = {
    "cnn": Recipe(Cnn, epochs=10, rate=4e-3, decay=0.05),
    "vit": Recipe(Vit, epochs=14, rate=1.5e-3, decay=0.05),
}


def read_idx(folder: pathlib.Path, name: str) -> npt.NDArray[np.uint8]:
    """The array of the one file ``name`` below ``folder``, in the idx format.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an idx file of bytes.
    """
    found = sorted(folder.rglob(name))
    if not found:
        raise FileNotFoundError(f"no {name} below {folder}")
    raw = gzip.decompress(found[0].read_bytes())
    if raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{found[0]} is not an idx file of bytes")
    rank = raw[3]
    shape = np.frombuffer(raw, ">u4", count=rank, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape.astype(int))


def read_pictures(folder: pathlib.Path, split: str) -> Pictures:
    """Pictures uint8 [n, 1, 28, 28] and labels int64 [n] of ``split``, "train" or "t10k"."""
    image = read_idx(folder, f"{split}-images-idx3-ubyte.gz")[:, None]
    return image, read_idx(folder, f"{split}-labels-idx1-ubyte.gz").astype(np.int64)


def train(recipe: Recipe, image: Tensor, label: Tensor, seed: int) -> nn.Module:
    """A model trained by ``recipe`` on normalized ``image`` [n, 1, 28, 28], in eval mode."""
    torch.manual_seed(seed)
    model = recipe.model()
    optimizer = torch.optim.AdamW(model.parameters(), recipe.rate, weight_decay=recipe.decay)
    steps = recipe.epochs * (len(image) // recipe.batch)

    def rate(step: int) -> float:
        warm = min(1.0, (step + 1) / recipe.warmup)
        return warm * 0.5 * (1 + math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    start = time.monotonic()
    for epoch in range(recipe.epochs):
        total = 0.0
        batches = torch.randperm(len(image)).split(recipe.batch)
        for chosen in batches[: len(image) // recipe.batch]:
            x = image[chosen]
            mirrored = torch.rand(len(x), 1, 1, 1) < 0.5
            loss = functional.cross_entropy(
                model(torch.where(mirrored, x.flip(-1), x)), label[chosen]
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            schedule.step()
            total += loss.item()
        mean = total / (len(image) // recipe.batch)
        elapsed = time.monotonic() - start
        print(f"epoch {epoch + 1}/{recipe.epochs}: loss {mean:.3f}, {elapsed:.0f} s", flush=True)
    return model.eval()


def scope(node: ir.Node) -> str:
    """Path of the torch module that ``node`` comes from, such as "stage1.conv1"."""
    scopes: list[str] = ast.literal_eval(node.metadata_props["pkg.torch.onnx.name_scopes"])
    return scopes[-2]


def name_nodes(graph: ir.Graph) -> None:
    """Name nodes and what they compute after their module: "stage1.conv1/Conv", "stage1/Relu_2"."""
    outputs = set(graph.outputs)
    count: collections.Counter[str] = collections.Counter()
    for node in graph:
        stem = f"{scope(node)}/{node.op_type}".lstrip("/")
        count[stem] += 1
        node.name = stem if count[stem] == 1 else f"{stem}_{count[stem]}"
        for value in node.outputs:
            if value not in outputs:
                value.name = node.name


def name_constants(graph: ir.Graph, parameters: Collection[str]) -> None:
    """Name constants that are no parameter after their first reader: "stage1/Reshape.1".

    The weight of a Linear before a MatMul, which the exporter stores transposed, takes the name
    of the parameter: "blocks.0.fc1.weight" is [K, N].
    """
    named: set[ir.Value] = set()
    for node in graph:
        for index, value in enumerate(node.inputs):
            if value is None or not value.is_initializer() or value in named:
                continue
            named.add(value)
            weight = f"{scope(node)}.weight"
            if node.op_type == "MatMul" and weight in parameters:
                value.name = weight
            elif value.name not in parameters:
                value.name = f"{node.name}.{index}"


def fix_reshapes(graph: ir.Graph) -> None:
    """Give each Reshape a constant shape: -1 for the batch, so that no Shape node is needed."""
    for node in graph:
        shape = node.outputs[0].shape
        if node.op_type == "Reshape" and shape is not None:
            target = [size if isinstance(size, int) else -1 for size in shape]
            value = ir.val(
                f"{node.outputs[0].name}/shape",
                const_value=ir.tensor(target, ir.DataType.INT64),
            )
            graph.register_initializer(value)
            node.replace_input_with(1, value)
            node.attributes.pop("allowzero", None)


def drop_zero_biases(graph: ir.Graph, parameters: Collection[str]) -> None:
    """Remove the zero bias that the exporter writes for a Conv without one."""
    for node in graph:
        bias = node.inputs[2] if node.op_type == "Conv" and len(node.inputs) == 3 else None
        if bias is not None and bias.name not in parameters:
            node.resize_inputs(2)


def strip_metadata(model: ir.Model) -> None:
    """Drop all metadata: the stack traces hold paths of the machine that exported."""
    graph = model.graph
    model.metadata_props.clear()
    graph.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
        if value.const_value is not None:
            value.const_value.metadata_props.clear()
    for node in graph:
        node.doc_string = None
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


def clean(model: ir.Model) -> None:
    """Fold constants, drop what is unused, name what is left and strip the metadata.

    BatchNormalization stays, which the exporter's own optimizer would fold into the Convs.
    """
    parameters = set(model.graph.initializers)
    fix_reshapes(model.graph)
    limit = 1 << 24  # above any tensor here: the default leaves transposed weights unfolded
    onnxscript.optimizer.fold_constants(model, input_size_limit=limit, output_size_limit=limit)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    drop_zero_biases(model.graph, parameters)
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    name_nodes(model.graph)
    name_constants(model.graph, parameters)
    strip_metadata(model)
    common.ShapeInferencePass()(model)


def export(model: nn.Module, path: pathlib.Path) -> None:
    """Write ``model`` to ``path`` as ONNX with a dynamic batch and all weights inside.

    Raises:
        RuntimeError: ONNX Runtime computes something else from the file than torch.
    """
    program = torch.onnx.export(
        model,
        (torch.zeros(2, 1, 28, 28),),  # a batch of 1 would be taken for a constant
        dynamo=True,
        optimize=False,
        opset_version=OPSET,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    clean(program.model)
    ir.save(program.model, path)
    onnx.checker.check_model(path, full_check=True)

    image = torch.randn(5, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        error = np.abs(logits(path, image.numpy()) - model(image).numpy()).max()
    if error > 1e-4:
        raise RuntimeError(f"{path.name} differs from torch by {error:.1e}")
    print(f"{path.name}: {path.stat().st_size} bytes, differs from torch by {error:.1e}")


def logits(path: pathlib.Path, image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Logits [n, 10] that the model in ``path`` gives for normalized ``image`` [n, 1, 28, 28]."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], {"image": image})[0])


def write_data(
    folder: pathlib.Path, training: npt.NDArray[np.uint8], test: Pictures, seed: int
) -> None:
    """Write the calibration pictures, drawn from ``training``, and the test pictures."""
    chosen = np.random.default_rng(seed).choice(len(training), CALIBRATION_PICTURES, replace=False)
    image = fashion.normalize(training[np.sort(chosen)])
    np.savez_compressed(folder / fashion.CALIBRATION, image=image)
    np.savez_compressed(folder / fashion.TEST, image=test[0], label=test[1].astype(np.uint8))


def main() -> None:
    """Read the command line, train, and write the models and the data."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=pathlib.Path, required=True, help="with the idx.gz files")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write to")
    parser.add_argument("--only", choices=sorted(RECIPES), help="train this model only")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    image, label = read_pictures(options.data, "train")
    test_image, test_label = read_pictures(options.data, "t10k")
    test_image, test_label = test_image[:TEST_PICTURES], test_label[:TEST_PICTURES]
    write_data(options.out, image, (test_image, test_label), options.seed)

    inputs, targets = torch.from_numpy(fashion.normalize(image)), torch.from_numpy(label)
    for name in [options.only] if options.only else list(RECIPES):
        path = options.out / f"fashion_{name}.onnx"
        export(train(RECIPES[name], inputs, targets, options.seed), path)
        guess = logits(path, fashion.normalize(test_image)).argmax(1)
        print(f"{path.name}: accuracy {np.mean(guess == test_label):.4f} on {len(guess)} pictures")


if __name__ == "__main__":
    main()
