"""Laws of ``qcompile blocks``: every block has its row and its box, and each error is said."""

from __future__ import annotations

import pathlib
import re
import sys

import graphs
import pytest
from command import Command

from qcompile import block_chart, blocks, execute, ports
from qcompile.capture import capture
from qcompile.models import fashion
from qcompile.models import matting_video as video

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.filterwarnings("ignore:Cyclopts application invoked")

MATTING = video.path("matting.onnx")
STATE = "r1=r1_out,r2=r2_out,r3=r3_out,r4=r4_out"


def test_every_block_has_a_row(qcompile: Command) -> None:
    result = qcompile("blocks", fashion.path(fashion.CNN))
    assert result.code == 0
    for part in blocks.partition(capture(fashion.path(fashion.CNN))):
        assert part.name in result.out
    assert "6 blocks, 8 layers, at most 2 in one" in result.out


def test_a_granularity_and_a_state_are_those_of_the_fit(qcompile: Command) -> None:
    layers = qcompile("blocks", fashion.path(fashion.CNN), "--granularity", "layer")
    assert "10 blocks, 8 layers, at most 1 in one" in layers.out  # two of them are Adds
    counts = [
        int(re.findall(r"(\d+) blocks", qcompile("blocks", MATTING, *words).out)[0])
        for words in (["--granularity", "layer"], ["--granularity", "layer", "--state", STATE])
    ]
    assert counts[0] > counts[1]


def test_shares_of_the_macs_add_up_to_one() -> None:
    for name in (fashion.CNN, fashion.VIT):
        model = capture(fashion.path(name))
        found = block_chart.shares(model, blocks.partition(model))
        assert found is not None and sum(found) == pytest.approx(1.0) and min(found) >= 0


def test_without_shapes_no_share_is_said() -> None:
    model = graphs.graph("""(float[1,4,h,w] x) => (float[1,4,h,w] y) <float[4,4,1,1] v> {
        y = Conv(x, v) }""")
    assert block_chart.shares(model, blocks.partition(model)) is None


def test_the_picture_names_every_block_and_is_the_same_each_time(
    tmp_path: pathlib.Path, qcompile: Command
) -> None:
    files = [tmp_path / name for name in ("a.svg", "b.svg")]
    for file in files:
        result = qcompile("blocks", MATTING, "--state", STATE, "-o", file)
        assert result.code == 0 and f"wrote {file}" in result.out
    drawn = files[0].read_text()
    assert drawn == files[1].read_text()
    for part in blocks.partition(capture(MATTING), ports.parse_state(STATE)):
        assert f">{part.name}<" in drawn


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF")])
def test_other_formats_are_drawn(tmp_path: pathlib.Path, suffix: str, start: bytes) -> None:
    model = capture(fashion.path(fashion.VIT))
    block_chart.draw(model, blocks.partition(model), tmp_path / f"a{suffix}")
    assert (tmp_path / f"a{suffix}").read_bytes().startswith(start)


def test_a_graph_without_layers_is_drawn_and_said(
    tmp_path: pathlib.Path, qcompile: Command
) -> None:
    model = graphs.graph("(float[4] x) => (float[4] y) { y = Relu(x) }")
    execute.save(model, tmp_path / "m.onnx")
    result = qcompile("blocks", tmp_path / "m.onnx", "-o", tmp_path / "a.svg")
    assert result.code == 0 and "0 blocks, 0 layers" in result.out


def test_curves_that_meet_have_lanes_of_their_own() -> None:
    depths = list(range(8))
    edges = [(0, 7), (1, 5), (5, 7), (2, 4), (0, 1)]
    found = block_chart._lanes(depths, edges)  # pyright: ignore[reportPrivateUsage]
    assert set(found) == {(0, 7), (1, 5), (5, 7), (2, 4)}  # a row to the next is a straight line
    for one in found:
        for other in found:
            apart = one[1] <= other[0] or other[1] <= one[0]
            assert one == other or apart or found[one] != found[other]
    assert found[2, 4] == found[5, 7] < found[1, 5] < found[0, 7]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.onnx"], "missing.onnx"),
        ([MATTING, "--state", "r1"], "expected INPUT=OUTPUT,..., got 'r1'"),
        ([MATTING, "--state", "r9=r1_out"], "r9"),
        ([MATTING, "-o", "a.xyz"], "-o 'a.xyz': the name must end in .svg, .png, .pdf"),
        ([MATTING, "-o", "nowhere/a.svg"], "cannot write 'nowhere/a.svg': No such file"),
    ],
)
def test_what_cannot_be_done_is_said(
    words: list[object], message: str, tmp_path: pathlib.Path, qcompile: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    result = qcompile("blocks", *words)
    assert result.code == 1 and message in result.err
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_extra_is_named(
    qcompile: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = qcompile("blocks", fashion.path(fashion.CNN), "-o", "a.svg")
    assert result.code == 1 and "pip install 'qcompile[pictures]'" in result.err
