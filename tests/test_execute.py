"""What is written is what any reader of ONNX reads."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompile import compiler, execute
from qcompile.models import fashion


def _message(path: pathlib.Path) -> tuple[Any, dict[str, bytes]]:
    """The message in ``path`` without its weights, and those by name."""
    library: Any = onnx  # partly untyped
    model = library.load(path)
    weights = {t.name: t.SerializeToString() for t in model.graph.initializer}
    model.graph.ClearField("initializer")
    return model, weights


@pytest.mark.parametrize("name", [fashion.CNN, fashion.VIT])
def test_a_file_is_the_message_that_onnx_would_write(name: str, tmp_path: pathlib.Path) -> None:
    model = compiler.load(fashion.path(name))
    execute.save(model, tmp_path / "ours.onnx")
    library: Any = ir  # partly untyped
    library.save(model, tmp_path / "theirs.onnx")
    ours, theirs = (_message(tmp_path / f"{who}.onnx") for who in ("ours", "theirs"))
    assert ours == theirs and len(ours[1]) > 10
    assert (tmp_path / "ours.onnx").stat().st_size == (tmp_path / "theirs.onnx").stat().st_size


@pytest.mark.parametrize("count", [1, 1 << 10, 1 << 14, 1 << 21])
def test_weights_of_any_length_are_read_back(count: int, tmp_path: pathlib.Path) -> None:
    weight = np.random.default_rng(count).standard_normal(count).astype(np.float32)
    x = ir.val("x", ir.DataType.FLOAT, [count])
    kept = ir.val("w", const_value=ir.tensor(weight, name="w"))
    node = ir.node("Add", [x, kept])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[kept], opset_imports={"": 18})
    execute.save(ir.Model(graph, ir_version=10), tmp_path / "model.onnx")
    [read] = compiler.load(tmp_path / "model.onnx").graph.initializers.values()
    assert read.const_value is not None
    assert np.array_equal(read.const_value.numpy(), weight)
    feeds = {"x": np.zeros(count, np.float32)}
    [found] = execute.Session(tmp_path / "model.onnx").run(feeds).values()
    assert np.array_equal(found, weight)


@pytest.mark.parametrize("where", ["memory", "file"])
def test_weights_too_many_for_a_message_are_shared_or_stay_in_files(
    where: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compiler.load(fashion.path(fashion.VIT))
    image = np.random.default_rng(0).random((2, 1, 28, 28), np.float32)
    feeds = {str(value.name): image for value in model.graph.inputs}
    wanted = execute.Session(model.clone()).run(feeds)
    if where == "file":
        execute.save(model, tmp_path / "model.onnx", beside=True)
        model = execute.load(tmp_path / "model.onnx")
    else:
        execute.read_external(model)
    written: list[pathlib.Path] = []
    save = execute.save

    def counted(model: ir.Model, path: pathlib.Path) -> None:
        written.append(path)
        save(model, path)

    monkeypatch.setattr(execute, "_IN_MEMORY_BYTES", 100_000)
    monkeypatch.setattr(execute, "save", counted)
    found = execute.Session(model).run(feeds)
    assert len(written) == (where == "file")
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)
