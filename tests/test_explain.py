"""Laws of what ``qcompile passes`` and ``qcompile targets`` print."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable

import pytest
from rich.console import Console

from qcompile import compiler, explain, pipeline, recipes, registry, syntax
from qcompile.errors import QCompileError

PASSES, TARGETS = registry.passes(), registry.targets()
WIDTHS = [80, 140]


def printed(show: Callable[..., None], *words: str, width: int = 80) -> str:
    out = io.StringIO()
    show(Console(file=out, width=width), *words)
    return out.getvalue()


def options(text: str) -> dict[str, str]:
    """What stands behind each ``name=default`` of the section "options"."""
    section = text.partition("\noptions\n")[2].partition("\n\n")[0]
    unwrapped = re.sub(r"\n {3,}(?=\S)", " ", section)
    return dict(line.split(None, 1) for line in unwrapped.splitlines() if "=" in line.split()[0])


@pytest.mark.parametrize("width", WIDTHS)
def test_lists_name_all_there_is_and_fit_the_terminal(width: int) -> None:
    for show, known in ((explain.list_passes, PASSES), (explain.list_targets, TARGETS)):
        lines = printed(show, width=width).splitlines()
        assert [line.split()[0] for line in lines if re.match(r"  [\w-]", line)] == list(known)
        assert all(len(line) <= width and line == line.rstrip() for line in lines)
    assert set(recipes.RECIPES) == set(recipes.MEANINGS)
    for name, meaning in recipes.MEANINGS.items():
        assert f"  @{name} " in printed(explain.list_passes, width=width)
        assert meaning.split(":")[0].split()[0] in printed(explain.list_passes, width=width)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_recipe_is_explained_pass_by_pass_and_ends_in_a_line_to_copy(name: str) -> None:
    text = recipes.RECIPES[name]
    *said, usage = printed(explain.explain_pass, f"@{name}", width=140).splitlines()
    assert said[0] == f"@{name}: {recipes.MEANINGS[name]}"
    assert usage.endswith(f"--passes '{text}'")
    for step in pipeline.parse(text, PASSES):
        assert any(line.startswith(f"  {step} ") for line in said)


@pytest.mark.parametrize("width", WIDTHS)
def test_explanations_fit_the_terminal_but_for_the_line_to_copy(width: int) -> None:
    for show, known in ((explain.explain_pass, PASSES), (explain.explain_target, TARGETS)):
        for name in known:
            *lines, heading, _ = printed(show, name, width=width).splitlines()
            assert heading == "usage"
            assert all(len(line) <= width and line == line.rstrip() for line in lines)


@pytest.mark.parametrize("name", [*PASSES, *TARGETS])
def test_every_option_has_its_default_its_values_and_a_meaning(name: str) -> None:
    kind = {**PASSES, **TARGETS}[name]
    show = explain.explain_pass if name in PASSES else explain.explain_target
    shown = options(printed(show, name))
    types_of = syntax.options_of(kind)
    defaults = {f.name: syntax.plain(f.default) for f in dataclasses.fields(kind) if f.init}
    assert list(shown) == [f"{k.replace('_', '-')}={v}" for k, v in defaults.items()]
    for said, option in zip(shown.values(), types_of.values(), strict=True):
        values, _, meaning = said.partition("; ")
        assert values == syntax.describe(option)
        assert meaning


@pytest.mark.parametrize("name", PASSES)
def test_the_usage_of_a_pass_is_a_pipeline_that_can_run(name: str) -> None:
    usage = printed(explain.explain_pass, name).splitlines()[-1]
    match = re.fullmatch(r"  qcompile MODEL --calib DATA --passes '(.+)'", usage)
    assert match is not None
    passes = pipeline.parse(match[1], PASSES)
    assert name in [step.name for step in passes]
    pipeline.check(passes, [compiler.parse_target("ort-cpu")])


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_is_explained_with_its_formats_and_every_rule(name: str) -> None:
    shown = printed(explain.explain_target, name)
    kind = TARGETS[name]
    assert re.search(f"  weights +{', '.join(kind.weight_formats)}\n", shown)
    rules = shown.partition("\nrules, in order\n")[2].partition("\n\n")[0]
    assert re.findall(r"^  ([\w-]+)", rules, re.M) == [rule.name for rule in kind.dialect]
    assert shown.splitlines()[-1] == f"  qcompile MODEL --calib DATA --target {name}"


@pytest.mark.parametrize(
    ("show", "name", "says"),
    [
        (explain.explain_pass, "quantise", "unknown pass 'quantise'; did you mean 'quantize'?"),
        (explain.explain_pass, "@int9", "did you mean 'int8'?"),
        (explain.explain_target, "ort", "unknown target 'ort'; did you mean 'ort-cpu'?"),
    ],
)
def test_an_unknown_name_gets_the_nearest(show: Callable[..., None], name: str, says: str) -> None:
    with pytest.raises(QCompileError, match=re.escape(says)):
        printed(show, name)
