"""Train the small recurrent matting network on procedural clips and write what this package ships.

    python -m qcompile.models.train_matting --out FOLDER [--minutes M] [--resume FILE] [--seed N]

Needs the extras ``torch`` and ``public`` and the package foolbox (``qcompile fetch foolbox``); its
pictures and four of scikit-image are the textures to train with. The clips to tune with say how the
training goes; those to judge with are read once, for the printed errors. The learning rate falls
over ``--minutes`` of the process's own time, so that no run repeats another to the bit.

The network is that of Robust Video Matting (Lin et al., arXiv 2108.11515) in small: an encoder of
inverted residual blocks as in MobileNetV3, LR-ASPP, and a decoder whose ConvGRUs remember half of
the channels at each of four scales. Unlike there, alpha ends in a sigmoid and there is no
foreground.
"""

# pyright: basic
# The reason for basic: much of torch's surface used here is only partly typed.

from __future__ import annotations

import argparse
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional

from qcompile import capture, graph
from qcompile.models import matting_metrics, matting_video, train_fashion
from qcompile.models.matting_metrics import Alpha, Errors
from qcompile.models.matting_video import SIZE, Clip

CLIPS, FRAMES = 1000, 6  # to train with; they are turned, mirrored and reversed at random
BATCH, RATE, DECAY, WARMUP = 4, 3e-3, 0.01, 50
CROP = 64  # sides of what the first half of the training sees, in pixels
STATES = ((8, 2), (16, 4), (24, 8), (32, 16))  # channels, and pixels of a frame to one of theirs
NAMES = tuple(f"r{number}" for number in range(1, len(STATES) + 1))


def unit(
    inputs: int,
    outputs: int,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    act: type[nn.Module] | None = None,
) -> nn.Sequential:
    """Convolution, BatchNorm and activation, if any."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    parts: list[nn.Module] = [conv, nn.BatchNorm2d(outputs, momentum=0.03)]
    return nn.Sequential(*parts, *([act()] if act else []))


class Squeeze(nn.Module):
    """Squeeze and excitation: channels scaled by what their means say."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 4, 1)
        self.expand = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.reduce(x.mean((2, 3), keepdim=True)))
        return x * functional.hardsigmoid(self.expand(y))


class Inverted(nn.Module):
    """Inverted residual block: expand, depthwise, squeeze if wanted, project."""

    def __init__(
        self,
        inputs: int,
        width: int,
        outputs: int,
        kernel: int = 3,
        stride: int = 1,
        squeeze: bool = False,
        act: type[nn.Module] = nn.ReLU6,
    ) -> None:
        super().__init__()
        self.residual = stride == 1 and inputs == outputs
        self.expand = unit(inputs, width, act=act)
        self.depthwise = unit(width, width, kernel, stride, width, act)
        self.squeeze = Squeeze(width) if squeeze else None
        self.project = unit(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        y = self.project(self.squeeze(y) if self.squeeze is not None else y)
        return x + y if self.residual else y


class Lraspp(nn.Module):
    """LR-ASPP: a pointwise branch scaled by a gate of the whole picture."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.local = unit(inputs, outputs, act=nn.ReLU)
        self.gate = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.local(x) * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))


class ConvGru(nn.Module):
    """``h' = (1 - z) h + z c`` of the state h and the input x, both [b, channels, h, w].

    ``r, z = sigmoid(conv([x, h]))`` and ``c = tanh(conv([x, r h]))``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gates = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.candidate = nn.Conv2d(2 * channels, channels, 3, padding=1)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        r, z = torch.sigmoid(self.gates(torch.cat([x, h], 1))).chunk(2, 1)
        c = torch.tanh(self.candidate(torch.cat([x, r * h], 1)))
        return h + z * (c - h)


class Remember(nn.Module):
    """A ConvGRU for the second half of the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gru = ConvGru(channels // 2)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        passed, kept = x.chunk(2, 1)
        h = self.gru(kept, h)
        return torch.cat([passed, h], 1), h


class Up(nn.Module):
    """Twice the size, joined with what the encoder had there and the shrunken frame."""

    def __init__(self, inputs: int, skip: int, outputs: int) -> None:
        super().__init__()
        self.mix = unit(inputs + skip + 3, outputs, 3, act=nn.ReLU)
        self.remember = Remember(outputs)

    def forward(self, x: Tensor, skip: Tensor, frame: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.remember(self.mix(torch.cat([double(x), skip, frame], 1)), h)


def double(x: Tensor) -> Tensor:
    """Twice the height and width, bilinear."""
    return functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


class Matting(nn.Module):
    """One frame [b, 3, H, W] and four states to alpha [b, 1, H, W] and the next states.

    H and W are multiples of 16. The states are those of ``STATES``, zero before the first frame.
    """

    def __init__(self) -> None:
        super().__init__()
        swish = nn.Hardswish
        self.stem = unit(3, 16, 3, stride=2, act=swish)
        self.stage1 = Inverted(16, 16, 16)
        self.stage2 = nn.Sequential(Inverted(16, 64, 24, stride=2), Inverted(24, 72, 24))
        self.stage3 = nn.Sequential(
            Inverted(24, 72, 40, 5, stride=2, squeeze=True),
            Inverted(40, 120, 40, 5, squeeze=True, act=swish),
        )
        self.stage4 = Inverted(40, 144, 48, 5, stride=2, squeeze=True, act=swish)
        self.aspp = Lraspp(48, 64)
        self.remember = Remember(64)
        self.up3 = Up(64, 40, 48)
        self.up2 = Up(48, 24, 32)
        self.up1 = Up(32, 16, 16)
        self.mix = unit(16 + 3, 12, 3, act=nn.ReLU)
        self.refine = unit(12, 12, 3, act=nn.ReLU)
        self.head = nn.Conv2d(12, 1, 1)

    def forward(
        self, frame: Tensor, r1: Tensor, r2: Tensor, r3: Tensor, r4: Tensor
    ) -> dict[str, Tensor]:
        half = functional.avg_pool2d(frame, 2)
        quarter = functional.avg_pool2d(half, 2)
        eighth = functional.avg_pool2d(quarter, 2)
        x1 = self.stage1(self.stem(frame))
        x2 = self.stage2(x1)
        x3 = self.stage3(x2)
        x, r4 = self.remember(self.aspp(self.stage4(x3)), r4)
        x, r3 = self.up3(x, x3, eighth, r3)
        x, r2 = self.up2(x, x2, quarter, r2)
        x, r1 = self.up1(x, x1, half, r1)
        x = self.refine(self.mix(torch.cat([double(x), frame], 1)))
        alpha = torch.sigmoid(self.head(x))
        return {"alpha": alpha, "r1_out": r1, "r2_out": r2, "r3_out": r3, "r4_out": r4}


def blank(batch: int, size: int = SIZE) -> list[Tensor]:
    """The states before the first frame."""
    return [torch.zeros(batch, channels, size // s, size // s) for channels, s in STATES]


def unroll(model: nn.Module, frames: Tensor) -> Tensor:
    """Alpha [b, T, 1, H, W] of ``frames`` [b, T, 3, H, W], with the state carried."""
    state: Sequence[Tensor] = blank(len(frames), frames.shape[-1])
    alphas: list[Tensor] = []
    for frame in frames.unbind(1):
        alpha, *state = model(frame, *state).values()
        alphas.append(alpha)
    return torch.stack(alphas, 1)


def loss_of(alpha: Tensor, truth: Tensor) -> Tensor:
    """L1, L1 of the Laplacian pyramid, and mean square of changes over time; of [b, T, ...]."""
    error = alpha - truth
    change = error.diff(dim=1).square().mean()
    level = error.flatten(0, 1)
    loss = level.abs().mean() + 5 * change
    for depth in range(4):
        small = functional.avg_pool2d(level, 2)
        loss = loss + 2**depth / 4 * (level - double(small)).abs().mean()
        level = small
    return loss


class Clips:
    """Clips in memory, as bytes, and random batches of them."""

    def __init__(self, count: int, seed: int) -> None:
        pictures = matting_video.pictures("training")
        self.random = np.random.default_rng(seed)
        self.rows = torch.empty(count, FRAMES, 4, SIZE, SIZE, dtype=torch.uint8)
        for number in range(count):
            pair = matting_video.training(number, pictures, FRAMES)
            whole = torch.from_numpy(np.concatenate(pair, 1))
            self.rows[number] = (whole * 255).round().byte()

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Crops of frames, [BATCH, FRAMES, 3, size, size], and their alpha."""
        rows = self.rows[self.random.integers(len(self.rows), size=BATCH)]
        for row in rows:
            for axis in (0, 2, 3):  # time, height, width
                if self.random.random() < 0.5:
                    row.copy_(row.flip(axis))
            if self.random.random() < 0.5:
                row.copy_(row.transpose(2, 3).clone())
        top, left = self.random.integers(SIZE - size + 1, size=2)
        crop = rows[..., top : top + size, left : left + size].float() / 255
        return crop[:, :, :3], crop[:, :, 3:]


def train(model: nn.Module, clips: Clips, minutes: float, file: pathlib.Path) -> None:
    """Train ``model`` for ``minutes`` of CPU time; the last eighth with BatchNorm at rest.

    The weights go to ``file`` every 200 steps.
    """
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=DECAY)
    start, step, total, rest = time.process_time(), 0, 0.0, False
    model.train()
    while (done := (time.process_time() - start) / 60 / minutes) < 1:
        rate = min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * done))
        optimizer.param_groups[0]["lr"] = RATE * max(rate, 0.01)
        if done > 7 / 8 and not rest:
            rest = True
            model.eval()  # nothing but BatchNorm differs
        frames, truth = clips.batch(CROP if done < 1 / 2 else SIZE)
        loss = loss_of(unroll(model, frames), truth)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, total = step + 1, total + loss.item()
        if step % 50 == 0:
            print(f"step {step}, {100 * done:.0f} %: loss {total / 50:.4f}", flush=True)
            total = 0.0
        if step % 200 == 0:
            torch.save(model.state_dict(), file)
            said = evaluate(lambda f: run_torch(model, f), matting_video.labelled("tuning"))
            print(f"tuning: {said}", flush=True)
    torch.save(model.state_dict(), file)
    model.eval()


def run_torch(model: nn.Module, frames: Alpha) -> Alpha:
    """Alpha [T, 1, H, W] of ``frames`` [T, 3, H, W], with BatchNorm at rest."""
    mode = model.training
    model.eval()
    with torch.no_grad():
        alpha = unroll(model, torch.from_numpy(frames)[None])[0].numpy()
    model.train(mode)
    return alpha


def run_onnx(session: onnxruntime.InferenceSession, frames: Alpha) -> Alpha:
    """The same by ONNX Runtime."""
    state = {name: each.numpy() for name, each in zip(NAMES, blank(1), strict=True)}
    alphas: list[Alpha] = []
    for frame in frames:
        alpha, *after = session.run(None, {"frame": frame[None], **state})
        state = dict(zip(NAMES, after, strict=True))
        alphas.append(np.asarray(alpha))
    return np.concatenate(alphas)


def evaluate(model: Callable[[Alpha], Alpha], clips: Iterable[Clip]) -> Errors:
    """The mean errors of ``model``, from frames to alpha, over ``clips``."""
    return matting_metrics.mean(
        matting_metrics.errors(model(clip.frames), clip.alpha) for clip in clips
    )


def control(clips: Clips) -> Callable[[Alpha], Alpha]:
    """What colour alone tells: alpha by least squares on the 10 terms of degree 2 of (r, g, b)."""
    chosen = clips.rows[:400, 0].float().numpy() / np.float32(255)
    pixels = chosen.transpose(0, 2, 3, 1).reshape(-1, 4)[::16]
    weights = np.linalg.lstsq(_terms(pixels[:, :3]), pixels[:, 3], rcond=None)[0]

    def guess(frames: Alpha) -> Alpha:
        return np.clip(_terms(frames.transpose(0, 2, 3, 1)) @ weights, 0, 1)[:, None]

    return guess


def _terms(colours: Any) -> Any:
    r, g, b = np.moveaxis(colours, -1, 0)
    one = np.ones_like(r)
    return np.stack([one, r, g, b, r * r, g * g, b * b, r * g, g * b, b * r], -1)


def export(model: nn.Module, path: pathlib.Path) -> None:
    """Write ``model`` to ``path`` as ONNX with a dynamic batch, BatchNorm kept.

    Raises:
        RuntimeError: ONNX Runtime computes something else from the file than torch.
    """
    random = torch.Generator().manual_seed(0)
    shapes = [(2, 3, SIZE, SIZE), *(tuple(state.shape) for state in blank(2))]
    named = zip(("frame", *NAMES), shapes, strict=True)
    example = {name: torch.rand(shape, generator=random) for name, shape in named}
    batch = torch.export.Dim("batch")
    captured = capture.capture((model, example, {name: {0: batch} for name in example}))
    train_fashion.drop_zero_biases(captured.graph, dict(model.named_parameters()))
    graph.remove_dead(captured)
    train_fashion.strip_metadata(captured)
    ir.save(captured, path)
    onnx.checker.check_model(path, full_check=True)

    several = {name: torch.cat([each, each, each[:1]]) for name, each in example.items()}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {name: each.numpy() for name, each in several.items()})
    with torch.no_grad():
        wanted = model(**several)
    pairs = zip(found, wanted.values(), strict=True)
    error = max(np.abs(np.asarray(got) - each.numpy()).max() for got, each in pairs)
    if error > 1e-4:
        raise RuntimeError(f"{path.name} differs from torch by {error:.1e}")
    print(f"{path.name}: {path.stat().st_size} bytes, differs from torch by {error:.1e}")


def write_calibration(path: pathlib.Path) -> None:
    """Write ``frame`` float32 [sequences, frames, 1, 3, SIZE, SIZE]."""
    clips = matting_video.labelled("calibration")
    np.savez_compressed(path, frame=np.stack([clip.frames[:, None] for clip in clips]))


def main() -> None:
    """Read the command line, train, write, and print errors."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write to")
    parser.add_argument("--minutes", type=float, default=15.0, help="of training")
    parser.add_argument("--resume", type=pathlib.Path, help="weights to start from")
    parser.add_argument("--clips", type=int, default=CLIPS, help="to train with")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    model: Any = Matting()
    model = model.to(memory_format=torch.channels_last)  # faster on a CPU
    if arguments.resume:
        model.load_state_dict(torch.load(arguments.resume, weights_only=True))
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    clips = Clips(arguments.clips, arguments.seed)
    if arguments.minutes > 0:
        train(model, clips, arguments.minutes, arguments.out / "matting.pt")
    model.eval()
    file = arguments.out / matting_video.MODEL
    export(model, file)
    write_calibration(arguments.out / matting_video.CALIBRATION)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    judged = list(matting_video.labelled("judge"))
    mean = float(clips.rows[:, :, 3].float().mean()) / 255
    models: dict[str, Callable[[Alpha], Alpha]] = {
        "network": lambda frames: run_onnx(session, frames),
        "colour": control(clips),
        "constant": lambda frames: np.full_like(frames[:, :1], mean),
        "nothing": lambda frames: np.zeros_like(frames[:, :1]),
    }
    for name, each in models.items():
        print(f"{name}: {evaluate(each, judged)}")


if __name__ == "__main__":
    main()
