"""The page says what report.json says, stands alone, and holds whatever names models have."""

from __future__ import annotations

import dataclasses
import pathlib
from html.parser import HTMLParser

import pytest

from qcompile import compiler, page
from qcompile.models import fashion
from qcompile.report import LeftAlone, Report

# Elements that have no end.
EMPTY = ("meta", "br")
ODD = "<script>alert(\"&\")</script> \u2192 'x'"


class Text(HTMLParser):
    """The text of a page, and that its elements are closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("page") / "out"
    calib = str(fashion.path(fashion.CALIBRATION))
    [done] = compiler.compile(
        fashion.path(fashion.VIT), folder, calib=calib, passes="@int8", latency=True
    )
    assert (folder / "report.html").read_text(encoding="utf-8") == page.render(done.report)
    return done.report


def test_every_layer_pass_and_figure_is_on_it(report: Report) -> None:
    found = Text(page.render(report))
    assert not found.open
    text = "".join(found.words)
    for row in report.layers:
        assert found.words.count(row.name) == 1
        assert row.runs in text and row.kernel in text
    for step in report.passes:
        assert step.text in found.words
    assert report.pipeline in found.words
    assert f"{report.outputs[0].sqnr:.1f} dB" in text
    assert report.latency is not None and f"{report.latency.ratio:.2f} of float" in text
    for parts in report.share.values():
        for name, value in parts.items():
            assert f"{value:.1%} {name}" in text


def test_every_layer_that_runs_in_integers_has_an_error(report: Report) -> None:
    for row in report.layers:
        assert row.sqnr is not None or row.runs == "float", row.name


def test_it_needs_nothing_else(report: Report) -> None:
    source = page.render(report)
    found = Text(source)
    assert not found.links and not {"script", "img", "link", "iframe"} & set(found.names)
    assert "http" not in source and "url(" not in source


def test_names_cannot_break_it(report: Report, tmp_path: pathlib.Path) -> None:
    first, *others = report.layers
    odd = dataclasses.replace(
        report,
        model=ODD,
        warnings=(ODD,),
        layers=(dataclasses.replace(first, name=ODD, reason=ODD, sqnr=float("nan")), *others),
        left_alone=(LeftAlone(ODD + "1", ODD, 0, ODD),),
        outputs=tuple(dataclasses.replace(o, sqnr=float("inf")) for o in report.outputs),
    )
    found = Text(page.render(odd))
    assert not found.open and "script" not in found.names
    assert "".join(found.words).count(ODD) >= 6
    assert "SQNR exact dB" in "".join(found.words)
    # Written in the encoding that it names, whatever that of the machine is.
    path = tmp_path / "page.html"
    path.write_text(page.render(odd), encoding="utf-8")
    assert path.read_bytes().decode("utf-8") == page.render(odd)
