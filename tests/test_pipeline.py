"""Laws of the pipeline: what cannot work is refused before it starts, and a lie is caught."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from graphs import CHAIN, CONV, LINEAR, graph, samples
from hypothesis import given
from hypothesis import strategies as st

from qcompile import graph as graphs
from qcompile import pipeline, recipes, registry, simulate, spec
from qcompile.calibrate import Calibration
from qcompile.compiler import parse_target
from qcompile.errors import (
    PassBug,
    PassError,
    PipelineSyntaxError,
    QCompileError,
    TargetError,
)
from qcompile.passes.calibrate import Calibrate
from qcompile.passes.fold_bn import FoldBn
from qcompile.passes.insert_qdq import InsertQdq
from qcompile.passes.quantize import Quantize
from qcompile.passes.simplify import Simplify
from qcompile.passes.smooth_hadamard import SmoothHadamard
from qcompile.pipeline import Context, Pass, Stats, Step, Watch
from qcompile.sources import Data
from qcompile.spec import TensorSpec

PASSES = registry.passes()

# Every built-in pass, with every option away from its default.
TEXTS = [
    "cast-half{dtype=bfloat16 keep=Softmax margin=2.5}",
    "simplify",
    "recompose",
    "fold-bn",
    "smooth-hadamard",
    "align-norms{samples=16}",
    "equalize",
    "equalize{weight=int4 input=float block=32}",
    "bias-correct",
    "bias-correct{rows=8}",
    "gptq",
    "gptq{damping=0.1 samples=8 rows=16 exclude=a}",
    "gptaq{damping=0.2 samples=8 rows=16 exclude=a,b}",
    "reconstruct{method=brecq granularity=layer steps=10 batch=2 rate=0.2 range-rate=0.01"
    " samples=4 decide=0.5 device=cuda}",
    "calibrate-affine{gains=none temporal=flow flow-weight=0.1 steps=10 batch=2 rate=0.1 frames=2"
    " samples=4 device=cuda}",
    "assign-bits",
    "low-rank",
    "learn-scales",
    "learn-scales{loss=kl outputs=logits*,y rate=0.01}",
    "smooth-hadamard{block=4 exclude=head,Gemm}",
    "calibrate",
    "calibrate{method=percentile percentile=99.5 bits=4}",
    "quantize",
    "quantize{weight=int4 input=uint8 granularity=block block=16 method=mse attention=int8"
    " include=layer*,Conv exclude=*/head}",
    "set{layer=head weight=float}",
    "set{layer=a,b weight=int4 input=int8 granularity=tensor block=8 method=pnorm}",
    "insert-qdq",
]


def calibrated(model: ir.Model, count: int = 2) -> Context:
    return Context(calibration=Calibration(Data("test", samples(model, count))))


def judged(model: ir.Model) -> Watch:
    """Measures against ``model`` as it is now, and insists on it."""
    judge = simulate.Judge(model.clone(), samples(model, 2))
    target = parse_target("ort-cpu")

    def measure(changed: ir.Model) -> float:
        return judge.worst(simulate.simulate(changed, target))

    return Watch(measure=measure, check_numerics=True)


# -- text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*TEXTS, ",".join(TEXTS), *recipes.RECIPES.values()])
def test_text_round_trips(text: str) -> None:
    passes = pipeline.parse(text, PASSES)
    assert pipeline.to_text(passes) == text
    assert pipeline.parse(pipeline.to_text(passes), PASSES) == passes


def test_every_pass_is_in_the_round_trip() -> None:
    assert {p.name for p in pipeline.parse(",".join(TEXTS), PASSES)} == set(PASSES)


@pytest.mark.parametrize(
    ("text", "column", "says"),
    [
        ("simplify,fold_bn", 9, "unknown pass 'fold_bn'; did you mean 'fold-bn'?"),
        ("simplify,calibrate{metod=mse}", 19, "no option 'metod'; did you mean 'method'?"),
        ("calibrate{method=max}", 17, "'max' is not one of minmax, percentile, mse, pnorm"),
        ("simplify,fold-bn{all=true}", 17, "fold-bn takes no options"),
        ("quantize{input=int8 weight=int9}", 27, "unknown format 'int9'"),
        ("quantize{input=int8 block=0}", 26, "block must be at least 1, got 0"),
        ("quantize{weight=float}", 16, "a quantized input needs a quantized weight"),
        ("smooth-hadamard{block=6}", 22, "must be a power of two from 2, got 6"),
        ("calibrate{percentile=20}", 21, "percentile must lie between 50 and 100, got 20"),
        ("calibrate{percentile=nan}", 21, "percentile must lie between 50 and 100, got nan"),
        ("calibrate{bits=16}", 15, "bits must be 2 to 8, got 16"),
        ("calibrate,set{weight=int8}", 10, "set needs layer=GLOB"),
        ("set{layer=a weight=fp8}", 19, "unknown format 'fp8'"),
    ],
)
def test_a_wrong_text_points_at_the_column(text: str, column: int, says: str) -> None:
    with pytest.raises(PipelineSyntaxError) as caught:
        pipeline.parse(text, PASSES)
    assert says in str(caught.value)
    assert caught.value.column == column, str(caught.value)


def test_a_recipe_is_its_text() -> None:
    assert recipes.expand("@int8") == recipes.RECIPES["int8"]
    assert recipes.expand("simplify") == "simplify"


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_passes_the_checks(name: str) -> None:
    passes = pipeline.parse(recipes.expand(f"@{name}"), PASSES)
    pipeline.check(passes, [parse_target("ort-cpu")])


def test_a_recipe_file_holds_a_pass_a_line(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "my.txt"
    file.write_text("# ours\nsimplify,\n\n  quantize{block=8}  # small blocks\n")
    assert recipes.expand(f"@{file}") == "simplify,quantize{block=8}"


def test_an_unknown_recipe_is_rejected() -> None:
    with pytest.raises(QCompileError, match=r"no recipe .* 'int9'; did you mean 'int8'\?"):
        recipes.expand("@int9")


def test_an_empty_recipe_file_is_rejected(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "none.txt"
    file.write_text("# nothing\n")
    with pytest.raises(QCompileError, match="names no pass"):
        recipes.expand(f"@{file}")


# -- the order ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pair", "works"),
    [
        (
            "quantize,calibrate,insert-qdq",
            "quantize requires 'ranges', which only calibrate behind it produces",
            "calibrate,quantize,insert-qdq",
        ),
        (
            "calibrate,smooth-hadamard,quantize,insert-qdq",
            "smooth-hadamard invalidates the 'ranges' that quantize requires",
            "smooth-hadamard,calibrate,quantize,insert-qdq",
        ),
        (
            "simplify,calibrate,quantize,fold-bn,insert-qdq",
            "fold-bn invalidates the 'specs' that insert-qdq requires",
            "simplify,fold-bn,calibrate,quantize,insert-qdq",
        ),
        (
            "calibrate,set{layer=a},quantize,set{layer=b},insert-qdq",
            "set requires 'specs', which only quantize behind it produces",
            "calibrate,quantize,set{layer=a},set{layer=b},insert-qdq",
        ),
        (
            "calibrate,quantize,insert-qdq,fold-bn",
            "fold-bn stands after the lowering",
            "fold-bn,calibrate,quantize,insert-qdq",
        ),
    ],
)
def test_an_impossible_order_names_the_pair_and_one_that_works(
    text: str, pair: str, works: str
) -> None:
    with pytest.raises(PassError) as caught:
        pipeline.check(pipeline.parse(text, PASSES), [])
    assert pair in str(caught.value)
    assert str(caught.value).endswith(f"this order works: {works}")
    pipeline.check(pipeline.parse(works, PASSES), [])


@given(
    st.lists(
        st.sampled_from([*TEXTS[:3], "calibrate", "quantize", "set{layer=a}", "insert-qdq"]),
        min_size=1,
        max_size=7,
    )
)
def test_a_suggested_order_works_and_holds_the_same_passes(texts: list[str]) -> None:
    passes = pipeline.parse(",".join(texts), PASSES)
    try:
        pipeline.check(passes, [])
    except PassError as error:
        _, found, order = str(error).partition("this order works: ")
        if found:
            suggested = pipeline.parse(order, PASSES)
            pipeline.check(suggested, [])
            assert sorted(map(str, suggested)) == sorted(map(str, passes))


def test_every_shuffle_of_a_recipe_is_put_right() -> None:
    text = "fold-bn,smooth-hadamard,calibrate,quantize,gptq,insert-qdq"
    passes = pipeline.parse(text, PASSES)
    for shuffled in itertools.permutations(passes):
        try:
            pipeline.check(shuffled, [])
        except PassError as error:
            assert "this order works: " in str(error)


def test_what_no_pass_produces_is_said() -> None:
    with pytest.raises(PassError, match="insert-qdq requires 'specs', which no pass of this"):
        pipeline.check(pipeline.parse("simplify,insert-qdq", PASSES), [])
    with pytest.raises(PassError, match="set requires 'specs', which no pass of this"):
        pipeline.check(pipeline.parse("calibrate,set{layer=a}", PASSES), [])


@pytest.mark.parametrize("text", ["quantize{weight=uint8}", "set{layer=a weight=uint4}"])
def test_a_format_that_the_target_lacks_is_refused_first(text: str) -> None:
    passes = pipeline.parse(f"calibrate,quantize,{text},insert-qdq", PASSES)
    with pytest.raises(TargetError, match=r"ort-cpu holds no uint\d weights \(asked for by "):
        pipeline.check(passes, [parse_target("ort-cpu")])


def test_a_missing_extra_is_refused_first() -> None:
    @dataclasses.dataclass(frozen=True)
    class Needy(Nothing):
        needs: ClassVar[frozenset[str]] = frozenset({"no_such_package"})

    with pytest.raises(PassError, match=r"pip install 'qcompile\[no_such_package\]'"):
        pipeline.check([Needy()], [])


def test_the_fork_stands_before_the_first_pass_for_a_target() -> None:
    passes = pipeline.parse("simplify,calibrate,quantize,insert-qdq", PASSES)
    shared, forked = pipeline.fork(passes)
    assert pipeline.to_text(shared) == "simplify,calibrate,quantize"
    assert forked == [InsertQdq()]
    assert pipeline.fork([Simplify(), FoldBn()]) == ([Simplify(), FoldBn()], [])


# -- the run ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Nothing(Pass):
    """Does nothing."""

    name: ClassVar[str] = "nothing"
    keeps_float: ClassVar[bool] = True

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        return {}


@dataclasses.dataclass(frozen=True)
class Dangle(Nothing):
    """Makes the first node read a value that nothing writes."""

    name: ClassVar[str] = "dangle"
    deep: bool = False

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        model.graph[0].replace_input_with(0, ir.Value(name="nowhere"))
        return {"broken": 1}


@dataclasses.dataclass(frozen=True)
class Lose(Nothing):
    """Forgets which layer a node stands for."""

    name: ClassVar[str] = "lose"

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        graphs.set_origins(model.graph[0], [])
        return {}


@dataclasses.dataclass(frozen=True)
class Twin(Nothing):
    """Gives two nodes one name."""

    name: ClassVar[str] = "twin"

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        model.graph[1].name = model.graph[0].name
        return {}


@dataclasses.dataclass(frozen=True)
class Mistype(Nothing):
    """Writes an attribute that the operator does not know."""

    name: ClassVar[str] = "mistype"

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        model.graph[0].attributes["colour"] = ir.AttrInt64("colour", 7)
        return {}


@dataclasses.dataclass(frozen=True)
class Unscale(Nothing):
    """Names a scale that does not exist."""

    name: ClassVar[str] = "unscale"

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        spec.write(model.graph[0], 1, TensorSpec("int8", scale="gone"))
        return {}


@dataclasses.dataclass(frozen=True)
class Scale(Nothing):
    """Multiplies every weight, and says that the function is kept."""

    name: ClassVar[str] = "scale"
    by: float = 1.01

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        for layer in graphs.layers(model):
            weight = graphs.constant(layer.weight.value) * np.float32(self.by)
            layer.weight.read_from(graphs.add_constant(model, "scaled", weight))
        return {}


@dataclasses.dataclass(frozen=True)
class Fail(Nothing):
    """Refuses what it was asked for."""

    name: ClassVar[str] = "fail"
    layer: str = "y"

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        raise PassError("no such layer")


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (Dangle(deep=True), r"pass dangle\{deep=true\} broke the graph: .* reads 'nowhere'"),
        (Lose(), r"pass lose broke the graph: the captured layer 'h' is lost"),
        (Twin(), r"pass twin broke the graph: two nodes are named 'h'"),
        (Mistype(), r"pass mistype broke the graph: .*colour"),
        (Unscale(), r"pass unscale broke .*: a spec of node 'h' names 'gone', which is lost"),
    ],
    ids=lambda case: str(case).split(" ")[0],
)
def test_a_pass_that_breaks_the_graph_is_named(broken: Pass, says: str) -> None:
    with pytest.raises(PassBug, match=says):
        pipeline.run(graph(CHAIN), [Nothing(), broken], Context())


def test_without_verify_a_broken_graph_goes_through() -> None:
    pipeline.run(graph(CHAIN), [Twin()], Context(), Watch(verify=False))


def test_findings_from_before_are_not_blamed_on_a_pass() -> None:
    model = graph(CHAIN)
    model.graph[0].attributes["colour"] = ir.AttrInt64("colour", 7)
    pipeline.run(model, [Simplify()], Context())


@pytest.mark.parametrize("by", [1.01, float("nan"), 0.0])
def test_check_numerics_catches_a_pass_that_lies(by: float) -> None:
    model = graph(CHAIN)
    with pytest.raises(PassBug, match=r"pass scale\S* changed the float function"):
        pipeline.run(model, [Nothing(), Scale(by=by)], Context(), judged(model))


def test_check_numerics_believes_a_pass_that_does_not() -> None:
    model = graph(CHAIN)
    passes = [Simplify(), SmoothHadamard(block=4, place="everywhere"), Calibrate()]
    pipeline.run(model, passes, calibrated(model), judged(model))


def test_check_numerics_asks_nothing_of_a_pass_that_promises_nothing() -> None:
    @dataclasses.dataclass(frozen=True)
    class Honest(Scale):
        keeps_float: ClassVar[bool] = False

    model = graph(CHAIN)
    [step] = pipeline.run(model, [Honest()], Context(), judged(model))
    assert step.sqnr_before == float("inf")
    # 1.01 twice in a row: 2 % of the signal is noise, 34 dB.
    assert step.sqnr_after is not None and 30.0 < step.sqnr_after < 40.0


def test_a_refusal_names_the_pass_as_it_was_asked_for() -> None:
    with pytest.raises(PassError, match=r"^fail\{layer=z\}: no such layer$"):
        pipeline.run(graph(LINEAR), [Fail(layer="z")], Context())


def test_each_step_is_recorded_and_observed() -> None:
    seen: list[tuple[int, str]] = []

    def after(position: int, step: Pass, model: ir.Model, done: Step) -> None:
        assert done.text == str(step)
        seen.append((position, done.text))

    model = graph(LINEAR)
    passes = [Nothing(), SmoothHadamard(block=8, place="everywhere")]
    steps = pipeline.run(model, passes, Context(), Watch(after=after), first=3)
    assert seen == [(3, "nothing"), (4, "smooth-hadamard{block=8 place=everywhere}")]
    assert [step.counters for step in steps] == [
        {},
        {"layers": 1, "rotations": 1, "left alone": 0},
    ]
    assert not steps[0].changed and steps[1].changed
    assert all(step.sqnr_before is None and step.sqnr_after is None for step in steps)


def test_a_pass_that_changes_only_numbers_has_changed_lines() -> None:
    @dataclasses.dataclass(frozen=True)
    class Overwrite(Nothing):
        def run(self, model: ir.Model, ctx: Context) -> Stats:
            zeros = np.zeros((8, 3), np.float32)
            model.graph.initializers["w"].const_value = ir.Tensor(zeros, name="w")
            return {}

    [step] = pipeline.run(graph(LINEAR), [Overwrite()], Context())
    assert [line[:3] for line in step.changed] == ["-w ", "+w "]


def test_what_a_pass_invalidates_is_gone() -> None:
    model = graph(CHAIN)
    ctx = calibrated(model)
    pipeline.run(model, [Calibrate(), Quantize(), SmoothHadamard(block=8, place="everywhere")], ctx)
    assert not any(spec.all_specs(node) for node in model.graph)
    assert not any(graphs.range_name(v) for node in model.graph for v in node.outputs)
    assert not any(name.endswith(("/scale", "/range")) for name in model.graph.initializers)


def test_a_layer_that_a_second_quantize_leaves_out_is_not_lowered_with_a_stale_scale() -> None:
    model = graph(CHAIN)
    ctx = calibrated(model)
    again = Quantize(exclude=("h",))
    pipeline.run(
        model,
        [Calibrate(), Quantize(), SmoothHadamard(block=8, place="everywhere"), Calibrate(), again],
        ctx,
    )
    assert [bool(layer.weight.spec) for layer in graphs.layers(model)] == [False, True]


# -- the services of a pass ---------------------------------------------------------------------


def test_randomness_depends_on_the_seed_and_the_key_only() -> None:
    draws = {
        (seed, key): tuple(Context(seed=seed).rng(key).standard_normal(4))
        for seed in (0, 1)
        for key in ("a", "b")
    }
    assert len(set(draws.values())) == 4
    ctx = Context(seed=1)
    ctx.rng("a").standard_normal(9)
    assert tuple(ctx.rng("a").standard_normal(4)) == draws[1, "a"]


def test_map_is_in_order_whatever_the_number_of_jobs() -> None:
    # A function of a library, because worker processes cannot import this file.
    numbers = [math.factorial(n) for n in range(20)]
    found = [Context(jobs=jobs).map(math.isqrt, numbers, "roots") for jobs in (1, 2)]
    assert found[0] == found[1] == [math.isqrt(n) for n in numbers]


def test_a_pass_that_reads_data_says_how_to_give_it() -> None:
    with pytest.raises(PassError, match=r"calibrate: .* calibration data: give --calib"):
        pipeline.run(graph(LINEAR), [Calibrate()], Context())


def test_the_same_passes_write_the_same_bytes() -> None:
    def once() -> bytes:
        model = graph(CONV)
        passes = [Simplify(), Calibrate(method="mse"), Quantize(method="mse"), InsertQdq()]
        ctx = calibrated(model, 4)
        ctx.target = parse_target("ort-cpu")
        pipeline.run(model, passes, ctx)
        return ir.to_proto(model).SerializeToString()

    assert once() == once()
