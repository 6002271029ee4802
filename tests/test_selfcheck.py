"""Laws of the self-check: a sound file passes, a broken one fails by name, qcompile is not needed.

Tolerances are those that the bundle measured when it was written.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import graphs
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from command import Command

import qcompile
from qcompile import bundle, compiler, execute, selfcheck
from qcompile.models import fashion

Array = npt.NDArray[Any]

NET = """(float[N,32] x) => (float[N,32] y, float[N,16] z) <float[32,32] w, float[32,16] v> {
    y = MatMul(x, w) r = Relu(y) z = MatMul(r, v) }"""
CELL = """(float[N,3] x, float[N,4] h) => (float[N,2] y, float[N,4] hn)
<float[3,4] u, float[4,4] v, float[4,2] w> {
    a = MatMul(x, u) b = MatMul(h, v) c = Add(a, b) hn = Tanh(c) y = MatMul(hn, w) }"""


def compiled(out: pathlib.Path, source: str = NET, count: int = 40, **options: Any) -> pathlib.Path:
    """The folder of a compiled graph, calibrated on ``count`` samples."""
    model = graphs.graph(source)
    calib = options.pop("calib", graphs.samples(model, count))
    [result] = qcompile.compile(model, out, calib=calib, **options)
    return result.folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The shipped CNN, compiled."""
    out = tmp_path_factory.mktemp("sound") / "out"
    qcompile.compile(fashion.path(fashion.CNN), out, calib=str(fashion.path(fashion.CALIBRATION)))
    return out


def copy(folder: pathlib.Path, to: pathlib.Path) -> pathlib.Path:
    shutil.copytree(folder, to)
    return to


def break_weight(file: pathlib.Path, name: str) -> None:
    """Change eight codes of the weight ``name`` of ``file`` to the other end of its grid."""
    model = execute.load(file)
    codes = graphs.weight(model, name).copy()
    codes.flat[:8] = np.where(codes.flat[:8] > 0, -127, 127)
    model.graph.initializers[name].const_value = ir.Tensor(codes, name=name)
    execute.save(model, file)


def changed(file: pathlib.Path, **fields: Any) -> None:
    """Set fields of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_what_was_compiled_agrees_and_is_as_good_as_promised(
    sound: pathlib.Path, qcompile: Command
) -> None:
    done = qcompile("verify", sound)
    assert done.code == 0
    assert "output logits: " in done.out
    assert "agrees" in done.out and "as good as promised" in done.out
    assert "this device computes what was compiled, as well as promised" in done.out
    assert qcompile("verify", sound / "check").code == 0


def test_changed_codes_fail_and_name_the_output(
    sound: pathlib.Path, tmp_path: pathlib.Path, qcompile: Command
) -> None:
    out = copy(sound, tmp_path / "out")
    model = execute.load(out / "model.onnx")
    [codes] = [n for n in model.graph.initializers if "head" in n and n.endswith("/codes") and (
        "weight" in n
    )]  # fmt: skip
    break_weight(out / "model.onnx", codes)
    done = qcompile("verify", out)
    assert done.code == 3
    assert "model.onnx changed since it was compiled" in done.err
    assert "output 'logits' is not what was compiled" in done.err
    assert "DIFFERS" in done.out


def test_a_change_too_small_for_the_outputs_is_told_by_the_file(tmp_path: pathlib.Path) -> None:
    out = compiled(tmp_path / "out")
    model = execute.load(out / "model.onnx")
    codes = graphs.weight(model, "v/codes").copy()
    codes.flat[0] += 1 if codes.flat[0] < 0 else -1
    model.graph.initializers["v/codes"].const_value = ir.Tensor(codes, name="v/codes")
    execute.save(model, out / "model.onnx")
    result = selfcheck.check(out)
    assert all(v.agrees and v.as_promised for v in result.verdicts)
    assert result.changed == ("model.onnx",) and not result.good


def test_only_the_outputs_behind_a_change_fail(tmp_path: pathlib.Path) -> None:
    out = compiled(tmp_path / "out")
    break_weight(out / "model.onnx", "v/codes")
    result = selfcheck.check(out)
    assert {v.output: v.agrees for v in result.verdicts} == {"y": True, "z": False}
    assert not result.good


def test_the_device_needs_no_qcompile(sound: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out = copy(sound, tmp_path / "out")

    def run() -> subprocess.CompletedProcess[str]:
        # A finder that refuses the name, in front of all others.
        code = (
            "import runpy, sys\n"
            "class Refuses:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name.partition('.')[0] in ('qcompile', 'torch', 'onnx', 'onnx_ir'):\n"
            "            raise ImportError(name)\n"
            "sys.meta_path.insert(0, Refuses())\n"
            "sys.argv = sys.argv[1:]\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        )
        words = [sys.executable, "-I", "-c", code, str(out / "check" / "verify.py")]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    good = run()
    assert (good.returncode, good.stderr) == (0, "")
    (out / "model.onnx").write_bytes(b"no model")
    bad = run()
    assert bad.returncode == 1
    assert bad.stderr.startswith("error: ONNX Runtime refuses model.onnx")
    assert "Traceback" not in bad.stderr


def test_the_program_in_the_bundle_is_the_module(sound: pathlib.Path) -> None:
    written = (sound / "check" / "verify.py").read_text()
    assert written == pathlib.Path(selfcheck.__file__).read_text()
    assert "import qcompile" not in written and "from qcompile" not in written


def test_a_state_is_carried_from_frame_to_frame(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    calib = [
        [{"x": rng.standard_normal((1, 3)).astype(np.float32)} for _ in range(6)] for _ in range(20)
    ]
    out = compiled(tmp_path / "out", CELL, calib=calib, state="h=hn")
    spec = json.loads((out / "check" / "check.json").read_text())
    assert (spec["sequences"], spec["state"]) == ([6] * 4, {"h": "hn"})
    assert selfcheck.check(out).good
    with np.load(out / "check" / "inputs.npz") as arrays:
        first = [key for key in arrays.files if key.endswith(f".{spec['inputs'].index('h')}")]
    assert first == ["0.1", "6.1", "12.1", "18.1"]
    # Without the state that flows between them the later frames are others.
    with np.load(out / "check" / "inputs.npz") as arrays:
        kept: Any = dict(arrays) | {f"{n}.1": np.zeros((1, 4), np.float32) for n in range(24)}
    np.savez(out / "check" / "inputs.npz", **kept)
    changed(out / "check" / "check.json", state={})
    assert not selfcheck.check(out).good


def test_the_bundle_keeps_within_its_bytes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Input, expected and float of one sample: [2, 32], and [2, 32] and [2, 16] twice.
    each = 4 * (2 * 32 + 2 * (2 * 32 + 2 * 16))
    for limit, kept in ((1, 1), (2 * each, 2), (100 * each, 4)):
        monkeypatch.setattr(bundle, "BYTES", limit)
        out = compiled(tmp_path / f"out{limit}")
        spec = json.loads((out / "check" / "check.json").read_text())
        assert spec["sequences"] == [1] * kept
        assert spec["limits"] == {"sequences": 4, "bytes": limit, "cut": kept < 4}
        assert selfcheck.check(out).good


def test_a_limit_is_below_what_a_sound_run_reaches_and_above_a_random_one(
    tmp_path: pathlib.Path,
) -> None:
    out = compiled(tmp_path / "out")
    for verdict in selfcheck.check(out).verdicts:
        assert verdict.compiled_limit is not None and verdict.float_limit is not None
        assert 10 < verdict.float_limit < verdict.float.value
        assert 10 < verdict.compiled_limit < verdict.compiled.value


# A norm written out, whose Pow reads numbers below zero, and a mask of the least float there is.
MASKED = """(float[N,32] x) => (float[N,16] z)
    <float[32,32] w, float[32,16] v, float two = {2.0}, int64[1] last = {-1},
     float least = {-3.4028234663852886e38}, float nought = {0.0}> {
    h = MatMul(x, w) p = Pow(h, two) m = ReduceMean(p, last) s = Sqrt(m) n = Div(h, s)
    b = Less(n, nought) f = Cast<to=1>(b) k = Mul(f, least) q = Add(n, k) r = Relu(q)
    z = MatMul(r, v) }"""


def test_powers_and_masks_are_judged_as_all_else(tmp_path: pathlib.Path) -> None:
    out = compiled(tmp_path / "out", MASKED, passes="calibrate,quantize,insert-qdq")
    result = selfcheck.check(out)
    assert result.good and all(v.judged for v in result.verdicts)
    [verdict] = result.verdicts
    assert verdict.compiled_limit is not None and verdict.compiled_limit > 5


def test_what_nothing_can_judge_is_not_called_good(
    tmp_path: pathlib.Path, qcompile: Command
) -> None:
    out = compiled(tmp_path / "out")
    spec = json.loads((out / "check" / "check.json").read_text())
    first, second = spec["outputs"]
    blind = {"compiled_limit": None, "float_limit": None}
    changed(out / "check" / "check.json", outputs=[first, second | blind])
    done = qcompile("verify", out)
    assert done.code == 0 and f"(nothing can judge {second['name']!r})" in done.out
    changed(out / "check" / "check.json", outputs=[first | blind, second | blind])
    done = qcompile("verify", out)
    assert done.code == 3
    assert "nothing can judge 'y', 'z': it was not finite where it was compiled" in done.err


def test_a_device_of_coarser_arithmetic_passes(tmp_path: pathlib.Path) -> None:
    out = compiled(tmp_path / "out")
    model = execute.load(out / "model.onnx")
    passed = 0
    for draw in range(100, 120):  # other draws than those that the limits were measured on
        execute.save(bundle.rounded(model, draw), out / "model.onnx")
        verdicts = selfcheck.check(out).verdicts
        passed += all(v.agrees and v.as_promised for v in verdicts)
    # Two outputs against two things each, and one run in 200 misses: three of 20 is one in 10,000.
    assert passed >= 18


def test_outputs_of_whole_numbers_are_judged_by_how_many_are_equal(tmp_path: pathlib.Path) -> None:
    source = """(float[N,16] x) => (int64[N,1] best) <float[16,8] w> {
        y = MatMul(x, w) best = ArgMax<axis=1>(y) }"""
    out = compiled(tmp_path / "out", source)
    [verdict] = selfcheck.check(out).verdicts
    assert verdict.whole and verdict.compiled.value == 1.0 and verdict.agrees
    model = execute.load(out / "model.onnx")
    assert model.graph[-1].op_type == "ArgMax"
    model.graph[-1].op_type = "ArgMin"
    execute.save(model, out / "model.onnx")
    [verdict] = selfcheck.check(out).verdicts
    assert verdict.compiled.value == 0.0 and not verdict.agrees


def test_another_model_is_another_one(tmp_path: pathlib.Path, qcompile: Command) -> None:
    out = compiled(tmp_path / "out")
    model = graphs.graph(NET.replace("z", "other"))
    execute.save(model, out / "model.onnx")
    done = qcompile("verify", out)
    assert (done.code, done.out) == (1, "")
    assert "the model writes no output 'z'" in done.err


# -- TensorRT: what can be told without a device ---------------------------------------------------


def test_a_runtime_that_is_missing_is_said(tmp_path: pathlib.Path, qcompile: Command) -> None:
    out = compiled(tmp_path / "out")
    for runtime, says in (
        ("tensorrt_of_none", "pip install tensorrt-of-none"),
        ("tensorrt", "neither the Python package tensorrt nor trtexec is here"),
    ):
        if runtime == "tensorrt" and (
            shutil.which("trtexec") or selfcheck.importlib.util.find_spec("tensorrt")
        ):
            continue
        changed(out / "check" / "check.json", runtime=runtime)
        done = qcompile("verify", out)
        assert done.code == 1
        assert says in done.err


def test_an_engine_without_a_device_is_said(tmp_path: pathlib.Path, qcompile: Command) -> None:
    pytest.importorskip("tensorrt_rtx")
    out = compiled(tmp_path / "out", targets=("tensorrt-rtx",))
    assert json.loads((out / "check" / "check.json").read_text())["runtime"] == "tensorrt_rtx"
    try:
        selfcheck.ctypes.CDLL("libcuda.so.1")
    except OSError:
        done = qcompile("verify", out)
        assert done.code == 1
        assert "there is no CUDA driver here" in done.err


def test_an_engine_is_built_of_the_file_where_none_fits(tmp_path: pathlib.Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    out = compiled(tmp_path / "out", targets=("tensorrt-rtx",))
    spec = json.loads((out / "check" / "check.json").read_text())
    assert spec["profile"] == {"x": [[2, 32]] * 3}
    plan = selfcheck.plan(trt, out / "model.onnx", spec["profile"])
    assert len(plan) > 1000
    (out / "model.onnx").write_bytes(b"no model")
    with pytest.raises(selfcheck.CheckError, match="parse"):
        selfcheck.plan(trt, out / "model.onnx", {})


def test_what_tensorrt_logs_becomes_a_sentence() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    log, said = selfcheck.logger(trt)
    # As TensorRT-RTX 1.7.1 says it on an H100.
    log.log(
        trt.ILogger.ERROR,
        "IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error (The engine cannot run on "
        "this GPU, which has compute capability 9.0. Supported compute capabilities: None. In "
        "throwUnlessComputeCapSupported at /_src/runtime/dispatch/runtime.cpp:84)",
    )
    log.log(trt.ILogger.ERROR, "out of\n memory")
    log.log(trt.ILogger.WARNING, "slow")
    assert said == [
        "The engine cannot run on this GPU, which has compute capability 9.0. Supported compute "
        "capabilities: None.",
        "out of memory",
    ]


def test_the_file_of_an_engine_computes_what_the_bundle_expects(tmp_path: pathlib.Path) -> None:
    # The ONNX file that the engine is made of, run by another runtime.
    pytest.importorskip("tensorrt_rtx")
    out = compiled(tmp_path / "out", targets=("tensorrt-rtx",))
    changed(out / "check" / "check.json", runtime="onnxruntime")
    assert selfcheck.check(out).good


def test_what_trtexec_exports_is_read() -> None:
    text = '[{ "name" : "y", "dimensions" : "2x3", "values" : [ 0, 1.5, 2, 3, 4, 5 ] }]'
    found = selfcheck.exported(text)
    np.testing.assert_array_equal(found["y"], [[0, 1.5, 2], [3, 4, 5]])


def test_each_target_has_a_check_of_its_own(tmp_path: pathlib.Path, qcompile: Command) -> None:
    pytest.importorskip("tensorrt_rtx")
    model = graphs.graph(NET)
    targets = ("ort-cpu", "tensorrt-rtx")
    compiler.compile(model, tmp_path / "out", calib=graphs.samples(model, 20), targets=targets)
    done = qcompile("verify", tmp_path / "out")
    assert done.code == 1
    assert "holds several targets: name one" in done.err
    assert qcompile("verify", tmp_path / "out" / "ort-cpu").code == 0


# -- figures ---------------------------------------------------------------------------------------


def test_a_figure_is_a_ratio_of_summed_powers() -> None:
    wanted = [np.array([3.0, 4.0]), np.array([0.0])]
    actual = [np.array([3.0, 4.5]), np.array([0.0])]
    figure = selfcheck.compare(wanted, actual)
    assert figure.value == pytest.approx(20.0)  # 25 over 0.25
    assert (figure.count, figure.uneven) == (3, 0)


def test_samples_of_another_size_are_left_out_and_counted() -> None:
    figure = selfcheck.compare([np.ones(3), np.ones(2)], [np.ones(3), np.ones(4)])
    assert figure == selfcheck.Figure(np.inf, 3, 1)
    assert np.isnan(selfcheck.compare([np.ones(3)], [np.ones(4)]).value)


def test_no_data_writes_no_check(tmp_path: pathlib.Path, qcompile: Command) -> None:
    passes = "quantize{input=float},insert-qdq"
    out = compiled(tmp_path / "out", calib=None, passes=passes)
    assert not (out / "check").exists()
    done = qcompile("verify", out)
    assert done.code == 1
    assert "has no check: name a folder that qcompile wrote with calibration data" in done.err


def test_rounding_moves_floats_alone_and_little() -> None:
    model = graphs.graph(NET)
    model.graph.register_initializer(
        ir.Value(name="k", const_value=ir.Tensor(np.arange(3), name="k"))
    )
    moved = bundle.rounded(model, 0)
    np.testing.assert_array_equal(graphs.weight(moved, "k"), [0, 1, 2])
    before, after = graphs.weight(model, "w"), graphs.weight(moved, "w")
    off = np.abs(after / before - 1)
    # The rounding of float32 comes on top.
    assert 0 < off.max() <= bundle.ROUNDING * (1 + 1e-3)
