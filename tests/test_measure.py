"""--measure: layers that lose in integers stay float, and the text makes the file again."""

from __future__ import annotations

import pathlib
from typing import Any

import graphs
import lowering
import numpy as np
import onnx_ir as ir
import pytest

import qcompile
from qcompile import execute, graph, pipeline, registry, spec
from qcompile.backends import ort_isa, ort_measure
from qcompile.backends.onnxruntime import OrtCpu
from qcompile.backends.ort_measure import Choice, Profile
from qcompile.errors import CalibrationError, TargetError

CHAIN = """(float[1,8,8,8] x) => (float[1,8,8,8] y)
<float[8,8,1,1] u, float[8,8,1,1] v, float[8,8,1,1] w> {
    a = Conv(x, u)
    r = Relu(a)
    b = Conv(r, v)
    t = Tanh(b)
    y = Conv(t, w)
}"""


def cut(floats: dict[str, float], integers: dict[str, float], conversions: float) -> set[str]:
    """The layers of CHAIN that the assignment leaves in float."""
    model = lowering.graph_of(CHAIN)
    calibration = lowering.decide(model)
    layers = list(graph.layers(model))
    return ort_measure.cut(
        model, layers, Profile(floats, 0.0), Profile(integers, conversions),
        calibration.shapes(model),
    )  # fmt: skip


def test_a_layer_that_is_slower_in_integers_stays_float() -> None:
    assert cut({"a": 9, "b": 9, "y": 1}, {"a": 1, "b": 1, "y": 9}, 0) == {"y"}


def test_borders_make_an_island_worth_less() -> None:
    floats, integers = {"a": 9.0, "b": 9.0, "y": 9.0}, {"a": 5.0, "b": 5.0, "y": 5.0}
    assert cut(floats, integers, 0.0) == set()
    # Four borders of one size: two around a and b, two around y, which alone saves 4.
    assert cut(floats, integers, 12.0) == {"y"}
    assert cut(floats, integers, 40.0) == {"a", "b", "y"}


def test_the_cut_is_the_best_of_all_assignments() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        floats, integers = (
            dict(zip("aby", map(float, t), strict=True)) for t in rng.uniform(0, 9, (2, 3))
        )
        conversions = float(rng.uniform(0, 20))
        each = conversions / 4

        def cost(left: set[str], f: dict[str, float] = floats, i: dict[str, float] = integers,
                 each: float = each) -> float:  # fmt: skip
            total = sum(f[n] if n in left else i[n] for n in "aby")
            a, b, y = (n not in left for n in "aby")
            return total + each * (a + (a != b) + b + 2 * y)

        every = [{n for k, n in enumerate("aby") if number >> k & 1} for number in range(8)]
        found = cut(floats, integers, conversions)
        assert cost(found) == pytest.approx(min(map(cost, every)))


def test_the_choice_as_text_makes_the_same_decisions() -> None:
    model = lowering.graph_of(CHAIN)
    calibration = lowering.decide(model)
    choice = Choice(float=("a", "y"))
    wanted = ort_measure.changed(model, choice)
    steps = pipeline.parse(",".join(choice.texts()), registry.passes())
    pipeline.run(model, steps, pipeline.Context(calibration=calibration, target=OrtCpu()))
    assert decisions(model) == decisions(wanted)
    [node] = [n for n in model.graph if n.name == "a"]
    assert node.metadata_props[graph.REASON] == "faster in float here"


def decisions(model: ir.Model) -> dict[str, Any]:
    return {n.name or "": spec.all_specs(n) for n in model.graph}


@pytest.mark.parametrize("name", ["a", "layer[0]/x", "two words", "a,b", "{c}", "what?*"])
def test_a_glob_of_a_name_matches_it_and_stands_in_the_text(name: str) -> None:
    glob = graph.glob_of(name)
    assert graph.matches(ir.Node("", "Conv", [], name=name), glob)
    text = f"set{{layer={glob} weight=float}}"
    assert str(pipeline.parse(text, registry.passes())[0]) == text


def test_a_measured_run_is_made_again_by_its_text(tmp_path: pathlib.Path) -> None:
    model = lowering.graph_of(CHAIN)
    options: dict[str, Any] = {"calib": graphs.samples(model, 10), "allow_float": True}
    [result] = qcompile.compile(model, tmp_path / "one", measure=True, **options)
    text = result.report.pipeline
    [again] = qcompile.compile(lowering.graph_of(CHAIN), tmp_path / "two", passes=text, **options)
    assert again.report.share == result.report.share
    files = [(r.folder / "model.onnx").read_bytes() for r in (result, again)]
    assert files[0] == files[1]
    assert (result.folder / "pipeline.txt").read_text() == (
        again.folder / "pipeline.txt"
    ).read_text()


def test_what_does_not_run_here_has_nothing_to_measure(tmp_path: pathlib.Path) -> None:
    model = lowering.graph_of(CHAIN)
    other = "arm" if ort_isa.machine() != "arm" else "avx2"
    for target, message in (
        ("tensorrt-rtx", "nothing to measure"),
        (f"ort-cpu{{isa={other}}}", "measures this machine"),
    ):
        with pytest.raises(TargetError, match=message):
            qcompile.compile(
                model, tmp_path / "out", targets=(target,), calib="random", measure=True
            )


def test_measuring_needs_data(tmp_path: pathlib.Path) -> None:
    with pytest.raises(CalibrationError, match="give --calib"):
        qcompile.compile(lowering.graph_of(CHAIN), tmp_path / "out", measure=True)


def test_a_profile_times_every_node_by_its_name() -> None:
    model = lowering.graph_of(CHAIN)
    [sample] = graphs.samples(model)
    found = execute.profile(model, sample, 0.01)
    assert {kind for _, kind in found} >= {"Conv"}
    assert all(duration >= 0 for duration in found.values())
