"""Images as samples: pixels that equal a plain computation, and preprocessing inside the model."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import graphs
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qcompile
from qcompile import execute, images, ports, simulate, sources, verify
from qcompile.errors import CalibrationError, PipelineSyntaxError
from qcompile.images import Image
from qcompile.ports import Port

PIL = pytest.importorskip("PIL.Image")

Array = npt.NDArray[Any]

NCHW = """(float[N,3,12,10] image) => (float[N,4,12,10] y) <float[4,3,3,3] w> {
    y = Conv<pads=[1,1,1,1]>(image, w)
}"""
NHWC = """(float[N,12,10,3] image) => (float[N,4,12,10] y) <float[4,3,3,3] w> {
    t = Transpose<perm=[0,3,1,2]>(image)
    y = Conv<pads=[1,1,1,1]>(t, w)
}"""
GREY = """(float[N,1,12,10] image) => (float[N,4,12,10] y) <float[4,1,3,3] w> {
    y = Conv<pads=[1,1,1,1]>(image, w)
}"""
HALF = """(float16[N,3,12,10] image) => (float16[N,4,12,10] y) <float[4,3,3,3] w> {
    h = Cast<to=10>(w)
    y = Conv<pads=[1,1,1,1]>(image, h)
}"""


def reads(*shape: int | None, dtype: str = "float32") -> Port:
    return Port("image", np.dtype(dtype), shape, ("",) * len(shape))


def picture(folder: pathlib.Path, name: str, height: int, width: int, seed: int = 0) -> Array:
    """Write a smooth picture without loss; its pixels [height, width, 3]."""
    rng = np.random.default_rng(seed)
    small = PIL.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    large = small.resize((width, height), PIL.Resampling.BICUBIC)
    (folder / name).parent.mkdir(exist_ok=True)
    large.save(folder / name)
    return np.asarray(large)


def loaded(folder: pathlib.Path, text: str, port: Port) -> list[Array]:
    """The arrays that the images in ``folder`` become."""
    data = sources.load(str(folder), [port], preprocess=images.parse(text))
    return [sample["image"] for sample in data.samples]


# -- pixels -------------------------------------------------------------------------------------


def test_pixels_of_the_right_size_are_taken_as_they_are(tmp_path: pathlib.Path) -> None:
    pixels = picture(tmp_path, "a.png", 12, 10)
    [found] = loaded(tmp_path, "image", reads(None, 3, 12, 10))
    np.testing.assert_array_equal(found, pixels.transpose(2, 0, 1)[None].astype(np.float32))
    assert found.dtype == np.float32


def test_normalization_is_that_of_the_text(tmp_path: pathlib.Path) -> None:
    pixels = picture(tmp_path, "a.png", 12, 10).astype(np.float64)
    mean, std = np.array([1.0, 0.5, 0.25]), np.array([0.5, 2.0, 4.0])
    text = "image{mean=1,0.5,0.25 std=0.5,2,4 scale=0.01 layout=nhwc}"
    [found] = loaded(tmp_path, text, reads(1, 12, 10, 3))
    np.testing.assert_allclose(found[0], (pixels * 0.01 - mean) / std, atol=1e-5)
    [same] = loaded(tmp_path, "image{mean=5 std=2}", reads(1, 12, 10, 3))
    np.testing.assert_allclose(same[0], (pixels - 5) / 2, atol=1e-5)


def test_channels_are_reordered_before_they_are_normalized(tmp_path: pathlib.Path) -> None:
    pixels = picture(tmp_path, "a.png", 12, 10)
    [found] = loaded(tmp_path, "image{order=bgr mean=1,2,3}", reads(1, 12, 10, 3))
    np.testing.assert_allclose(found[0], pixels[..., ::-1] - np.array([1.0, 2, 3]), atol=1e-5)


def test_a_model_with_one_channel_reads_grey(tmp_path: pathlib.Path) -> None:
    picture(tmp_path, "a.png", 12, 10)
    wanted = np.asarray(PIL.open(tmp_path / "a.png").convert("L"))
    [found] = loaded(tmp_path, "image", reads(1, 1, 12, 10))
    np.testing.assert_array_equal(found[0, 0], wanted)


def test_a_model_of_uint8_reads_the_pixels(tmp_path: pathlib.Path) -> None:
    pixels = picture(tmp_path, "a.png", 12, 10)
    [found] = loaded(tmp_path, "image", reads(1, 12, 10, 3, dtype="uint8"))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found[0], pixels)


def ramp(height: int, width: int) -> Array:
    """Pixels that say where they are: rows in the first channel, columns in the second."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8)


@pytest.mark.parametrize(
    ("size", "text", "shape", "first", "last"),
    [
        # The shorter side becomes 40, then 20 by 20 from the middle: rows 10-29, columns 30-49.
        ((40, 80), "image{resize=40 crop=20}", (20, 20), (10, 30), (29, 49)),
        ((80, 40), "image{resize=40 crop=20}", (20, 20), (30, 10), (49, 29)),
        ((40, 80), "image{crop=20,40}", (20, 40), None, None),
        ((40, 80), "image{resize=40,80}", (40, 80), (0, 0), (39, 79)),
        ((40, 80), "image{resize=40 fit=stretch}", (40, 40), None, None),
    ],
)
def test_boxes_are_where_they_should_be(
    tmp_path: pathlib.Path,
    size: tuple[int, int],
    text: str,
    shape: tuple[int, int],
    first: tuple[int, int] | None,
    last: tuple[int, int] | None,
) -> None:
    PIL.fromarray(ramp(*size)).save(tmp_path / "a.png")
    [found] = loaded(tmp_path, text, reads(1, None, None, 3))
    assert found.shape == (1, *shape, 3)
    if first is not None:
        assert tuple(found[0, 0, 0, :2]) == first and tuple(found[0, -1, -1, :2]) == last


def test_what_is_left_of_a_padded_box_is_grey(tmp_path: pathlib.Path) -> None:
    PIL.new("RGB", (80, 40), (9, 9, 9)).save(tmp_path / "a.png")
    [found] = loaded(tmp_path, "image{resize=20 fit=pad}", reads(1, None, None, 3))
    assert found.shape == (1, 20, 20, 3)
    np.testing.assert_array_equal(found[0, :, 7, 0], [114] * 5 + [9] * 10 + [114] * 5)


@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from(["cover", "stretch", "pad"]))
def test_an_image_of_any_size_fills_the_model_s(height: int, width: int, fit: str) -> None:
    flat = PIL.new("RGB", (width, height), (7, 8, 9))
    image = images.parse(f"image{{fit={fit}}}")
    scaled = images._scaled(flat, image, (12, 10))  # pyright: ignore[reportPrivateUsage]
    assert scaled.height >= 12 and scaled.width >= 10
    assert fit == "cover" or scaled.size == (10, 12)
    # Covering scales no further than it must.
    assert scaled.height == 12 or scaled.width == 10


def test_files_are_read_in_the_order_of_names_and_batched(tmp_path: pathlib.Path) -> None:
    for name, value in (("b.png", 2), ("a.PNG", 1), ("c/d.bmp", 3), ("d.png", 4), ("e.png", 5)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        PIL.new("L", (4, 4), value).save(tmp_path / name)
    (tmp_path / "labels.txt").write_text("ours")
    (tmp_path / ".hidden.png").write_text("no image")
    found = loaded(tmp_path, "image", reads(2, 1, 4, 4))
    assert [list(array[:, 0, 0, 0]) for array in found] == [[1, 2], [3, 4]]
    assert len(loaded(tmp_path, "image", reads(None, 1, 4, 4))) == 5


def test_the_shape_that_the_user_gives_is_a_size(tmp_path: pathlib.Path) -> None:
    picture(tmp_path, "a.png", 30, 40)
    model = graphs.graph("(float[N,3,H,W] image) => (float[N,3,H,W] y) { y = Relu(image) }")
    ports.choose_shapes(model, ["image=1x3x8x6"])
    [port] = ports.inputs_of(model)
    [found] = loaded(tmp_path, "image", port)
    assert found.shape == (1, 3, 8, 6)


# -- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "port", "words"),
    [
        ("image", reads(1, 3, None, None), "no size of its own: give crop=224 or resize=224"),
        ("image{crop=8}", reads(1, 3, 12, 10), "images are cut to (8, 8), and the model reads"),
        ("image{resize=8}", reads(1, 3, 12, 10), "resize=(8,) is smaller than the (12, 10)"),
        ("image", reads(1, 3, 10, 3), "which axis of image: float32[1,3,10,3] are the channels?"),
        ("image", reads(1, None, 10, 10), "give layout=nchw or layout=nhwc"),
        ("image{layout=nchw}", reads(1, 12, 10, 3), "has 12 channels on axis 1"),
        ("image{mean=1,2,3}", reads(1, 1, 12, 10), "mean has 3 numbers"),
        ("image{mean=1}", reads(1, 12, 10, 3, dtype="uint8"), "takes no mean, std or scale"),
        ("image", reads(1, 12, 10, 3, dtype="int32"), "takes no mean, std or scale"),
        ("image", reads(1, 12), "into one input of 4 dimensions; the model reads image: float32"),
        ("image", reads(2, 3, 12, 10), "holds 1 images, and image: float32[2,3,12,10] takes 2"),
    ],
)
def test_a_model_that_the_images_do_not_fit_is_named(
    tmp_path: pathlib.Path, text: str, port: Port, words: str
) -> None:
    picture(tmp_path, "a.png", 30, 40)
    with pytest.raises(CalibrationError) as error:
        loaded(tmp_path, text, port)
    assert words in str(error.value)


def test_a_model_with_another_input_is_refused(tmp_path: pathlib.Path) -> None:
    picture(tmp_path, "a.png", 30, 40)
    inputs = [reads(1, 3, 12, 10), Port("sizes", np.dtype(np.int64), (2,))]
    with pytest.raises(CalibrationError, match=r"feeds one input; the model reads .*sizes: int64"):
        sources.load(str(tmp_path), inputs, preprocess=Image())


def test_without_pillow_the_command_that_installs_it_is_said(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(tmp_path, "a.png", 12, 10)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(CalibrationError, match=r"pip install 'qcompile\[images\]'"):
        loaded(tmp_path, "image", reads(1, 3, 12, 10))


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_a_file_that_is_no_image_is_named(tmp_path: pathlib.Path, content: bytes | None) -> None:
    picture(tmp_path, "a.jpg", 30, 40)
    cut = (tmp_path / "a.jpg").read_bytes()[:-200]
    (tmp_path / "b.jpg").write_bytes(cut if content is None else content)
    with pytest.raises(CalibrationError, match=r"b\.jpg' is not a readable image"):
        loaded(tmp_path, "image", reads(1, 3, 12, 10))


@pytest.mark.parametrize(
    ("text", "words", "mark"),
    [
        ("imag", "unknown preprocessing 'imag'; did you mean 'image'?", "imag"),
        ("image{meen=1}", "did you mean 'mean'?", "meen"),
        ("image{crop=a}", "'a' is not a whole number", "a}"),
        ("image{crop=0}", "crop is one size or height,width", "0}"),
        ("image{resize=1,2,3}", "resize is one size or height,width", "1,2"),
        ("image{mean=1,2}", "mean is one number or three", "1,2"),
        ("image{std=0}", "std and scale must be above 0", "0}"),
        ("image{mean=nan}", "must be finite", "nan"),
        ("image{resize=8 crop=9}", "crop=(9,) is larger than resize=(8,)", "8 crop"),
        ("image{order=gbr}", "'gbr' is not one of rgb, bgr", "gbr"),
    ],
)
def test_a_text_that_is_wrong_is_underlined(text: str, words: str, mark: str) -> None:
    with pytest.raises(PipelineSyntaxError) as error:
        images.parse(text)
    assert words in str(error.value)
    assert error.value.column == text.index(mark)


def test_text_and_preprocessing_round_trip() -> None:
    for text in ("image", "image{resize=256 crop=224,192 mean=1,2.5,3 order=bgr fold=true}"):
        assert str(images.parse(text)) == text
    with pytest.raises(CalibrationError, match="give one, such as --preprocess 'image"):
        images.parse("image,image")


@pytest.mark.parametrize("calib", ["random", "data.npz"])
def test_other_data_takes_no_preprocessing(tmp_path: pathlib.Path, calib: str) -> None:
    np.savez(tmp_path / "data.npz", image=np.zeros((2, 3, 12, 10), np.float32))
    source = calib if calib == "random" else str(tmp_path / calib)
    with pytest.raises(CalibrationError, match="--preprocess is for a folder of images"):
        sources.load(source, [reads(1, 3, 12, 10)], preprocess=Image())


# -- folding ------------------------------------------------------------------------------------

TEXTS = [
    "image{mean=123.7,116.3,103.5 std=58.4,57.1,57.4}",
    "image{mean=0.5 std=0.25 scale=0.00392 order=bgr}",
    "image{scale=0.00784 mean=1}",
    "image{order=bgr}",
    "image",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("source", [NCHW, NHWC, GREY, HALF])
def test_the_folded_model_equals_the_model_behind_the_preprocessing(
    tmp_path: pathlib.Path, source: str, text: str
) -> None:
    if source == GREY and "," in text:
        text = "image{mean=116.3 std=57.1}"
    picture(tmp_path, "a.png", 30, 40)
    model = graphs.graph(source)
    image = images.parse(text)
    [outside] = sources.load(str(tmp_path), ports.inputs_of(model), preprocess=image).samples
    wanted = graphs.outputs(model, outside)["y"]
    rest = images.fold(model, image)
    verify.verify(model)
    assert model.graph.inputs[0].name == "image"
    channels = 1 if source == GREY else 3
    [port] = ports.inputs_of(model)
    assert str(port) == f"image: uint8[?,12,10,{channels}]"
    [pixels] = sources.load(str(tmp_path), [port], preprocess=rest).samples
    actual = graphs.outputs(model, pixels)["y"]
    # Half precision keeps 11 bits; single 24, less what the sums lose.
    assert simulate.sqnr(wanted, actual) > (50 if source == HALF else 100)


def test_only_what_is_needed_is_folded() -> None:
    def operators(source: str, text: str) -> list[str]:
        model = graphs.graph(source)
        images.fold(model, images.parse(text))
        return [node.op_type for node in model.graph]

    assert operators(NHWC, "image") == ["Cast", "Transpose", "Conv"]
    assert operators(NCHW, "image{std=2}") == ["Cast", "Mul", "Transpose", "Conv"]
    full = ["Cast", "Gather", "Sub", "Mul", "Transpose", "Conv"]
    assert operators(NCHW, "image{order=bgr mean=1 std=2}") == full
    assert operators(HALF, "image") == ["Cast", "Transpose", "Cast", "Cast", "Conv"]


def test_a_chosen_shape_goes_with_the_input() -> None:
    model = graphs.graph(NCHW)
    ports.choose_shapes(model, ["image=5x3x12x10"])
    images.fold(model, Image())
    assert ports.inputs_of(model)[0].chosen == (5, 12, 10, 3)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("(float[N,3] x) => (float[N,3] y) { y = Relu(x) }", "into one input of 4 dimensions"),
        (
            "(uint8[N,8,8,3] x) => (float[N,8,8,3] y) { y = Cast<to=1>(x) }",
            "fold=true needs an input of floats; the model reads x: uint8",
        ),
    ],
)
def test_a_model_that_nothing_can_be_folded_into_is_named(source: str, words: str) -> None:
    with pytest.raises(CalibrationError) as error:
        images.fold(graphs.graph(source), Image())
    assert words in str(error.value)


# -- the whole way ------------------------------------------------------------------------------


def compiled(
    folder: pathlib.Path, calib: str, preprocess: str | None, **options: Any
) -> qcompile.Compiled:
    [result] = qcompile.compile(
        graphs.graph(NCHW), folder, calib=calib, preprocess=preprocess, **options
    )
    return result


def test_a_folder_of_images_calibrates_and_folds(tmp_path: pathlib.Path) -> None:
    for number in range(10):
        picture(tmp_path, f"photos/{number}.png", 30 + number, 40, number)
    text = "image{resize=16 mean=120,110,100 std=60}"
    photos = str(tmp_path / "photos")
    plain = compiled(tmp_path / "plain", photos, text)
    folded = compiled(tmp_path / "folded", photos, f"{text[:-1]} fold=true}}")
    for result in (plain, folded):
        [output] = result.report.outputs
        assert output.sqnr > 30 and result.report.fused() == 1.0
    one, other = (execute.Session(tmp_path / name / "model.onnx") for name in ("plain", "folded"))
    [port] = ports.inputs_of(graphs.graph(NCHW))
    image = images.parse(text)
    data = sources.load(photos, [port], preprocess=image)
    uint8 = images.fold(graphs.graph(NCHW), image)
    pixels = sources.load(photos, [reads(None, 12, 10, 3, dtype="uint8")], preprocess=uint8)
    for floats, whole in zip(data.samples, pixels.samples, strict=True):
        np.testing.assert_allclose(other.run(whole)["y"], one.run(floats)["y"], atol=0.05)


def test_a_folded_model_reads_arrays_of_pixels(tmp_path: pathlib.Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 12, 10, 3), np.uint8)
    np.savez(tmp_path / "pixels.npz", image=pixels)
    text = "image{mean=120 std=60 fold=true}"
    result = compiled(tmp_path / "out", str(tmp_path / "pixels.npz"), text)
    assert result.report.outputs[0].sqnr > 30
    assert f"--preprocess '{text}'" in (tmp_path / "out" / "pipeline.txt").read_text()


def test_a_model_of_an_old_opset_is_folded_and_checked_like_any(tmp_path: pathlib.Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 12, 10, 3), np.uint8)
    np.savez(tmp_path / "pixels.npz", image=pixels)
    (tmp_path / "old.onnx").write_bytes(graphs.proto(NCHW, 13).SerializeToString())
    [result] = qcompile.compile(
        tmp_path / "old.onnx", tmp_path / "out", calib=str(tmp_path / "pixels.npz"),
        preprocess="image{mean=120 std=60 fold=true}",
    )  # fmt: skip
    assert result.report.outputs[0].sqnr > 30
    assert not any("not checked" in warning for warning in result.report.warnings)


def test_the_example_is_one() -> None:
    text = images.EXAMPLE.removeprefix("--preprocess ").strip("'")
    assert images.parse(text).resize == (256,)
