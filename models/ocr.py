"""PaddleOCR's text detector, recognizer and orientation classifier, with data drawn here.

The three ONNX files come in the package ``rapidocr`` (Apache-2.0, weights of PaddleOCR under
Apache-2.0 as well), at opset 11. ``det()``, ``rec()`` and ``cls()`` are their paths. Words are
nouns of WordNet in Pillow's own font (Aileron, CC0), blurred, turned, pale and noisy; pages set
such words on textures and mix in two photographed pages of scikit-image. Nouns and pictures that
calibrate never judge. All three models read ``x``, float32 [1, 3, h, w], BGR, -1 to 1.

Needs the extra ``public`` of qcompile and the packages ``rapidocr`` and ``wordnet-base``.
"""

# pyright: basic, reportMissingImports=false
# The reason: the tests pass without the extra ``public``, which brings Pillow.

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from qcompile.models import fetch
from qcompile.models.pictures import Pixels, Split, skimage_folder
from qcompile.sources import Sample

HEIGHT, WIDTH, CLS_WIDTH = 48, 320, 192  # of a line of text, in pixels
# Textures to write on, and photographed pages.
BACKGROUNDS: dict[Split, tuple[str, ...]] = {
    "calibration": ("grass.png", "moon.png", "coffee.png", "camera.png"),
    "judge": ("brick.png", "gravel.png", "coins.png", "chelsea.png"),
}
PAGES: dict[Split, str] = {"calibration": "page.png", "judge": "text.png"}
# Sides of a page, multiples of 32: mostly square, because one size is the usual setting.
SIDES = ((320, 320), (320, 320), (320, 320), (256, 416), (320, 320), (320, 320), (384, 288))

# How hard the blurred lines are to read: at 1.0 the float model reads 82 %, at 1.3 half of them.
STRENGTH = 1.0


def det() -> pathlib.Path:
    """PP-OCRv6 det small: ``x`` [n, 3, h, w], sides multiples of 32, to a text map [n, 1, h, w]."""
    return fetch.find("rapidocr", "rapidocr/models/PP-OCRv6_det_small.onnx")


def rec() -> pathlib.Path:
    """PP-OCRv6 rec small: ``x`` [n, 3, 48, w] to probabilities [n, w / 8, 18710]."""
    return fetch.find("rapidocr", "rapidocr/models/PP-OCRv6_rec_small.onnx")


def cls() -> pathlib.Path:
    """PP-OCR cls mobile v2.0: ``x`` [n, 3, 48, 192] to [n, 2], upright and upside down."""
    return fetch.find("rapidocr", "rapidocr/models/ch_ppocr_mobile_v2.0_cls_mobile.onnx")


def nouns(split: Split) -> list[str]:
    """The nouns of WordNet, in the order of its file, that are 4 to 12 lower-case letters.

    Every second one serves to calibrate, the others to judge.
    """
    lines = fetch.find("wordnet-base", "usr/share/wordnet/data.noun").read_text("latin-1")
    fields = (line.split(" ", 5) for line in lines.split("\n") if line and line[0] != " ")
    words = dict.fromkeys(field[4] for field in fields)
    plain = [w for w in words if 4 <= len(w) <= 12 and w.isalpha() and w.islower()]
    return plain[0 if split == "calibration" else 1 :: 2]


def word_mask(word: str, random: np.random.Generator) -> npt.NDArray[np.float32]:
    """Ink 0 to 1 of ``word``, [h, w]: of 16 to 40 pixels, turned by up to 3 degrees, blurred."""
    size, margin = int(random.integers(16, 41)), int(random.integers(3, 8))
    return text_mask(word, size, margin, random.uniform(-3, 3), random.uniform(0, 1.6))


def text_mask(
    text: str, size: int, margin: int, degrees: float, blur: float
) -> npt.NDArray[np.float32]:
    """Ink 0 to 1 of ``text``, [h, w]: of ``size`` pixels, then turned, then blurred."""
    from PIL import Image, ImageDraw, ImageFilter, ImageFont

    font = ImageFont.load_default(size)
    left, top, right, bottom = map(round, font.getbbox(text))
    ink = Image.new("L", (right - left + 2 * margin, bottom - top + 2 * margin))
    ImageDraw.Draw(ink).text((margin - left, margin - top), text, fill=255, font=font)
    ink = ink.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    ink = ink.filter(ImageFilter.GaussianBlur(blur))
    return (np.asarray(ink) / 255).astype(np.float32)


def inked(
    paper: npt.NDArray[np.float32],
    mask: npt.NDArray[np.float32],
    random: np.random.Generator,
    contrasts: tuple[float, float] = (40, 180),
) -> npt.NDArray[np.float32]:
    """``paper`` [h, w, 3] with ``mask`` [h, w] in a colour that is ``contrasts`` levels away."""
    tone = float(paper.mean())
    contrast = random.uniform(*contrasts)
    ink = tone - contrast if tone > 127 else tone + contrast
    colour = np.clip(ink + random.uniform(-20, 20, 3), 0, 255)
    return (paper + (colour - paper) * mask[:, :, None]).astype(np.float32)


def noisy(picture: npt.NDArray[np.float32], random: np.random.Generator) -> Pixels:
    """``picture`` with white noise of a sigma up to 12, as bytes."""
    sigma = random.uniform(0, 12)
    return np.clip(picture + random.normal(0, sigma, picture.shape), 0, 255).astype(np.uint8)


def word_pictures(split: Split, most: int) -> Iterator[tuple[Pixels, str]]:
    """Pictures [h, w, 3] of 1 to ``most`` words on plain paper, and what they say.

    There are 64 to calibrate and 200 to judge.
    """
    random = np.random.default_rng(0 if split == "calibration" else 1)
    words = nouns(split)
    for _ in range(64 if split == "calibration" else 200):
        text = " ".join(random.choice(words, random.integers(1, most + 1)))
        mask = word_mask(text, random)
        tone = random.choice((random.uniform(10, 60), random.uniform(160, 250)))
        paper = np.full((*mask.shape, 3), tone, np.float32)
        yield noisy(inked(paper, mask, random), random), text


def _normalized(pixels: Pixels) -> npt.NDArray[np.float32]:
    """RGB bytes [h, w, 3] as the models read them: [1, 3, h, w], BGR, -1 to 1."""
    picture = (pixels[:, :, ::-1].astype(np.float32) / 255.0 - 0.5) / 0.5
    return np.ascontiguousarray(picture.transpose(2, 0, 1)[None])


def line_sample(pixels: Pixels, width: int = WIDTH, most: int | None = None) -> Sample:
    """A line of text [h, w, 3] scaled to 48 high, then zeros up to ``width``; at most ``most``."""
    from PIL import Image

    wide = max(1, round(HEIGHT * pixels.shape[1] / pixels.shape[0]))
    wide = wide if most is None else min(wide, most)
    scaled = Image.fromarray(pixels).resize((wide, HEIGHT), Image.Resampling.BILINEAR)
    x = np.zeros((1, 3, HEIGHT, max(wide, width)), np.float32)
    x[:, :, :, :wide] = _normalized(np.asarray(scaled))
    return {"x": x}


def rec_labelled(split: Split) -> Iterator[tuple[Sample, str]]:
    """Samples of the recognizer, one to three words each, and what they say."""
    for pixels, text in word_pictures(split, 3):
        yield line_sample(pixels), text


def rec_calibration() -> Iterator[Sample]:
    """64 samples for the recognizer, 48 high and 320 or more wide."""
    return (sample for sample, _ in rec_labelled("calibration"))


def rec_judge() -> Iterator[Sample]:
    """200 samples for the recognizer, of other words."""
    return (sample for sample, _ in rec_labelled("judge"))


def blurred_pictures(
    split: Split, count: int, strength: float = STRENGTH
) -> Iterator[tuple[Pixels, str]]:
    """``count`` pictures [h, w, 3] of one to three words that are hard to read, and what they say.

    All of it grows with ``strength``: small letters, turned by up to 4 degrees, blurred by up to a
    tenth of their size, pale and noisy. At 1 the float model reads 82 % of the lines.
    """
    random = np.random.default_rng(4 if split == "calibration" else 5)
    words = nouns(split)
    for _ in range(count):
        text = " ".join(random.choice(words, random.integers(1, 4)))
        size, margin = int(random.integers(14, 33)), int(random.integers(3, 8))
        degrees = random.uniform(-4, 4) * strength
        blur = size * random.uniform(0.02, 0.1) * strength
        mask = text_mask(text, size, margin, degrees, blur)
        contrast = random.uniform(40, 120) / strength
        tone = random.choice((random.uniform(10, 100), random.uniform(130, 245)))
        paper = np.full((*mask.shape, 3), tone, np.float32)
        sigma = random.uniform(0, contrast / 6) * strength
        page = inked(paper, mask, random, (contrast, contrast))
        noise = random.normal(0, sigma, page.shape)
        yield np.clip(page + noise, 0, 255).astype(np.uint8), text


def blurred_labelled(
    split: Split, count: int, strength: float = STRENGTH
) -> Iterator[tuple[Sample, str]]:
    """Samples of the recognizer that are hard to read, and what they say."""
    for pixels, text in blurred_pictures(split, count, strength):
        yield line_sample(pixels), text


def blurred_calibration() -> Iterator[Sample]:
    """128 samples for the recognizer, every second one hard to read."""
    hard = (sample for sample, _ in blurred_labelled("calibration", 64))
    for plain, blurred in zip(rec_calibration(), hard, strict=True):
        yield plain
        yield blurred


def blurred_judge() -> Iterator[Sample]:
    """400 samples for the recognizer that are hard to read, of other words."""
    return (sample for sample, _ in blurred_labelled("judge", 400))


def characters() -> list[str]:
    """What each class of the recognizer stands for; the first is the blank."""
    import onnx

    model = onnx.load(rec(), load_external_data=False)
    [listed] = [entry.value for entry in model.metadata_props if entry.key == "character"]
    return ["", *listed.split("\n"), " "]


def read(probabilities: npt.NDArray[np.float32], known: Sequence[str]) -> str:
    """The text that ``probabilities`` [t, classes] spell: the best path, repeats and blanks out."""
    best = probabilities.argmax(axis=-1)
    kept = best[np.append(True, best[1:] != best[:-1])]
    return "".join(known[int(index)] for index in kept)


@dataclasses.dataclass(frozen=True)
class Lines:
    """How many of ``count`` lines are read right in float and compiled, and how many alike."""

    count: int
    float_right: int
    right: int
    equal: int


def compare(
    wanted: Iterable[npt.NDArray[np.float32]],
    actual: Iterable[npt.NDArray[np.float32]],
    texts: Iterable[str],
) -> Lines:
    """What is read of lines that say ``texts``, from the probabilities in float and compiled."""
    known = characters()
    rows = [
        (read(one[0], known), read(other[0], known), text)
        for one, other, text in zip(wanted, actual, texts, strict=True)
    ]
    return Lines(
        len(rows),
        sum(one == text for one, _, text in rows),
        sum(other == text for _, other, text in rows),
        sum(one == other for one, other, _ in rows),
    )


def cls_labelled(split: Split) -> Iterator[tuple[Sample, int]]:
    """Samples of the orientation classifier, every second one upside down, and 1 for those."""
    for number, (pixels, _) in enumerate(word_pictures(split, 1)):
        turned = number % 2
        shown = np.ascontiguousarray(pixels[::-1, ::-1]) if turned else pixels
        yield line_sample(shown, CLS_WIDTH, CLS_WIDTH), turned


def cls_calibration() -> Iterator[Sample]:
    """64 samples for the orientation classifier, [1, 3, 48, 192]."""
    return (sample for sample, _ in cls_labelled("calibration"))


def cls_judge() -> Iterator[Sample]:
    """200 samples for the orientation classifier, of other words."""
    return (sample for sample, _ in cls_labelled("judge"))


def det_labelled(split: Split) -> Iterator[tuple[Sample, list[tuple[int, int]]]]:
    """Pages, and row and column of the centre of each word: 32 to calibrate, 40 to judge.

    Every eighth is a crop of a photographed page, of which nothing is known.
    """
    from PIL import Image

    random = np.random.default_rng(2 if split == "calibration" else 3)
    words, folder = nouns(split), skimage_folder()
    papers = [Image.open(folder / name).convert("RGB") for name in BACKGROUNDS[split]]
    photograph = Image.open(folder / PAGES[split]).convert("RGB")
    for number in range(32 if split == "calibration" else 40):
        height, width = SIDES[number % len(SIDES)]
        centres: list[tuple[int, int]] = []
        if number % 8 == 7:
            page = _crop(photograph, height, width, random)
        else:
            page = _crop(papers[number % len(papers)], height, width, random)
            page, centres = _written(page, words, random)
        yield {"x": _normalized(noisy(page, random))}, centres


def _crop(
    picture: object, height: int, width: int, random: np.random.Generator
) -> npt.NDArray[np.float32]:
    """A part of the Pillow ``picture`` of the aspect of height and width, scaled to them."""
    from PIL import Image

    assert isinstance(picture, Image.Image)
    scale = min(picture.width / width, picture.height / height) * random.uniform(0.5, 1.0)
    left = random.uniform(0, picture.width - width * scale)
    top = random.uniform(0, picture.height - height * scale)
    box = (left, top, left + width * scale, top + height * scale)
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC, box), np.float32)


def _written(
    page: npt.NDArray[np.float32], words: Sequence[str], random: np.random.Generator
) -> tuple[npt.NDArray[np.float32], list[tuple[int, int]]]:
    """``page`` faded to paper, with lines of words, and where their centres lie."""
    fade = random.uniform(0.15, 0.6)
    tone = random.choice((random.uniform(10, 60), random.uniform(160, 250)))
    page = page * fade + tone * (1 - fade)
    centres: list[tuple[int, int]] = []
    height, width, _ = page.shape
    top = int(random.integers(4, 40))
    while top < height:
        left, deepest = int(random.integers(4, 60)), 8
        while True:
            mask = word_mask(str(random.choice(words)), random)
            bottom, right = top + mask.shape[0], left + mask.shape[1]
            if bottom > height or right > width:
                break
            page[top:bottom, left:right] = inked(page[top:bottom, left:right], mask, random)
            centres.append(((top + bottom) // 2, (left + right) // 2))
            left, deepest = right + int(random.integers(4, 30)), max(deepest, mask.shape[0])
        top += deepest + int(random.integers(4, 30))
    return page, centres


def det_calibration() -> Iterator[Sample]:
    """32 pages for the detector, most of them 320x320."""
    return (sample for sample, _ in det_labelled("calibration"))


def det_judge() -> Iterator[Sample]:
    """40 pages for the detector, of other words and pictures."""
    return (sample for sample, _ in det_labelled("judge"))
