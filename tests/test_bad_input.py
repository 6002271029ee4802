"""Bad input as a stranger gives it: the right exit code, one sentence, and nothing left behind."""

from __future__ import annotations

import pathlib
import re
import shlex
import sys
import tempfile

import numpy as np
import onnx
import pytest
from command import Command, names, process
from graphs import CHAIN, graph, proto, samples

from qcompile import execute

pytestmark = pytest.mark.filterwarnings("ignore:Cyclopts application invoked")

# Of the user's own code: factories of models, and sources of data.
MINE = """
import sys
import numpy as np
number = 42
def raises(): raise RuntimeError("no such luck")
def leaves(): sys.exit(0)
def needs(more): return more
def pair(): return 1, 2
def wrong(): return {"x": np.zeros((2, 8), np.float32)}
def nothing(): return []
def ragged(): yield {"x": [[1, 2], [3]]}
def breaks():
    yield {"x": np.zeros((2, 8), np.float32)}
    raise KeyError("sensor 7")
"""


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a model, data that fits it, and much that is wrong."""
    place = tmp_path_factory.mktemp("desk")
    _models(place)
    _data(place)
    (place / "file").write_text("mine")
    (place / "foreign").mkdir()
    (place / "foreign" / "thesis.txt").write_text("years of work")
    # A report deep inside does not make the folder around it one of ours.
    for name in ("one", "two"):
        (place / "runs" / name).mkdir(parents=True)
        for file in ("report.json", "pipeline.txt"):
            (place / "runs" / name / file).write_text("{}")
    (place / "hollow").mkdir()
    (place / "damaged" / "check").mkdir(parents=True)
    (place / "damaged" / "check" / "check.json").write_text("{")
    (place / "empty.txt").write_text("# no pass\n")
    (place / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (place / "mine.py").write_text(MINE)
    (place / "unsound.py").write_text("def f(:\n")
    (place / "dies.py").write_text("1 / 0\n")
    return place


def _models(place: pathlib.Path) -> None:
    def write(name: str, model: onnx.ModelProto) -> None:
        (place / f"{name}.onnx").write_bytes(model.SerializeToString())

    sound = proto(CHAIN)
    write("m", sound)
    write("plain", proto("(float[2,8] x) => (float[2,8] y) { y = Neg(x) }"))
    two = "(float[2,8] x, float[2,8] z) => (float[2,3] y) <float[8,3] w> { s = Add(x, z)"
    write("two", proto(f"{two} y = MatMul(s, w) }}"))
    write("quantized", proto("""(float[4] x) => (float[4] y) <float s = {0.5}, int8 z = {0}> {
        q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }"""))  # fmt: skip
    for name, version in (("newer", 26), ("older", 6)):
        write(name, proto(CHAIN, version))
    custom = proto(CHAIN)
    custom.graph.node[2].op_type, custom.graph.node[2].domain = "Swirl", "com.acme"
    custom.opset_import.append(onnx.helper.make_opsetid("com.acme", 1))
    write("custom", custom)
    unknown = proto(CHAIN, 13)
    unknown.graph.node[2].op_type = "Swirl"
    write("unknown", unknown)
    loose = proto(CHAIN)
    loose.graph.node[2].input[0] = "nobody"
    write("loose", loose)
    circle = proto(CHAIN)
    circle.graph.node[1].input[0] = "r"
    write("circle", circle)
    odd = proto("(float[1,2,5,5] x) => (float[1,2,3,3] y) <float[2,2,3,3] w> { y = Conv(x, w) }", 9)
    odd.graph.node[0].attribute.append(onnx.helper.make_attribute("group", "one"))
    write("odd", odd)
    short = proto(CHAIN)
    short.graph.initializer[0].raw_data = b"\0" * 12
    write("short", short)
    untyped = proto(CHAIN)
    untyped.graph.input[0].ClearField("type")
    write("untyped", untyped)
    for name, location in (("gone-data", "gone.data"), ("outside", "/etc/passwd")):
        apart = proto(CHAIN)
        weight = apart.graph.initializer[0]
        weight.ClearField("raw_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=location)
        write(name, apart)
    whole = sound.SerializeToString()
    (place / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    (place / "notes.onnx").write_text("these are notes, no model\n" * 9)
    (place / "nothing.onnx").write_bytes(b"")


def _data(place: pathlib.Path) -> None:
    x = np.stack([s["x"] for s in samples(graph(CHAIN), 10)])
    np.savez(place / "data.npz", x=x)
    np.savez(place / "names.npz", z=x)
    np.savez(place / "odd-labels.npz", x=x, labels=np.zeros(7, np.int64))
    np.savez(place / "more.npz", x=x, extra=x)
    np.savez(place / "shapes.npz", x=x[:, :, :5])
    np.savez(place / "rank.npz", x=x[0, 0])
    np.savez(place / "whole.npz", x=x.astype(np.int64))
    np.savez(place / "nan.npz", x=x * np.nan)
    np.savez(place / "empty.npz", x=x[:0])
    np.savez(place / "objects.npz", x=np.array([{}], object))
    np.savez(place / "nothing.npz")
    np.save(place / "data.npy", x)
    (place / "text.npz").write_text("no archive")
    content = (place / "data.npz").read_bytes()
    (place / "cut.npz").write_bytes(content[: len(content) // 2])
    (place / "photos").mkdir()
    (place / "photos" / "a.png").write_bytes(b"no picture")


D = "--calib data.npz"
P = f"m.onnx {D} --passes"
E = f"m.onnx {D} --eval data.npz --metric"
RETURNS = "a factory must return (module, example_inputs), (module, example_inputs, dynamic_shapes)"

# Words, exit code, and what must be said.
CASES: list[tuple[str, int, str]] = [
    # the model
    (f"gone.onnx {D}", 1, "there is no file 'gone.onnx'"),
    (f"{'long' * 999} {D}", 1, "there is no file 'longlong"),
    (f"hollow {D}", 1, "'hollow' is a folder; name the .onnx file"),
    (f"notes.onnx {D}", 1, "'notes.onnx' is not a readable ONNX model"),
    (f"cut.onnx {D}", 1, "'cut.onnx' is not a readable ONNX model"),
    (f"data.npz {D}", 1, "'data.npz' is not a readable ONNX model"),
    (f"nothing.onnx {D}", 1, "'nothing.onnx' is not an ONNX model: its graph has no outputs"),
    (f"quantized.onnx {D}", 1, "quantized already: node 'q' is QuantizeLinear; start from the"),
    (f"newer.onnx {D}", 1, "opset 26 is not supported; export the model at one of 7 to 25"),
    (f"older.onnx {D}", 1, "opset 6 is not supported"),
    (f"custom.onnx {D}", 1, "it has no operator 'Swirl' of the domain 'com.acme'"),
    (
        "custom.onnx --passes 'quantize{input=float},insert-qdq'",
        1,
        "it has no operator 'Swirl' of the domain 'com.acme'",
    ),
    (f"unknown.onnx {D}", 1, "node 'r': ONNX has no operator 'Swirl' at opset 13"),
    (f"gone-data.onnx {D}", 1, "weight 'w1' lies in 'gone.data', which is missing"),
    (f"outside.onnx {D}", 1, "'w1' lies in '/etc/passwd', outside the folder of the model"),
    (f"loose.onnx {D}", 1, "node 'r' (Relu) reads 'nobody', which nothing writes"),
    (f"circle.onnx {D}", 1, "nodes read in a circle: 'r', 's'"),
    (f"odd.onnx {D}", 1, "node 'y' (Conv) has the attribute 'group' as STRING; ONNX wants INT"),
    (f"short.onnx {D}", 1, "weight 'w1' of shape [8, 8] has 12 bytes, not 256"),
    (f"untyped.onnx {D}", 1, "input 'x' has no type"),
    (f"plain.onnx {D}", 1, "nothing is quantized by"),
    (f"nowhere:make {D}", 1, "model 'nowhere:make': cannot import 'nowhere'"),
    (f"mine:nope {D}", 1, "mine has no 'nope'; known are"),
    (f":make {D}", 1, "':make' is not of the form package.module:name"),
    (f"unsound:make {D}", 1, "importing unsound raises SyntaxError: invalid syntax"),
    (f"dies:make {D}", 1, "importing dies raises ZeroDivisionError: division by zero"),
    (f"mine:raises {D}", 1, "the factory of the model raises RuntimeError: no such luck"),
    (f"mine:leaves {D}", 1, "the factory of the model raises SystemExit: 0"),
    (f"mine:needs {D}", 1, "needs() missing 1 required positional argument: 'more'"),
    (f"mine:number {D}", 1, RETURNS),
    (f"mine:pair {D}", 1, "or an ExportedProgram, not (int, int)"),
    # calibration data
    ("m.onnx", 1, "no calibration data: give --calib"),
    ("m.onnx --calib gone.npz", 1, "there is no file 'gone.npz'"),
    ("m.onnx --calib noise", 1, "a source is an .npz file"),
    ("m.onnx --calib data.npy", 1, "'data.npy' is no .npz file"),
    ("m.onnx --calib text.npz", 1, "'text.npz' is not a readable .npz"),
    ("m.onnx --calib cut.npz", 1, "'cut.npz' is not a readable .npz"),
    ("m.onnx --calib objects.npz", 1, "array 'x.npy' holds Python objects"),
    ("m.onnx --calib nothing.npz", 1, "'nothing.npz' holds no arrays"),
    ("m.onnx --calib empty.npz", 1, "array 'x' holds no sample"),
    ("m.onnx --calib names.npz", 1, "no array for input 'x'; it has z"),
    ("m.onnx --calib more.npz", 1, "an array 'extra', which is no input"),
    ("m.onnx --calib shapes.npz", 1, "'x' has shape [2, 5], the model reads x: float32[2,8]"),
    ("m.onnx --calib rank.npz", 1, "add a leading sample axis or the batch axis"),
    ("m.onnx --calib whole.npz", 1, "'x' is int64, the model reads x: float32[2,8]"),
    ("m.onnx --calib nan.npz", 1, "'x' has NaN or infinity in it"),
    (f"two.onnx {D}", 1, "has no array for input 'z'; it has x"),
    ("m.onnx --calib hollow", 1, "neither .npz files nor images; it holds nothing"),
    ("m.onnx --calib photos", 1, "as in --preprocess 'image{resize=256 crop=224"),
    (
        "m.onnx --calib photos --preprocess image",
        1,
        "images go into one input of 4 dimensions; the model reads x: float32[2,8]",
    ),
    (f"m.onnx {D} --preprocess image", 1, "is for a folder of images; 'data.npz'"),
    (f"m.onnx {D} --preprocess 'image{{mean=a}}'", 1, "'a' is not a number"),
    (f"m.onnx {D} --preprocess 'image{{fold=true}}'", 1, "one input of 4 dimensions"),
    (f"m.onnx {D} --state x", 1, "--state x: expected INPUT=OUTPUT,..., got 'x'"),
    (f"m.onnx {D} --state x=z", 1, "unknown name 'z'; known are y"),
    (f"m.onnx {D} --state x=y", 1, "output y: float32[2,4] does not fit input x"),
    ("m.onnx --state x=y", 1, "--state says how to read calibration data: give --calib"),
    (f"m.onnx {D} --mask z", 1, "--mask z: unknown name 'z'; known are x"),
    (f"m.onnx {D} --shape x=2", 1, "contradicts the model, which reads x: float32"),
    (f"m.onnx {D} --shape z=2x8", 1, "--shape z=2x8: unknown name 'z'"),
    ("m.onnx --calib nowhere:make", 1, "source 'nowhere:make': cannot import 'nowhere'"),
    ("m.onnx --calib mine:nope", 1, "mine has no 'nope'"),
    ("m.onnx --calib unsound:f", 1, "importing unsound raises SyntaxError"),
    ("m.onnx --calib mine:raises", 1, "'mine:raises' raises RuntimeError: no such luck"),
    ("m.onnx --calib mine:breaks", 1, "'mine:breaks' raises KeyError: 'sensor 7'"),
    ("m.onnx --calib mine:number", 1, "must yield dicts of arrays, one a run; it is int"),
    ("m.onnx --calib mine:wrong", 1, "must yield dicts of arrays, one a run; it is dict"),
    ("m.onnx --calib mine:nothing", 1, "'mine:nothing' yields no samples"),
    ("m.onnx --calib mine:ragged", 1, "sample 0 of 'mine:ragged': 'x' is no array"),
    # the pipeline
    (f"{P} calibrat,quantize,insert-qdq", 1, "unknown pass 'calibrat'; did you mean 'calibrate'?"),
    (f"{P} 'quantize{{wieght=int8}}'", 1, "has no option 'wieght'; did you mean 'weight'?"),
    (f"{P} 'quantize{{weight=int8'", 1, "this brace is never closed"),
    (f"{P} 'quantize}}weight=int8'", 1, "expected ',' or '{' after 'quantize', got '}'"),
    (f"{P} ''", 1, "expected a name, the text ends"),
    (f"{P} ,", 1, "expected a name, got ','"),
    (f"{P} 'quantize{{weight=int99}}'", 1, "unknown format 'int99'"),
    (f"{P} 'calibrate{{bits=99}}'", 1, "bits must be 2 to 8, got 99"),
    (f"{P} 'calibrate{{percentile=-1}}'", 1, "percentile must lie between 50 and 100, got -1"),
    (f"{P} 'calibrate{{percentile=x}}'", 1, "'x' is not a number"),
    (f"{P} 'calibrate{{method=best}}'", 1, "'best' is not one of minmax, percentile"),
    (f"{P} 'smooth-hadamard{{block=6}}'", 1, "must be a power of two from 2, got 6"),
    (
        f"{P} 'quantize{{granularity=block block=5 input=float}},insert-qdq'",
        1,
        "block 5 divides the summed axis of no layer; that of 'h' has 8",
    ),
    (
        f"{P} quantize,calibrate,insert-qdq",
        1,
        "this order works: calibrate,quantize,insert-qdq",
    ),
    (f"{P} calibrate,insert-qdq", 1, "requires 'specs', which no pass of this pipeline produces"),
    (
        f"{P} 'calibrate,quantize{{exclude=*head}},insert-qdq'",
        1,
        "exclude=*head matches no layer; known are h, y",
    ),
    (f"{P} simplify", 1, "'simplify' lowers nothing: end it with calibrate,quantize,insert-qdq"),
    (f"{P} calibrate,quantize", 1, "'calibrate,quantize' lowers nothing: end it with"),
    (f"{P} @int9", 1, "no recipe and no file is called 'int9'; did you mean 'int8'?"),
    (f"{P} @empty.txt", 1, "the recipe file 'empty.txt' names no pass"),
    (f"{P} @bytes.txt", 1, "the recipe file 'bytes.txt' is not readable text"),
    (f"m.onnx {D} --print-after fuse", 1, "the pipeline has no such pass"),
    # the target
    (f"m.onnx {D} --target ort-gpu", 1, "unknown target 'ort-gpu'; did you mean 'ort-cpu'?"),
    (f"m.onnx {D} --target 'ort-cpu{{vnni=yes}}'", 1, "ort-cpu has no option 'vnni'"),
    (f"m.onnx {D} --target ort-cpu --target ort-cpu", 1, "a target is named twice"),
    (f"m.onnx {D} --target ort-cpu,tensorrt-rtx", 1, "give --target once for each"),
    (
        f"{P} 'calibrate,quantize{{weight=uint8}},insert-qdq'",
        1,
        "ort-cpu holds no uint8 weights",
    ),
    # where to write
    (f"m.onnx {D} -o file", 1, "file' is a file; name a folder to write"),
    (f"m.onnx {D} -o file/inside", 1, "file' is a file; name a folder to write"),
    (f"m.onnx {D} -o foreign", 1, "'foreign' holds files that qcompile did not write"),
    (f"m.onnx {D} -o runs", 1, "'runs' holds files that qcompile did not write"),
    (f"m.onnx {D} -o .", 1, "'.' is a folder that you work in; name another"),
    (f"m.onnx {D} -o ..", 1, "'..' is a folder that you work in; name another"),
    (f"m.onnx {D} -o {'long' * 99}", 1, "File name too long"),
    (f"m.onnx {D} --snapshots file", 1, "file' is a file; name a folder to write"),
    # numbers
    (f"m.onnx {D} --require-fused 200", 1, "a percentage from 0 to 100, got 200"),
    (f"m.onnx {D} --jobs 0", 1, "--jobs is a number of processes, from 1; got 0"),
    (f"m.onnx {D} --min-sqnr nan", 1, "--min-sqnr is a number of dB, got nan"),
    ("m.onnx --min-sqnr 20", 1, "--min-sqnr compares with float on data: give --calib"),
    # accuracy on the user's terms
    ("m.onnx --eval data.npz --metric cosine", 1, "--eval compares with float on data: give"),
    (f"m.onnx {D} --eval data.npz", 1, "--eval needs --metric"),
    (f"m.onnx {D} --metric top1", 1, "--metric needs --eval"),
    (f"m.onnx {D} --max-drop 1%", 1, "--max-drop needs --eval"),
    (f"{E} top2", 1, "unknown metric 'top2'; did you mean 'top1'?"),
    (f"{E} 'top1{{k=5}}'", 1, "top1 has no option 'k'"),
    (f"{E} top1,cosine", 1, "--metric top1,cosine: one metric is measured, not 2"),
    (f"{E} top1", 1, "sample 0 of 'data.npz' has no array 'labels'"),
    (f"{E} perplexity", 1, "which input holds the tokens? none has the shape"),
    (f"{E} nowhere:f", 1, "metric 'nowhere:f': cannot import 'nowhere'"),
    (f"{E} mine:number", 1, "metric 'mine:number' is int, no function"),
    (f"{E} mine:needs --max-drop 1%", 1, "metric 'mine:needs' raises TypeError: float()"),
    (f"{E} cosine --max-drop much", 1, "--max-drop is a percentage of the metric in float (1%)"),
    (f"{E} cosine --max-drop=-1%", 1, "from 0; got '-1%'"),
    (f"m.onnx {D} --eval gone.npz --metric cosine", 1, "there is no file 'gone.npz'"),
    (f"m.onnx {D} --eval names.npz --metric cosine", 1, "no array for input 'x'; it has z"),
    (f"m.onnx {D} --eval odd-labels.npz --metric top1", 1, "which cannot be cut into 10 samples"),
    # usage
    (f"m.onnx {D} --seed x", 2, 'unable to convert "x" into int'),
    (f"m.onnx {D} --bits 8", 2, "Unknown option: --bits"),
    (f"m.onnx n.onnx {D}", 2, "n.onnx"),
    ("diff m.onnx", 2, "requires an argument"),
    ("", 2, "requires an argument"),
    # the other commands
    ("diff m.onnx notes.onnx", 2, "'notes.onnx' is not a readable ONNX model"),
    ("replay hollow", 1, "'hollow' is no reproducer"),
    ("verify hollow", 1, "'hollow' has no check: name a folder that qcompile wrote"),
    ("verify gone", 1, "'gone' has no check"),
    ("verify damaged", 1, "the check in 'damaged/check' is damaged"),
    ("bench", 1, "name the .onnx files, or the folders that qcompile wrote"),
    ("bench gone.onnx", 1, "there is no file 'gone.onnx'"),
    ("bench hollow", 1, "the folder 'hollow' holds no model.onnx"),
    ("bench notes.onnx", 1, "'notes.onnx' is not a readable ONNX model"),
    ("bench custom.onnx", 1, "it has no operator 'Swirl' of the domain 'com.acme'"),
    ("bench m.onnx --vs gone.onnx", 1, "there is no file 'gone.onnx'"),
    ("bench m.onnx --data gone.npz", 1, "there is no file 'gone.npz'"),
    ("bench m.onnx two.onnx --data data.npz", 1, "has no array for input 'z'; it has x"),
    ("bench m.onnx --rounds 0", 1, "--rounds is a number from 1; got 0"),
    ("bench m.onnx --threads 0", 1, "--threads is a number from 1; got 0"),
    ("bench m.onnx --rounds x", 2, 'unable to convert "x" into int'),
    ("passes quantise", 1, "unknown pass 'quantise'; did you mean 'quantize'?"),
    ("targets ort", 1, "unknown target 'ort'; did you mean 'ort-cpu'?"),
]


@pytest.mark.parametrize(
    ("words", "code", "says"), CASES, ids=[re.sub(r"(long)+", "long", c[0]) for c in CASES]
)
def test_a_mistake_is_said_in_a_sentence_and_nothing_is_written(
    desk: pathlib.Path, tmp_path: pathlib.Path, qcompile: Command,
    monkeypatch: pytest.MonkeyPatch, words: str, code: int, says: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(desk)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = names(desk)
    given = shlex.split(words)
    commands = ("diff", "replay", "passes", "targets", "verify", "bench")
    out = [] if not given or given[0] in commands or "-o" in given else ["-o", "result"]
    done = qcompile(*given, *out)
    assert (done.code, done.out) == (code, "")
    assert says in done.err
    # A pass may have been logged before the mistake shows.
    said = done.err[done.err.index("error: ") :].splitlines()
    caret = len(said) > 2 and said[2].strip() == "^"
    usage = said[1:] == ["qcompile --help lists the options"]
    assert len(said) == 1 or caret or usage
    assert "long" in words or len(said[0]) < 450
    assert sorted({*names(desk), "__pycache__"}) == sorted({*before, "__pycache__"})
    assert names(tmp_path) == []


@pytest.mark.skipif(not pathlib.Path("/proc").is_dir(), reason="a folder that takes no files")
def test_a_folder_that_takes_no_files_is_said(
    desk: pathlib.Path, qcompile: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(desk)
    done = qcompile(*shlex.split(f"m.onnx {D} -o /proc/result"))
    assert done.code == 1
    assert done.err.startswith("error: cannot write into '/proc'")


def test_a_process_says_it_alike(desk: pathlib.Path) -> None:
    before = names(desk)
    for words in ("loose.onnx", "cut.onnx", "custom.onnx"):
        done = process(words, "--calib", "data.npz", "-o", "result", cwd=desk)
        assert (done.code, done.out) == (1, "")
        assert done.err.startswith("error: ")
        assert len(done.err.splitlines()) == 1
    assert names(desk) == before


def test_a_crash_keeps_a_foreign_folder_of_that_name(
    tmp_path: pathlib.Path, qcompile: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    execute.save(graph(CHAIN), tmp_path / "m.onnx")
    (tmp_path / "result-crash").mkdir()
    (tmp_path / "result-crash" / "thesis.txt").write_text("years of work")

    def broken(*_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("qcompile.report.layer_reports", broken)
    words = "m.onnx -o result --passes 'quantize{input=float},insert-qdq'"
    assert qcompile(*shlex.split(words)).code == 70
    assert names(tmp_path) == ["m.onnx", "result-crash", "result-crash.1"]
    assert names(tmp_path / "result-crash") == ["thesis.txt"]
