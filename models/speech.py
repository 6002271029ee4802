"""Silero's voice activity detector at 16 kHz, with its own recordings as data.

The ONNX file, at opset 15, and two recordings come in the source archive of ``silero-vad`` (MIT).
``silero()`` is the path of the file. It reads 512 samples behind the last 64 of the frame before
(``input``, float32 [1, 576]), what it remembers (``state``, [2, 1, 128]) and the rate (``sr``,
int64 scalar), and gives the probability of speech (``output``, [1, 1]) and the next state
(``stateN``). The sources yield sequences of frames without the state, which is carried.

The recording that calibrates never judges. Some sequences hold no speech but noise, hum and
silence, made here, and some hold speech with noise in it.
"""

from __future__ import annotations

import pathlib
import wave
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from qcompile.models import fetch
from qcompile.models.pictures import Split
from qcompile.sources import Sample

RATE, FRAME, CONTEXT = 16000, 512, 64  # Hz, and samples of a frame and of what precedes it
FRAMES = 48  # of a sequence: 1.5 seconds
ROOT = "silero_vad-6.2.3"
RECORDINGS: dict[Split, str] = {
    "calibration": f"{ROOT}/tests/data/test.wav",
    "judge": f"{ROOT}/examples/c++/aepyx.wav",
}


def silero() -> pathlib.Path:
    """Silero VAD v6: ``input`` [n, 576], ``state``, ``sr`` to ``output`` [n, 1] and ``stateN``."""
    return fetch.find("silero-vad", f"{ROOT}/src/silero_vad/data/silero_vad_16k_op15.onnx")


def recording(split: Split) -> npt.NDArray[np.float32]:
    """The recorded speech, 60 and 169 seconds at 16 kHz, -1 to 1."""
    with wave.open(str(fetch.find("silero-vad", RECORDINGS[split]))) as stream:
        raw = stream.readframes(stream.getnframes())
    return np.frombuffer(raw, np.int16).astype(np.float32) / np.float32(32768)


def frames(sound: npt.NDArray[np.float32]) -> list[Sample]:
    """``sound`` [samples] cut into inputs of one frame each; what is left over is dropped."""
    padded = np.concatenate([np.zeros(CONTEXT, np.float32), sound])
    starts = range(0, len(sound) - FRAME + 1, FRAME)
    return [
        {"input": padded[None, i : i + CONTEXT + FRAME], "sr": np.array(RATE, np.int64)}
        for i in starts
    ]


def silero_labelled(split: Split) -> Iterator[tuple[list[Sample], bool]]:
    """Sequences of 1.5 seconds, and whether they are cut from speech: 40 each.

    Of five, three are speech (at -12 to 0 dB, two with noise at least 15 dB below it), one is noise
    or hum, and one is speech that stops halfway; the last counts as speech.
    """
    random = np.random.default_rng(0 if split == "calibration" else 1)
    speech, length = recording(split), FRAMES * FRAME
    for number in range(40):
        start = int(random.integers(0, len(speech) - length))
        sound = speech[start : start + length] * np.float32(10 ** random.uniform(-0.6, 0))
        if number % 5 == 3:
            sound = _noise(length, random)
        elif number % 5 == 4:
            sound = np.concatenate([sound[: length // 2], np.zeros(length // 2, np.float32)])
        elif number % 5:
            level = np.sqrt(np.mean(sound**2)) * 10 ** random.uniform(-2, -0.75)
            sound = sound + random.normal(0, level, length).astype(np.float32)
        yield frames(sound), number % 5 != 3


def _noise(length: int, random: np.random.Generator) -> npt.NDArray[np.float32]:
    """White noise of a random level, smoothed or with the hum of the mains in it."""
    level = 10 ** random.uniform(-3, -1)
    sound = random.normal(0, level, length)
    if random.random() < 0.5:
        sound = np.convolve(sound, np.ones(8) / 8, "same")
    hum = np.sin(2 * np.pi * random.choice((50, 60)) * np.arange(length) / RATE)
    return (sound + level * random.uniform(0, 2) * hum).astype(np.float32)


def silero_calibration() -> Iterator[list[Sample]]:
    """40 sequences of 48 frames."""
    return (sequence for sequence, _ in silero_labelled("calibration"))


def silero_judge() -> Iterator[list[Sample]]:
    """40 sequences of 48 frames, of another recording."""
    return (sequence for sequence, _ in silero_labelled("judge"))
