"""Statistics equal to numpy's, judges kept apart, a cache that is keyed by content."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any, cast

import graphs
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qcompile import (
    bench,
    calibrate,
    content,
    execute,
    graph,
    histograms,
    numerics,
    patches,
    pipeline,
    ports,
    registry,
    sequences,
    simulate,
    sources,
)  # fmt: skip
from qcompile.backends.onnxruntime import OrtCpu
from qcompile.calibrate import Calibration, MinMax, Moments
from qcompile.errors import CalibrationError
from qcompile.histograms import Histogram
from qcompile.sequences import Sample, Samples
from qcompile.sources import Data

Array = npt.NDArray[Any]

TWO_LAYERS = """(float[N,4] x) => (float[N,2] y) <float[4,3] w1, float[3,2] w2> {
    h = MatMul(x, w1)
    r = Relu(h)
    y = MatMul(r, w2)
}"""
PICTURE = """(float[N,2,4,4] x) => (float[N,3,4,4] y) <float[3,2,1,1] w> {
    y = Conv(x, w)
}"""


X = ports.Port("x", np.dtype(np.float32), (1, 3))


def numbers(*shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


# -- judges -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "judges"), [(5, 1), (20, 4), (80, 16), (200, 16)])
def test_judges_are_apart_from_samples(count: int, judges: int) -> None:
    samples: list[Sample] = [{"x": np.full(1, i, np.float32)} for i in range(count)]
    calibration = Calibration(Data("test", samples))
    assert calibration.apart
    assert len(calibration.judges) == judges
    assert [*calibration.samples, *calibration.judges] == samples


def test_too_few_samples_judge_themselves_and_say_so() -> None:
    listed: list[Sample] = [{"x": numbers(1, 3)}, {"x": numbers(2, 3)}]
    calibration = Calibration(Data("test", listed))
    assert not calibration.apart
    assert list(calibration.samples) == list(calibration.judges) == listed


def test_judges_are_whole_sequences() -> None:
    data = sources.load([[{"x": numbers(1, 3)}] * n for n in range(1, 11)], [X])
    calibration = Calibration(data)
    assert (calibration.samples.sequences, calibration.judges.sequences) == (8, 2)
    assert (len(calibration.samples), len(calibration.judges)) == (36, 19)
    assert calibration.judges.where(0) == "frame 0 of sequence 8"


# -- statistics ---------------------------------------------------------------------------------


def calibrated(text: str, count: int = 10) -> tuple[ir.Model, Calibration]:
    model = graphs.graph(text)
    return model, Calibration(Data("test", graphs.samples(model, count)))


def every(model: ir.Model, calibration: Calibration, value: str) -> list[Array]:
    """What ``value`` holds for each calibration sample."""
    return [execute.execute(model, sample, [value])[value] for sample in calibration.samples]


@pytest.mark.parametrize("value", ["x", "h", "r", "y"])
def test_min_max_equals_numpy_over_all_samples(value: str) -> None:
    model, calibration = calibrated(TWO_LAYERS)
    found = calibration.stats(model, [value], "minmax")[value]
    assert isinstance(found, MinMax)
    arrays = every(model, calibration, value)
    # The optimized runtime may sum in another order.
    assert found.low == pytest.approx(min(a.min() for a in arrays), rel=1e-6)
    assert found.high == pytest.approx(max(a.max() for a in arrays), rel=1e-6)


def test_the_judges_are_not_observed() -> None:
    model = graphs.graph(TWO_LAYERS)
    samples = graphs.samples(model, 10)
    for sample in samples[8:]:
        sample["x"] *= 100
    found = Calibration(Data("test", samples)).stats(model, ["x"], "minmax")["x"]
    assert isinstance(found, MinMax) and found.high < 10


def test_a_value_that_is_always_empty_has_the_range_zero() -> None:
    model = graphs.graph("(float[N,2] x) => (float[N,2] y) { y = Relu(x) }")
    samples = [{"x": np.zeros((0, 2), np.float32)}] * 3
    found = Calibration(Data("test", samples)).stats(model, ["x", "y"], "minmax")
    assert found == {"x": MinMax(0.0, 0.0), "y": MinMax(0.0, 0.0)}


@pytest.mark.parametrize("value", ["x", "r"])
def test_a_histogram_counts_every_element_between_the_extremes(value: str) -> None:
    model, calibration = calibrated(TWO_LAYERS)
    found = calibration.stats(model, [value], "histogram")[value]
    assert isinstance(found, Histogram)
    numbers = np.concatenate([a.ravel() for a in every(model, calibration, value)])
    assert found.counts.sum() == numbers.size
    assert len(found.counts) == histograms.BINS == len(found.edges) - 1
    wanted, _ = np.histogram(numbers.astype(np.float64), found.edges)
    # A number within rounding of an edge may fall on either side of it.
    assert np.abs(np.cumsum(found.counts) - np.cumsum(wanted)).max() <= 1


def test_a_constant_value_has_a_histogram() -> None:
    model = graphs.graph("(float[N,2] x) => (float[N,2] y) { z = Sub(x, x) y = Relu(z) }")
    calibration = Calibration(Data("test", graphs.samples(model, 3)))
    found = calibration.stats(model, ["z"], "histogram")["z"]
    assert isinstance(found, Histogram) and found.counts.sum() == 12


@pytest.mark.parametrize(
    ("text", "value", "axes"), [(TWO_LAYERS, "h", (0,)), (PICTURE, "y", (0, 2, 3))]
)
def test_moments_equal_numpy_per_channel(text: str, value: str, axes: tuple[int, ...]) -> None:
    model, calibration = calibrated(text)
    found = calibration.stats(model, [value], "moments")[value]
    assert isinstance(found, Moments)
    whole = np.concatenate(every(model, calibration, value)).astype(np.float64)
    np.testing.assert_allclose(found.mean, whole.mean(axis=axes), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.variance, whole.var(axis=axes), rtol=1e-5)
    assert found.count == whole.size // whole.shape[1]


def test_moments_of_rank_3_are_of_the_last_axis() -> None:
    model, calibration = calibrated("(float[N,3,4] x) => (float[N,3,4] y) { y = Relu(x) }")
    found = calibration.stats(model, ["y"], "moments")["y"]
    assert isinstance(found, Moments) and found.mean.shape == (4,)


@pytest.mark.parametrize("observer", ["minmax", "histogram", "moments"])
def test_nan_inside_the_model_names_value_and_sample(observer: calibrate.Observer) -> None:
    model = graphs.graph("(float[N,2] x) => (float[N,2] y) { l = Sqrt(x) y = Relu(l) }")
    samples = [{"x": np.abs(s["x"]) + 1} for s in graphs.samples(model, 10)]
    samples[3]["x"] = -samples[3]["x"]
    with pytest.raises(CalibrationError, match="value 'l' has NaN or infinity for sample 3"):
        Calibration(Data("test", samples)).stats(model, ["x", "l"], observer)


CUT = """(float[1,3,8,8] x) => (float[1,3,8,8] y) <float low = {LOW}, float high = {2.0}> {
    h = Sin(x)
    y = Clip(h, low, high)
}"""


def test_what_is_cut_at_zero_starts_there_and_what_is_cut_below_does_not() -> None:
    x = np.random.default_rng(0).uniform(0.5, 1.5, (1, 3, 8, 8)).astype(np.float32)
    for low, least in (("0.0", 0.0), ("-1.0", float(np.sin(x).min()))):
        model = graphs.graph(CUT.replace("LOW", low))
        found = Calibration(Data("test", [{"x": x}])).stats(model, ["y"], "minmax")["y"]
        assert isinstance(found, MinMax)
        np.testing.assert_allclose([found.low, found.high], [least, np.sin(x).max()], rtol=1e-6)


@pytest.mark.parametrize("place", [0, 100, 191])
def test_one_nan_in_a_picture_is_found(place: int) -> None:
    model = graphs.graph(CUT.replace("LOW", "0.0").replace("Sin", "Sqrt"))
    x = np.ones((1, 3, 8, 8), np.float32)
    x.reshape(-1)[place] = -1.0
    with pytest.raises(CalibrationError, match="value 'h' has NaN"):
        Calibration(Data("test", [{"x": x}])).stats(model, ["h"], "minmax")


LISTED = """(float[N,4] x) => (float[N,2] y, int64[] n) {
    two = Constant<value_ints=[2, 2]>()
    parts = SplitToSequence<axis=1>(x, two)
    one = Constant<value_int=1>()
    y = SequenceAt(parts, one)
    n = SequenceLength(parts)
}"""


@pytest.mark.parametrize("text", [TWO_LAYERS, PICTURE, CUT.replace("LOW", "0.0"), LISTED])
def test_shapes_are_those_of_the_values(text: str) -> None:
    model = graphs.graph(text)
    for node in model.graph:
        if node.op_type == "SplitToSequence":
            node.outputs[0].type = ir.SequenceType(ir.TensorType(ir.DataType.FLOAT))
            node.outputs[0].shape = None
    calibration = Calibration(Data("test", graphs.samples(model, 3)))
    names = [v.name or "" for node in model.graph for v in node.outputs]
    values = execute.execute(model, calibration.samples[0], names)
    wanted = {name: np.shape(value) for name, value in values.items()}
    found = calibration.shapes(model)
    assert {name: found[name] for name in names} == wanted
    assert calibration.shapes(model) == found


def test_what_a_relu_alone_reads_has_no_range() -> None:
    model, _ = calibrated(TWO_LAYERS)
    wanted = calibrate.quantizable_values(model)
    assert "h" not in wanted and {"x", "r"} <= set(wanted)


@pytest.mark.parametrize("place", [0, 37, 63])
def test_one_nan_among_numbers_is_found(place: int) -> None:
    # ONNX Runtime's ReduceMin and ReduceMax pass over a NaN that is not alone.
    model = graphs.graph("(float[1,64] x) => (float[1,64] y) { l = Sqrt(x) y = Relu(l) }")
    x = np.ones((1, 64), np.float32)
    x[0, place] = -1.0
    with pytest.raises(CalibrationError, match="value 'l' has NaN"):
        Calibration(Data("test", [{"x": x}])).stats(model, ["l"], "minmax")


@pytest.mark.parametrize("observer", ["minmax", "histogram", "moments"])
def test_nan_in_a_sequence_names_its_frame(observer: calibrate.Observer) -> None:
    model = graphs.graph("(float[N,2] x) => (float[N,2] y) { l = Sqrt(x) y = Relu(l) }")
    frames = [{"x": np.ones((1, 2), np.float32)} for _ in range(12)]
    frames[7]["x"] = -frames[7]["x"]
    data = sources.load([frames[i : i + 3] for i in range(0, 12, 3)], ports.inputs_of(model))
    with pytest.raises(CalibrationError, match="'l' has NaN or infinity for frame 1 of sequence 2"):
        Calibration(data).stats(model, ["l"], observer)


def test_a_constant_far_from_zero_has_a_histogram_and_ranges() -> None:
    model = graphs.graph("(float[N,2] x) => (float[N,2] y) { z = Sub(x, x) y = Exp(z) }")
    calibration = Calibration(Data("test", graphs.samples(model, 3)))
    found = calibration.stats(model, ["y"], "histogram")["y"]
    assert isinstance(found, Histogram) and found.counts.sum() == 12
    for method in numerics.ACTIVATION_METHODS:
        low, high = numerics.histogram_range(
            found.counts, found.edges, numerics.IntFormat(8, False), cast("Any", method)
        )
        assert low <= 1.0 <= high + 1e-3


# -- grams --------------------------------------------------------------------------------------

GROUPED = """(float[N,4,7,6] x) => (float[N,6,4,3] y) <float[6,2,3,2] w> {
    y = Conv<group=2, pads=[1,0,2,1], strides=[2,2]>(x, w)
}"""
DILATED = """(float[N,2,9] x) => (float[N,3,5] y) <float[3,2,3] w> {
    y = Conv<dilations=[2]>(x, w)
}"""
DEPTHWISE = """(float[N,3,5,5] x) => (float[N,3,3,3] y) <float[3,1,3,3] w> {
    y = Conv<group=3, auto_pad="SAME_LOWER", strides=[2,2]>(x, w)
}"""
TRANSPOSED = """(float[4,N] x) => (float[N,3] y) <float[3,4] w> {
    y = Gemm<transA=1, transB=1>(x, w)
}"""
DEEP = "(float[N,5,4] x) => (float[N,5,3] y) <float[4,3] w> { y = MatMul(x, w) }"


def weights_of(layer: graph.Layer) -> npt.NDArray[np.float64]:
    """The weight of a layer as the matrices that rows are multiplied with: [groups, K, N]."""
    array = graph.constant(layer.weight.value).astype(np.float64)
    if layer.kind == "linear":
        return (array.T if layer.channel_axis == 0 else array)[None]
    groups = graph.attribute(layer.node, "group", 1)
    return array.reshape(groups, array.shape[0] // groups, -1).swapaxes(1, 2)


@pytest.mark.parametrize(
    "text", [TWO_LAYERS, PICTURE, GROUPED, DILATED, DEPTHWISE, TRANSPOSED, DEEP]
)
def test_a_gram_gives_the_power_of_the_layer_s_output(text: str) -> None:
    # The sum of the squares of X @ W is the trace of W.T @ gram @ W, for every column of W.
    model, calibration = calibrated(text)
    layers = list(graph.layers(model))
    for name, gram in calibration.grams(model, layers).items():
        layer = next(one for one in layers if one.name == name)
        weights = weights_of(layer)
        matrix = gram.matrix.reshape(weights.shape[0], weights.shape[1], -1)
        power = np.einsum("gkn,gkl,gln->gn", weights, matrix, weights).ravel()
        value = layer.output.name or ""
        outputs = [a.astype(np.float64) for a in every(model, calibration, value)]
        channel = 1 if layer.kind in ("conv", "depthwise") else -1
        wanted = sum(np.moveaxis(a, channel, -1).reshape(-1, power.size) ** 2 for a in outputs)
        np.testing.assert_allclose(power, np.sum(wanted, axis=0), rtol=1e-4)
        assert gram.rows == sum(a.size for a in outputs) // power.size


def test_the_gram_of_a_linear_layer_equals_numpy() -> None:
    model, calibration = calibrated(TWO_LAYERS)
    [first, second] = graph.layers(model)
    found = calibration.grams(model, [first, second])
    for layer, value in ((first, "x"), (second, "r")):
        rows = np.concatenate(every(model, calibration, value)).astype(np.float64)
        gram = found[layer.name]
        np.testing.assert_allclose(gram.matrix, rows.T @ rows, rtol=1e-5, atol=1e-6)
        assert gram.rows == len(rows) and gram.matrix.dtype == np.float64


def test_blocks_of_patches_are_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calibration = calibrated(GROUPED)
    layers = list(graph.layers(model))
    [whole] = calibration.grams(model, layers).values()
    monkeypatch.setattr(patches, "_BLOCK", 1)
    [parts] = Calibration(calibration.data).grams(model, layers).values()
    # float32 sums, in another order.
    np.testing.assert_allclose(parts.matrix, whole.matrix, rtol=1e-5, atol=1e-5)
    assert parts.rows == whole.rows


@pytest.mark.parametrize("text", [TWO_LAYERS, PICTURE, GROUPED, DEPTHWISE, DEEP])
def test_a_gram_of_some_rows_is_near_that_of_all(text: str) -> None:
    model, calibration = calibrated(text)
    layers = list(graph.layers(model))
    whole = calibration.grams(model, layers)
    for name, part in calibration.grams(model, layers, rows=6).items():
        assert part.rows <= 6 * len(calibration.samples) and part.rows <= whole[name].rows
        one = np.trace(part.matrix, axis1=-2, axis2=-1).sum() / part.rows
        other = np.trace(whole[name].matrix, axis1=-2, axis2=-1).sum() / whole[name].rows
        assert 0.5 < one / other < 2.0
        np.testing.assert_allclose(part.total.shape, whole[name].matrix.shape[:-1])


def test_rows_are_drawn_anew_for_each_sample_and_are_no_more_than_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, calibration = calibrated(DEPTHWISE)
    [layer] = graph.layers(model)
    kind = patches.of(layer)
    assert kind is not None
    [array] = every(model, calibration, layer.input.value.name or "")[:1] if layer.input else [None]
    assert array is not None
    one, same, other = (next(kind.blocks(array, 3, draw)) for draw in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    monkeypatch.setattr(calibrate, "ENOUGH_ROWS", 1)
    [gram] = calibration.grams(model, [layer], rows=100).values()
    samples = len(calibration.samples)
    assert gram.rows <= samples * len(array) * -(-kind.columns // samples)


@pytest.mark.parametrize("count", [1, 4, 5, 7, 100])
def test_some_samples_are_evenly_apart(count: int) -> None:
    samples = Samples.of([{"x": np.array([i])} for i in range(17)])
    found = [int(sample["x"][0]) for sample in samples.some(count)]
    assert 1 <= len(found) <= count and found == sorted(found)
    assert len({b - a for a, b in itertools.pairwise(found)}) <= 1


def test_of_sequences_with_state_whole_ones_are_taken() -> None:
    frames: list[Sample] = [{"x": np.array([i])} for i in range(12)]
    samples = Samples(frames, [0, 4, 8], {"h": "hn"})
    assert [len(samples.some(count)) for count in (1, 4, 7, 8, 12)] == [4, 4, 4, 8, 12]


def test_moments_along_an_axis_of_some_samples_have_its_extremes() -> None:
    model, calibration = calibrated(DEEP)
    found = calibration.moments(model, {"x": 1}, 4)["x"]
    rows = np.concatenate([np.moveaxis(s["x"], 1, -1) for s in calibration.samples.some(4)])
    rows = rows.reshape(-1, 5)
    np.testing.assert_array_equal(found.low, rows.min(axis=0))
    np.testing.assert_array_equal(found.high, rows.max(axis=0))
    np.testing.assert_allclose(found.power, (rows.astype(np.float64) ** 2).mean(axis=0), rtol=1e-6)


def test_layers_that_read_one_input_alike_share_a_gram_and_a_sweep() -> None:
    model, calibration = calibrated(
        """(float[N,4] x) => (float[N,2] a, float[N,3] b) <float[4,2] u, float[4,3] v> {
        a = MatMul(x, u)
        b = MatMul(x, v)
    }"""
    )
    sweeps = counted(calibration)
    one, other = calibration.grams(model, list(graph.layers(model))).values()
    assert one is other and sweeps == ["grams"]
    calibration.grams(model, list(graph.layers(model)))
    assert sweeps == ["grams"]


def test_a_gram_that_does_not_fit_is_refused_before_anything_runs() -> None:
    model, calibration = calibrated(
        "(float[1,8200] x) => (float[1,2] y) <float[8200,2] w> { y = MatMul(x, w) }", 1
    )
    sweeps = counted(calibration)
    with pytest.raises(CalibrationError, match="of layer 'y' has 8200 columns; at most 8192 fit"):
        calibration.grams(model, list(graph.layers(model)))
    assert sweeps == []


def test_a_layer_without_a_gram_is_named() -> None:
    model, calibration = calibrated(
        "(float[2,4] x, float[4,2] z) => (float[2,2] y) { y = MatMul(x, z) }"
    )
    with pytest.raises(CalibrationError, match=r"layer 'y' \(attention\) has no gram"):
        calibration.grams(model, list(graph.layers(model)))


def test_nan_in_the_input_of_a_gram_is_named() -> None:
    text = "(float[N,2] x) => (float[N,2] y) <float[2,2] w> { l = Sqrt(x) y = MatMul(l, w) }"
    model = graphs.graph(text)
    samples = [{"x": -np.ones((1, 2), np.float32)}]
    with pytest.raises(CalibrationError, match="value 'l' has NaN or infinity for sample 0"):
        Calibration(Data("test", samples)).grams(model, list(graph.layers(model)))


# -- masks --------------------------------------------------------------------------------------

TOKENS = """(float[N,T,4] x, int64[N,T] mask) => (float[N,T,3] y, float[N,3] p, float[N,T] s)
<float[4,3] w> {
    h = MatMul(x, w)
    y = Relu(h)
    p = ReduceMax<keepdims=0>(y, axis)
    s = ReduceSum<keepdims=0>(y, last)
}"""


def tokens() -> ir.Model:
    text = TOKENS.replace("<float[4,3] w>", "<float[4,3] w, int64[1] axis={1}, int64[1] last={2}>")
    return graphs.graph(text)


def masked_samples(fill: float) -> tuple[list[Sample], list[Sample]]:
    """Samples padded with ``fill`` to six tokens, and the same without padding."""
    rng = np.random.default_rng(5)
    padded: list[Sample] = []
    bare: list[Sample] = []
    for length in (2, 6, 3, 1):
        x = rng.standard_normal((1, length, 4)).astype(np.float32)
        mask = np.ones((1, length), np.int64)
        bare.append({"x": x, "mask": mask})
        pads = (0, 0), (0, 6 - length)
        whole = np.pad(x, (*pads, (0, 0)), constant_values=fill)
        padded.append({"x": whole, "mask": np.pad(mask, pads)})
    return padded, bare


@pytest.mark.parametrize("observer", ["minmax", "histogram", "moments"])
@pytest.mark.parametrize("fill", [100.0, np.nan])
def test_padding_does_not_count(observer: calibrate.Observer, fill: float) -> None:
    model = tokens()
    padded, bare = masked_samples(fill)
    values = ["x", "h", "y", "s"]
    found = Calibration(Data("padded", padded), mask="mask").stats(model, values, observer)
    wanted = Calibration(Data("bare", bare), mask="mask").stats(model, values, observer)
    for name in values:
        for field in dataclasses.fields(found[name]):
            one, other = (getattr(s[name], field.name) for s in (found, wanted))
            np.testing.assert_allclose(one, other, rtol=1e-6, err_msg=f"{name} {field.name}")


def test_without_a_mask_everything_counts_and_so_does_what_does_not_line_up() -> None:
    model = tokens()
    padded, _ = masked_samples(100.0)
    values = ["x", "p"]
    full = Calibration(Data("padded", padded)).stats(model, values, "minmax")
    masked = Calibration(Data("padded", padded), mask="mask").stats(model, values, "minmax")
    assert cast("MinMax", full["x"]).high == 100.0 and cast("MinMax", masked["x"]).high < 10
    assert full["p"] == masked["p"]


def test_a_gram_does_not_count_padding() -> None:
    model = tokens()
    padded, bare = masked_samples(100.0)
    layers = list(graph.layers(model))
    [found] = Calibration(Data("padded", padded), mask="mask").grams(model, layers).values()
    [wanted] = Calibration(Data("bare", bare)).grams(model, layers).values()
    np.testing.assert_allclose(found.matrix, wanted.matrix, rtol=1e-6)
    assert found.rows == wanted.rows == 12


def test_a_sample_of_padding_alone_counts_for_nothing() -> None:
    model = tokens()
    padded, _ = masked_samples(100.0)
    padded.append({name: array * 0 for name, array in padded[0].items()})
    one, other = (
        Calibration(Data("padded", some), mask="mask").stats(model, ["x"], "moments")["x"]
        for some in (padded[:4], padded)
    )
    np.testing.assert_array_equal(cast("Moments", one).mean, cast("Moments", other).mean)


@pytest.mark.parametrize("observer", ["minmax", "moments"])
def test_a_mask_of_other_numbers_is_refused(observer: calibrate.Observer) -> None:
    padded, _ = masked_samples(0.0)
    padded[2]["mask"] = padded[2]["mask"] * 7
    calibration = Calibration(Data("padded", padded), mask="mask")
    with pytest.raises(
        CalibrationError, match=r"mask 'mask' has other numbers .* sample 2: 0 to 7"
    ):
        calibration.stats(tokens(), ["x"], observer)


def test_what_a_conv_reads_has_channels_where_a_mask_has_tokens() -> None:
    model = graphs.graph(
        """(float[1,2,4,4] x, int64[1,2] mask) => (float[1,2,4,4] y) <float[2,2,1,1] w> {
        y = Conv(x, w) z = Cast<to=1>(mask)
    }"""
    )
    assert not {"x", "y"} & ports.lined_up(model, "mask")


# -- state --------------------------------------------------------------------------------------

RECURRENT = """(float[N,3] x, float[N,4] h) => (float[N,2] y, float[N,4] hn)
<float[3,4] u, float[4,4] v, float[4,2] w> {
    a = MatMul(x, u)
    b = MatMul(h, v)
    c = Add(a, b)
    hn = Tanh(c)
    y = MatMul(hn, w)
}"""


def recurrent(count: int = 6) -> tuple[ir.Model, Calibration]:
    model = graphs.graph(RECURRENT)
    rng = np.random.default_rng(4)
    source = [
        [{"x": 3 * rng.standard_normal((1, 3)).astype(np.float32)} for _ in range(5 + k)]
        for k in range(count)
    ]
    data = sources.load(source, ports.inputs_of(model), outputs=ports.outputs_of(model))
    return model, Calibration(data)


def by_hand(model: ir.Model, samples: Samples, value: str) -> list[Array]:
    """What ``value`` holds for each frame, by a plain loop that hands the state on."""
    found: list[Array] = []
    state = np.zeros((1, 4), np.float32)
    for frame in samples:
        feeds = {"x": frame["x"], "h": frame.get("h", state)}
        results = execute.execute(model, feeds, [value, "hn"])
        state = results["hn"]
        found.append(results[value])
    return found


@pytest.mark.parametrize("value", ["b", "hn", "h", "y"])
def test_observers_see_the_state_that_a_plain_loop_carries(value: str) -> None:
    model, calibration = recurrent()
    assert calibration.state == {"h": "hn"}
    whole = np.concatenate(by_hand(model, calibration.samples, value))
    found = calibration.stats(model, [value], "minmax")[value]
    assert isinstance(found, MinMax)
    assert (found.low, found.high) == pytest.approx((whole.min(), whole.max()), rel=1e-5)
    moments = calibration.stats(model, [value], "moments")[value]
    assert isinstance(moments, Moments)
    np.testing.assert_allclose(moments.mean, whole.mean(axis=0), rtol=1e-4, atol=1e-6)
    histogram = calibration.stats(model, [value], "histogram")[value]
    assert isinstance(histogram, Histogram) and histogram.counts.sum() == whole.size


def quantized(model: ir.Model, calibration: Calibration) -> ir.Model:
    """``model`` as the target lowers it."""
    steps = pipeline.parse("calibrate,quantize", registry.passes())
    decided = model.clone()
    pipeline.run(decided, steps, pipeline.Context(calibration=calibration, target=OrtCpu()))
    OrtCpu().lower(decided)
    return decided


def test_the_judge_lets_each_model_carry_its_own_state() -> None:
    model, calibration = recurrent()
    lowered = quantized(model, calibration)
    judge = simulate.Judge(model, calibration.judges)
    session = execute.Session(lowered, optimize=False)
    for name in ("y", "hn"):
        wanted = np.concatenate(by_hand(model, calibration.judges, name))
        actual = np.concatenate(by_hand(lowered, calibration.judges, name))
        assert judge.sqnr(session)[name] == pytest.approx(simulate.sqnr(wanted, actual), abs=0.01)
    between = judge.between(execute.Session(model), session)
    assert between == pytest.approx(judge.sqnr(session), abs=0.01)
    layers = simulate.layer_sqnr(model, lowered, ["y"], calibration.judges)
    assert layers["y"] == pytest.approx(judge.sqnr(session)["y"], abs=0.01)


def test_a_state_that_is_lost_is_heard() -> None:
    # The error of a state grows from frame to frame: a judge that fed the float state would not see
    # that this model forgets.
    model, calibration = recurrent()
    deaf = model.clone()
    deaf.graph.initializers["v"].const_value = ir.Tensor(np.zeros((4, 4), np.float32), name="v")
    judge = simulate.Judge(model, calibration.judges)
    assert judge.sqnr(execute.Session(deaf))["y"] < 20


def test_frames_in_any_sessions_do_not_mix() -> None:
    model, calibration = recurrent()
    session, state = execute.Session(model), calibration.state
    one = sequences.carry(session, calibration.samples, state, ["y"])
    other = sequences.carry(session, calibration.samples[5:], state, ["y"])
    first = [results["y"] for (_, results), _ in zip(one, other, strict=False)]
    alone = [r["y"] for _, r in sequences.carry(session, calibration.samples, state, ["y"])]
    np.testing.assert_array_equal(first, alone[: len(first)])


def test_latency_runs_over_sequences_again_and_again() -> None:
    model, calibration = recurrent()
    one, again, compiled = (execute.Session(model, threads=1) for _ in range(3))
    rounds = 2 * len(calibration.samples)
    found = bench.interleaved(one, again, compiled, calibration.samples, rounds)
    assert found.rounds == rounds and found.ratio > 0


def test_without_state_frames_are_run_as_they_are() -> None:
    model, calibration = calibrated(TWO_LAYERS)
    session = execute.Session(model)
    for feeds, results in sequences.carry(session, calibration.samples, {}):
        assert results.keys() == {"y"}
        np.testing.assert_array_equal(results["y"], session.run(feeds)["y"])


def test_what_reads_a_state_depends_on_all_that_computes_it() -> None:
    model, calibration = recurrent()
    sweeps = counted(calibration)
    before = calibration.stats(model, ["b"], "minmax")
    array = graphs.weight(model, "u") * 2
    model.graph.initializers["u"].const_value = ir.Tensor(array, name="u")
    assert calibration.stats(model, ["b"], "minmax") != before
    assert len(sweeps) == 2
    plain = content.keys(model)
    assert plain["b"] != content.keys(model, calibration.state)["b"]
    assert plain["a"] == content.keys(model, calibration.state)["a"]


# -- the cache ----------------------------------------------------------------------------------


def counted(calibration: Calibration) -> list[str]:
    """The labels of the sweeps that ``calibration`` makes from now on."""
    sweeps: list[str] = []

    def progress(items: Iterable[Any], label: str) -> Iterable[Any]:
        sweeps.append(label)
        return items

    calibration._progress = progress  # pyright: ignore[reportPrivateUsage]
    return sweeps


def test_one_request_is_one_sweep_and_a_repeated_one_is_none() -> None:
    model, calibration = calibrated(TWO_LAYERS)
    sweeps = counted(calibration)
    first = calibration.stats(model, ["x", "h", "r"], "minmax")
    assert sweeps == ["ranges"]
    assert calibration.stats(model, ["h", "x"], "minmax") == {v: first[v] for v in ("h", "x")}
    assert sweeps == ["ranges"]
    calibration.stats(model, ["h", "y"], "minmax")
    assert sweeps == ["ranges", "ranges"]


def rename(model: ir.Model) -> None:
    next(v for n in model.graph for v in n.outputs if v.name == "h").name = "other"


def set_weight(model: ir.Model) -> None:
    array = graphs.weight(model, "w1") * 2
    model.graph.initializers["w1"].const_value = ir.Tensor(array, name="w1")


def set_later_weight(model: ir.Model) -> None:
    array = graphs.weight(model, "w2") * 2
    model.graph.initializers["w2"].const_value = ir.Tensor(array, name="w2")


@pytest.mark.parametrize(
    ("edit", "same"), [(rename, True), (set_weight, False), (set_later_weight, True)]
)
def test_the_key_of_a_value_is_the_content_that_computes_it(
    edit: Callable[[ir.Model], None], same: bool
) -> None:
    model, calibration = calibrated(TWO_LAYERS)
    before = content.keys(model)["r"]
    sweeps = counted(calibration)
    calibration.stats(model, ["r"], "minmax")
    edit(model)
    assert (content.keys(model)["r"] == before) == same
    calibration.stats(model, ["r"], "minmax")
    assert len(sweeps) == (1 if same else 2)


def test_attributes_count_for_the_key() -> None:
    one = graphs.graph("(float[2,4] x) => (float[2,4] y) { y = Softmax<axis=0>(x) }")
    other = graphs.graph("(float[2,4] x) => (float[2,4] y) { y = Softmax<axis=1>(x) }")
    assert content.keys(one)["y"] != content.keys(other)["y"]


def test_shapes_are_those_of_the_first_sample() -> None:
    model, calibration = calibrated(TWO_LAYERS)
    assert calibration.shapes(model) == {"x": (2, 4), "h": (2, 3), "r": (2, 3), "y": (2, 2)}


# -- memory -------------------------------------------------------------------------------------

# The high-water mark of this process alone; what getrusage says includes the parent's.
MEASURE = """
import re, sys
import numpy as np
import onnx_ir as ir
from qcompile import execute, ports, simulate, sources
from qcompile.calibrate import Calibration

model = ir.from_onnx_text(sys.argv[1])
samples = ({"x": np.full((1, 1 << 18), i, np.float32)} for i in range(int(sys.argv[2])))
calibration = Calibration(sources.load(samples, ports.inputs_of(model)))
values = [f"v{i}" for i in range(4)]
for observer in ("minmax", "histogram", "moments"):
    calibration.stats(model, values, observer)
judge = simulate.Judge(model, calibration.samples)
assert judge.worst(execute.Session(model)) == np.inf
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_samples() -> None:
    nodes = " ".join(f"v{i} = Relu({'x' if i == 0 else f'v{i - 1}'})" for i in range(4))
    text = f"""<ir_version: 10, opset_import: ["": 21]>
        g (float[1,262144] x) => (float[1,262144] v3) {{ {nodes} }}"""
    peaks = [
        int(subprocess.check_output([sys.executable, "-c", MEASURE, text, str(count)]))
        for count in (32, 128)
    ]
    # 96 further samples of 1 MiB, and what the judge wants of them, would be 192 MiB.
    assert peaks[1] - peaks[0] < 24 << 10
