"""Pictures to calibrate and to judge with: those of scikit-image's wheel and of foolbox.

The pictures of scikit-image are in the public domain, CC0 or under its BSD-3-Clause licence, as the
docstrings of ``skimage.data`` say; foolbox's ImageNet pictures come in its MIT package. What
calibrates never judges. Needs the extra ``public`` of qcompile.
"""

# pyright: basic, reportMissingImports=false
# The reason: the tests pass without the extra ``public``, which brings Pillow.

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Iterator
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from qcompile.models import fetch

Pixels: TypeAlias = npt.NDArray[np.uint8]
Split: TypeAlias = Literal["calibration", "judge"]

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


def imagenet_crops(split: Split, size: int = 224) -> Iterator[Pixels]:
    """Seeded random crops, uint8 [size, size, 3] RGB: 64 to calibrate, 300 to judge.

    A crop covers 25 to 100 % of a picture at an aspect ratio of 3/4 to 4/3, is scaled
    bicubically and mirrored half of the time. The two splits share no picture.

    Raises:
        FetchError: the split is "judge" and the package foolbox is not there.
    """
    from PIL import Image

    folder = skimage_folder()
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


def skimage_folder() -> pathlib.Path:
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
