"""What a GPU alone can show. Skipped where torch finds none; no GPU is simulated."""

from __future__ import annotations

import json
import pathlib
import re

import fits
import numpy as np
import onnx_ir as ir
import pytest
import torch_cases

from qcompile import compiler, devices, execute, selfcheck, text
from qcompile.backends import trt_device
from qcompile.backends.tensorrt import CAPABILITIES
from qcompile.models import fashion

torch = pytest.importorskip("torch")

from qcompile.torch_exec import TorchGraph  # noqa: E402
from qcompile.torch_table import from_array  # noqa: E402

if not torch.cuda.is_available():
    pytest.skip("torch finds no GPU", allow_module_level=True)

CASES = torch_cases.cases()
OPERATORS = sorted({case.operator for case in CASES})


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operator_is_what_onnx_runtime_computes(operator: str) -> None:
    for case in CASES:
        if case.operator != operator:
            continue
        model = ir.from_proto(case.model())
        names = [v.name or "" for v in model.graph.inputs]
        outputs = [v.name or "" for v in model.graph.outputs]
        wanted = execute.execute(model, case.feeds)
        feeds = {name: from_array(np.array(array)) for name, array in case.feeds.items()}
        with torch.no_grad():
            actual = TorchGraph(model, names, outputs, "cuda")(feeds)
        for name, array in wanted.items():
            found = actual[name].cpu().numpy()
            assert (found.dtype, found.shape) == (array.dtype, array.shape)
            torch_cases.assert_close(found, array, 3e-6, str(case))


FITS = (
    "reconstruct{steps=40 batch=8",
    "reconstruct{method=adaround granularity=layer steps=40 batch=8",
    "reconstruct{method=brecq steps=40 batch=8",
    "calibrate-affine{steps=30",
    "learn-scales{steps=30",
)


@pytest.mark.parametrize("passes", FITS)
def test_a_fit_lowers_the_error_as_on_the_processor(passes: str) -> None:
    data = fits.calibration(40)
    found: list[float] = []
    for more in ("", f",{passes} device=cpu}}", f",{passes} device=cuda}}"):
        model = fits.shipped(fashion.CNN)
        reference = model.clone()
        fits.run(model, fits.FOUR + more, data)
        found.append(fits.noise(reference, model, fits.apart(40)))
    plain, processor, gpu = found
    assert gpu < plain
    # Of other draws, and sums that round otherwise, other codes: seeds differ by 3 dB.
    assert gpu < 2 * processor


@pytest.mark.parametrize("passes", FITS)
def test_the_same_seed_makes_the_same_bytes(passes: str) -> None:
    data, rendered = fits.calibration(24), list[str]()
    for _ in range(2):
        model = fits.shipped(fashion.CNN)
        fits.run(model, f"{fits.FOUR},{passes} device=cuda}}", data)
        rendered.append(text.render(model, weights=True))
    assert rendered[0] == rendered[1]


def test_states_and_control_flow_go_through_the_frames() -> None:
    model, data = fits.matting(4)
    passes = "simplify,calibrate,quantize{weight=int4},reconstruct{steps=4 device=cuda}"
    [*_, step] = fits.run(model, passes, data)
    assert int(step.counters["blocks"]) > 0


def test_the_capability_is_that_of_torch() -> None:
    major, minor = torch.cuda.get_device_capability()
    assert trt_device.capability() == 10 * major + minor


def test_memory_of_the_check_goes_to_the_device_and_back() -> None:
    cuda = selfcheck._Cuda()  # type: ignore[reportPrivateUsage]
    array = np.random.default_rng(0).standard_normal((3, 1000)).astype(np.float32)
    place = cuda.upload(array)
    cuda.wait()
    np.testing.assert_array_equal(cuda.download(place, np.empty_like(array)), array)
    cuda.free(place)


@pytest.mark.parametrize("recipe", ["@int8", "@int4", "@fp16"])
def test_an_engine_runs_here_or_what_is_amiss_is_said(tmp_path: pathlib.Path, recipe: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    out, said = tmp_path / "out", list[str]()
    compiler.compile(
        fashion.path(fashion.VIT), out, passes=recipe, targets=("tensorrt-rtx",),
        calib=str(fashion.path(fashion.CALIBRATION)), log=said.append,
    )  # fmt: skip
    tried = json.loads((out / "device.json").read_text())
    if trt_device.capability() in CAPABILITIES:
        assert not tried["error"] and min(tried["sqnr"]) > 30
        assert selfcheck.check(out).good
        return
    why = "the engine cannot be loaded: .*compute capability"  # there is no kernel for this GPU
    assert re.match(why, tried["error"])
    notes = json.loads((out / "report.json").read_text())["warnings"]
    assert any("it does not run on the GPU here" in note for note in notes)
    with pytest.raises(selfcheck.CheckError, match=r"cannot be loaded: .*compute capability"):
        selfcheck.check(out)


def test_a_convolution_is_not_rounded_to_ten_bits() -> None:
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(s).astype(np.float32) for s in ((2, 64, 28, 28), (64, 64, 3, 3))]
    case = torch_cases.Case("Conv", tuple(inputs), {})
    model = ir.from_proto(case.model())
    wanted = execute.execute(model, case.feeds)["y0"]
    feeds = {name: from_array(array) for name, array in case.feeds.items()}
    with devices.exact("cuda", print), torch.no_grad():
        found = TorchGraph(model, ["x0", "x1"], ["y0"], "cuda")(feeds)["y0"].cpu().numpy()
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
