"""Laws of the passes that decide: calibrate, quantize, set. Nothing is lowered here."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphs import CHAIN, CONV, GEMM, LINEAR, Array, assert_same_function, graph, samples, weight

from qcompile import decisions as deciding
from qcompile import execute, histograms, noise, numerics, pipeline, registry, spec, text
from qcompile import graph as graphs
from qcompile.calibrate import Calibration
from qcompile.deciding import Granularity
from qcompile.errors import CalibrationError, PassError
from qcompile.numerics import ActivationMethod, IntFormat, RangeMethod
from qcompile.passes.calibrate import Calibrate
from qcompile.passes.quantize import Quantize
from qcompile.passes.set import Set
from qcompile.pipeline import Context, Pass, Stats
from qcompile.sources import Data
from qcompile.spec import TensorSpec

ATTENTION = """(float[2,4,8] q, float[2,8,6] k) => (float[2,4,6] y) { y = MatMul(q, k) }"""
EMBEDDING = """(int64[2,3] ids) => (float[2,3,4] y) <float[10,8] t, float[8,4] w> {
    e = Gather(t, ids) y = MatMul(e, w) }"""
SHARED = """(float[2,8] x) => (float[2,8] y) <float[8,8] w> {
    h = MatMul(x, w) r = Relu(h) y = MatMul(r, w) }"""
EMPTY = "(float[4] x) => (float[4] y) { y = Neg(x) }"
FORMATS = ["int8", "int4", "int2"]


def context(model: ir.Model, count: int = 4, seed: int = 1, seed_of_run: int = 0) -> Context:
    data = Data("test", samples(model, count, seed))
    return Context(seed=seed_of_run, calibration=Calibration(data))


def run(model: ir.Model, *passes: Pass) -> list[Stats]:
    return [step.counters for step in pipeline.run(model, passes, context(model))]


def decided(source: str, *passes: Pass) -> ir.Model:
    model = graph(source)
    run(model, Calibrate(), *passes)
    return model


def decisions(model: ir.Model) -> dict[str, dict[int, str]]:
    return {
        node.name or "": {i: str(s) for i, s in spec.all_specs(node).items()}
        for node in model.graph
        if spec.all_specs(node)
    }


@pytest.mark.parametrize("source", [LINEAR, GEMM, CONV, CHAIN, ATTENTION, EMBEDDING, EMPTY])
def test_deciding_keeps_the_float_function(source: str) -> None:
    model = graph(source)
    reference = model.clone()
    run(model, Calibrate(), Quantize(attention="int8"))
    assert_same_function(reference, model)


@pytest.mark.parametrize("text", ["calibrate", "quantize", "set{layer=y}"])
def test_the_text_round_trips(text: str) -> None:
    [step] = pipeline.parse(text, registry.passes())
    assert str(step) == text


@pytest.mark.parametrize("method", numerics.RANGE_METHODS)
def test_the_same_decisions_come_out(method: RangeMethod) -> None:
    found: list[bytes] = []
    for jobs in (1, 2):
        model = graph(CHAIN)
        ctx = context(model)
        ctx.jobs = jobs
        pipeline.run(model, [Calibrate(), Quantize(method=method)], ctx)
        found.append(ir.to_proto(model).SerializeToString())
    assert found[0] == found[1]


# -- calibrate ----------------------------------------------------------------------------------


def test_calibrate_adds_ranges_only() -> None:
    model = graph(CHAIN)
    before = text.render(model)
    assert run(model, Calibrate()) == [{"values": 4, "samples": 4}]
    assert text.changes(before, text.render(model)) == [
        "+w %h/range: f32[2]",
        "+w %r/range: f32[2]",
        "+w %x/range: f32[2]",
        "+w %y/range: f32[2]",
    ]


def observed(model: ir.Model, value: str, count: int = 4) -> Array:
    return np.stack(
        [execute.execute(model, feeds, [value])[value] for feeds in samples(model, count)]
    )


def test_min_max_is_the_extremes_of_every_sample() -> None:
    model = graph(CHAIN)
    run(model, Calibrate())
    for name in ("h", "r", "y"):
        [value] = [v for n in model.graph for v in n.outputs if v.name == name]
        seen = observed(model, name)
        found = graphs.range_of(model, value)
        assert found is not None
        # Reductions inside an optimized graph may fuse, and so round, differently.
        np.testing.assert_allclose(found, (seen.min(), seen.max()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["percentile", "mse", "pnorm", "entropy"])
@pytest.mark.parametrize("bits", [4, 8])
def test_other_methods_stay_within_the_extremes(method: ActivationMethod, bits: int) -> None:
    full, model = graph(CHAIN), graph(CHAIN)
    run(full, Calibrate())
    run(model, Calibrate(method=method, percentile=95.0, bits=bits))
    for name in ("x/range", "h/range", "r/range"):
        (low, high), (lowest, highest) = weight(model, name), weight(full, name)
        assert lowest <= low <= high <= highest


def test_more_samples_never_narrow_the_extremes() -> None:
    few, many = graph(CHAIN), graph(CHAIN)
    for model, count in ((few, 2), (many, 4)):
        pipeline.run(model, [Calibrate()], context(model, count))
    for name in ("x/range", "h/range", "y/range"):
        assert weight(many, name)[0] <= weight(few, name)[0]
        assert weight(many, name)[1] >= weight(few, name)[1]


def test_calibrating_again_overwrites() -> None:
    model = graph(LINEAR)
    run(model, Calibrate(method="percentile", percentile=60.0))
    run(model, Calibrate())
    fresh = graph(LINEAR)
    run(fresh, Calibrate())
    assert text.render(model, weights=True) == text.render(fresh, weights=True)


def test_a_model_without_layers_is_no_error() -> None:
    assert run(graph(EMPTY), Calibrate(), Quantize()) == [
        {"values": 0, "samples": 4},
        {"weights": 0, "inputs": 0, "products": 0, "tables": 0, "spared": 0},
    ]


def test_a_value_that_is_not_finite_is_named_with_its_sample() -> None:
    model = graph("""(float[4] x) => (float[4] y) <float[4,4] w> {
        l = Log(x) y = MatMul(l, w) }""")
    with pytest.raises(CalibrationError, match=r"value 'l' has NaN or infinity for sample 0"):
        run(model, Calibrate())


# -- quantize -----------------------------------------------------------------------------------


def test_quantize_adds_decisions_and_scales_only() -> None:
    model = graph(CHAIN)
    run(model, Calibrate())
    before = text.render(model)
    assert run(model, Quantize()) == [
        {"weights": 2, "inputs": 2, "products": 0, "tables": 0, "spared": 0}
    ]
    assert text.changes(before, text.render(model)) == [
        "+w %w1/scale: f32[8]",
        "+w %w2/scale: f32[4]",
        "-%h: f32[2,8] = MatMul(%x, %w1)",
        "+%h: f32[2,8] = MatMul(%x{int8 asymmetric}, %w1{int8 axis=1})",
        "-%y: f32[2,4] = MatMul(%r, %w2)",
        "+%y: f32[2,4] = MatMul(%r{int8 asymmetric}, %w2{int8 axis=1})",
    ]


@pytest.mark.parametrize(
    ("source", "granularity", "block", "axis", "shape"),
    [
        (LINEAR, "tensor", 32, None, ()),
        (LINEAR, "channel", 32, 1, (3,)),
        (LINEAR, "block", 4, 0, (2, 3)),
        (GEMM, "channel", 32, 0, (3,)),
        (GEMM, "block", 2, 1, (3, 4)),
        (CONV, "channel", 32, 0, (4,)),
        (CONV, "block", 4, 0, (4,)),  # a Conv has no block form: one scale a channel
        (CONV, "tensor", 4, None, ()),
    ],
)
def test_scales_have_the_granularity_that_was_asked_for(
    source: str, granularity: str, block: int, axis: int | None, shape: tuple[int, ...]
) -> None:
    options = f"{{granularity={granularity} block={block}}}"
    [step] = pipeline.parse(f"quantize{options}", registry.passes())
    model = decided(source, step)
    [layer] = graphs.layers(model)
    assert layer.weight.spec is not None
    assert layer.weight.spec.axis == axis
    assert (layer.weight.spec.block is not None) == (len(shape) == 2)
    assert weight(model, layer.weight.spec.scale).shape == shape


@pytest.mark.parametrize("form", ["int8", "int4", "int2"])
def test_the_scale_is_that_of_numerics(form: str) -> None:
    model = decided(CHAIN, Quantize(weight=form, method="mse"))
    for layer in graphs.layers(model):
        found = layer.weight.spec
        assert found is not None and found.format == form and found.symmetric
        grid = numerics.weight_grid(
            graphs.constant(layer.weight.value), numerics.parse_format(form), 1, method="mse"
        )
        np.testing.assert_array_equal(weight(model, found.scale), grid.scale)


def test_an_activation_is_decided_by_the_name_of_its_range() -> None:
    model = decided(CHAIN, Quantize())
    for layer, name in zip(graphs.layers(model), ["x/range", "r/range"], strict=True):
        assert layer.input is not None
        assert layer.input.spec == TensorSpec("int8", symmetric=False, range=name)


def test_error_falls_as_bits_rise() -> None:
    errors: list[float] = []
    for bits in range(2, 9):
        model = decided(LINEAR, Quantize(weight=f"int{bits}", input="float"))
        [layer] = graphs.layers(model)
        found = layer.weight.spec
        assert found is not None
        scale = weight(model, found.scale)
        grid = numerics.Grid(IntFormat(bits, True), scale, np.zeros(scale.shape, np.int32), 1)
        array = graphs.constant(layer.weight.value)
        errors.append(float(np.mean((grid.round_trip(array) - array) ** 2)))
    assert errors == sorted(errors, reverse=True)


def test_ends_are_the_layers_before_and_behind_all_others() -> None:
    source = """(float[2,8] x) => (float[2,8] y, float[2,8] z)
    <float[8,8] w1, float[8,8] w2, float[8,8] w3, float[8,8] w4, float[8,8] w5> {
        a = MatMul(x, w1)
        b = Relu(x)
        c = MatMul(b, w2)
        d = Add(a, c)
        e = MatMul(d, w3)
        y = MatMul(e, w4)
        z = MatMul(e, w5)
    }"""
    found = decisions(decided(source, Quantize(weight="int4", input="int5", ends="int8")))
    narrow, wide = (
        {0: f"{a} asymmetric", 1: f"{w} axis=1"} for a, w in (("int5", "int4"), ("int8", "int8"))
    )
    assert found == {"a": wide, "c": wide, "e": narrow, "y": wide, "z": wide}
    alone = decisions(decided(source, Quantize(weight="int4", input="float", ends="int8")))
    assert alone["e"] == {1: "int4 axis=1"} and alone["y"] == {1: "int8 axis=1"}


def test_symmetric_inputs_are_decided_when_asked_for() -> None:
    model = decided(CHAIN, Quantize(symmetric=True))
    assert decisions(model)["y"] == {0: "int8", 1: "int8 axis=1"}


def test_a_scale_at_run_time_has_eight_bits() -> None:
    with pytest.raises(PassError, match="scale=dynamic has 8 bits, not int4"):
        decided(CHAIN, Quantize(input="int4", scale="dynamic"))


def test_weight_only_leaves_every_input_float() -> None:
    assert decisions(decided(CHAIN, Quantize(weight="int4", input="float"))) == {
        "h": {1: "int4 axis=1"},
        "y": {1: "int4 axis=1"},
    }


def test_a_later_weight_only_takes_the_inputs_back() -> None:
    model = decided(CHAIN, Quantize(), Quantize(input="float", include=("y",)))
    assert decisions(model)["y"] == {1: "int8 axis=1"}


def test_products_of_activations_are_decided_on_both_sides_when_asked_for() -> None:
    assert decisions(decided(ATTENTION, Quantize())) == {}
    assert decisions(decided(ATTENTION, Quantize(attention="int8"))) == {
        "y": {0: "int8 asymmetric", 1: "int8 asymmetric"}
    }


def test_an_embedding_is_left_alone() -> None:
    assert list(decisions(decided(EMBEDDING, Quantize()))) == ["y"]


def test_readers_of_one_weight_share_its_scale() -> None:
    model = decided(SHARED, Quantize())
    first, second = (layer.weight.spec for layer in graphs.layers(model))
    assert first is not None and first == second
    assert [n for n in model.graph.initializers if n.endswith("/scale")] == ["w/scale"]


def test_included_and_excluded_layers() -> None:
    assert list(decisions(decided(CHAIN, Quantize(include=("y",))))) == ["y"]
    assert list(decisions(decided(CHAIN, Quantize(exclude=("y",))))) == ["h"]
    assert decisions(decided(CHAIN, Quantize(exclude=("MatMul",)))) == {}


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_glob_that_matches_nothing_is_rejected(option: str) -> None:
    [step] = pipeline.parse(f"quantize{{{option}=head*}}", registry.passes())
    with pytest.raises(PassError, match=rf"{option}=head\* matches no layer; known are h, y"):
        decided(CHAIN, step)


def test_a_block_that_does_not_divide_is_rejected() -> None:
    with pytest.raises(PassError, match=r"quantize\{.*block=3\}: block 3 divides .*'y' has 8"):
        decided(LINEAR, Quantize(granularity="block", block=3))


def test_what_a_block_does_not_divide_has_a_scale_a_channel_beside_what_it_divides() -> None:
    source = CHAIN.replace("w1, float[8] b1, float[8,4] w2", "w1, float[8] b1, float[6,4] w2")
    source = source.replace("float[8,8] w1, float[8] b1", "float[8,6] w1, float[6] b1")
    model = decided(source, Quantize(granularity="block", block=4))
    assert {name: found[1] for name, found in decisions(model).items()} == {
        "h": "int8 axis=0 block=4",
        "y": "int8 axis=1",
    }


@pytest.mark.parametrize("weight_format", ["int4", "int2"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
@pytest.mark.parametrize("source", [LINEAR, GEMM, CONV])
def test_errors_that_are_weighed_by_the_data_are_never_more_than_of_the_extremes(
    source: str, granularity: Granularity, weight_format: str
) -> None:
    losses: dict[str, float] = {}
    methods: tuple[RangeMethod, ...] = ("minmax", "output")
    for method in methods:
        model = graph(source)
        ctx = uneven(model)
        how = Quantize(
            weight=weight_format, input="float", granularity=granularity, block=4, method=method
        )
        pipeline.run(model, [how], ctx)
        [layer] = graphs.layers(model)
        assert layer.input is not None and layer.weight.spec is not None
        axis = noise.channel_axis(layer)
        power = ctx.data().moments(model, {"x": axis}, 64)["x"].power
        array = graphs.finite_weight(layer)
        error = deciding.rounded(model, layer.weight.value, layer.weight.spec) - array
        losses[method] = float((noise.along_input(layer, power, array.shape) * error**2).sum())
    # Rounding of float32 in the sums that are compared.
    assert losses["output"] <= losses["minmax"] * (1 + 1e-6)


def uneven(model: ir.Model) -> Context:
    """Data with one channel that is far larger than the others."""
    drawn = samples(model, 6)
    for feeds in drawn:
        feeds["x"][:, 1] *= 20.0
    return Context(calibration=Calibration(Data("test", drawn)))


def test_weighing_errors_by_the_data_needs_data() -> None:
    assert Quantize(method="output", input="float").needs_data()
    assert not Quantize(method="mse", input="float").needs_data()
    with pytest.raises(PassError, match="needs calibration data"):
        pipeline.run(graph(LINEAR), [Quantize(method="output", input="float")], Context())


def small_and_large(small: int, large: int) -> ir.Model:
    """``small`` layers of 8 x 8 weights in a row, then one of 8 x ``large``."""
    steps = " ".join(f"h{i + 1} = MatMul(h{i}, w{i})" for i in range(small))
    weights = ", ".join(f"float[8,8] w{i}" for i in range(small))
    return graph(
        f"(float[4,8] h0) => (float[4,{large}] y) <{weights}, float[8,{large}] w> "
        f"{{ {steps} y = MatMul(h{small}, w) }}"
    )


@pytest.mark.parametrize(
    ("large", "least", "spared"),
    [(784, 0.0, 0), (784, 0.9, 0), (784, 1.1, 2), (6384, 0.13, 2), (84, 4.0, 0)],
)
def test_layers_below_a_share_of_macs_and_weights_stay_float(
    large: int, least: float, spared: int
) -> None:
    model = small_and_large(2, large)
    reference = model.clone()
    *_, stats = run(model, Calibrate(), Quantize(least=least))
    assert stats["spared"] == spared
    assert len(decisions(model)) == 3 - spared
    reasons = [node.metadata_props.get(graphs.REASON, "") for node in model.graph]
    assert sum("% of the MACs" in reason for reason in reasons) == spared
    assert_same_function(reference, model)


def test_many_small_layers_do_not_all_stay_float() -> None:
    model = small_and_large(100, 8)
    *_, stats = run(model, Calibrate(), Quantize(least=1.0))
    # Each has 0.99 % and 20 % may stay.
    assert stats["spared"] == 20


def test_a_small_layer_with_large_weights_is_quantized() -> None:
    # One row against 64: a hundredth of the MACs, a third of the weights.
    source = """(float[64,16] x, float[1,16] z) => (float[64,16] y, float[1,16] r)
        <float[16,16] a, float[16,16] b, float[16,16] w> {
        h = MatMul(x, a) y = MatMul(h, b) r = MatMul(z, w) }"""
    *_, stats = run(graph(source), Calibrate(), Quantize(least=2.0))
    assert stats["spared"] == 0


def test_sparing_small_layers_takes_back_what_was_decided() -> None:
    model = small_and_large(2, 784)
    run(model, Calibrate(), Quantize(), Quantize(least=1.1))
    assert len(decisions(model)) == 1


@pytest.mark.parametrize("least", [-1.0, 5.0, float("nan")])
def test_a_share_out_of_bounds_is_rejected(least: float) -> None:
    with pytest.raises(PassError, match="least is a percentage from 0 and below 5"):
        Quantize(least=least)


def test_sparing_small_layers_needs_data() -> None:
    assert Quantize(least=0.1).needs_data() and not Quantize().needs_data()


def test_the_percentile_of_all_numbers_is_their_range() -> None:
    model = graph(LINEAR)
    every, counted = model.clone(), model.clone()
    run(every, Calibrate())
    run(counted, Calibrate(method="percentile", percentile=100.0))
    wide = graphs.range_of(every, every.graph.inputs[0])
    assert wide is not None
    step = (wide[1] - wide[0]) / histograms.BINS
    found = graphs.range_of(counted, counted.graph.inputs[0])
    assert found == pytest.approx(wide, abs=1.01 * step)


def test_an_input_without_a_range_is_rejected() -> None:
    with pytest.raises(PassError, match=r"quantize: 'x' has no range; calibrate first"):
        run(graph(LINEAR), Quantize())


# -- set ----------------------------------------------------------------------------------------


def test_set_rewrites_only_the_layer_that_it_names() -> None:
    model = decided(CHAIN, Quantize())
    before = text.render(model)
    assert run(model, Set(layer=("y",), weight="int4", input="keep")) == [{"layers": 1}]
    changes = text.changes(before, text.render(model))
    assert [line for line in changes if not line[1:].startswith("w ")] == [
        "-%y: f32[2,4] = MatMul(%r{int8 asymmetric}, %w2{int8 axis=1})",
        "+%y: f32[2,4] = MatMul(%r{int8 asymmetric}, %w2{int4 axis=1})",
    ]


def test_set_makes_a_layer_float_again_and_says_so() -> None:
    model = decided(CHAIN, Quantize(), Set(layer=("y",), weight="float", input="float"))
    assert list(decisions(model)) == ["h"]
    reasons = {n.name: n.metadata_props.get(graphs.REASON) for n in model.graph}
    assert reasons["y"] == "set{layer=y weight=float input=float}"
    assert reasons["h"] is None


def test_set_decides_a_layer_that_was_left_out_without_a_reason_for_float() -> None:
    step = Set(layer=("y",), weight="int4", input="int8")
    model = decided(CHAIN, Quantize(exclude=("y",)), step)
    assert decisions(model)["y"] == {0: "int8 asymmetric", 1: "int4 axis=1"}
    assert graphs.REASON not in next(n for n in model.graph if n.name == "y").metadata_props


def test_the_last_set_wins() -> None:
    model = decided(
        CHAIN, Quantize(), Set(layer=("*",), weight="int4"), Set(layer=("h",), weight="int2")
    )
    assert {name: found[1] for name, found in decisions(model).items()} == {
        "h": "int2 axis=1",
        "y": "int4 axis=1",
    }


def test_readers_of_one_weight_may_be_set_apart() -> None:
    model = decided(SHARED, Quantize(), Set(layer=("y",), weight="int4"))
    first, second = (layer.weight.spec for layer in graphs.layers(model))
    assert first is not None and second is not None
    assert (first.format, second.format) == ("int8", "int4")
    assert not np.array_equal(weight(model, first.scale), weight(model, second.scale))


def test_keep_changes_nothing() -> None:
    model = decided(CHAIN, Quantize())
    before = text.render(model, weights=True)
    run(model, Set(layer=("*",)))
    assert text.render(model, weights=True) == before


@pytest.mark.parametrize(
    "step",
    [Set(layer=("head",), weight="int4"), Set(layer=("h", "head"), input="float")],
    ids=str,
)
def test_set_on_no_layer_is_rejected(step: Set) -> None:
    with pytest.raises(PassError, match=r"layer=head matches no layer; .*known are h, y"):
        decided(CHAIN, Quantize(), step)
