"""The wheel: one importable name, every file of the four folders, the data of models."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import tarfile
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = {"qcompile": "qcompile", "passes": "qcompile/passes", "backends": "qcompile/backends"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with the wheel and the sdist, built from the project's files."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder


def test_only_qcompile_becomes_importable(built: pathlib.Path) -> None:
    [wheel] = built.glob("*.whl")
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"qcompile"}


def test_every_source_file_and_the_data_are_in_the_wheel(built: pathlib.Path) -> None:
    [wheel] = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"{place}/{path.name}"
        for folder, place in {**FOLDERS, "models": "qcompile/models"}.items()
        for pattern in ("*.py", "*.onnx", "*.npz", "*.json", "*.md")
        for path in (ROOT / folder).glob(pattern)
    }
    assert wanted - names == set()


def test_the_sdist_builds_the_same_files(built: pathlib.Path) -> None:
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"passes/fold_bn.py", "backends/base.py", "models/fashion_cnn.onnx"} <= names


def test_importing_qcompile_imports_nothing_heavy() -> None:
    code = "import sys, qcompile, qcompile.registry as r; r.passes(); r.targets(); "
    heavy = ("torch", "tensorrt_rtx", "onnxscript", "scipy.optimize")
    code += f"print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
