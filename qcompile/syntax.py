"""The one text syntax, for passes and targets alike: ``name{option=value option=a,b},name``.

Options are split by spaces, items of a list by commas. An option is a field of the frozen dataclass
that the name stands for, and its type says what a value may be. ``parse`` and ``render``
round-trip; options at their default are not printed. Errors point at the column.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin

from qcompile.errors import PipelineSyntaxError, QCompileError, nearest

T = TypeVar("T")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_OPTION = re.compile(r"([A-Za-z_][A-Za-z0-9_-]*)=([^\s{}]*)")


@dataclasses.dataclass(frozen=True)
class Option:
    """One ``key=value`` and the columns where key and value start."""

    key: str
    value: str
    column: int
    value_column: int


@dataclasses.dataclass(frozen=True)
class Item:
    """One ``name{...}`` and the column where it starts."""

    name: str
    options: tuple[Option, ...]
    column: int


def items(text: str) -> list[Item]:
    """Split ``text`` into its items; raise PipelineSyntaxError where that is impossible."""
    found: list[Item] = []
    position = 0
    while True:
        position = _skip_spaces(text, position)
        match = _NAME.match(text, position)
        if match is None:
            got = f"got {text[position]!r}" if position < len(text) else "the text ends"
            raise PipelineSyntaxError(f"expected a name, {got}", text, position)
        start, position = position, match.end()
        options: tuple[Option, ...] = ()
        if position < len(text) and text[position] == "{":
            options, position = _options(text, position)
        found.append(Item(match[0], options, start))
        position = _skip_spaces(text, position)
        if position == len(text):
            return found
        if text[position] != ",":
            raise PipelineSyntaxError(
                f"expected ',' or '{{' after {match[0]!r}, got {text[position]!r}", text, position
            )
        position += 1


def _options(text: str, brace: int) -> tuple[tuple[Option, ...], int]:
    end = text.find("}", brace)
    if end < 0:
        raise PipelineSyntaxError("this brace is never closed", text, brace)
    found: list[Option] = []
    position = brace + 1
    while (position := _skip_spaces(text, position)) < end:
        match = _OPTION.match(text, position, end)
        if match is None:
            raise PipelineSyntaxError("expected option=value", text, position)
        if any(match[1] == option.key for option in found):
            raise PipelineSyntaxError(f"option {match[1]!r} is given twice", text, position)
        found.append(Option(match[1], match[2], position, match.start(2)))
        position = match.end()
        if position < end and not text[position].isspace():
            raise PipelineSyntaxError(f"unexpected {text[position]!r}", text, position)
    return tuple(found), end + 1


def _skip_spaces(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def build(item: Item, known: Mapping[str, type[T]], what: str, text: str) -> T:
    """The object that ``item`` of ``text`` names, with its options.

    Args:
        item: one of ``items(text)``.
        known: the classes by name; each is a frozen dataclass whose fields are the options.
        what: "pass" or "target", for messages.
        text: the whole text, for messages.
    """
    if item.name not in known:
        hint = nearest(item.name, known)
        raise PipelineSyntaxError(f"unknown {what} {item.name!r}; {hint}", text, item.column)
    kind = known[item.name]
    types_of = options_of(kind)
    values: dict[str, Any] = {}
    for option in item.options:
        field = option.key.replace("-", "_")
        if field not in types_of:
            hint = nearest(option.key, [n.replace("_", "-") for n in types_of])
            hint = hint if types_of else f"{item.name} takes no options"
            raise PipelineSyntaxError(
                f"{item.name} has no option {option.key!r}; {hint}", text, option.column
            )
        try:
            values[field] = convert(option.value, types_of[field])
        except ValueError as error:
            raise PipelineSyntaxError(
                f"option {option.key!r} of {item.name}: {error}", text, option.value_column
            ) from None
    try:
        return kind(**values)
    except QCompileError as error:
        column = _culprit(item, kind, values)
        raise PipelineSyntaxError(f"{item.name}: {error}", text, column) from error


def _culprit(item: Item, kind: type[Any], values: Mapping[str, Any]) -> int:
    """The column of the option without which ``kind`` takes the others; else that of the item."""
    for option in item.options:
        field = option.key.replace("-", "_")
        try:
            kind(**{key: value for key, value in values.items() if key != field})
        except QCompileError:
            continue
        return option.value_column
    return item.column


def options_of(kind: type[Any]) -> dict[str, Any]:
    """The options of a class and their types, in the order of its fields."""
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind) if f.init}


def convert(text: str, kind: Any) -> Any:
    """``text`` as a value of type ``kind``; raise ValueError that says what is wanted."""
    origin = get_origin(kind)
    if origin is Literal:
        if text not in get_args(kind):
            raise ValueError(f"{text!r} is not one of {', '.join(get_args(kind))}")
        return text
    if origin in (types.UnionType, typing.Union):
        if text == "none":
            return None
        for word in get_args(kind):
            if get_origin(word) is Literal and text in get_args(word):
                return text
        return convert(text, next(a for a in get_args(kind) if a is not type(None)))
    if origin is tuple:
        inner = get_args(kind)[0]
        return tuple(convert(part, inner) for part in text.split(",") if part)
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(f"{text!r} is not true or false")
        return text == "true"
    if kind is int:
        if not re.fullmatch(r"[+-]?\d+", text):
            raise ValueError(f"{text!r} is not a whole number")
        return int(text)
    if kind is float:
        try:
            return float(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a number") from None
    return text


def describe(kind: Any) -> str:
    """What ``convert`` takes for the type ``kind``, in words."""
    origin = get_origin(kind)
    if origin is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if origin in (types.UnionType, typing.Union):
        one, *others = (a for a in get_args(kind) if a is not type(None))
        words = [w for other in others for w in get_args(other)] or ["none"]
        return f"{describe(one)}, or {', '.join(words)}"
    if origin is tuple:
        inner = get_args(kind)[0]
        one, _, others = describe(inner).partition(",")
        return f"list of {one}s{',' + others if others else ''}"
    words = {bool: "true or false", int: "whole number", float: "number"}
    return words.get(kind, "word")


def render(name: str, value: Any) -> str:
    """The text of one object: its name and the options that are not at their default."""
    shown: list[str] = []
    for field in dataclasses.fields(value):
        current = getattr(value, field.name)
        if field.init and current != field.default:
            shown.append(f"{field.name.replace('_', '-')}={plain(current)}")
    return f"{name}{{{' '.join(shown)}}}" if shown else name


def plain(value: Any) -> str:
    """The text of an option's value."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(plain(v) for v in typing.cast("Sequence[Any]", value))
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)
