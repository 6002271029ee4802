"""Magika, which tells the type of a file from its bytes, with the files of this machine as data.

The ONNX file comes in the package ``magika`` (Apache-2.0), at opset 15; ``magika()`` is its path.
It reads ``bytes``, int32 [n, 2048], and gives a probability for each of 214 types. The data are
files of Python's standard library, of the installed packages and of the fetched ones, so that
the samples are the same only where the same versions are installed.
"""

from __future__ import annotations

import json
import os
import pathlib
import sysconfig
import zlib
from collections.abc import Iterator

import numpy as np

from qcompile.models import fetch
from qcompile.models.pictures import Split
from qcompile.sources import Sample

BLOCK, PART, PADDING = 4096, 1024, 256  # bytes read, bytes kept of each end, and what fills up
LEAST, MOST = 200, 12  # bytes of a file, and files with one ending on each side
FOLDER = "magika/models/standard_v3_3"
LABELS = {
    ".c": "c", ".cpp": "cpp", ".css": "css", ".csv": "csv", ".gif": "gif", ".gz": "gzip",
    ".html": "html", ".jpg": "jpeg", ".js": "javascript", ".json": "json",
    ".md": "markdown", ".mp4": "mp4", ".npy": "npy", ".npz": "npz", ".onnx": "onnx",
    ".pdf": "pdf", ".png": "png", ".proto": "proto", ".pth": "pytorch", ".py": "python",
    ".pyi": "python", ".rst": "rst", ".sh": "shell", ".so": "elf", ".svg": "svg",
    ".toml": "toml", ".ttf": "ttf", ".wav": "wav", ".xml": "xml",
    ".yaml": "yaml", ".yml": "yaml", ".zip": "zip",
}  # fmt: skip


def magika() -> pathlib.Path:
    """Magika standard_v3_3: ``bytes`` int32 [n, 2048] to probabilities [n, 214]."""
    return fetch.find("magika", f"{FOLDER}/model.onnx")


def types() -> list[str]:
    """The names of Magika's classes, in their order."""
    content = json.loads(fetch.find("magika", f"{FOLDER}/config.min.json").read_text())
    return content["target_labels_space"]


def file_sample(path: pathlib.Path) -> Sample:
    """Both ends of a file, without the white space outside, filled up towards its middle."""
    with path.open("rb") as stream:
        head = stream.read(BLOCK).lstrip()[:PART]
        stream.seek(max(0, path.stat().st_size - BLOCK))
        tail = stream.read(BLOCK).rstrip()[-PART:]
    read = np.full((1, 2 * PART), PADDING, np.int32)
    read[0, : len(head)] = np.frombuffer(head, np.uint8)
    read[0, 2 * PART - len(tail) :] = np.frombuffer(tail, np.uint8)
    return {"bytes": read}


def files(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """The files below ``root`` with a known ending, in an order that the machine does not set."""
    found: list[str] = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name != "__pycache__"]
        found += [os.path.join(folder, n) for n in names if os.path.splitext(n)[1] in LABELS]
    paths = [pathlib.Path(path).relative_to(root).as_posix() for path in found]
    for path in sorted(paths, key=lambda path: (zlib.crc32(path.encode()), path)):
        yield root / path


def magika_labelled(split: Split) -> Iterator[tuple[Sample, str]]:
    """Samples and the type that the ending of the file says: up to 12 of each ending.

    The content decides the side, so that copies of one file never lie on both.
    """
    side = 0 if split == "calibration" else 1
    counts, seen = dict.fromkeys(LABELS, 0), set[int]()
    places = (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"), fetch.folder())
    for path in (path for place in places for path in files(pathlib.Path(place))):
        if counts[path.suffix] == MOST or not path.is_file() or path.stat().st_size < LEAST:
            continue
        sample = file_sample(path)
        content = zlib.crc32(sample["bytes"].tobytes())
        if content % 2 == side and content not in seen:
            seen.add(content)
            counts[path.suffix] += 1
            yield sample, LABELS[path.suffix]


def magika_calibration() -> Iterator[Sample]:
    """Some 200 files."""
    return (sample for sample, _ in magika_labelled("calibration"))


def magika_judge() -> Iterator[Sample]:
    """Some 200 other files."""
    return (sample for sample, _ in magika_labelled("judge"))
