"""Laws of the text syntax: it round-trips, and its errors point at the column that is wrong."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile import syntax
from qcompile.errors import PassError, PipelineSyntaxError


@dataclasses.dataclass(frozen=True)
class Tea:
    """One option of every type that a pass may have."""

    sort: Literal["green", "black"] = "black"
    cups: int = 1
    strength: float = 0.5
    milk: bool = False
    sugar: int | None = None
    guests: tuple[str, ...] = ("ann",)
    minutes: tuple[int, ...] = ()
    served_in: str = "pot"
    steeps: tuple[int | Literal["never"], ...] = ()

    def __post_init__(self) -> None:
        if self.cups < 0:
            raise PassError(f"cups must not be negative, got {self.cups}")
        if self.milk and self.sort == "green":
            raise PassError("green tea takes no milk")


@dataclasses.dataclass(frozen=True)
class Water:
    """No options."""


@dataclasses.dataclass(frozen=True)
class Guarded:
    """Cannot be made without its option."""

    layer: str = ""
    bits: int = 8

    def __post_init__(self) -> None:
        if not self.layer:
            raise PassError("guarded needs layer=GLOB")


KNOWN: dict[str, type[object]] = {"tea": Tea, "water": Water, "guarded": Guarded}


def build(text: str) -> list[object]:
    return [syntax.build(item, KNOWN, "drink", text) for item in syntax.items(text)]


def rejected(text: str) -> PipelineSyntaxError:
    with pytest.raises(PipelineSyntaxError) as caught:
        build(text)
    return caught.value


words = st.from_regex(r"[A-Za-z0-9*/._\[\]?=-]{1,8}", fullmatch=True)
teas = st.builds(
    Tea,
    sort=st.just("black"),
    cups=st.integers(0, 10**9),
    strength=st.floats(allow_nan=False),
    milk=st.booleans(),
    sugar=st.none() | st.integers(),
    guests=st.lists(words, max_size=3).map(tuple),
    minutes=st.lists(st.integers(), max_size=3).map(tuple),
    served_in=words,
)


@given(st.lists(teas, min_size=1, max_size=3))
def test_render_and_build_round_trip(brewed: list[Tea]) -> None:
    text = ",".join(syntax.render("tea", tea) for tea in brewed)
    assert build(text) == brewed
    assert ",".join(syntax.render("tea", tea) for tea in build(text)) == text


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,8}", fullmatch=True)
keys = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,6}", fullmatch=True)
braces = st.dictionaries(keys, st.from_regex(r"[A-Za-z0-9*/,.=-]{0,6}", fullmatch=True), max_size=3)


@given(st.lists(st.tuples(names, braces), min_size=1, max_size=4), st.sampled_from(["", " ", "  "]))
def test_items_are_what_was_written(written: list[tuple[str, dict[str, str]]], gap: str) -> None:
    def one(name: str, options: dict[str, str]) -> str:
        inner = f"{gap} ".join(f"{key}={value}" for key, value in options.items())
        return f"{gap}{name}{{{gap}{inner}{gap}}}{gap}" if options else f"{gap}{name}{gap}"

    text = ",".join(one(name, options) for name, options in written)
    found = syntax.items(text)
    assert [(item.name, {o.key: o.value for o in item.options}) for item in found] == written
    for item in found:
        assert text.startswith(item.name, item.column)
        for option in item.options:
            assert text.startswith(f"{option.key}=", option.column)
            assert text.startswith(option.value, option.value_column)


@given(st.text("ab{}=, -*", max_size=12))
def test_any_text_is_read_or_rejected_at_a_column_of_it(text: str) -> None:
    try:
        syntax.items(text)
    except PipelineSyntaxError as error:
        assert 0 <= error.column <= len(text)
        assert str(error).endswith(f"\n  {text}\n  {' ' * error.column}^")


def test_defaults_are_not_printed() -> None:
    assert syntax.render("tea", Tea()) == "tea"
    assert syntax.render("tea", Tea(cups=3, served_in="mug")) == "tea{cups=3 served-in=mug}"
    assert syntax.render("tea", Tea(guests=(), sugar=0)) == "tea{sugar=0 guests=}"


def test_an_underscore_may_be_written_for_a_dash() -> None:
    assert build("tea{served_in=mug}") == build("tea{served-in=mug}") == [Tea(served_in="mug")]


def test_what_an_option_takes_is_said_in_words() -> None:
    assert {n: syntax.describe(t) for n, t in syntax.options_of(Tea).items()} == {
        "sort": "one of green, black",
        "cups": "whole number",
        "strength": "number",
        "milk": "true or false",
        "sugar": "whole number, or none",
        "guests": "list of words",
        "minutes": "list of whole numbers",
        "served_in": "word",
        "steeps": "list of whole numbers, or never",
    }


def test_a_word_may_stand_among_numbers() -> None:
    assert build("tea{steeps=2,never}") == [Tea(steeps=(2, "never"))]
    assert syntax.render("tea", Tea(steeps=(2, "never"))) == "tea{steeps=2,never}"
    with pytest.raises(PipelineSyntaxError, match="'ever' is not a whole number"):
        build("tea{steeps=ever}")


def test_none_is_a_value_of_an_optional() -> None:
    assert build("tea{sugar=2},tea{sugar=none}") == [Tea(sugar=2), Tea(sugar=None)]


@pytest.mark.parametrize(
    ("text", "column", "says"),
    [
        ("", 0, "expected a name, the text ends"),
        ("tea,", 4, "expected a name, the text ends"),
        ("tea,,water", 4, "expected a name, got ','"),
        (",tea", 0, "expected a name, got ','"),
        ("tea water", 4, "expected ',' or '{' after 'tea', got 'w'"),
        ("tea}", 3, "expected ',' or '{' after 'tea', got '}'"),
        ("water,tea{cups=3", 9, "this brace is never closed"),
        ("tea{cups}", 4, "expected option=value"),
        ("tea{cups=1 cups=2}", 11, "option 'cups' is given twice"),
        ("tea{cups=1{}", 10, "unexpected '{'"),
        ("water,tee{cups=3}", 6, "unknown drink 'tee'; did you mean 'tea'?"),
        ("zzz", 0, "unknown drink 'zzz'; known are guarded, tea, water"),
        ("tea{cups=1 mlik=true}", 11, "tea has no option 'mlik'; did you mean 'milk'?"),
        ("water{cups=1}", 6, "water takes no options"),
        ("tea{milk=true cups=two}", 19, "option 'cups' of tea: 'two' is not a whole number"),
        ("tea{cups=1.5}", 9, "'1.5' is not a whole number"),
        ("tea{strength=strong}", 13, "'strong' is not a number"),
        ("tea{milk=yes}", 9, "'yes' is not true or false"),
        ("tea{sort=red}", 9, "'red' is not one of green, black"),
        ("tea{minutes=1,x}", 12, "'x' is not a whole number"),
        ("tea{cups=}", 9, "'' is not a whole number"),
        ("tea{milk=true cups=-1}", 19, "tea: cups must not be negative, got -1"),
        ("water,tea{sort=green milk=true}", 15, "green tea takes no milk"),
        ("water,guarded{bits=4}", 6, "guarded needs layer=GLOB"),
        ("water,guarded", 6, "guarded needs layer=GLOB"),
    ],
)
def test_errors_point_at_the_column(text: str, column: int, says: str) -> None:
    error = rejected(text)
    assert error.column == column, str(error)
    assert says in str(error)
    assert re.search(rf"\n  {re.escape(text)}\n  {' ' * column}\^$", str(error))
