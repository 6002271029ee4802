"""Laws of layers of low rank: of a branch beside a layer, and of two factors as one layer."""

from __future__ import annotations

import fits
import graphs
import numpy as np
import onnx_ir as ir
import pytest

from qcompile import blocks, execute, factors, graph, spec
from qcompile.backends.onnxruntime import OrtCpu
from qcompile.calibrate import Calibration
from qcompile.models import fashion
from qcompile.sources import Data

torch = pytest.importorskip("torch")

from qcompile.prefix import Prefix  # noqa: E402
from qcompile.quantized import Quantized  # noqa: E402

LINEAR = "(float[2,8] x) => (float[2,6] y) <float[8,6] w> { y = MatMul(x, w) }"
SCALED = """(float[2,8] x) => (float[2,6] y) <float[8,6] w, float[6] b> {
    y = Gemm<alpha=0.5, beta=2.0>(x, w, b) }"""
PADDED = """(float[1,6,9,9] x) => (float[1,4,6,6] y) <float[4,6,1,1] w, float[4] b> {
    y = Conv<strides=[2,2], pads=[1,1,1,1], kernel_shape=[1,1]>(x, w, b) }"""
WIDE = """(float[32,64] x) => (float[32,48] y) <float[64,64] w1, float[64] b1, float[64,48] w2> {
    h = MatMul(x, w1) s = Add(h, b1) r = Relu(s) y = MatMul(r, w2) }"""


def behind(model: ir.Model, passes: str, count: int = 8) -> tuple[ir.Model, dict[str, object]]:
    """A clone of ``model`` behind ``passes``, and what the first of them counted."""
    done = model.clone()
    data = Calibration(Data("test", graphs.samples(model, count)))
    return done, dict(fits.run(done, passes, data)[0].counters)


def directed(source: str, large: int = 3) -> ir.Model:
    """A graph whose weights have ``large`` directions ten times as long as the others."""
    model, rng = graphs.graph(source), np.random.default_rng(3)
    for layer in graph.layers(model):
        weight = graph.constant(layer.weight.value)
        u, s, v = np.linalg.svd(rng.standard_normal(weight.shape), full_matrices=False)
        s[:large] *= 10
        layer.weight.value.const_value = ir.Tensor(((u * s) @ v).astype(np.float32))
    return model


@pytest.mark.parametrize("source", [LINEAR, graphs.GEMM, SCALED, graphs.CHAIN, PADDED])
@pytest.mark.parametrize("weigh", ["input", "none"])
def test_a_branch_keeps_function_layers_and_origins(source: str, weigh: str) -> None:
    model = graphs.graph(source)
    done, counted = behind(model, f"low-rank{{form=branch rank=2 weigh={weigh}}}")
    graphs.assert_same_function(model, done)
    one, other = (
        [(layer.name, graph.origins(layer.node)) for layer in graph.layers(m)]
        for m in (model, done)
    )
    assert one == other and counted["layers"] == len(one)
    assert all("branch" not in name for name, _ in other)


def test_the_largest_singular_value_of_the_residual_is_the_next_of_the_weight() -> None:
    model = directed(LINEAR)
    values = np.linalg.svd(graphs.weight(model, "w"), compute_uv=False)
    for rank in (1, 2, 5):
        done, _ = behind(model, f"low-rank{{form=branch rank={rank} weigh=none}}")
        [layer] = graph.layers(done)
        left = np.linalg.svd(factors.matrix(layer), compute_uv=False)
        np.testing.assert_allclose(left[0], values[rank], rtol=1e-5)


@pytest.mark.parametrize("bits", [3, 4])
def test_a_branch_lowers_the_error_of_weights_with_a_few_large_directions(bits: int) -> None:
    model = directed(WIDE)
    decide = f"calibrate,quantize{{weight=int{bits}}}"
    judges = graphs.samples(model, 4, seed=9)
    plain, _ = behind(model, decide)
    found: list[float] = [fits.noise(model, plain, judges)]
    for rank in (1, 3, 12):
        branched, _ = behind(model, f"low-rank{{form=branch rank={rank} weigh=none}},{decide}")
        found.append(fits.noise(model, branched, judges))
    assert found == sorted(found, reverse=True)
    assert found[2] < 0.2 * found[0]  # all of the large directions are out


def test_what_quantizes_leaves_a_branch_in_float() -> None:
    model = graphs.graph(WIDE)
    passes = "low-rank{form=branch rank=4 weigh=none},calibrate,quantize{weight=int4}"
    done, _ = behind(model, passes)
    products = [node for node in done.graph if graph.ROLE in node.metadata_props]
    assert len(products) == 4 and not any(spec.all_specs(node) for node in products)
    assert all(spec.all_specs(layer.node) for layer in graph.layers(done))


def test_passes_behind_a_branch_keep_the_function() -> None:
    model = graphs.graph(WIDE)
    passes = "low-rank{form=branch rank=4 weigh=none},equalize,simplify,smooth-hadamard{block=8}"
    done, _ = behind(model, passes)
    for sample in graphs.samples(model, 2, seed=9):
        want, got = (execute.execute(m, sample)["y"] for m in (model, done))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_what_a_branch_costs_is_counted() -> None:
    model = graphs.graph(WIDE)
    whole = 64 * 64 + 64 * 48
    for form, added in (("branch", 0), ("product", -whole)):
        _, counted = behind(model, f"low-rank{{form={form} rank=4 weigh=input}}")
        after = whole + 4 * (64 + 64) + 4 * (64 + 48) + added
        assert counted["weights"] == after and counted["macs %"] == round(100 * after / whole, 1)


# -- two factors as one layer -------------------------------------------------------------------


def decaying(source: str, power: float = 1.0) -> ir.Model:
    """A graph whose weights have singular values that fall with ``power`` of their number."""
    model, rng = graphs.graph(source), np.random.default_rng(4)
    for layer in graph.layers(model):
        weight = graph.constant(layer.weight.value)
        u, s, v = np.linalg.svd(rng.standard_normal(weight.shape), full_matrices=False)
        s = np.arange(1, len(s) + 1) ** -power
        layer.weight.value.const_value = ir.Tensor(((u * s) @ v).astype(np.float32))
    return model


@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_factors_are_in_one_block_and_count_as_one_layer(granularity: blocks.Granularity) -> None:
    model = fits.shipped(fashion.VIT)
    fits.run(model, "simplify,fold-bn", fits.calibration(8))
    before = [block.name for block in blocks.partition(model, granularity=granularity)]
    fits.run(model, "low-rank{share=0.5 weigh=none}", fits.calibration(8))
    parts = blocks.partition(model, granularity=granularity)
    where = {layer.name: part.name for part in parts for layer in part.layers}
    pairs = [name for name in where if name.endswith("/inner")]
    assert len(pairs) > 30
    assert all(where[name] == where[name.removesuffix("/inner")] for name in pairs)
    assert len(parts) == len(before)


def test_the_float_trajectory_through_factors_is_that_of_the_captured_layer() -> None:
    model = graphs.graph(WIDE)
    captured, data = model.clone(), fits.correlated(model)
    fits.run(model, "low-rank{rank=4 weigh=none},calibrate,quantize{weight=int4}", data)
    parts = blocks.partition(model, granularity="layer")
    for given in (None, captured):
        prefix = Prefix(Quantized(model, OrtCpu()), parts, data.samples[:3], captured=given)
        prefix.run()
        for number in range(3):
            wanted = execute.execute(given or model, data.samples[number])["y"]
            found = prefix.float.value("y", number)
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_block_whose_values_have_new_names_keeps_its_own_function() -> None:
    model = graphs.graph(WIDE)
    captured, data = model.clone(), fits.correlated(model)
    passes = "equalize{input=float},low-rank{rank=4 weigh=none},quantize{weight=int4 input=float}"
    fits.run(model, passes, data)
    parts = blocks.partition(model, granularity="layer")
    assert [name for name in parts[1].inputs if name.endswith("/equalized")]
    prefix = Prefix(Quantized(model, OrtCpu()), parts, data.samples[:2], captured=captured)
    prefix.run()
    wanted = execute.execute(model, data.samples[1])["y"]
    np.testing.assert_allclose(prefix.float.value("y", 1), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_rounding_factors_together_makes_good_for_what_was_cut_off(granularity: str) -> None:
    captured = decaying(WIDE)
    data = fits.correlated(captured, 60)
    cut = "low-rank{rank=12 weigh=input}"
    decided = f"{cut},quantize{{weight=int4 input=float method=mse}}"
    fit = f"reconstruct{{steps=100 granularity={granularity}}}"

    def error(passes: str, reference: ir.Model | None = None) -> float:
        model = captured.clone()
        fits.run(model, passes, data, reference=reference)
        return fits.noise(captured, model, data.judges)

    others = [cut, decided, f"{decided},gptq", f"{decided},{fit}"]
    assert error(f"{decided},{fit}", captured) < 0.5 * min(map(error, others))
