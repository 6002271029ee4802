"""Optical flow: warping, the check there and back, and OpenCV's flow on known motion."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from qcompile.errors import CalibrationError
from qcompile.models import matting_video as video

torch: Any = pytest.importorskip("torch")
from qcompile import flow  # noqa: E402 - it imports torch


def noise(*shape: int) -> Any:
    return torch.from_numpy(np.random.default_rng(0).standard_normal(shape, np.float32))


def translated(dx: float, dy: float) -> Any:
    """Two frames [2, 3, 64, 64] of one texture, the second moved by (dx, dy) pixels."""
    texture = video.procedural_pictures(1)[0].astype(np.float64) / 255
    library: Any = ndimage  # partly untyped
    moved = library.shift(texture, (dy, dx, 0), order=3, mode="grid-wrap")
    pair = [picture[64:128, 64:128].transpose(2, 0, 1) for picture in (texture, moved)]
    return torch.from_numpy(np.stack(pair).astype(np.float32))


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 1, 7, 13), (1, 2, 96, 50)])
def test_a_flow_of_zero_is_the_identity_to_the_bit(shape: tuple[int, ...]) -> None:
    image = noise(*shape)
    still = torch.zeros(shape[0], 2, *shape[2:])
    assert torch.equal(flow.warp(image, still), image)


def test_warping_reads_where_the_flow_leads_to() -> None:
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(9.0), indexing="ij")
    ramp = torch.stack([columns, rows])[None]
    motion = torch.tensor([1.25, -0.5]).reshape(1, 2, 1, 1).expand(1, 2, 6, 9)
    found = flow.warp(ramp, motion)[0]
    wanted = (ramp + motion)[0]
    wanted[0].clamp_(0, 8)
    wanted[1].clamp_(0, 5)
    torch.testing.assert_close(found, wanted)


def test_warping_passes_gradients_on() -> None:
    image = noise(1, 2, 5, 6).double().requires_grad_()
    motion = (noise(1, 2, 5, 6).double() * 0.3 + 0.01).requires_grad_()
    assert torch.autograd.gradcheck(flow.warp, (image, motion))


def test_a_way_back_that_ends_elsewhere_is_not_consistent() -> None:
    there = torch.tensor([2.0, 0.0]).reshape(1, 2, 1, 1).expand(1, 2, 16, 16)
    assert flow.consistent(there, -there)[..., :14].all()
    assert not flow.consistent(there, -there)[..., 14:].any(), "leaves the image"
    back = -there.clone()
    back[:, :, :, 5] += 3
    assert (flow.consistent(there, back)[0, 0] == 0)[:, 3].all()


@pytest.mark.parametrize(("dx", "dy"), [(0.0, 0.0), (2.0, -1.0), (-3.5, 0.5)])
def test_the_flow_of_a_translated_texture_is_its_translation(dx: float, dy: float) -> None:
    pytest.importorskip("cv2")
    found, confidence = flow.dis(translated(dx, dy))
    assert found.shape == (1, 2, 64, 64)
    assert confidence.shape == (1, 1, 64, 64)
    error = torch.hypot(found[:, 0] - dx, found[:, 1] - dy)[:, 8:-8, 8:-8]
    assert error.mean() < 0.2
    assert error.max() < 0.5
    assert confidence[..., 8:-8, 8:-8].mean() > 0.95


def test_the_flow_of_a_clip_is_the_exact_one_where_both_are_confident() -> None:
    pytest.importorskip("cv2")
    for number in range(3):
        clip = video.clip((7, number), video.procedural_pictures(), frames=4)
        for frames, exact, share in (
            (clip.frames, clip.forward, clip.forward_confidence),
            (clip.frames[::-1].copy(), clip.backward[::-1], clip.backward_confidence[::-1]),
        ):
            found, confidence = flow.dis(torch.from_numpy(frames))
            error = np.linalg.norm(found.numpy() - exact, axis=1, keepdims=True)
            sure = (confidence.numpy() > 0) & (share > 0.99)
            assert sure.mean() > 0.5
            assert np.median(error[sure]) < 0.2
            still = np.linalg.norm(exact, axis=1, keepdims=True)
            assert error[sure].mean() < 0.5 * still[sure].mean()


def test_flow_is_deterministic_and_each_pair_stands_alone() -> None:
    pytest.importorskip("cv2")
    frames = torch.cat([translated(1.0, 2.0), translated(-2.0, 0.0)])
    found, _ = flow.dis(frames)
    again, _ = flow.dis(frames)
    last, _ = flow.dis(frames[2:])
    assert torch.equal(found, again)
    assert torch.equal(found[2:], last)


def test_what_is_no_video_is_refused() -> None:
    for shape in ((1, 3, 32, 32), (2, 1, 32, 32), (2, 3, 8, 32)):
        with pytest.raises(CalibrationError, match=r"two or more frames .* got \["):
            flow.dis(torch.zeros(shape))


def test_without_opencv_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(CalibrationError, match=r"pip install 'qcompile\[flow\]'"):
        flow.dis(torch.zeros(2, 3, 32, 32))
