"""Laws of plugins: what an installed package adds, what it cannot break, and the page about them.

``tests/plugin`` is a real package; ``passes/README.md`` shows its files and says what to run.
"""

from __future__ import annotations

import doctest
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pytest
from graphs import CHAIN, graph, samples

from qcompile import cli, execute, registry
from qcompile.errors import PluginError
from qcompile.models import fashion
from qcompile.passes.fold_bn import FoldBn

# The framework wonders why a test calls the command line without words; here they are in sys.argv.
pytestmark = pytest.mark.filterwarnings("ignore:Cyclopts application invoked")

ROOT = pathlib.Path(__file__).parent.parent
PLUGIN = ROOT / "tests" / "plugin"
PAGE = ROOT / "passes" / "README.md"


class Result(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Result]


def install(source: pathlib.Path, site: pathlib.Path) -> None:
    """What ``pip install source`` does, into a folder of its own and without a network."""
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True)


def package(site: pathlib.Path, name: str, points: str, code: str) -> None:
    """Write a package as pip leaves it: a module, and metadata with its entry points."""
    module = name.replace("-", "_")
    (site / f"{module}.py").write_text(code)
    metadata = site / f"{module}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(points)


@pytest.fixture
def site(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """A folder whose packages count as installed in this process."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    known = (registry.passes, registry.targets)
    for catalog in known:
        catalog.cache_clear()
    yield folder
    for catalog in known:
        catalog.cache_clear()


@pytest.fixture
def qcompile(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Command:
    """The command line in this process, in a folder with a tiny model and its data."""
    execute.save(graph(CHAIN), tmp_path / "m.onnx")
    np.savez(tmp_path / "data.npz", x=np.stack([s["x"] for s in samples(graph(CHAIN), 10)]))
    monkeypatch.chdir(tmp_path)

    def command(*words: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["qcompile", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return Result(int(caught.value.code or 0), out, err)

    return command


COMPILE = ("m.onnx", "--calib", "data.npz", "-o", "result")
PASS = """
import dataclasses
from typing import ClassVar
from qcompile.backends.onnxruntime import OrtCpu
from qcompile.pipeline import Pass

@dataclasses.dataclass(frozen=True)
class Mine(Pass):
    name: ClassVar[str] = "mine"
    def run(self, model, ctx):
        {body}
"""
MINE = "[qcompile.passes]\nmine = {module}:Mine\n"


# -- what an installed package adds -------------------------------------------------------------


def test_a_pass_and_a_target_of_a_package_compile_a_real_model(tmp_path: pathlib.Path) -> None:
    source, site, out = (tmp_path / name for name in ("source", "site", "out"))
    shutil.copytree(PLUGIN, source)  # the build writes beside its source
    install(source, site)
    passes = "simplify,fold-bn,clip-weights{limit=3.0},calibrate,quantize,insert-qdq"
    targets = ("ort-cpu", "ort-cpu-unpadded")
    command = [sys.executable, "-m", "qcompile.cli", str(fashion.path(fashion.CNN))]
    command += ["--calib", str(fashion.path(fashion.CALIBRATION)), "-o", str(out)]
    command += ["--passes", passes, *(word for target in targets for word in ("--target", target))]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    padded: dict[str, int] = {}
    for target in targets:
        report = json.loads((out / target / "report.json").read_text())
        named = report["target"].partition("{")[0]  # the options are those of this machine
        assert (report["pipeline"], named) == (passes, target)
        assert report["share"]["macs"]["int8"] == pytest.approx(1.0)
        written = execute.load(out / target / "model.onnx")
        padded[target] = sum(node.op_type == "Pad" for node in written.graph)
    # The first Conv has one input channel; the rule that the target leaves out pads it to four.
    assert padded == {"ort-cpu": 1, "ort-cpu-unpadded": 0}


# -- what is wrong with a package ---------------------------------------------------------------

FAULTS = {
    "does not import": ("import gone_with_the_wind", "No module named 'gone_with_the_wind'"),
    "raises at import": ("1 / 0", "ZeroDivisionError: division by zero"),
    "lacks the name": ("", "has no attribute 'Mine'"),
    "a function": ("def Mine(): ...", "is no complete subclass of qcompile.pipeline.Pass"),
    "a target": (
        PASS.replace("(Pass)", "(OrtCpu)").format(body="..."),
        "is no complete subclass of qcompile.pipeline.Pass",
    ),
    "no run": (
        PASS.replace("def run", "def walk").format(body="..."),
        "is no complete subclass of qcompile.pipeline.Pass",
    ),
    "no dataclass": (
        PASS.replace("@dataclasses", "# @dataclasses").format(body="..."),
        "is not decorated with @dataclasses.dataclass(frozen=True)",
    ),
    "another name": (PASS.replace('"mine"', '"yours"').format(body="..."), "calls itself 'yours'"),
    "no default": (
        PASS.replace("def run", "bits: int\n    def run").format(body="..."),
        "has no default for its option 'bits'",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_said_in_one_sentence_where_the_name_is_asked_for(
    site: pathlib.Path, fault: str
) -> None:
    code, says = FAULTS[fault]
    name = f"faulty-{fault.replace(' ', '-')}"
    package(site, name, MINE.format(module=name.replace("-", "_")), code)
    known = registry.passes()
    assert "mine" in known and "mine" in list(known)
    assert known["fold-bn"] is FoldBn
    with pytest.raises(PluginError) as caught:
        known["mine"]
    message = str(caught.value)
    assert message.startswith(f"the pass 'mine' of the package {name} can")
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("others", "says"),
    [
        (["clash-one"], "qcompile and clash-one each have a pass 'set'; remove one of them:"),
        (["clash-b", "clash-a"], "qcompile and clash-a and clash-b each have a pass 'set'"),
    ],
)
def test_a_name_that_is_taken_is_an_error_and_nobody_wins(
    site: pathlib.Path, others: Sequence[str], says: str
) -> None:
    for name in others:
        module = name.replace("-", "_")
        code = PASS.replace('"mine"', '"set"').format(body="...")
        package(site, name, f"[qcompile.passes]\nset = {module}:Mine\n", code)
    with pytest.raises(PluginError, match=says):
        registry.passes()["set"]


def test_faulty_packages_break_no_command_that_does_not_name_them(
    site: pathlib.Path, qcompile: Command
) -> None:
    package(site, "broken-a", MINE.format(module="broken_a"), "import gone_with_the_wind")
    points = "[qcompile.passes]\nset = broken_b:Set\n[qcompile.targets]\nort-cpu = broken_b:Ort\n"
    package(site, "broken-b", points, "")
    points = "[qcompile.targets]\nort-gpu = broken_c:Ort\n"
    package(site, "broken-c", points, "import gone_with_the_wind")

    listed = qcompile("passes")
    assert listed.code == 0
    assert "from broken-a 1.0\n  mine  error: the pass 'mine' of the package broken-a" in listed.out
    assert "qcompile and broken-b each have a pass 'set'" in " ".join(listed.out.split())
    assert "from broken-c 1.0\n  ort-gpu  error:" in qcompile("targets").out

    clash = qcompile(*COMPILE)
    assert clash.code == 1
    assert "each have a target 'ort-cpu'; remove one of them: pip uninstall broken-b" in clash.err
    shutil.rmtree(site / "broken_b-1.0.dist-info")
    registry.passes.cache_clear()
    registry.targets.cache_clear()
    assert qcompile(*COMPILE).code == 0
    for words, name in (
        ((*COMPILE, "--passes", "mine,calibrate,quantize,insert-qdq"), "broken-a"),
        ((*COMPILE, "--target", "ort-gpu"), "broken-c"),
        (("passes", "mine"), "broken-a"),
        (("targets", "ort-gpu"), "broken-c"),
    ):
        done = qcompile(*words)
        assert done.code == 1
        assert f"repair the package or remove it: pip uninstall {name}" in done.err


CRASHES = {
    "raises": (MINE, PASS.format(body="return {'layers': 1 // 0}"), "ZeroDivisionError"),
    "misuses ours": (
        MINE,
        PASS.format(body="__import__('qcompile').graph.constant(model.graph.inputs[0])"),
        "AssertionError",
    ),
    "breaks the graph": (
        MINE,
        PASS.format(body="model.graph[0].outputs[0].name = 'y'; return {}"),
        "two values are named 'y'",
    ),
    "a target": (
        "[qcompile.targets]\nmine = {module}:Mine\n",
        PASS.replace("(Pass)", "(OrtCpu)")
        .replace("def run(self, model, ctx)", "def prove(self, model, folder)")
        .format(body="return {'layers': 1 // 0}"),
        "ZeroDivisionError",
    ),
}


@pytest.mark.parametrize("crash", CRASHES)
def test_a_bug_is_reported_to_the_package_that_has_it(
    site: pathlib.Path, qcompile: Command, crash: str
) -> None:
    points, code, says = CRASHES[crash]
    name = f"crashing-{crash.replace(' ', '-')}"
    package(site, name, points.format(module=name.replace("-", "_")), code)
    words = ("--target", "mine") if crash == "a target" else ("--passes", "mine,@")
    done = qcompile(*COMPILE, words[0], words[1].replace("@", "calibrate,quantize,insert-qdq"))
    assert done.code == cli.BUG
    assert f"this is a bug of {name}: " in done.err
    assert says in done.err


# -- the page -----------------------------------------------------------------------------------

BLOCK = re.compile(r"(?:^`([\w/.]+)`:\n\n)?^```(\w+)\n(.*?)^```$", re.M | re.S)


def test_the_page_shows_the_files_of_the_plugin_as_they_are() -> None:
    shown = {path: body for path, _, body in BLOCK.findall(PAGE.read_text()) if path}
    files = [p for p in PLUGIN.rglob("*") if p.suffix in (".py", ".toml") and p.stat().st_size]
    there = {p.relative_to(ROOT).as_posix(): p.read_text() for p in files if "build" not in p.parts}
    assert shown == there


def test_the_page_is_true(tmp_path: pathlib.Path) -> None:
    here, site = tmp_path / "checkout", tmp_path / "site"
    junk = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    for folder in ("qcompile", "passes", "backends", "models", "tests/plugin"):
        shutil.copytree(ROOT / folder, here / folder, symlinks=True, ignore=junk)
    shutil.copy(ROOT / "pyproject.toml", here)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(here), str(site)]),
        "COLUMNS": "80",
    }

    def shell(command: str) -> str:
        words = shlex.split(command)
        # pip would change the environment that these tests run in.
        if words[:2] == ["pip", "install"]:
            install(here / words[2], site)
            return ""
        if words[:2] == ["pip", "uninstall"]:
            shutil.rmtree(site)
            return ""
        done = subprocess.run(
            words if ">" not in words else ["sh", "-c", command],
            cwd=here, env=environment, text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return done.stdout

    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    printed = ""
    for _, language, body in BLOCK.findall(PAGE.read_text()):
        if language == "sh":
            printed = "".join(shell(command) for command in body.splitlines())
        elif language == "text":
            assert doctest.OutputChecker().check_output(body, printed, flags), printed
