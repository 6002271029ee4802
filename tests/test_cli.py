"""Laws of the command line: exit codes, the user's words, and files that appear whole or not."""

from __future__ import annotations

import json
import pathlib
import shlex
from collections.abc import Sequence

import numpy as np
import pytest
from command import Command, Result, names, process
from graphs import CHAIN, graph, proto, samples

from qcompile import execute, pipeline, recipes, registry
from qcompile.backends.onnxruntime import OrtCpu
from qcompile.capture import capture
from qcompile.models import fashion

# The framework wonders why a test calls the command line without words; here they are in sys.argv.
pytestmark = pytest.mark.filterwarnings("ignore:Cyclopts application invoked")


@pytest.fixture
def here(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """An empty folder to work in, with a tiny model and data that fits it."""
    model = graph(CHAIN)
    execute.save(model, tmp_path / "m.onnx")
    stacked = np.stack([s["x"] for s in samples(model, 10)])
    np.savez(tmp_path / "data.npz", x=stacked)
    monkeypatch.chdir(tmp_path)
    return tmp_path


TINY = ("m.onnx", "--calib", "data.npz", "-o", "result")
START = ["data.npz", "m.onnx"]


# -- compiling ----------------------------------------------------------------------------------


def test_a_real_model_becomes_integers_and_the_same_command_writes_the_same_bytes(
    tmp_path: pathlib.Path, qcompile: Command
) -> None:
    command = [fashion.path(fashion.CNN), "--calib", fashion.path(fashion.CALIBRATION), "-o"]
    mine = qcompile(*command, tmp_path / "one")
    other = process(*command, tmp_path / "two")
    assert (mine.code, other.code) == (0, 0), mine.err + other.err
    assert names(tmp_path) == ["one", "two"]
    assert {"model.onnx", "report.json", "pipeline.txt"} <= set(names(tmp_path / "one"))
    one, two = (tmp_path / n / "model.onnx" for n in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    pictures, labels = fashion.test()
    float_model, compiled = execute.Session(fashion.path(fashion.CNN)), execute.Session(one)

    def right(session: execute.Session) -> float:
        logits = session.run({"image": pictures[:1000]})["logits"]
        return float((logits.argmax(axis=1) == labels[:1000]).mean())

    # A hundredth is ten pictures: more than two standard errors of a paired difference this small.
    assert right(compiled) > right(float_model) - 0.01
    assert one.stat().st_size < 0.5 * fashion.path(fashion.CNN).stat().st_size
    assert f"wrote {tmp_path / 'one'}" in mine.out


def test_each_target_has_a_folder_of_its_own(tmp_path: pathlib.Path, qcompile: Command) -> None:
    asked = ("ort-cpu{isa=avx2 version=1.32}", "ort-cpu{isa=arm version=1.32}", "tensorrt-rtx")
    words = [word for target in asked for word in ("--target", target)]
    command = [fashion.path(fashion.CNN), "--calib", fashion.path(fashion.CALIBRATION), *words]
    done = qcompile(*command, "--passes", "calibrate,quantize,insert-qdq", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    folders = ["ort-cpu-isa-arm-version-1.32", "ort-cpu-isa-avx2-version-1.32", "tensorrt-rtx"]
    assert names(tmp_path / "out") == folders
    told = [json.loads((tmp_path / "out" / f / "report.json").read_text()) for f in folders]
    assert [report["target"] for report in told] == [asked[1], asked[0], asked[2]]
    one, other = ((tmp_path / "out" / f / "model.onnx").read_bytes() for f in folders[:2])
    assert one != other


def test_the_report_and_the_file_say_how_it_was_made(here: pathlib.Path, qcompile: Command) -> None:
    assert qcompile(*TINY, "--seed", 7).code == 0
    written = json.loads((here / "result" / "report.json").read_text())
    stamp = json.loads(execute.load(here / "result" / "model.onnx").metadata_props["qcompile"])
    assert written["pipeline"] == stamp["pipeline"] == recipes.RECIPES["int8"]
    assert written["target"] == stamp["target"] == str(OrtCpu())
    assert written["seed"] == stamp["seed"] == 7
    assert written["data"]["digest"] == stamp["data"]
    assert stamp["random_calibration"] is False


def test_the_written_pipeline_makes_the_same_file(here: pathlib.Path, qcompile: Command) -> None:
    assert qcompile(*TINY).code == 0
    again = shlex.split((here / "result" / "pipeline.txt").read_text())
    assert qcompile("m.onnx", "--calib", "data.npz", "-o", "again", *again).code == 0
    one, other = (here / n / "model.onnx" for n in ("result", "again"))
    assert one.read_bytes() == other.read_bytes()


def test_the_number_of_jobs_does_not_matter(here: pathlib.Path, qcompile: Command) -> None:
    text = "simplify,calibrate,quantize{method=mse},insert-qdq"
    for jobs in (1, 2):
        command = ("m.onnx", "--calib", "data.npz", "-o", f"j{jobs}", "--jobs", jobs)
        assert qcompile(*command, "--passes", text).code == 0
    one, other = (here / n / "model.onnx" for n in ("j1", "j2"))
    assert one.read_bytes() == other.read_bytes()


def test_our_own_folder_is_replaced_whole(here: pathlib.Path, qcompile: Command) -> None:
    assert qcompile(*TINY).code == 0
    (here / "result" / "stale.txt").write_text("from before")
    assert qcompile(*TINY).code == 0
    assert "stale.txt" not in names(here / "result")
    assert names(here) == [*START, "result"]


def test_observers_print_and_write(here: pathlib.Path, qcompile: Command) -> None:
    done = qcompile(*TINY, "--print-after", "quantize", "--print-changes", "--snapshots", "steps")
    assert done.code == 0
    shown = done.out + done.err
    assert "%h: f32[2,8] = MatMul(%x{int8 asymmetric}, %w1{int8 axis=1})" in shown
    assert "-%h: f32[2,8] = MatMul(%x, %w1)" in shown
    passes = pipeline.parse(recipes.RECIPES["int8"], registry.passes())
    stems = [f"{i:02d}-{step.name}" for i, step in enumerate(passes)]
    assert names(here / "steps") == sorted(f"{s}{e}" for s in stems for e in (".onnx", ".txt"))


def test_noise_is_marked_everywhere(here: pathlib.Path, qcompile: Command) -> None:
    done = qcompile("m.onnx", "--calib", "random", "-o", "result")
    assert done.code == 0
    assert "calibrated on random noise" in " ".join(done.out.split())
    written = json.loads((here / "result" / "report.json").read_text())
    stamp = json.loads(execute.load(here / "result" / "model.onnx").metadata_props["qcompile"])
    assert written["data"]["random"] is True
    assert any("random noise" in warning for warning in written["warnings"])
    assert stamp["random_calibration"] is True


def test_a_float_result_is_written_when_it_is_asked_for(
    here: pathlib.Path, qcompile: Command
) -> None:
    assert qcompile(*TINY, "--passes", "simplify", "--allow-float").code == 0
    assert (here / "result" / "model.onnx").is_file()


def test_a_recipe_file_is_read(here: pathlib.Path, qcompile: Command) -> None:
    (here / "my.txt").write_text("calibrate  # ours\nquantize{weight=int4}\ninsert-qdq\n")
    assert qcompile(*TINY, "--passes", "@my.txt").code == 0
    written = json.loads((here / "result" / "report.json").read_text())
    assert written["pipeline"] == "calibrate,quantize{weight=int4},insert-qdq"


def test_a_shape_fixes_the_dimensions_of_noise(here: pathlib.Path, qcompile: Command) -> None:
    text = CHAIN.replace("float[2,8] x", "float[N,8] x").replace("float[2,4] y", "float[N,4] y")
    execute.save(graph(text), here / "open.onnx")
    command = ("open.onnx", "--calib", "random", "--shape", "x=5x8", "-o", "result")
    assert qcompile(*command).code == 0
    written = json.loads((here / "result" / "report.json").read_text())
    assert [layer["macs"] for layer in written["layers"]] == [5 * 8 * 8, 5 * 8 * 4]


def test_a_mask_is_in_the_report_and_in_the_pipeline(here: pathlib.Path, qcompile: Command) -> None:
    model = graph(
        """(float[N,T,8] x, int64[N,T] keep) => (float[N,T,4] y, float[N,T] k) <float[8,4] w> {
        y = MatMul(x, w) k = Cast<to=1>(keep)
    }"""
    )
    execute.save(model, here / "tokens.onnx")
    rng = np.random.default_rng(0)
    x, keep = rng.standard_normal((10, 1, 6, 8)).astype(np.float32), np.ones((10, 1, 6), np.int64)
    x[:, :, 4:], keep[:, :, 4:] = 1e6, 0
    np.savez(here / "padded.npz", x=x, keep=keep)
    command = ("tokens.onnx", "--calib", "padded.npz", "-o", "result", "--passes", "calibrate")
    done = qcompile(*command, "--mask", "keep", "--allow-float", "--snapshots", "steps")
    assert done.code == 0
    data = json.loads((here / "result" / "report.json").read_text())["data"]
    assert data["mask"] == "keep"
    assert "--mask keep" in (here / "result" / "pipeline.txt").read_text()
    ranges = execute.load(here / "steps" / "00-calibrate.onnx").graph.initializers["x/range"]
    assert ranges.const_value is not None and ranges.const_value.numpy().max() < 10


def test_sequences_carry_a_state_and_the_report_says_so(
    here: pathlib.Path, qcompile: Command
) -> None:
    model = graph(
        """(float[N,3] x, float[N,4] h) => (float[N,2] y, float[N,4] hn)
        <float[3,4] u, float[4,4] v, float[4,2] w> {
        a = MatMul(x, u) b = MatMul(h, v) c = Add(a, b) hn = Tanh(c) y = MatMul(hn, w)
    }"""
    )
    execute.save(model, here / "cell.onnx")
    x = np.random.default_rng(0).standard_normal((10, 6, 1, 3)).astype(np.float32)
    np.savez(here / "long.npz", x=x)
    found = qcompile("cell.onnx", "--calib", "long.npz", "-o", "paired")
    assert found.code == 0 and "state: h=hn (paired by name, type and shape)" in found.err
    said = qcompile("cell.onnx", "--calib", "long.npz", "--state", "h=hn", "-o", "said")
    assert said.code == 0 and "paired" not in said.err
    for name in ("paired", "said"):
        data = json.loads((here / name / "report.json").read_text())["data"]
        assert (data["samples"], data["judged"], data["sequences"]) == (48, 12, 10)
        assert data["state"] == {"h": "hn"}
    one, other = (here / n / "model.onnx" for n in ("paired", "said"))
    assert one.read_bytes() == other.read_bytes()
    assert "--state h=hn" in (here / "said" / "pipeline.txt").read_text()


# -- exit code 1: the user's mistakes; test_bad_input.py has the list ---------------------------

WITH_DATA = ["--calib", "data.npz"]


def test_foreign_files_are_not_touched(here: pathlib.Path, qcompile: Command) -> None:
    (here / "result").mkdir()
    (here / "result" / "thesis.txt").write_text("years of work")
    done = qcompile(*TINY)
    assert done.code == 1
    assert "holds files that qcompile did not write" in done.err
    assert names(here / "result") == ["thesis.txt"]
    assert names(here) == [*START, "result"]


def test_a_file_is_not_overwritten_by_the_folder(here: pathlib.Path, qcompile: Command) -> None:
    (here / "result").write_text("mine")
    done = qcompile(*TINY)
    assert (done.code, (here / "result").read_text()) == (1, "mine")
    assert "is a file; name a folder to write" in done.err


def test_a_failure_leaves_the_last_result_as_it_was(here: pathlib.Path, qcompile: Command) -> None:
    assert qcompile(*TINY).code == 0
    before = (here / "result" / "model.onnx").read_bytes()
    assert qcompile(*TINY, "--passes", "calibrate,quantize{include=nope},insert-qdq").code == 1
    assert (here / "result" / "model.onnx").read_bytes() == before
    assert names(here) == [*START, "result"]


def test_a_quantized_model_is_refused_with_the_node(here: pathlib.Path, qcompile: Command) -> None:
    assert qcompile(*TINY).code == 0
    done = qcompile("result/model.onnx", *WITH_DATA, "-o", "again")
    assert done.code == 1
    assert "the model is quantized already: node '" in done.err
    assert "start from the float model" in done.err
    assert not (here / "again").exists()


def test_a_process_says_it_alike(here: pathlib.Path) -> None:
    done = process("gone.onnx", *WITH_DATA, cwd=here)
    assert (done.code, done.out) == (1, "")
    assert "there is no file 'gone.onnx'" in done.err
    assert names(here) == START


# -- exit code 3 --------------------------------------------------------------------------------


def test_a_requirement_that_is_missed_exits_with_three(
    here: pathlib.Path, qcompile: Command
) -> None:
    half = ("--passes", "calibrate,quantize{exclude=h},insert-qdq")
    done = qcompile(*TINY, *half, "--require-fused", 90)
    assert done.code == 3
    # The first layer has 2 * 8 * 8 MACs, the second 2 * 8 * 4.
    assert "33.3 % of the MACs run in integers, 90 % are required" in done.err


def test_a_requirement_that_is_met_exits_with_zero(here: pathlib.Path, qcompile: Command) -> None:
    assert qcompile(*TINY, "--require-fused", 100).code == 0


def test_an_sqnr_that_is_missed_names_the_output(here: pathlib.Path, qcompile: Command) -> None:
    assert qcompile(*TINY, "--min-sqnr", 20).code == 0
    done = qcompile(*TINY, "--min-sqnr", 200)
    assert done.code == 3
    assert "requirement not met: ort-cpu{" in done.err and "}: output 'y' has " in done.err
    assert "dB of SQNR, 200 dB are required" in done.err
    assert (here / "result" / "model.onnx").is_file()


# -- the command as a script --------------------------------------------------------------------


def test_the_saved_command_makes_the_same_file(here: pathlib.Path, qcompile: Command) -> None:
    passes = "calibrate,quantize{exclude=h},insert-qdq"
    told = ("--passes", passes, "--seed", 3, "--no-verify", "--min-sqnr", -5)
    assert qcompile(*TINY, *told, "--save-command", "again.sh").code == 0
    script = (here / "again.sh").read_text()
    first, *_, last = script.splitlines()
    assert first == "#!/bin/sh"
    words = shlex.split(last)
    assert words[0] == "qcompile"
    assert words[1:] == [
        "m.onnx", "-o", "result", "--passes", passes, "--calib", "data.npz", "--seed", "3",
        "--min-sqnr=-5.0", "--no-verify",
    ]  # fmt: skip
    before = (here / "result" / "model.onnx").read_bytes()
    words[words.index("result")] = "other"
    assert qcompile(*words[1:]).code == 0
    assert (here / "other" / "model.onnx").read_bytes() == before


def test_the_saved_command_is_written_when_a_requirement_is_missed(
    here: pathlib.Path, qcompile: Command
) -> None:
    assert qcompile(*TINY, "--min-sqnr", 200, "--save-command", "again.sh").code == 3
    assert "--min-sqnr 200" in (here / "again.sh").read_text()
    done = qcompile(*TINY, "--save-command", "gone/again.sh")
    assert done.code == 1
    assert "cannot write 'gone/again.sh'" in done.err


# -- the other commands -------------------------------------------------------------------------


def test_diff_tells_equal_from_different_from_wrong(here: pathlib.Path, qcompile: Command) -> None:
    changed = graph(CHAIN)
    changed.graph[2].op_type = "Tanh"
    execute.save(changed, here / "changed.onnx")
    execute.save(graph(CHAIN, seed=3), here / "numbers.onnx")
    (here / "notes.onnx").write_text("no model at all, only words\n" * 5)
    assert qcompile("diff", "m.onnx", "m.onnx") == Result(0, "", "")
    different = qcompile("diff", "m.onnx", "changed.onnx")
    assert (different.code, different.out.splitlines()) == (
        1,
        ["-%r: f32[2,8] = Relu(%s)", "+%r: f32[2,8] = Tanh(%s)"],
    )
    assert qcompile("diff", "m.onnx", "numbers.onnx").code == 0
    assert qcompile("diff", "m.onnx", "numbers.onnx", "--weights").code == 1
    for wrong in ("gone.onnx", "notes.onnx"):
        done = qcompile("diff", "m.onnx", wrong)
        assert (done.code, done.out) == (2, "")
        assert f"'{wrong}' is not a readable ONNX model" in done.err


@pytest.mark.parametrize("word", ["[/b]", "[red]", "[/]"])
def test_brackets_are_shown_as_they_are(here: pathlib.Path, qcompile: Command, word: str) -> None:
    for words, code in (
        (["diff", "m.onnx", word], 2),
        (["m.onnx", "--seed", word], 2),
        ([word, *WITH_DATA], 1),
        (["m.onnx", *WITH_DATA, "-o", f"to{word}"], 0),
        (["m.onnx", *WITH_DATA, "-o", f"to{word}", "--passes", "calibrate,quantize{exclude=x}"], 1),
    ):
        done = qcompile(*words)
        assert done.code == code
        assert code == 1 or word in done.out + done.err


def test_layers_with_brackets_in_their_names_are_reported(
    here: pathlib.Path, qcompile: Command
) -> None:
    model = graph(CHAIN)
    model.graph[0].name = "[red]layers[/b]"
    model.graph[0].outputs[0].name = "layers[conv]"
    execute.save(model, here / "odd.onnx")
    done = qcompile("odd.onnx", *WITH_DATA, "-o", "result", "-v")
    assert done.code == 0
    assert "[red]layers[/b]" in done.out


def test_diff_has_its_codes_as_a_process(here: pathlib.Path) -> None:
    assert process("diff", "m.onnx", "m.onnx", cwd=here).code == 0
    assert process("diff", "m.onnx", "gone.onnx", cwd=here).code == 2


def test_every_pass_is_listed_and_explained(qcompile: Command) -> None:
    listed = qcompile("passes")
    assert listed.code == 0
    for name in registry.passes():
        assert name in listed.out
        assert qcompile("passes", name).code == 0
    for name, text in recipes.RECIPES.items():
        assert f"@{name}" in listed.out
        assert qcompile("passes", f"@{name}").out.rstrip().endswith(f"--passes '{text}'")


def test_every_target_is_listed_and_explained(qcompile: Command) -> None:
    listed = qcompile("targets")
    assert listed.code == 0
    for name in registry.targets():
        assert name in listed.out
        assert qcompile("targets", name).code == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("passes", "quantise"), "unknown pass 'quantise'; did you mean 'quantize'?"),
        (("targets", "ort"), "unknown target 'ort'; did you mean 'ort-cpu'?"),
        (("passes", "@int9"), "did you mean 'int8'?"),
    ],
)
def test_an_unknown_name_gets_the_nearest(
    qcompile: Command, words: Sequence[str], says: str
) -> None:
    done = qcompile(*words)
    assert done.code == 1
    assert says in done.err


def test_help_names_every_command(qcompile: Command) -> None:
    done = qcompile("--help")
    assert done.code == 0
    for word in (
        "diff",
        "passes",
        "targets",
        "fetch",
        "verify",
        "bench",
        "--calib",
        "--passes",
        "--target",
    ):
        assert word in done.out


def test_capture_and_cli_agree_on_what_a_model_is(here: pathlib.Path, qcompile: Command) -> None:
    assert qcompile(*TINY, "--passes", "simplify", "--allow-float").code == 0
    written = capture(here / "result" / "model.onnx")
    assert [n.op_type for n in written.graph] == ["MatMul", "Add", "Relu", "MatMul"]


def test_a_model_that_declares_a_wrong_shape_compiles_all_the_same(here: pathlib.Path) -> None:
    model = proto(CHAIN.replace("float[2,4] y", "float[2,7] y"))
    (here / "wrong.onnx").write_bytes(model.SerializeToString())
    done = process("wrong.onnx", *WITH_DATA, "-o", "result", cwd=here)
    assert done.code == 0, done.err
    assert "Shape inference failed" not in done.err
