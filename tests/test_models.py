"""The loaders of real models: what needs neither packages nor the extra ``public``."""

from __future__ import annotations

import itertools
import pathlib

import numpy as np
import pytest

from qcompile.models import filetypes, ocr, speech


def test_a_file_is_read_from_both_ends(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"  head" + bytes(range(256)) * 40 + b"tail\n\n")
    read = filetypes.file_sample(path)["bytes"]
    assert read.shape == (1, 2048)
    assert bytes(read[0, :4].astype(np.uint8)) == b"head"
    assert bytes(read[0, -4:].astype(np.uint8)) == b"tail"
    assert read.max() < filetypes.PADDING


def test_a_short_file_is_filled_up_towards_the_middle(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    [read] = filetypes.file_sample(path)["bytes"]
    np.testing.assert_array_equal(read[:3], read[-3:])
    assert (read[3:-3] == filetypes.PADDING).all()


def test_frames_overlap_by_their_context() -> None:
    sound = np.arange(3 * speech.FRAME + 7, dtype=np.float32)
    read = [frame["input"][0] for frame in speech.frames(sound)]
    assert len(read) == 3
    assert not read[0][: speech.CONTEXT].any()
    for before, after in itertools.pairwise(read):
        np.testing.assert_array_equal(before[-speech.CONTEXT :], after[: speech.CONTEXT])
    heard = np.concatenate([frame[speech.CONTEXT :] for frame in read])
    np.testing.assert_array_equal(heard, sound[: 3 * speech.FRAME])


def test_reading_drops_blanks_and_repeats() -> None:
    path = [0, 1, 1, 0, 1, 2, 2, 0]
    probabilities = np.eye(3, dtype=np.float32)[path]
    assert ocr.read(probabilities, ["", "a", "b"]) == "aab"


def test_lines_are_compared_with_what_they_say_and_with_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ocr, "characters", lambda: ["", "a", "b"])
    a, b = (np.eye(3, dtype=np.float32)[[[i]]] for i in (1, 2))
    assert ocr.compare([a, a, b, b], [a, b, a, b], "aaaa") == ocr.Lines(4, 2, 2, 2)


def test_suppression_keeps_the_best_of_what_overlaps() -> None:
    torch = pytest.importorskip("torch")
    from qcompile.models import vision

    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [0, 0, 10, 4]])
    scores = torch.tensor([0.5, 0.9, 0.1, 0.4])
    assert [int(row) for row in vision.suppressed(boxes, scores, 0.5)] == [1, 3, 2]
