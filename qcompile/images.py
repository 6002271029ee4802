"""Images as samples, and their preprocessing as a part of the model.

An image becomes pixels, whole numbers from 0 to 255 as they are stored: scaled, cut, in RGB or
grey. Pixels become what a model reads by ``(pixel * scale - mean) / std`` for each channel.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile import graph, ports, syntax
from qcompile.errors import CalibrationError
from qcompile.ports import Port

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

Array = npt.NDArray[Any]
Pixels = npt.NDArray[np.uint8]

SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
EXAMPLE = "--preprocess 'image{resize=256 crop=224 mean=123.7,116.3,103.5 std=58.4,57.1,57.4}'"
# What letterboxing fills with, as detectors of the YOLO family are trained.
_GREY = 114


@dataclasses.dataclass(frozen=True)
class Image:
    """How an image file becomes an input.

    * ``resize``: the box that the image is scaled to, bilinearly: one number for a square, or
      height,width. ``fit`` says how: ``cover`` keeps the aspect ratio and fills the box (with a
      square, the shorter side becomes ``resize``), ``stretch`` does not keep it, ``pad`` keeps it
      and fills what is left of the box with grey.
    * ``crop``: the box that is cut from the middle. Either box is by default that of the model's
      input, or else the other one.
    * ``mean``, ``std`` (one number, or one a channel in the order of the model) and ``scale``:
      ``(pixel * scale - mean) / std``; without them the pixels themselves.
    * ``layout``: of the model; ``auto`` finds the axis with 1 or 3 channels.
    * ``order``: of the channels of the model; a model with one channel reads grey.
    * ``fold``: all but scaling and cutting is in the model, which reads uint8 [N, H, W, channels]
      (see the function ``fold``); data that is no images holds such arrays.

    Raises CalibrationError for a box, ``std`` or ``scale`` that is none.
    """

    name: ClassVar[str] = "image"

    resize: tuple[int, ...] = ()
    crop: tuple[int, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    scale: float = 1.0
    layout: Literal["auto", "nchw", "nhwc"] = "auto"
    order: Literal["rgb", "bgr"] = "rgb"
    fit: Literal["cover", "stretch", "pad"] = "cover"
    fold: bool = False

    def __post_init__(self) -> None:
        for what in ("resize", "crop"):
            box: tuple[int, ...] = getattr(self, what)
            if len(box) > 2 or any(side < 1 for side in box):
                raise CalibrationError(f"{what} is one size or height,width, got {box}")
        for what in ("mean", "std"):
            if len(getattr(self, what)) not in (0, 1, 3):
                raise CalibrationError(f"{what} is one number or three, got {getattr(self, what)}")
        if not np.isfinite([*self.mean, *self.std, self.scale]).all():
            raise CalibrationError("mean, std and scale must be finite")
        if any(s <= 0 for s in self.std) or self.scale <= 0:
            raise CalibrationError("std and scale must be above 0")
        if self.crop and self.resize and not _within(_box(self.crop), _box(self.resize)):
            raise CalibrationError(f"crop={self.crop} is larger than resize={self.resize}")

    @property
    def plain(self) -> bool:
        """Whether the model reads the pixels as they are."""
        return not (any(self.mean) or any(s != 1.0 for s in self.std)) and self.scale == 1.0

    def affine(self, channels: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """``offset`` and ``factor`` [channels] of ``(pixel - offset) * factor``."""
        mean = np.broadcast_to(np.array(self.mean or 0.0, np.float64), channels)
        std = np.broadcast_to(np.array(self.std or 1.0, np.float64), channels)
        return (mean / self.scale).astype(np.float32), (self.scale / std).astype(np.float32)

    def __str__(self) -> str:
        return syntax.render(self.name, self)


def parse(text: str) -> Image:
    """The preprocessing that ``text`` names. Raises PipelineSyntaxError, pointing at the column."""
    [first, *more] = syntax.items(text)
    if more:
        raise CalibrationError(f"--preprocess {text}: give one, such as {EXAMPLE}")
    return syntax.build(first, {Image.name: Image}, "preprocessing", text)


def available() -> None:
    """Raise CalibrationError, with the command that installs it, if Pillow is missing."""
    try:
        import PIL.Image  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise CalibrationError("images need Pillow: pip install 'qcompile[images]'") from error


# -- what a model reads -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Form:
    """The input ``port`` as one of images: ``axis`` of its channels, and its size if known."""

    port: Port
    axis: int
    channels: int
    size: tuple[int, int] | None


def _form(image: Image, inputs: Sequence[Port]) -> _Form:
    """The input that images go into. Raises CalibrationError if there is not exactly one."""
    able = [p for p in inputs if len(p.shape) == 4]
    if len(able) != 1:
        reads = ", ".join(map(str, inputs))
        raise CalibrationError(f"images go into one input of 4 dimensions; the model reads {reads}")
    [port] = able
    axes = {"nchw": [1], "nhwc": [3]}.get(image.layout) or [
        axis for axis in (1, 3) if port.shape[axis] in (1, 3)
    ]
    if len(axes) != 1:
        raise CalibrationError(
            f"which axis of {port} are the channels? give layout=nchw or layout=nhwc"
        )
    [axis] = axes
    channels = 3 if port.shape[axis] is None else port.shape[axis]
    if channels not in (1, 3):
        raise CalibrationError(f"{port} has {channels} channels on axis {axis}; images have 1 or 3")
    for what in ("mean", "std"):
        if len(getattr(image, what)) > channels:
            raise CalibrationError(f"{what} has 3 numbers, and {port} has one channel")
    if port.dtype.kind in "iub" and not (port.dtype == np.uint8 and image.plain):
        raise CalibrationError(
            f"{port} takes no mean, std or scale: only uint8 pixels or floats do"
        )
    height, width = (1, 2) if axis == 3 else (2, 3)
    known = port.chosen or port.shape
    rows, columns = known[height], known[width]
    size = None if rows is None or columns is None else (rows, columns)
    return _Form(port, axis, channels, size)


# -- files --------------------------------------------------------------------------------------


def read(
    files: Sequence[pathlib.Path], image: Image | None, inputs: Sequence[Port], source: str
) -> Iterator[tuple[str, Array, str]]:
    """The name of the input, an array for it, and the file that it is from, one run at a time.

    A fixed batch takes several files; what is left over is not used.

    Raises CalibrationError without ``image``, for a model that reads no images, for boxes that do
    not make its size, and for a file that is none.
    """
    if image is None:
        raise CalibrationError(
            f"{source!r} is a folder of images: say how the model wants them, as in {EXAMPLE}"
        )
    available()
    if len(inputs) != 1:
        raise CalibrationError(
            f"a folder of images feeds one input; the model reads {', '.join(map(str, inputs))}; "
            "give package.module:iterable"
        )
    form = _form(image, inputs)
    boxes = _boxes(image, form)
    batch = form.port.shape[0] or 1
    if len(files) < batch:
        raise CalibrationError(
            f"{source!r} holds {len(files)} images, and {form.port} takes {batch}"
        )
    for first in range(0, len(files) - batch + 1, batch):
        taken = files[first : first + batch]
        pixels = np.stack([_pixels(file, image, form, *boxes) for file in taken])
        yield form.port.name, _normalized(pixels, image, form), f"image {str(taken[0])!r}"


def _boxes(image: Image, form: _Form) -> tuple[tuple[int, int], tuple[int, int]]:
    """The boxes to scale to and to cut."""
    crop = _box(image.crop) if image.crop else form.size or _box(image.resize)
    if crop is None:
        raise CalibrationError(f"{form.port} has no size of its own: give crop=224 or resize=224")
    resize = _box(image.resize) or crop
    if not _within(crop, resize):
        raise CalibrationError(f"resize={image.resize} is smaller than the {crop} that are cut")
    if form.size not in (None, crop):
        raise CalibrationError(f"images are cut to {crop}, and the model reads {form.port}")
    return resize, crop


def _box(sides: tuple[int, ...]) -> tuple[int, int] | None:
    return (sides[0], sides[-1]) if sides else None


def _within(inner: tuple[int, int] | None, outer: tuple[int, int] | None) -> bool:
    return inner is None or outer is None or (inner[0] <= outer[0] and inner[1] <= outer[1])


def _pixels(
    file: pathlib.Path,
    image: Image,
    form: _Form,
    resize: tuple[int, int],
    crop: tuple[int, int],
) -> Pixels:
    """The pixels [*crop, channels] of an image file."""
    import PIL.Image

    try:
        with PIL.Image.open(file) as opened:
            picture = opened.convert("L" if form.channels == 1 else "RGB")
    except Exception as error:  # each decoder raises its own kinds
        raise CalibrationError(f"{str(file)!r} is not a readable image: {error}") from error
    picture = _scaled(picture, image, resize)
    top, left = round((picture.height - crop[0]) / 2), round((picture.width - crop[1]) / 2)
    cut = picture.crop((left, top, left + crop[1], top + crop[0]))
    return np.asarray(cut).reshape(*crop, form.channels)


def _scaled(picture: Picture, image: Image, box: tuple[int, int]) -> Picture:
    """``picture`` scaled to the box, or for ``cover`` to the least size that holds it."""
    from PIL.Image import Resampling
    from PIL.ImageOps import pad

    rows, columns = box
    if image.fit == "pad":
        grey = _GREY if picture.mode == "L" else (_GREY,) * 3
        return pad(picture, (columns, rows), Resampling.BILINEAR, color=grey)
    if image.fit == "cover":
        # Rounded down as in torchvision's Resize.
        if rows * picture.width > columns * picture.height:
            columns = picture.width * rows // picture.height
        else:
            rows = picture.height * columns // picture.width
    return picture.resize((columns, rows), Resampling.BILINEAR)


def _normalized(pixels: Pixels, image: Image, form: _Form) -> Array:
    """Pixels [N, H, W, channels] as the model reads them."""
    array: Array = pixels[..., ::-1] if image.order == "bgr" else pixels
    if not image.plain:
        offset, factor = image.affine(form.channels)
        array = (array.astype(np.float32) - offset) * factor
    if form.port.dtype.kind != "u":
        array = array.astype(form.port.dtype)
    return np.moveaxis(array, 3, form.axis)


# -- in the model -------------------------------------------------------------------------------


def fold(model: ir.Model, image: Image) -> Image:
    """Put the preprocessing in front of ``model``, in place, and return what is left outside.

    The input of images becomes uint8 ``[N, H, W, channels]``, channels as red, green, blue; in
    front stand Cast, the reorder of the channels (Gather), ``(x - offset) * factor`` (Sub and Mul)
    and Transpose, as far as each is needed. Scaling and cutting stay outside.

    Raises CalibrationError if the model has not exactly one input that images go into, or if that
    reads no floats.
    """
    form = _form(image, ports.inputs_of(model))
    if form.port.dtype.kind == "u":
        raise CalibrationError(f"fold=true needs an input of floats; the model reads {form.port}")
    position = [v.name for v in model.graph.inputs].index(form.port.name)
    old = model.graph.inputs[position]
    places = (0, 2, 3, 1) if form.axis == 1 else (0, 1, 2, 3)
    assert old.shape is not None and old.dtype is not None
    dims = [old.shape[place] for place in places]
    entered = ir.Value(
        name=form.port.name,
        shape=ir.Shape([*dims[:3], form.channels]),
        type=ir.TensorType(ir.DataType.UINT8),
    )
    if form.port.chosen is not None and form.port.most is not None:
        ends = zip(form.port.chosen, form.port.most, strict=True)
        sizes = [f"{first}..{most}" if first < most else str(first) for first, most in ends]
        entered.metadata_props[ports.SHAPE] = "x".join(sizes[place] for place in places)
    model.graph.inputs[position] = entered
    last = _computed(model, form, image, entered, old)
    for node, index in list(old.uses()):
        node.replace_input_with(index, last)
    return dataclasses.replace(image, mean=(), std=(), scale=1.0, order="rgb", layout="nhwc")


def _computed(
    model: ir.Model, form: _Form, image: Image, entered: ir.Value, old: ir.Value
) -> ir.Value:
    """What the model read so far, computed from the pixels ``entered``."""
    name, first = form.port.name, model.graph[0]
    offset, factor = image.affine(form.channels)
    assert old.dtype is not None

    def step(
        kind: str, value: ir.Value, constant: Array | None = None, **attributes: Any
    ) -> ir.Value:
        label = f"{name}/{kind.lower()}"
        others = [] if constant is None else [graph.add_constant(model, f"{label}/by", constant)]
        made = graph.insert(model, kind, [value, *others], attributes, output=label, before=first)
        made.type, made.shape = value.type, value.shape
        return made

    value = step("Cast", entered, to=int(ir.DataType.FLOAT))
    value.type = ir.TensorType(ir.DataType.FLOAT)
    if image.order == "bgr" and form.channels == 3:
        value = step("Gather", value, np.array([2, 1, 0]), axis=3)
    if offset.any():
        value = step("Sub", value, offset)
    if (factor != 1.0).any():
        value = step("Mul", value, factor)
    if form.axis == 1:
        value = step("Transpose", value, perm=[0, 3, 1, 2])
    value.shape = old.shape
    if old.dtype != ir.DataType.FLOAT:
        value = step("Cast", value, to=int(old.dtype))
    value.type = old.type
    return value
