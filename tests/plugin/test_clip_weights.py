"""Laws of clip-weights."""

from __future__ import annotations

import numpy as np
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import pytest
from qcompile_example.clip_weights import ClipWeights

from qcompile import execute, pipeline, registry, text
from qcompile.capture import capture
from qcompile.errors import PassError
from qcompile.pipeline import Context

CLIP = ClipWeights(limit=2.0)
LINEAR = "(float[2,50] x) => (float[2,3] y) { y = MatMul(x, w) }"
PRODUCT = "(float[2,50] x, float[50,3] z) => (float[2,3] y) { y = MatMul(x, z) }"


def model(source: str, weight: np.ndarray) -> ir.Model:
    """The model of ``source`` as captured, with a weight ``w``."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> tiny {source}')
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return capture(proto)


def weights(outliers: int) -> np.ndarray:
    """Signs of 1 [50, 3] from a seed, of which ``outliers`` in each column are 10."""
    signs = np.random.default_rng(0).choice(np.array([-1, 1], np.float32), (50, 3))
    signs[:outliers] *= 10
    return signs


def test_the_function_is_kept_where_no_weight_is_far_from_the_others() -> None:
    before, after = model(LINEAR, weights(0)), model(LINEAR, weights(0))
    pipeline.run(after, [CLIP], Context())
    x = {"x": np.random.default_rng(1).standard_normal((2, 50)).astype(np.float32)}
    np.testing.assert_array_equal(execute.execute(after, x)["y"], execute.execute(before, x)["y"])


@pytest.mark.parametrize("outliers", [1, 5, 25])
def test_fewer_than_one_in_limit_squared_weights_move(outliers: int) -> None:
    [step] = pipeline.run(model(LINEAR, weights(outliers)), [CLIP], Context())
    assert int(step.counters["weights clipped"]) < weights(outliers).size / 2.0**2


def test_only_the_weight_changes() -> None:
    clipped = model(LINEAR, weights(1))
    before = text.render(clipped)
    pipeline.run(clipped, [CLIP], Context())
    assert text.changes(before, text.render(clipped)) == [
        "-w %w: f32[50,3]",
        "-%y: f32[2,3] = MatMul(%x, %w)",
        "+w %w/clipped: f32[50,3]",
        "+%y: f32[2,3] = MatMul(%x, %w/clipped)",
    ]


def test_what_has_no_constant_weight_or_is_excluded_is_left_alone() -> None:
    for source, step in (
        (PRODUCT, CLIP),
        (LINEAR, ClipWeights(limit=2.0, exclude=("MatMul",))),
    ):
        left = model(source, weights(1))
        before = text.render(left, weights=True)
        [done] = pipeline.run(left, [step], Context())
        assert done.counters == {"layers": 0, "weights clipped": 0, "left alone": 1}
        assert text.render(left, weights=True) == before


def test_a_limit_that_clips_the_most_is_refused() -> None:
    with pytest.raises(PassError, match=r"at least 1, got 0\.5"):
        ClipWeights(limit=0.5)


def test_its_text_reads_back() -> None:
    step = ClipWeights(limit=2.5, exclude=("a", "*/b"))
    assert str(step) == "clip-weights{limit=2.5 exclude=a,*/b}"
    assert pipeline.parse(str(step), registry.passes()) == [step]
