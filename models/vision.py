"""Torchvision networks with random weights, for structure and speed; accuracy means nothing.

``mobilenet_v2`` and ``vit_b_16`` classify; ``deeplabv3``, ``lraspp`` and ``unet`` segment;
``ssdlite`` and ``faster_rcnn`` detect and end in NonMaxSuppression. All but the last are factories
for ``torch.export`` and can be named on a command line as ``qcompile.models.vision:NAME``;
``faster_rcnn`` writes an ONNX file, because its control flow depends on the data. Torchvision's
code is under the BSD-3-Clause licence, and no weights of others are used.

BatchNorm statistics are those of four pictures, then disturbed, and scale and shift are random, so
that folding and the ranges of activations are as demanding as in a trained network.

Needs the extras ``torch`` and ``public`` of qcompile.
"""

# pyright: basic, reportMissingImports=false
# The reason: torch is only partly typed, torchvision hardly, and the tests pass without the extra
# ``public``.

from __future__ import annotations

import contextlib
import functools
import itertools
import pathlib
import sys
import warnings
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from qcompile.models.pictures import Pixels, Split, imagenet_crops
from qcompile.sources import Sample

Factory: TypeAlias = tuple[nn.Module, dict[str, Tensor], dict[str, dict[int, Any]]]

DETECTION_SIZE = 320  # sides of a picture for the detectors, in pixels
FOREGROUND = 90  # classes of COCO without the background
OVERLAP = 0.55  # above which the weaker of two boxes goes

# -- torchvision --------------------------------------------------------------------------------

_NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS = {
    "nms": _NMS,
    "qnms": _NMS,
    "roi_align": "(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, "
    "SymInt pooled_width, int sampling_ratio, bool aligned) -> Tensor",
}


def _compiled_operators() -> bool:
    return True


@functools.cache
def torchvision() -> Any:
    """The package torchvision, even if it was built for another torch.

    A wheel with CUDA beside a CPU torch cannot load its compiled operators and then fails to
    register their shapes. Declaring them first lets it load; those that the detectors run are
    given kernels in Python, and torchvision is told that it has them.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    else:
        return torchvision
    library = torch.library.Library("torchvision", "DEF")
    for name, signature in _OPERATORS.items():
        library.define(name + signature)
    import torchvision

    pooling: Any = sys.modules["torchvision.ops.roi_align"]
    in_python = pooling._roi_align.__wrapped__  # the function below its torch.compile
    library.impl("nms", suppressed, "CPU")
    library.impl("roi_align", in_python, "CPU")
    torchvision.extension._has_ops = pooling._has_ops = _compiled_operators
    _libraries.append(library)
    return torchvision


_libraries: list[torch.library.Library] = []  # an operator lives as long as its library object


def suppressed(boxes: Tensor, scores: Tensor, overlap: float) -> Tensor:
    """Which of ``boxes`` [n, 4] to keep, best first: none overlaps a better one by more."""
    order = scores.argsort(descending=True, stable=True)
    ranked = boxes[order]
    low = torch.maximum(ranked[:, None, :2], ranked[None, :, :2])
    high = torch.minimum(ranked[:, None, 2:], ranked[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = (ranked[:, 2:] - ranked[:, :2]).prod(-1)
    too_near = shared / (areas[:, None] + areas[None] - shared) > overlap
    alive = torch.ones(len(ranked), dtype=torch.bool)
    for index in range(len(ranked)):
        if alive[index]:
            alive[index + 1 :] &= ~too_near[index, index + 1 :]
    return order[alive]


# -- weights ------------------------------------------------------------------------------------


@torch.no_grad()
def settled(module: nn.Module, examples: Callable[[], Tensor]) -> nn.Module:
    """``module`` in eval mode, with the BatchNorm statistics of ``examples``, disturbed."""
    norms = [child for child in module.modules() if isinstance(child, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0.0, 0.2)
        norm.momentum = 1.0  # keep the statistics of one batch as they are
    module.train()(examples())
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
        mean += 0.1 * variance.sqrt() * torch.randn_like(mean)
        variance *= torch.exp(0.2 * torch.randn_like(variance))
    return module.eval()


@contextlib.contextmanager
def seeded(seed: int) -> Generator[None]:
    """Draw the same numbers every time, and leave the user's generator as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def pictures(size: int) -> Tensor:
    """Four crops to calibrate with, [4, 3, size, size], normalized as for ImageNet."""
    crops = itertools.islice(imagenet_crops("calibration", size), 4)
    return torch.from_numpy(np.concatenate([imagenet_sample(crop)["image"] for crop in crops]))


def image_factory(module: nn.Module, size: int) -> Factory:
    """``module`` with an example of pictures, ``image`` [2, 3, size, size], of any number."""
    example = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    return module.eval(), {"image": example}, {"image": {0: torch.export.Dim("batch")}}


# -- classification -----------------------------------------------------------------------------


class Classifier(nn.Module):
    """A torchvision classifier whose input is called ``image``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)


def mobilenet_v2() -> Factory:
    """MobileNetV2: ``image`` [batch, 3, 224, 224] to 1,000 logits."""
    with seeded(0):
        net = Classifier(torchvision().models.mobilenet_v2(weights=None))
        return image_factory(settled(net, lambda: pictures(224)), 224)


def vit_b_16() -> Factory:
    """ViT-B/16: ``image`` [batch, 3, 224, 224] to 1,000 logits.

    Its head, which torchvision leaves at zero, is random, and so are the position embeddings.
    """
    with seeded(0):
        net = torchvision().models.vit_b_16(weights=None)
        nn.init.normal_(net.heads.head.weight, std=0.02)
        return image_factory(Classifier(net), 224)


# -- segmentation -------------------------------------------------------------------------------


class Segmentation(nn.Module):
    """A torchvision segmentation network whose result is its main output alone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)["out"]


def deeplabv3() -> Factory:
    """DeepLabV3 on MobileNetV3-Large: ``image`` [batch, 3, 224, 224] to 21 maps of that size."""
    return _segmentation("deeplabv3_mobilenet_v3_large")


def lraspp() -> Factory:
    """LR-ASPP on MobileNetV3-Large: ``image`` [batch, 3, 224, 224] to 21 maps of that size."""
    return _segmentation("lraspp_mobilenet_v3_large")


def _segmentation(name: str) -> Factory:
    build = getattr(torchvision().models.segmentation, name)
    with seeded(0):
        net = build(weights=None, weights_backbone=None, num_classes=21)
        return image_factory(settled(Segmentation(net), lambda: pictures(224)), 224)


class UNet(nn.Module):
    """The U-Net of Ronneberger et al. (2015) with padding and BatchNorm, ``width`` channels up.

    ``image`` [batch, 3, h, w], sides multiples of 8, to ``classes`` maps of that size.
    """

    def __init__(self, width: int = 16, depth: int = 3, classes: int = 2) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        self.stem = self._twice(3, width)
        self.down = nn.ModuleList(self._twice(w, 2 * w) for w in widths[:-1])
        self.grow = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in widths[:-1])
        self.up = nn.ModuleList(self._twice(2 * w, w) for w in widths[:-1])
        self.head = nn.Conv2d(width, classes, 1)

    @staticmethod
    def _twice(inputs: int, outputs: int) -> nn.Module:
        block = torchvision().ops.Conv2dNormActivation
        return nn.Sequential(block(inputs, outputs, 3), block(outputs, outputs, 3))

    def forward(self, image: Tensor) -> Tensor:
        levels = [self.stem(image)]
        for down in self.down:
            levels.append(down(functional.max_pool2d(levels[-1], 2)))
        x = levels.pop()
        for grow, up in zip(reversed(self.grow), reversed(self.up), strict=True):
            x = up(torch.cat([levels.pop(), grow(x)], 1))
        return self.head(x)


def unet() -> Factory:
    """A U-Net of 0.5 M parameters: ``image`` [batch, 3, 224, 224] to 2 maps of that size."""
    with seeded(0):
        return image_factory(settled(UNet(), lambda: pictures(224)), 224)


# -- detection ----------------------------------------------------------------------------------


class SSDLite(nn.Module):
    """The single-shot detector without its loop over classes, as it is exported for devices.

    ``image`` [1, 3, 320, 320], -1 to 1, to ``boxes`` [3234, 4] as corners in pixels, ``scores``
    [3234, 90] of the foreground classes, and the rows to keep among the 200 best, [n] int64.
    """

    anchors: Tensor  # [3234, 4]

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.backbone, self.head, self.coder = net.backbone, net.head, net.box_coder
        images = torch.zeros(1, 3, DETECTION_SIZE, DETECTION_SIZE)
        listed = torchvision().models.detection.image_list.ImageList(
            images, [(DETECTION_SIZE, DETECTION_SIZE)]
        )
        [anchors] = net.anchor_generator(listed, list(net.backbone(images).values()))
        self.register_buffer("anchors", anchors)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self.head(list(self.backbone(image).values()))
        boxes = self.coder.decode_single(found["bbox_regression"][0], self.anchors)
        boxes = boxes.clamp(0, DETECTION_SIZE)
        scores = found["cls_logits"][0].softmax(-1)[:, 1:]
        best, rows = scores.amax(1).topk(200)
        kept = torchvision().ops.nms(boxes[rows], best, OVERLAP)
        return boxes, scores, rows[kept]


def ssdlite() -> Factory:
    """SSDlite on MobileNetV3-Large, 320x320; see ``SSDLite``."""
    with seeded(0), torch.no_grad():
        net = torchvision().models.detection.ssdlite320_mobilenet_v3_large(
            weights=None, weights_backbone=None
        )
        module = settled(SSDLite(net.eval()), lambda: pictures(DETECTION_SIZE))
    example = torch.zeros(1, 3, DETECTION_SIZE, DETECTION_SIZE)
    return module, {"image": example}, {"image": {}}


def faster_rcnn(folder: pathlib.Path) -> pathlib.Path:
    """Write Faster R-CNN on MobileNetV3-Large with a pyramid to an ONNX file in ``folder``.

    ``image`` [3, 320, 320], 0 to 1, to ``boxes`` [n, 4], ``labels`` [n] and ``scores`` [n], best
    first. Suppression stands inside of an If, and RoiAlign reads what it left over.
    """
    size = DETECTION_SIZE
    with seeded(0), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer: the picture has one size
        net = torchvision().models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
            weights=None, weights_backbone=None, min_size=size, max_size=size,
            box_score_thresh=0.3,
        )  # fmt: skip
        settled(net.backbone, lambda: pictures(size))
        net.roi_heads.box_predictor.cls_score.weight *= 3  # else no score is worth a box
        path = folder / "faster_rcnn.onnx"
        torch.onnx.export(
            net.eval(), ([torch.rand(3, size, size)],), str(path), dynamo=False, opset_version=17,
            input_names=["image"], output_names=["boxes", "labels", "scores"], verbose=False,
        )  # fmt: skip
    return path


# -- data ---------------------------------------------------------------------------------------


def imagenet_sample(pixels: Pixels) -> Sample:
    """Input of torchvision's networks, [1, 3, h, w], from RGB ``pixels`` [h, w, 3]."""
    mean = np.array([0.485, 0.456, 0.406], np.float32)
    deviation = np.array([0.229, 0.224, 0.225], np.float32)
    image = (pixels.astype(np.float32) / 255.0 - mean) / deviation
    return {"image": np.ascontiguousarray(image.transpose(2, 0, 1)[None])}


def classification_calibration() -> Iterator[Sample]:
    """64 crops for ``mobilenet_v2`` and ``vit_b_16``."""
    return map(imagenet_sample, imagenet_crops("calibration"))


def classification_judge() -> Iterator[Sample]:
    """46 crops of other pictures: two of each."""
    return map(imagenet_sample, itertools.islice(imagenet_crops("judge"), 46))


def segmentation_calibration() -> Iterator[Sample]:
    """64 crops for ``deeplabv3``, ``lraspp`` and ``unet``."""
    return map(imagenet_sample, imagenet_crops("calibration"))


def segmentation_judge() -> Iterator[Sample]:
    """46 crops of other pictures: two of each."""
    return map(imagenet_sample, itertools.islice(imagenet_crops("judge"), 46))


def _detection_pixels(split: Split) -> Iterator[Pixels]:
    return itertools.islice(imagenet_crops(split, DETECTION_SIZE), 46)


def _ssdlite_sample(pixels: Pixels) -> Sample:
    image = pixels.astype(np.float32) / np.float32(127.5) - 1
    return {"image": np.ascontiguousarray(image.transpose(2, 0, 1)[None])}


def ssdlite_calibration() -> Iterator[Sample]:
    """46 crops for ``ssdlite``."""
    return map(_ssdlite_sample, _detection_pixels("calibration"))


def ssdlite_judge() -> Iterator[Sample]:
    """46 crops of other pictures."""
    return map(_ssdlite_sample, _detection_pixels("judge"))


def _faster_rcnn_sample(pixels: Pixels) -> Sample:
    image = pixels.astype(np.float32) / np.float32(255)
    return {"image": np.ascontiguousarray(image.transpose(2, 0, 1))}


def faster_rcnn_calibration() -> Iterator[Sample]:
    """46 crops for ``faster_rcnn``."""
    return map(_faster_rcnn_sample, _detection_pixels("calibration"))


def faster_rcnn_judge() -> Iterator[Sample]:
    """46 crops of other pictures."""
    return map(_faster_rcnn_sample, _detection_pixels("judge"))
