"""Matting: procedural clips with exact alpha and flow, and the errors of alpha."""

from __future__ import annotations

import itertools
import json
import pathlib
from typing import Any

import numpy as np
import onnxruntime
import pytest
from command import Command

from qcompile import execute, ports
from qcompile.errors import CalibrationError
from qcompile.models import matting_metrics as metrics
from qcompile.models import matting_video as video


@pytest.fixture(scope="module")
def clips() -> list[video.Clip]:
    pictures = video.procedural_pictures()
    return [video.clip((5, number), pictures, frames=4) for number in range(3)]


def scenes(count: int, frames: int = 4) -> list[video.Scene]:
    pictures = video.procedural_pictures()
    return [video.scene((5, number), pictures, frames) for number in range(count)]


# -- clips --------------------------------------------------------------------------------------


def test_a_clip_has_the_shapes_and_ranges_it_states(clips: list[video.Clip]) -> None:
    for clip in clips:
        assert clip.frames.shape == (4, 3, 96, 96)
        assert clip.alpha.shape == (4, 1, 96, 96)
        assert clip.forward.shape == clip.backward.shape == (3, 2, 96, 96)
        assert clip.forward_confidence.shape == clip.backward_confidence.shape == (3, 1, 96, 96)
        for each in (clip.frames, clip.alpha, clip.forward_confidence, clip.backward_confidence):
            assert each.dtype == np.float32
            assert each.min() >= 0
            assert each.max() <= 1
        assert 0.02 < clip.alpha.mean() < 0.9
        np.testing.assert_array_equal(np.round(clip.frames * 255) / np.float32(255), clip.frames)
        [first, *_] = clip.sequence()
        assert {name: array.shape for name, array in first.items()} == {"frame": (1, 3, 96, 96)}


def test_a_clip_depends_on_its_seed_alone(clips: list[video.Clip]) -> None:
    again = video.clip((5, 1), video.procedural_pictures(), frames=4)
    np.testing.assert_array_equal(again.frames, clips[1].frames)
    np.testing.assert_array_equal(again.forward, clips[1].forward)
    for one, other in itertools.combinations(clips, 2):
        assert np.abs(one.frames - other.frames).mean() > 0.05


def test_a_layer_goes_back_to_where_it_came_from() -> None:
    [scene] = scenes(1)
    for layer in scene.layers:
        np.testing.assert_allclose(
            layer.seen_at(layer.local(scene.grid(), 2), 2), scene.grid(), atol=1e-9
        )


def test_the_flow_to_the_same_frame_is_zero_and_sure() -> None:
    for scene in scenes(3):
        flow, confidence = scene.flow(1, 1)
        np.testing.assert_allclose(flow, 0, atol=1e-9)
        np.testing.assert_allclose(confidence[0], scene.shares(scene.grid(), 1).max(0), atol=1e-6)


def test_shares_add_up_and_give_alpha() -> None:
    for scene in scenes(3):
        shares = scene.shares(scene.grid(), 0)
        np.testing.assert_allclose(shares.sum(0), 1, atol=1e-12)
        np.testing.assert_allclose(scene.render(0)[1][0], shares[1:].sum(0), atol=1e-6)


def test_what_is_composited_is_alpha_times_foreground_over_background() -> None:
    for scene in scenes(3):
        frame, alpha = scene.render(0)
        back, _ = video.Scene(scene.layers[:1], scene.size).render(0)
        np.testing.assert_allclose(frame[:, alpha[0] == 0], back[:, alpha[0] == 0], atol=1e-6)
        assert np.abs(frame - back)[:, alpha[0] == 1].mean() > 0.02
        assert ((alpha > 0.05) & (alpha < 0.95)).any(), "edges are soft"


def test_frames_warped_by_the_exact_flow_are_the_frames_before() -> None:
    torch: Any = pytest.importorskip("torch")
    from qcompile import flow

    for scene in scenes(4):
        frames, alphas = (np.stack(each) for each in zip(*map(scene.render, range(4)), strict=True))
        for time, to in [(0, 1), (2, 1), (0, 3)]:
            motion, confidence = (torch.from_numpy(each)[None] for each in scene.flow(time, to))
            seen = (confidence > 0.999).numpy()[0]
            assert seen.mean() > 0.5
            for images in (frames, alphas):
                warped = flow.warp(torch.from_numpy(images[to])[None], motion).numpy()[0]
                lost = np.abs(warped - images[time])[:, seen[0]].mean()
                still = np.abs(images[to] - images[time])[:, seen[0]].mean()
                assert lost < 0.003, "what bilinear interpolation blurs"
                assert images is alphas or lost < 0.2 * still


def test_what_gets_covered_or_leaves_is_not_confident() -> None:
    flat = np.full((3, video.TEXTURE, video.TEXTURE), 0.5, np.float32)
    still, ones = np.full((2, 2), 16.0), np.ones(2)
    back = video.Layer(flat, None, 1.0, still, 0 * ones, ones)
    disc = np.full(361, 6.0)
    front = video.Layer(flat, disc, 1.0, np.array([[10.0, 16.0], [15.0, 16.0]]), 0 * ones, ones)
    motion, confidence = video.Scene((back, front), 32).flow(0, 1)
    np.testing.assert_array_equal(motion[:, 16, 10], [5, 0])
    np.testing.assert_array_equal(motion[:, 16, 19], [0, 0])
    assert confidence[0, 16, 10] == 1
    assert confidence[0, 16, 19] == 0, "the disc is there in the next frame"
    assert confidence[0, 16, 28] == 1
    away = video.Layer(flat, disc, 1.0, np.array([[10.0, 16.0], [40.0, 16.0]]), 0 * ones, ones)
    assert video.Scene((back, away), 32).flow(0, 1)[1][0, 16, 10] == 0


def test_a_scene_without_pictures_is_refused() -> None:
    with pytest.raises(CalibrationError, match="128 or more pixels a side, got none"):
        video.scene((0,), [], 4)
    with pytest.raises(CalibrationError, match=r"got one of shape \(127, 300, 3\)"):
        video.scene((0,), [np.zeros((127, 300, 3), np.uint8)], 4)


def test_no_picture_is_in_two_splits() -> None:
    names = [name for split in video.PICTURES.values() for name in split]
    assert len(names) == len(set(names))


# -- errors -------------------------------------------------------------------------------------


def alphas(*values: float) -> metrics.Alpha:
    """Frames [T, 1, 4, 4] of one value each."""
    each = np.array(values, np.float32).reshape(-1, 1, 1, 1)
    return np.broadcast_to(each, (len(values), 1, 4, 4))


def test_the_truth_has_no_error(clips: list[video.Clip]) -> None:
    assert metrics.errors(clips[0].alpha, clips[0].alpha) == metrics.Errors(0, 0, 0, 0)


def test_errors_of_frames_of_one_value() -> None:
    found, truth = alphas(0.5, 0.25, 0.25), alphas(0.0, 0.5, 0.5)
    assert metrics.mad(found, truth) == pytest.approx((0.5 + 0.25 + 0.25) / 3)
    assert metrics.mse(found, truth) == pytest.approx((0.25 + 0.0625 + 0.0625) / 3)
    assert metrics.dtssd(found, truth) == pytest.approx((0.75 + 0.0) / 2)
    assert metrics.grad(found, truth) == pytest.approx(0, abs=1e-12)


def test_a_constant_error_does_not_flicker() -> None:
    assert metrics.dtssd(alphas(0.3, 0.7), alphas(0.1, 0.5)) == pytest.approx(0, abs=1e-7)
    assert metrics.dtssd(alphas(0.3), alphas(0.1)) == 0


def test_the_gradient_of_a_ramp() -> None:
    # Far from the edges, the two filters of norm 1 give the slope times sum(t^2 g) / |t g| times
    # sum(g) / |g|, of the Gaussian g at whole distances up to 4 pixels.
    at = np.arange(-4, 5)
    g = np.exp(-(at**2) / (2 * 1.4**2))
    per_slope = (at**2 @ g) / np.linalg.norm(at * g) * g.sum() / np.linalg.norm(g)
    ramp = np.broadcast_to(np.linspace(0, 1, 41, dtype=np.float32), (1, 41, 41))
    middle = np.zeros((1, 41, 41), np.float32)
    whole = metrics.grad(ramp, middle)
    # Four columns at either side feel the repeated edge, so the sum lies between two bounds.
    assert 33 * 41 * (per_slope / 40) ** 2 < whole < 41 * 41 * (per_slope / 40) ** 2
    assert metrics.grad(ramp.swapaxes(1, 2), middle) == pytest.approx(whole)
    assert metrics.grad(1 - ramp, ramp) == pytest.approx(0, abs=1e-9), "lengths, not directions"


def test_errors_are_averaged_and_printed_in_the_units_of_tables() -> None:
    mean = metrics.mean([metrics.Errors(0.01, 0.002, 500, 0.03), metrics.Errors(0, 0, 0, 0)])
    assert mean == metrics.Errors(0.005, 0.001, 250, 0.015)
    assert str(mean) == "MAD 5.00, MSE 1.00, Grad 0.250, dtSSD 1.50"


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\(1, 1, 4, 4\), but the truth \(2, 1, 4, 4\)"):
        metrics.errors(alphas(1), alphas(1, 1))


# -- the shipped network ------------------------------------------------------------------------


def session() -> Any:
    library: Any = onnxruntime  # partly untyped
    return library.InferenceSession(
        str(video.path(video.MODEL)), providers=["CPUExecutionProvider"]
    )


def run(network: Any, frames: video.Array, carried: bool = True) -> video.Array:
    """Alpha [T, 1, H, W], from states of zero, which are ``carried`` from frame to frame or not."""
    pairs = ports.parse_state(video.STATE)
    shapes = {each.name: each.shape[1:] for each in network.get_inputs()}
    empty = {name: np.zeros((1, *shapes[name]), np.float32) for name in pairs}
    names = [each.name for each in network.get_outputs()]
    state, found = empty, list[video.Array]()
    for frame in frames:
        outputs = dict(zip(names, network.run(None, {"frame": frame[None], **state}), strict=True))
        state = {taken: outputs[given] for taken, given in pairs.items()} if carried else empty
        found.append(outputs["alpha"])
    return np.concatenate(found)


def test_the_shipped_network_keeps_its_batchnorms_and_is_small() -> None:
    path = video.path(video.MODEL)
    assert path.stat().st_size < 1.5e6
    nodes = list(execute.load(path).graph)
    kinds = [node.op_type for node in nodes]
    assert kinds.count("BatchNormalization") == 25
    assert {"HardSwish", "HardSigmoid", "Clip", "Resize", "Tanh"} <= set(kinds)
    assert not any(node.metadata_props for node in nodes)
    with pytest.raises(FileNotFoundError, match=r"no shipped file 'matting.pt'; known are"):
        video.path("matting.pt")


def test_the_shipped_calibration_is_what_its_seed_gives() -> None:
    pytest.importorskip("skimage")
    shipped = list(video.calibration())
    for clip, sequence in itertools.zip_longest(video.labelled("calibration"), shipped):
        found = np.concatenate([frame["frame"] for frame in sequence])
        # Another release of scipy may round a pixel the other way.
        assert np.abs(found - clip.frames).max() <= 1.01 / 255
        assert (found != clip.frames).mean() < 1e-3


def test_the_network_mattes_unseen_pictures_and_remembers() -> None:
    pytest.importorskip("skimage")
    network = session()
    clips = list(itertools.islice(video.labelled("judge"), 6))
    carried = metrics.mean(metrics.errors(run(network, c.frames), c.alpha) for c in clips)
    alone = metrics.mean(metrics.errors(run(network, c.frames, False), c.alpha) for c in clips)
    blank = metrics.mean(metrics.errors(np.zeros_like(c.alpha), c.alpha) for c in clips)
    assert carried.mad < 0.25 * blank.mad
    assert carried.mad < alone.mad
    assert carried.dtssd < alone.dtssd


def test_eight_bits_keep_alpha_with_the_state_carried(
    qcompile: Command, tmp_path: pathlib.Path
) -> None:
    result = qcompile(
        video.path(video.MODEL), "--calib", video.path(video.CALIBRATION), "--state", video.STATE,
        "--passes", "@int8-fast", "-o", tmp_path,
    )  # fmt: skip
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "report.json").read_text())
    [alpha] = [output for output in report["outputs"] if output["name"] == "alpha"]
    assert alpha["sqnr"] > 20


def test_the_metric_of_the_command_line_is_the_mean_absolute_difference() -> None:
    frames = np.array([0.5, 0.25], np.float32)
    runs = [({"labels": np.zeros(1, np.float32)}, {"alpha": frame[None]}) for frame in frames]
    assert metrics.mad_of_runs(runs) == pytest.approx(0.375)
    assert getattr(metrics.mad_of_runs, "lower_is_better", False)
