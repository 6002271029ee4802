"""Simulation: the lowered graph run plainly, and the figures that compare models."""

from __future__ import annotations

import pathlib

import graphs
import lowering
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile import execute, simulate, spec, text
from qcompile.backends.onnxruntime import OrtCpu
from qcompile.backends.tensorrt import TensorRtRtx
from qcompile.errors import TargetError

TWO = """(float[N,16] x) => (float[N,16] y, float[N,16] z)
<float[16,16] w, float[16,16] v, float[16] b> {
    m = MatMul(x, w)
    h = Add(m, b)
    y = Relu(h)
    z = MatMul(h, v)
}"""


def decided(source: str = TWO) -> tuple[ir.Model, ir.Model]:
    """The float model and the same with decisions."""
    model = lowering.graph_of(source)
    reference = model.clone()
    lowering.decide(model)
    return reference, model


# -- figures ------------------------------------------------------------------------------------


def test_sqnr_of_known_noise() -> None:
    signal = np.full(1000, 10.0)
    assert simulate.sqnr(signal, signal + 1) == pytest.approx(20.0)
    assert simulate.sqnr(signal, signal * 2) == pytest.approx(0.0)


def test_sqnr_without_noise_is_infinite_and_of_nan_is_nan() -> None:
    signal = np.arange(4.0)
    assert simulate.sqnr(signal, signal) == np.inf
    assert np.isnan(simulate.sqnr(signal, signal * np.nan))
    assert np.isnan(simulate.sqnr(signal, np.full(4, np.inf)))
    assert simulate.sqnr(np.zeros(4), np.ones(4)) == -np.inf
    assert simulate.sqnr(np.zeros(4), np.zeros(4)) == np.inf


@given(st.floats(0.01, 100), st.integers(0, 99))
def test_sqnr_and_cosine_do_not_depend_on_the_scale(factor: float, seed: int) -> None:
    signal, actual = np.random.default_rng(seed).standard_normal((2, 50))
    assert simulate.sqnr(signal * factor, actual * factor) == pytest.approx(
        simulate.sqnr(signal, actual)
    )
    assert simulate.cosine(signal, actual * factor) == pytest.approx(
        simulate.cosine(signal, actual)
    )


def test_cosine_of_known_angles() -> None:
    one = np.array([1.0, 0.0])
    assert simulate.cosine(one, one) == 1.0
    assert simulate.cosine(one, np.array([0.0, 1.0])) == 0.0
    assert simulate.cosine(one, -one) == -1.0
    assert simulate.cosine(np.zeros(2), np.zeros(2)) == 1.0
    assert simulate.cosine(one, np.zeros(2)) == 0.0


# -- simulate -----------------------------------------------------------------------------------


def test_a_model_without_decisions_runs_in_float() -> None:
    reference, _ = decided()
    sample = graphs.samples(reference)[0]
    found = simulate.simulate(reference, OrtCpu()).run(sample)
    for name, wanted in execute.execute(reference, sample).items():
        np.testing.assert_array_equal(found[name], wanted)


@pytest.mark.parametrize("target", [OrtCpu(), TensorRtRtx()])
def test_simulation_equals_the_lowered_graph_and_changes_nothing(
    target: OrtCpu | TensorRtRtx,
) -> None:
    _, model = decided()
    before = text.render(model, weights=True)
    sample = graphs.samples(model)[0]
    found = simulate.simulate(model, target).run(sample)
    assert text.render(model, weights=True) == before
    lowered = model.clone()
    target.lower(lowered)
    for name, wanted in execute.execute(lowered, sample).items():
        np.testing.assert_array_equal(found[name], wanted)


def test_targets_differ_in_simulation() -> None:
    reference, model = decided()
    sample = graphs.samples(reference)[0]
    ort, trt = (simulate.simulate(model, t).run(sample) for t in (OrtCpu(), TensorRtRtx()))
    assert not np.array_equal(ort["y"], trt["y"])


def test_sqnr_rises_with_the_bits() -> None:
    found: list[float] = []
    for bits in (2, 3, 4, 6, 8):
        model = lowering.graph_of(TWO)
        judge = simulate.Judge(model, graphs.samples(model, 4))
        lowering.decide(model, f"calibrate,quantize{{weight=int{bits}}}")
        found.append(judge.worst(simulate.simulate(model, OrtCpu())))
    assert found == sorted(found)
    assert found[-1] > 30


def test_a_model_that_the_runtime_refuses_is_told_in_its_words() -> None:
    model = graphs.graph("(float[2,4] x) => (float[2,4] y) { y = Relu(x) }")
    next(iter(model.graph)).op_type = "NoSuchOperator"
    with pytest.raises(TargetError, match=r"ONNX Runtime refuses the model: .*NoSuchOperator"):
        simulate.simulate(model, OrtCpu())


# -- the judge ----------------------------------------------------------------------------------


def test_the_judge_finds_no_difference_to_the_reference_itself() -> None:
    reference, _ = decided()
    judge = simulate.Judge(reference, graphs.samples(reference, 3))
    session = execute.Session(reference)
    assert judge.sqnr(session) == {"y": np.inf, "z": np.inf}
    assert judge.cosine(session) == pytest.approx({"y": 1.0, "z": 1.0})
    assert judge.worst(session) == np.inf
    assert judge.between(session, session) == {"y": np.inf, "z": np.inf}


def test_the_judge_sums_powers_over_all_samples() -> None:
    reference, model = decided()
    samples = graphs.samples(reference, 5)
    samples[0]["x"] *= 10
    judge = simulate.Judge(reference, samples)
    session = simulate.simulate(model, OrtCpu())
    exact = execute.Session(reference)
    wanted = np.concatenate([exact.run(s)["z"] for s in samples])
    actual = np.concatenate([session.run(s)["z"] for s in samples])
    assert judge.sqnr(session)["z"] == pytest.approx(simulate.sqnr(wanted, actual))
    assert judge.worst(session) == min(judge.sqnr(session).values())


def test_outputs_that_are_no_floats_are_not_judged() -> None:
    source = "(float[2,4] x) => (float[2,4] y, int64[2,1] i) { y = Relu(x) i = ArgMax<axis=1>(x) }"
    model = graphs.graph(source)
    judge = simulate.Judge(model, graphs.samples(model))
    assert judge.outputs == ["y"]
    only = graphs.graph("(float[2,4] x) => (int64[2,1] i) { i = ArgMax<axis=1>(x) }")
    assert simulate.Judge(only, graphs.samples(only)).worst(execute.Session(only)) == np.inf


def test_layers_are_compared_by_the_names_that_both_models_have() -> None:
    reference, model = decided()
    lowered = model.clone()
    OrtCpu().lower(lowered)
    samples = graphs.samples(reference, 3)
    found = simulate.layer_sqnr(reference, lowered, ["h", "z", "no such value"], samples)
    assert "no such value" not in found
    judge = simulate.Judge(reference, samples)
    session = execute.Session(lowered, optimize=False)
    assert found["z"] == pytest.approx(judge.sqnr(session)["z"], rel=1e-3)
    assert simulate.layer_sqnr(reference, lowered, ["nothing"], samples) == {}


def test_the_optimized_run_lies_far_below_the_quantization_noise(tmp_path: pathlib.Path) -> None:
    result = lowering.lower(TWO, OrtCpu(), tmp_path)
    assert not any(spec.all_specs(node) for node in result.model.graph)
    judge = simulate.Judge(result.reference, result.calibration.judges)
    plain = execute.Session(result.model, optimize=False)
    fused = execute.Session(tmp_path / "model.onnx")
    between = min(judge.between(plain, fused).values())
    assert between > judge.worst(fused) + 15  # dB, as the design demands


def test_what_was_simulated_last_is_known() -> None:
    model = graphs.graph(TWO)
    judge = simulate.Judge(model, graphs.samples(model, 2))
    found = judge.simulated(model)
    assert judge.simulated(model.clone()) is found and judge.worst(found) > 100
