"""A small learned image codec at four rates, its rate-distortion loss and the BD-rate.

    codec_1.onnx .. codec_4.onnx    from the lowest rate to the highest
    codec_calibration.npz           16 crops

A network maps ``image`` float32 [batch, 3, 128, 128] in 0..1 to ``reconstruction`` of that shape
and to the likelihoods of the rounded latents, ``y_likelihoods`` [batch, 48, 16, 16] and
``z_likelihoods`` [batch, 24, 8, 8], which an entropy coder would turn into
``-sum log2(likelihood)`` bits. No coder is here: rates are those. ``train_codec`` makes the files;
README.md says how well they do.

What trains, calibrates and judges are crops of different pictures. They need the extra ``public``,
those that train or judge also the package foolbox (``qcompile fetch foolbox``).
"""

# pyright: basic, reportMissingImports=false
# The reason: scipy is only partly typed, and the tests pass without the extra ``public``.

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import interpolate

from qcompile.errors import CalibrationError
from qcompile.models import shipped
from qcompile.models.pictures import Pixels, labelled_files, skimage_folder
from qcompile.sources import Sample

Array: TypeAlias = npt.NDArray[Any]
Split: TypeAlias = Literal["training", "calibration", "judge"]
Run: TypeAlias = tuple[Sample, Mapping[str, Array]]  # what a model was fed and what it gave

SIZE = 128  # sides of a crop, in pixels
TRADES = (0.0025, 0.005, 0.01, 0.02)  # bits a pixel that one unit of MSE (0..255) is worth
MODELS = tuple(f"codec_{number}.onnx" for number in range(1, len(TRADES) + 1))
CALIBRATION = "codec_calibration.npz"
FILES = (*MODELS, CALIBRATION)
LIKELIHOODS = ("y_likelihoods", "z_likelihoods")
# Of scikit-image; those to calibrate with are CC0 or in the public domain: crops are shipped.
PICTURES: dict[Split, tuple[str, ...]] = {
    "training": (
        "astronaut.png",
        "brick.png",
        "coins.png",
        "grass.png",
        "hubble_deep_field.jpg",
        "motorcycle_left.png",
        "motorcycle_right.png",
    ),
    "calibration": ("camera.png", "coffee.png", "gravel.png", "rocket.jpg"),
    "judge": ("chelsea.png", "ihc.png", "retina.jpg"),
}
_SEEDS: dict[Split, int] = {"training": 0, "calibration": 1, "judge": 2}
_EACH = 8  # crops of each picture to judge with


# -- rate and distortion ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Quality:
    """Bits a pixel, and the mean squared error of pixels in 0..255."""

    bpp: float
    mse: float

    @property
    def psnr(self) -> float:
        """In dB."""
        return float(10 * np.log10(255**2 / self.mse))


def quality(image: Array, outputs: Mapping[str, Array]) -> Quality:
    """Of the ``outputs`` of a codec for ``image`` [batch, 3, height, width] in 0..1.

    Raises:
        CalibrationError: an output of a codec is missing.
    """
    missing = [name for name in ("reconstruction", *LIKELIHOODS) if name not in outputs]
    if missing:
        raise CalibrationError(f"a codec has the outputs {missing}, got {sorted(outputs)}")
    bits = -sum(float(np.log2(outputs[n].astype(np.float64)).sum()) for n in LIKELIHOODS)
    shown = np.clip(outputs["reconstruction"].astype(np.float64), 0, 1)
    mse = float(np.mean((255 * (shown - image)) ** 2))
    return Quality(bits / (image.size / image.shape[1]), mse)


def mean(found: Iterable[Quality]) -> Quality:
    """The mean rate and the mean error of ``found``, of which there must be one."""
    rows = np.array([dataclasses.astuple(each) for each in found])
    return Quality(*map(float, rows.mean(0)))


@dataclasses.dataclass(frozen=True)
class RateDistortion:
    """``R + trade D``: mean bits a pixel, and mean squared error of pixels in 0..255.

    A metric for --metric and for ``assign-bits{metric=...}``. The loss that a codec is trained
    with depends on its rate point, and so does the metric: ``rate_distortion_1`` goes with
    ``codec_1.onnx``.
    """

    trade: float
    lower_is_better: ClassVar[bool] = True

    def __call__(self, runs: Iterable[Run]) -> float:
        found = mean(quality(sample["image"], outputs) for sample, outputs in runs)
        return found.bpp + self.trade * found.mse


rate_distortion_1, rate_distortion_2, rate_distortion_3, rate_distortion_4 = map(
    RateDistortion, TRADES
)


def bd_rate(base: Sequence[Quality], other: Sequence[Quality]) -> float:
    """How many percent more bits ``other`` takes than ``base`` for the same PSNR, on average.

    Bjontegaard's delta (VCEG-M33): the mean difference of the logarithms of the rates over the
    PSNR that both reach; between points by monotone cubics (PCHIP), which do not overshoot.

    Raises:
        CalibrationError: a curve has fewer than 2 points, its PSNR does not rise with its rate, or
            the two share no PSNR.
    """
    one, two = _curve(base), _curve(other)
    low, high = max(one.x[0], two.x[0]), min(one.x[-1], two.x[-1])
    if low >= high:
        raise CalibrationError(
            f"the curves share no PSNR: {one.x[0]:.2f} to {one.x[-1]:.2f} dB and "
            f"{two.x[0]:.2f} to {two.x[-1]:.2f} dB"
        )
    lost = (two.integrate(low, high) - one.integrate(low, high)) / (high - low)
    return float(100 * np.expm1(lost))


def _curve(points: Sequence[Quality]) -> Any:
    """The logarithm of the rate over the PSNR."""
    ordered = sorted(points, key=lambda point: point.bpp)
    psnr = np.array([point.psnr for point in ordered])
    if len(psnr) < 2 or not (np.diff(psnr) > 0).all():
        said = ", ".join(f"{point.psnr:.2f} dB at {point.bpp:.3f} bpp" for point in ordered)
        raise CalibrationError(
            f"a curve is 2 or more points whose PSNR rises, got {said or 'none'}"
        )
    return interpolate.PchipInterpolator(psnr, np.log([point.bpp for point in ordered]))


# -- data ---------------------------------------------------------------------------------------


def pictures(split: Split) -> list[Pixels]:
    """The pictures of a split, uint8 [height, width, 3]: scikit-image's, and foolbox's.

    Every other one of foolbox's 20 trains, the rest judge.

    Raises:
        ModuleNotFoundError: scikit-image or Pillow is not there.
        FetchError: the split is not "calibration", and the package foolbox is not there.
    """
    from PIL import Image

    files = [skimage_folder() / name for name in PICTURES[split]]
    if split != "calibration":
        files += [file for file, _ in labelled_files()[int(split == "judge") :: 2]]
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]


def crop(picture: Pixels, random: np.random.Generator) -> npt.NDArray[np.float32]:
    """A random square, shrunk 1 to 2 times and mirrored half of the time, [3, SIZE, SIZE] in 0..1.

    In steps of 1/255.

    Raises:
        CalibrationError: the picture is smaller than SIZE.
    """
    from PIL import Image

    height, width = picture.shape[:2]
    if min(height, width) < SIZE:
        raise CalibrationError(
            f"a crop needs a picture of {SIZE} or more pixels a side, got {height}x{width}"
        )
    edge = int(random.integers(SIZE, min(2 * SIZE, height, width) + 1))
    top, left = (int(random.integers(0, side - edge + 1)) for side in (height, width))
    square = Image.fromarray(picture[top : top + edge, left : left + edge])
    small = np.asarray(square.resize((SIZE, SIZE), Image.Resampling.BOX))
    seen = small[:, ::-1] if random.random() < 0.5 else small
    return np.ascontiguousarray(seen.transpose(2, 0, 1), np.float32) / np.float32(255)


def crops(split: Split, count: int, draw: int = 0) -> Iterator[npt.NDArray[np.float32]]:
    """``count`` crops, of each picture of ``split`` in turn; each ``draw`` has others.

    Raises what ``pictures`` raises.
    """
    found = pictures(split)
    for number in range(count):
        random = np.random.default_rng([_SEEDS[split], draw, number])
        yield crop(found[number % len(found)], random)


def calibration() -> Iterator[Sample]:
    """The shipped crops: 16, those of ``crops("calibration", 16)``."""
    with np.load(path(CALIBRATION)) as arrays:
        images = arrays["image"]
    return ({"image": image[None]} for image in images)


def judge() -> Iterator[Sample]:
    """8 crops of each of 13 pictures that neither trained nor calibrated, in turn."""
    count = _EACH * len(pictures("judge"))
    return ({"image": image[None]} for image in crops("judge", count))


def path(name: str) -> pathlib.Path:
    """Where the shipped file ``name`` lies.

    Raises:
        FileNotFoundError: no such file is shipped.
    """
    return shipped.path(name, FILES)
