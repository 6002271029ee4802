"""Laws of the grids: they are ONNX's, they hold zero, and a searched range is no worse."""

from __future__ import annotations

import functools
import itertools
import math

import hypothesis.extra.numpy as hnp
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile import execute, numerics
from qcompile.errors import PassError
from qcompile.numerics import ActivationMethod, Codes, Floats, Grid, IntFormat, RangeMethod

FORMATS = [IntFormat(bits, signed) for bits in range(2, 9) for signed in (True, False)]
STORED = [IntFormat(bits, signed) for bits in (4, 8) for signed in (True, False)]
TYPES = {"int8": onnx.TensorProto.INT8, "uint8": onnx.TensorProto.UINT8}

formats = st.sampled_from(FORMATS)
# Far from float32's ends, where one scale step more would be infinite.
values = st.floats(-(2.0**60), 2.0**60, width=32)
scales = st.floats(2.0**-40, 2.0**40, width=32)


def arrays(rank: int = 2, longest: int = 9) -> st.SearchStrategy[Floats]:
    shape = hnp.array_shapes(min_dims=rank, max_dims=rank, min_side=1, max_side=longest)
    return hnp.arrays(np.float32, shape, elements=values)


@functools.cache
def operator(kind: str, form: str, axis: int | None) -> execute.Session:
    """QuantizeLinear or DequantizeLinear with every operand an input, at any length."""
    real, whole, flat = onnx.TensorProto.FLOAT, TYPES[form], [] if axis is None else ["C"]
    first, last = (real, whole) if kind == "QuantizeLinear" else (whole, real)
    node = onnx.helper.make_node(kind, ["x", "s", "z"], ["y"], axis=1 if axis is None else axis)
    graph = onnx.helper.make_graph(
        [node],
        kind,
        [
            onnx.helper.make_tensor_value_info("x", first, ["M", "N"]),
            onnx.helper.make_tensor_value_info("s", real, flat),
            onnx.helper.make_tensor_value_info("z", whole, flat),
        ],
        [onnx.helper.make_tensor_value_info("y", last, ["M", "N"])],
    )
    opset = [onnx.helper.make_opsetid("", 21)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)
    return execute.Session(ir.from_proto(model), optimize=False, threads=1)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Floats, Grid]:
    """An array and an 8-bit grid on it, one scale a tensor or a channel."""
    array = draw(arrays())
    form = draw(st.sampled_from([IntFormat(8, True), IntFormat(8, False)]))
    axis = draw(st.sampled_from([None, 0, 1]))
    shape = () if axis is None else (array.shape[axis],)
    scale = draw(hnp.arrays(np.float32, shape, elements=scales))
    zero = draw(hnp.arrays(np.int32, shape, elements=st.integers(form.low, form.high)))
    return array, Grid(form, np.asarray(scale), np.asarray(zero), axis)


@given(problems())
def test_quantize_is_quantize_linear(problem: tuple[Floats, Grid]) -> None:
    array, grid = problem
    stored = np.int8 if grid.format.signed else np.uint8
    session = operator("QuantizeLinear", grid.format.name, grid.axis)
    feeds = {"x": array, "s": grid.scale, "z": grid.zero_point.astype(stored)}
    np.testing.assert_array_equal(grid.quantize(array), session.run(feeds)["y"])


@given(problems())
def test_dequantize_is_dequantize_linear(problem: tuple[Floats, Grid]) -> None:
    array, grid = problem
    stored = np.int8 if grid.format.signed else np.uint8
    session = operator("DequantizeLinear", grid.format.name, grid.axis)
    codes = grid.quantize(array)
    feeds = {"x": codes.astype(stored), "s": grid.scale, "z": grid.zero_point.astype(stored)}
    np.testing.assert_array_equal(grid.dequantize(codes), session.run(feeds)["y"])


def test_ties_go_to_the_even_code() -> None:
    grid = Grid(IntFormat(8, True), np.array(2.0, np.float32), np.array(0, np.int32))
    array = np.array([-3.0, -1.0, 1.0, 3.0, 5.0, 7.0], np.float32)
    assert grid.quantize(array).tolist() == [-2, 0, 0, 2, 2, 4]


@pytest.mark.parametrize(
    ("form", "symmetric"),
    [(form, symmetric) for form in STORED for symmetric in (True, False)[not form.signed :]],
    ids=str,
)
@pytest.mark.parametrize(("axis", "block"), [(None, None), (0, None), (1, None), (0, 4), (1, 2)])
def test_packed_codes_dequantize_in_the_runtime(
    form: IntFormat, axis: int | None, block: int | None, symmetric: bool
) -> None:
    weight = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    grid = numerics.weight_grid(weight, form, axis, block, symmetric)
    codes = grid.quantize(weight)
    attributes = {} if axis is None else {"axis": axis}
    attributes |= {} if block is None else {"block_size": block}
    operands = [
        numerics.pack(codes, form, "codes"),
        ir.Tensor(grid.scale, name="scale"),
        numerics.pack(grid.zero_point, form, "zero_point"),
    ]
    inputs = [ir.Value(name=t.name, const_value=t, type=ir.TensorType(t.dtype)) for t in operands]
    node = ir.Node(
        "",
        "DequantizeLinear",
        inputs,
        attributes=ir.convenience.convert_attributes(attributes),
        outputs=[ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT))],
    )
    graph = ir.Graph(
        [], node.outputs, nodes=[node], initializers=inputs, opset_imports={"": 21}, name="one"
    )
    found = execute.execute(ir.Model(graph, ir_version=10), {})["y"]
    np.testing.assert_array_equal(found, grid.dequantize(codes))


# -- formats ------------------------------------------------------------------------------------


@given(formats)
def test_names_round_trip(form: IntFormat) -> None:
    assert numerics.parse_format(str(form)) == form


@pytest.mark.parametrize(
    "text", ["int9", "int1", "float", "", "INT8", "int8 ", "uint", "int12", "int32"]
)
def test_unknown_formats_are_rejected(text: str) -> None:
    with pytest.raises(PassError, match=r"unknown format .*known are int2 to int8"):
        numerics.parse_format(text)


@given(formats)
def test_a_format_of_b_bits_has_two_to_the_b_codes(form: IntFormat) -> None:
    assert form.high - form.low + 1 == 2**form.bits
    assert form.low <= 0 <= form.high
    assert form.stored.low <= form.low and form.high <= form.stored.high


@given(formats, st.data())
def test_codes_survive_packing(form: IntFormat, data: st.DataObject) -> None:
    shape = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=7)
    codes: Codes = np.asarray(
        data.draw(hnp.arrays(np.int32, shape, elements=st.integers(form.low, form.high)))
    )
    tensor = numerics.pack(codes, form, "codes")
    np.testing.assert_array_equal(numerics.unpack(tensor), codes)
    assert tensor.nbytes == math.ceil(codes.size * form.stored.bits / 8)
    loaded = ir.from_proto(ir.to_proto(tensor))
    np.testing.assert_array_equal(numerics.unpack(loaded), codes)


# -- ranges to grids ----------------------------------------------------------------------------


@given(arrays(1), formats, st.booleans())
def test_codes_lie_within_the_grid(array: Floats, form: IntFormat, symmetric: bool) -> None:
    scale, zero = numerics.affine(array.min(), array.max(), form, symmetric)
    codes = Grid(form, scale, zero).quantize(array * np.float32(1.5))
    assert form.low <= codes.min() and codes.max() <= form.high


@given(values, values, formats, st.booleans())
def test_zero_is_exact(one: float, other: float, form: IntFormat, symmetric: bool) -> None:
    scale, zero = numerics.affine(min(one, other), max(one, other), form, symmetric)
    assert form.low <= int(zero) <= form.high
    assert not Grid(form, scale, zero).round_trip(np.zeros(3, np.float32)).any()


@given(arrays(1), formats, st.booleans())
def test_the_round_trip_errs_by_half_a_step_within_the_range(
    array: Floats, form: IntFormat, symmetric: bool
) -> None:
    if symmetric and not form.signed:
        array = np.abs(array)
    scale, zero = numerics.affine(array.min(), array.max(), form, symmetric)
    error = np.abs(Grid(form, scale, zero).round_trip(array).astype(np.float64) - array)
    # One rounding of the scale, one of the quotient and one of the product, over 255 codes.
    slack = 255 * 4 * float(np.finfo(np.float32).eps)
    assert error.max() <= float(scale) * (0.5 + slack)


@given(arrays(1), st.integers(2, 8))
def test_a_symmetric_signed_grid_leaves_its_lowest_code_unused(array: Floats, bits: int) -> None:
    form = IntFormat(bits, True)
    scale, zero = numerics.affine(array.min(), array.max(), form, True)
    assert Grid(form, scale, zero).quantize(array).min() >= -form.high
    assert int(zero) == 0


@given(values, values, st.booleans(), st.booleans())
def test_steps_shrink_as_bits_rise(one: float, other: float, signed: bool, symmetric: bool) -> None:
    low, high = min(one, other, 0.0), max(one, other, 0.0)
    steps = [
        float(numerics.affine(low, high, IntFormat(bits, signed), symmetric)[0])
        for bits in range(2, 9)
    ]
    # A range of nothing, or one that is smaller than the smallest scale, has no step to shrink.
    if max(abs(low), abs(high)) > 1e-30:
        assert all(a > b for a, b in itertools.pairwise(steps))
    else:
        assert all(a >= b for a, b in itertools.pairwise(steps))


@pytest.mark.parametrize("method", ["minmax", "mse", "pnorm"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("axis", "block"), [(None, None), (1, None), (0, 16)])
def test_error_falls_as_bits_rise(
    method: RangeMethod, symmetric: bool, axis: int | None, block: int | None
) -> None:
    weight = np.random.default_rng(0).standard_normal((32, 24)).astype(np.float32)
    errors: list[float] = []
    for bits in range(2, 9):
        form = IntFormat(bits, True)
        grid = numerics.weight_grid(weight, form, axis, block, symmetric, method)
        errors.append(float(np.mean((grid.round_trip(weight) - weight) ** 2)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 100


def test_error_falls_as_groups_shrink() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 24)).astype(np.float32)
    weight *= np.exp(np.random.default_rng(1).standard_normal((64, 24))).astype(np.float32)
    form = IntFormat(4, True)
    grids = [(None, None), (1, None), (0, 32), (0, 8)]
    errors = [
        float(np.mean((numerics.weight_grid(weight, form, a, b).round_trip(weight) - weight) ** 2))
        for a, b in grids
    ]
    assert errors == sorted(errors, reverse=True)


def test_a_constant_zero_has_a_scale_of_one() -> None:
    grid = numerics.weight_grid(np.zeros((3, 4), np.float32), IntFormat(8, True), 0)
    assert grid.scale.tolist() == [1.0, 1.0, 1.0]
    assert not grid.round_trip(np.zeros((3, 4), np.float32)).any()


def test_the_smallest_numbers_give_a_normal_scale() -> None:
    tiny = float(np.finfo(np.float32).smallest_subnormal)
    scale, _ = numerics.affine(-tiny, tiny, IntFormat(8, True), True)
    assert float(scale) >= numerics.SMALLEST_SCALE


# -- granularity --------------------------------------------------------------------------------


@given(arrays(2), st.sampled_from([0, 1, -1, -2]), formats)
def test_a_channel_grid_is_the_grid_of_each_channel(
    weight: Floats, axis: int, form: IntFormat
) -> None:
    whole = numerics.weight_grid(weight, form, axis).round_trip(weight)
    for index in range(weight.shape[axis]):
        channel = np.take(weight, [index], axis)
        alone = numerics.weight_grid(channel, form, None).round_trip(channel)
        np.testing.assert_array_equal(np.take(whole, [index], axis), alone)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_a_block_grid_is_the_grid_of_each_block(axis: int) -> None:
    weight = np.random.default_rng(0).standard_normal((4, 8, 12)).astype(np.float32)
    form = IntFormat(4, True)
    grid = numerics.weight_grid(weight, form, axis, 4)
    wanted = list(weight.shape)
    wanted[axis] //= 4
    assert list(grid.scale.shape) == wanted
    whole = grid.round_trip(weight)
    for part, rounded in zip(
        np.split(weight, wanted[axis], axis), np.split(whole, wanted[axis], axis), strict=True
    ):
        others = [a for a in range(3) if a != axis % 3]
        for index in np.ndindex(*(weight.shape[a] for a in others)):
            place: list[int | slice] = [slice(None)] * 3
            for other, i in zip(others, index, strict=True):
                place[other] = i
            block = part[tuple(place)]
            alone = numerics.weight_grid(block, form, None).round_trip(block)
            np.testing.assert_array_equal(rounded[tuple(place)], alone)


@pytest.mark.parametrize("block", [0, 3, 16])
def test_a_block_that_does_not_divide_is_rejected(block: int) -> None:
    with pytest.raises(PassError, match=rf"block {block} does not divide axis 0 .*\[8, 2\]"):
        numerics.weight_grid(np.zeros((8, 2), np.float32), IntFormat(4, True), 0, block)


# -- searches -----------------------------------------------------------------------------------


def loss(rows: Floats, ends: tuple[Floats, Floats], form: IntFormat, symmetric: bool, power: float):
    scale, zero = numerics.affine(*ends, form, symmetric)
    error = np.abs(Grid(form, scale, zero, axis=0).round_trip(rows) - rows)
    return np.mean(error.astype(np.float64) ** power, axis=1)


@given(arrays(2), formats, st.booleans(), st.sampled_from([("mse", 2.0), ("pnorm", 2.4)]))
def test_a_searched_range_is_never_worse_than_min_max(
    rows: Floats, form: IntFormat, symmetric: bool, search: tuple[RangeMethod, float]
) -> None:
    method, power = search
    full = numerics.search_range(rows, form, symmetric, "minmax")
    found = numerics.search_range(rows, form, symmetric, method, power=power)
    lost, kept = loss(rows, found, form, symmetric, power), loss(rows, full, form, symmetric, power)
    assert (lost <= kept).all()


@given(arrays(2), formats, st.booleans())
def test_a_searched_range_lies_within_min_max(rows: Floats, form: IntFormat, sym: bool) -> None:
    low, high = numerics.search_range(rows, form, sym, "mse")
    assert (np.abs(low) <= np.abs(rows.min(axis=1))).all()
    assert (np.abs(high) <= np.abs(rows.max(axis=1))).all()


def test_mse_clips_an_outlier() -> None:
    rows = np.append(np.random.default_rng(0).standard_normal(4096), 12.0).astype(np.float32)[None]
    _, high = numerics.search_range(rows, IntFormat(4, True), True, "mse")
    assert 3.0 < high[0] < 11.0


def test_a_percentile_is_two_sided() -> None:
    rows = np.linspace(-1.0, 1.0, 10_001, dtype=np.float32)[None]
    low, high = numerics.search_range(rows, IntFormat(8, True), True, "percentile", percentile=99.0)
    assert low[0] == pytest.approx(-0.98, abs=1e-3)  # pyright: ignore[reportUnknownMemberType]
    assert high[0] == pytest.approx(0.98, abs=1e-3)  # pyright: ignore[reportUnknownMemberType]


@pytest.mark.parametrize("method", numerics.RANGE_METHODS)
def test_an_empty_row_has_an_empty_range(method: RangeMethod) -> None:
    low, high = numerics.search_range(
        np.zeros((2, 0), np.float32), IntFormat(8, True), True, method
    )
    assert low.tolist() == high.tolist() == [0.0, 0.0]


# -- histograms ---------------------------------------------------------------------------------


def histogram(array: Floats, bins: int = 512):
    counts, edges = np.histogram(array.astype(np.float64), bins)
    return counts.astype(np.int64), edges


def histogram_loss(
    counts: np.ndarray, edges: np.ndarray, low: float, high: float, form: IntFormat, power: float
) -> float:
    scale, zero = numerics.affine(low, high, form, symmetric=False)
    centres = (edges[:-1] + edges[1:]) / 2
    codes = np.clip(np.rint(centres / scale) + zero, form.low, form.high)
    return float(counts @ np.abs((codes - zero) * scale - centres) ** power)


@given(arrays(1, 40), st.integers(2, 8), st.sampled_from([("mse", 2.0), ("pnorm", 2.4)]))
def test_a_histogram_search_is_never_worse_than_min_max(
    array: Floats, bits: int, search: tuple[ActivationMethod, float]
) -> None:
    form, (method, power) = IntFormat(bits, False), search
    # numpy's own histogram cannot place numbers a few units in the last place apart.
    array = np.round(array / np.float32(2.0**50), 3)
    counts, edges = histogram(array)
    full = numerics.histogram_range(counts, edges, form, "minmax")
    found = numerics.histogram_range(counts, edges, form, method, power=power)
    kept = histogram_loss(counts, edges, *full, form, power)
    # The same sum in another order.
    assert histogram_loss(counts, edges, *found, form, power) <= kept * (1 + 1e-9)


def test_min_max_of_a_histogram_is_its_extremes() -> None:
    array = np.array([-1.5, 0.0, 0.25, 4.0], np.float32)
    assert numerics.histogram_range(*histogram(array), IntFormat(8, False), "minmax") == (-1.5, 4.0)


def test_a_percentile_of_a_histogram_cuts_both_tails() -> None:
    counts, edges = histogram(np.linspace(-1.0, 1.0, 100_001, dtype=np.float32), 1000)
    low, high = numerics.histogram_range(counts, edges, IntFormat(8, False), "percentile", 90.0)
    # As the two-sided percentile of a row: 10 % on each side, to the width of a bin.
    assert low == pytest.approx(-0.8, abs=0.003)  # pyright: ignore[reportUnknownMemberType]
    assert high == pytest.approx(0.8, abs=0.003)  # pyright: ignore[reportUnknownMemberType]


def test_the_whole_percentile_is_min_max() -> None:
    counts, edges = histogram(np.random.default_rng(0).standard_normal(5000).astype(np.float32))
    form = IntFormat(8, False)
    whole = numerics.histogram_range(counts, edges, form, "percentile", 100.0)
    assert whole == numerics.histogram_range(counts, edges, form, "minmax")


@pytest.mark.parametrize("method", numerics.ACTIVATION_METHODS)
def test_an_empty_histogram_has_an_empty_range(method: ActivationMethod) -> None:
    edges = np.linspace(0.0, 1.0, 9)
    empty = np.zeros(8, np.int64)
    assert numerics.histogram_range(empty, edges, IntFormat(8, False), method) == (0.0, 0.0)


# -- entropy ------------------------------------------------------------------------------------


def divergence(counts: npt.NDArray[np.float64], levels: int, kept: int) -> float:
    """KL of the first ``kept`` bins from themselves on a grid of ``levels``, written out."""
    true = counts[:kept].copy()
    true[-1] += counts[kept:].sum()
    level = np.arange(kept) * levels // kept
    filled = counts[:kept] > 0
    spread = np.zeros(kept)
    for one in range(levels):
        at = level == one
        spread[at & filled] = counts[:kept][at].sum() / max((at & filled).sum(), 1)
    p, q = true[filled] / true.sum(), spread[filled] / spread.sum()
    return float(np.sum(p * np.log(p / q)))


@given(st.integers(0, 99), st.sampled_from([4, 8, 16]), st.floats(0.5, 3.0))
def test_the_entropy_threshold_is_the_least_divergence(
    seed: int, levels: int, heavy: float
) -> None:
    tails = np.abs(np.random.default_rng(seed).standard_normal(3000)) ** heavy
    counts = np.histogram(tails, 64)[0].astype(np.float64)
    found = numerics.entropy_threshold(counts, levels)
    counts[0] = min(counts[0], counts[1])
    ends = [i for i in range(levels, 65) if counts[i - 1] > 0]
    least = min(divergence(counts, levels, i) for i in ends)
    assert divergence(counts, levels, found) == pytest.approx(least, rel=1e-9, abs=1e-11)  # pyright: ignore[reportUnknownMemberType]


@given(arrays(1, 60), st.integers(2, 8))
def test_an_entropy_range_is_within_the_extremes_and_always_the_same(
    array: Floats, bits: int
) -> None:
    counts, edges = histogram(np.round(array / np.float32(2.0**50), 3))
    form = IntFormat(bits, False)
    low, high = numerics.histogram_range(counts, edges, form, "minmax")
    found = numerics.histogram_range(counts, edges, form, "entropy")
    assert low <= found[0] <= found[1] <= high
    assert found == numerics.histogram_range(counts, edges, form, "entropy")


def test_entropy_cuts_what_is_far_from_all_else_and_keeps_what_is_even() -> None:
    rng = np.random.default_rng(0)
    form = IntFormat(8, False)
    normal = np.append(rng.standard_normal(100_000), 60.0).astype(np.float32)
    _, high = numerics.histogram_range(*histogram(normal, 2048), form, "entropy")
    assert 3 < high < 6
    even = rng.uniform(-1, 1, 100_000).astype(np.float32)
    low, high = numerics.histogram_range(*histogram(even, 2048), form, "entropy")
    assert low < -0.99 and high > 0.99


def test_a_spike_at_zero_does_not_cut_the_rest() -> None:
    # Behind a Relu half of all numbers are zero.
    relu = np.maximum(np.random.default_rng(0).standard_normal(100_000), 0).astype(np.float32)
    low, high = numerics.histogram_range(*histogram(relu, 2048), IntFormat(8, False), "entropy")
    assert low == 0.0 and high > 3


def test_entropy_of_numbers_far_from_zero_needs_no_more_bins() -> None:
    far = np.float32(1e6) + np.arange(100, dtype=np.float32)
    low, high = numerics.histogram_range(*histogram(far), IntFormat(8, False), "entropy")
    assert 1e6 <= low <= high <= 1e6 + 100
