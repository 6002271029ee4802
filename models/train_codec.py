"""Train the small image codec at four rates and write what this package ships.

    python -m qcompile.models.train_codec --out FOLDER [--steps N] [--seed N]

Needs the extras ``torch`` and ``public`` and the package foolbox (``qcompile fetch foolbox``). The
highest rate is trained from nothing, each lower one from the next higher in an eighth of the steps.
A run that was stopped goes on where it was when it is started again. One thread and a fixed seed
make a run repeatable on one machine with one version of torch.

The network is a mean-scale hyperprior (Minnen et al., arXiv 1809.02736) in small. A linear
transform of blocks of 8x8 pixels, at the start their principal components, stands beside three
strided 5x5 convolutions with ReLU, which learn what it misses: so it trains in minutes. Densities
are those of Laplace in place of Gaussian and factorized ones, since their tails are exact in
float32. Rate is trained with uniform noise in place of rounding, distortion with rounding whose
gradient is taken for 1. At export latents are rounded.
"""

# pyright: basic
# The reason for basic: much of torch's surface used here is only partly typed.

from __future__ import annotations

import argparse
import io
import itertools
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional

from qcompile import capture, graph
from qcompile.models import codec, train_fashion
from qcompile.models.codec import LIKELIHOODS, MODELS, SIZE, TRADES, Array

STEPS, SHARE = 8000, 8  # of the first point; one part in SHARE for each of the others
BATCH, RATE, WARMUP = 4, 1e-3, 100
CROPS = 4000  # to train with, kept as bytes
KEPT = 500  # steps between states that are written
WIDTH, LATENT, HYPER = 28, 48, 24  # channels
BLOCK = 8  # pixels of a side to one latent
STEP = 36.0  # what one step of a latent is to the components at the start, of 0..255
LEAST = 0.05  # scale of a Laplace density
FLOOR = 1e-9  # likelihood: no symbol takes more than 30 bits


def down(inputs: int, outputs: int, kernel: int) -> nn.Conv2d:
    """Half the size."""
    return nn.Conv2d(inputs, outputs, kernel, 2, kernel // 2)


def up(inputs: int, outputs: int, kernel: int) -> nn.ConvTranspose2d:
    """Twice the size."""
    return nn.ConvTranspose2d(inputs, outputs, kernel, 2, kernel // 2, 1)


def chain(*layers: nn.Module) -> nn.Sequential:
    """``layers`` with ReLU between them."""
    parts = itertools.chain.from_iterable((layer, nn.ReLU()) for layer in layers)
    return nn.Sequential(*list(parts)[:-1])


def likelihood(distance: Tensor, scale: Tensor) -> Tensor:
    """The mass of a Laplace density of ``scale`` within 1/2 of ``distance`` from its mean."""

    def above(x: Tensor) -> Tensor:
        half = 0.5 * torch.exp(-x.abs() / scale)
        return torch.where(x < 0, 1 - half, half)

    far = distance.abs()
    return (above(far - 0.5) - above(far + 0.5)).clamp(FLOOR, 1.0)


class Codec(nn.Module):
    """``image`` [b, 3, H, W] in 0..1 to its reconstruction and the likelihoods of its latents.

    H and W are multiples of 16. In training mode rates are those of latents with uniform noise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Conv2d(3, LATENT, BLOCK, BLOCK, bias=False)
        self.unblocks = nn.ConvTranspose2d(LATENT, 3, BLOCK, BLOCK, bias=False)
        self.analysis = chain(down(3, WIDTH, 5), down(WIDTH, WIDTH, 5), down(WIDTH, LATENT, 5))
        self.synthesis = chain(up(LATENT, WIDTH, 5), up(WIDTH, WIDTH, 5), up(WIDTH, 3, 5))
        self.hyper_analysis = chain(nn.Conv2d(LATENT, HYPER, 3, 1, 1), down(HYPER, HYPER, 3))
        self.hyper_synthesis = chain(up(HYPER, HYPER, 3), nn.Conv2d(HYPER, 2 * LATENT, 3, 1, 1))
        self.mean = nn.Parameter(torch.zeros(1, HYPER, 1, 1))
        self.scale = nn.Parameter(torch.zeros(1, HYPER, 1, 1))

    def start(self, rows: Tensor) -> None:
        """The weights to train from: principal components of blocks, and nothing beside them."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        last: Any
        for last in (self.analysis[-1], self.synthesis[-1]):
            nn.init.zeros_(last.weight)
        image = rows[:200].double() / 255 - 0.5
        squares = image.unfold(2, BLOCK, BLOCK).unfold(3, BLOCK, BLOCK)
        flat = squares.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * BLOCK * BLOCK)
        _, vectors = torch.linalg.eigh(flat.T @ flat)
        components = vectors[:, -LATENT:].T.reshape(LATENT, 3, BLOCK, BLOCK).float()
        with torch.no_grad():
            self.blocks.weight.copy_(components * 255 / STEP)
            self.unblocks.weight.copy_(components * STEP / 255)

    def coarsen(self, factor: float) -> None:
        """Latents of ``factor`` times the size, which the decoder undoes but for their rounding."""
        layer: Any
        with torch.no_grad():
            for layer in (self.blocks, self.analysis[-1], self.hyper_synthesis[-1]):
                for each in layer.parameters():
                    each[:LATENT] *= factor  # of the last, those of the means
            for layer in (self.unblocks, self.synthesis[0], self.hyper_analysis[0]):
                layer.weight /= factor

    def coded(self, latent: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """What the decoder gets, and its likelihoods."""
        distance = torch.round(latent - mean)
        scale = functional.softplus(scale) + LEAST
        if not self.training:
            return distance + mean, likelihood(distance, scale)
        noisy = latent - mean + torch.rand_like(latent) - 0.5
        return latent + (distance + mean - latent).detach(), likelihood(noisy, scale)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        centred = image - 0.5
        latent = self.blocks(centred) + self.analysis(centred)
        hyper, of_hyper = self.coded(self.hyper_analysis(latent), self.mean, self.scale)
        mean, scale = self.hyper_synthesis(hyper).chunk(2, 1)
        given, of_latent = self.coded(latent, mean, scale)
        shown = self.unblocks(given) + self.synthesis(given) + 0.5
        found = (shown, of_latent, of_hyper)
        return dict(zip(("reconstruction", *LIKELIHOODS), found, strict=True))


def loss_of(image: Tensor, outputs: dict[str, Tensor], trade: float) -> Tensor:
    """Bits a pixel and ``trade`` times the squared error of pixels in 0..255."""
    bits = -sum(outputs[name].log2().sum() for name in LIKELIHOODS)
    error = (outputs["reconstruction"] - image).square().mean() * 255**2
    return bits / (image.numel() / image.shape[1]) + trade * error


def training(seed: int) -> Tensor:
    """Crops uint8 [CROPS, 3, SIZE, SIZE]."""
    rows = torch.empty(CROPS, 3, SIZE, SIZE, dtype=torch.uint8)
    for row, image in zip(rows, codec.crops("training", CROPS, seed), strict=True):
        row.copy_(torch.from_numpy(np.round(image * 255)))
    return rows


def batch(rows: Tensor, random: torch.Generator) -> Tensor:
    """Random crops, turned and mirrored."""
    image = rows[torch.randint(len(rows), (BATCH,), generator=random)].float() / 255
    image = image.rot90(int(torch.randint(4, (), generator=random)), (2, 3))
    return image.contiguous(memory_format=torch.channels_last)


def train(
    model: nn.Module, trade: float, rows: Tensor, steps: int, peak: float, seed: int,
    file: pathlib.Path,
) -> None:  # fmt: skip
    """Train ``model`` for ``steps``; its state goes to ``file`` and is read from there first."""
    optimizer = torch.optim.Adam(model.parameters(), peak)
    step, total, start = 0, 0.0, time.monotonic()
    if file.exists():
        kept = torch.load(file, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        step = int(kept["step"])
    model.train()
    while step < steps:
        torch.manual_seed(seed * 1_000_000 + step)  # also of the noise, so that a run can go on
        random = torch.Generator().manual_seed(seed * 1_000_000 + step)
        warm = min(1.0, (step + 1) / WARMUP)
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = peak * warm * max(cosine, 0.01)
        image = batch(rows, random)
        loss = loss_of(image, model(image), trade)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, total = step + 1, total + loss.item()
        if step % KEPT == 0 or step == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "step": step}, file)
            found, spent = evaluate(model, "calibration", 16), time.monotonic() - start
            lost = total / (step % KEPT or KEPT)
            print(
                f"{file.stem}, step {step}/{steps}, {spent:.0f} s: loss {lost:.4f}, "
                f"{found.bpp:.3f} bpp, {found.psnr:.2f} dB", flush=True,
            )  # fmt: skip
            total = 0.0
    model.eval()


def evaluate(model: nn.Module, split: codec.Split, count: int) -> codec.Quality:
    """The mean over ``count`` crops of ``split``, with latents rounded."""
    mode = model.training
    model.eval()
    found: list[codec.Quality] = []
    with torch.no_grad():
        for image in codec.crops(split, count):
            outputs = model(torch.from_numpy(image)[None])
            arrays = {name: each.numpy() for name, each in outputs.items()}
            found.append(codec.quality(image[None], arrays))
    model.train(mode)
    return codec.mean(found)


def export(model: nn.Module, path: pathlib.Path) -> None:
    """Write ``model`` to ``path`` as ONNX with a dynamic batch.

    Raises:
        RuntimeError: ONNX Runtime computes something else from the file than torch.
    """
    random = torch.Generator().manual_seed(0)
    example = {"image": torch.rand(2, 3, SIZE, SIZE, generator=random)}
    dynamic = {"image": {0: torch.export.Dim("batch")}}
    captured = capture.capture((model, example, dynamic))
    graph.remove_dead(captured)
    train_fashion.strip_metadata(captured)
    ir.save(captured, path)
    onnx.checker.check_model(path, full_check=True)

    image = torch.from_numpy(np.stack(list(codec.crops("calibration", 3))))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = [np.asarray(each) for each in session.run(None, {"image": image.numpy()})]
    with torch.no_grad():
        wanted = [each.numpy() for each in model(image).values()]
    # A latent half way between two numbers may be rounded to either, so errors are counted.
    pairs = zip(found, wanted, strict=True)
    apart = max(float(np.mean(np.abs(a - b) > 1e-3)) for a, b in pairs)
    if apart > 0.01:
        raise RuntimeError(f"{path.name} differs from torch at {apart:.1%} of an output")
    print(f"{path.name}: {path.stat().st_size} bytes, apart from torch at {apart:.2%}")


def jpeg(images: Sequence[Array], level: int) -> codec.Quality:
    """The mean over ``images`` [crops, 3, SIZE, SIZE], each a file of its crops side by side.

    Side by side, so that headers count for little.
    """
    from PIL import Image

    found: list[codec.Quality] = []
    for image in images:
        pixels = np.round(255 * np.concatenate(list(image), 2)).astype(np.uint8).transpose(1, 2, 0)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=level, optimize=True)
        error = np.asarray(Image.open(file)).astype(np.float64) - pixels
        bpp = 8 * file.tell() / (pixels.size / 3)
        found.append(codec.Quality(bpp, float(np.mean(error**2))))
    return codec.mean(found)


def main() -> None:
    """Read the command line, train, write, and print errors."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write to")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the first point")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    model: Any = Codec()
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    rows = training(arguments.seed)
    model.start(rows)
    model = model.to(memory_format=torch.channels_last)  # faster on a CPU
    before = 0.0
    for name, trade in reversed(list(zip(MODELS, TRADES, strict=True))):
        file = arguments.out / name
        steps, peak = arguments.steps, RATE
        if before:
            steps, peak = steps // SHARE, RATE / 2
            # A step of a latent at its best is to the power of -1/2 of what errors count for.
            model.coarsen((trade / before) ** 0.5)
        train(model, trade, rows, steps, peak, arguments.seed, file.with_suffix(".pt"))
        export(model, file)
        before = trade
    images = np.stack(list(codec.crops("calibration", 16)))
    np.savez_compressed(arguments.out / codec.CALIBRATION, image=images)
    count = len(codec.pictures("judge"))
    crops = np.concatenate([sample["image"] for sample in codec.judge()])
    levels = [jpeg([crops[n::count] for n in range(count)], level) for level in range(3, 96)]
    for name in MODELS:
        session = onnxruntime.InferenceSession(
            arguments.out / name, providers=["CPUExecutionProvider"]
        )
        names = [each.name for each in session.get_outputs()]
        runs = (session.run(None, {"image": image[None]}) for image in crops)
        outputs = (dict(zip(names, map(np.asarray, run), strict=True)) for run in runs)
        found = codec.mean(map(codec.quality, crops[:, None], outputs))
        other = min(levels, key=lambda each: abs(each.bpp - found.bpp))
        print(f"{name}: {found.bpp:.3f} bpp, {found.psnr:.2f} dB; ", end="")
        print(f"JPEG {other.bpp:.3f} bpp, {other.psnr:.2f} dB")


if __name__ == "__main__":
    main()
