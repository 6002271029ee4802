"""A model larger than protobuf can hold, written without ever holding it: external weights."""

from __future__ import annotations

import pathlib

import numpy as np
from onnx import TensorProto, helper


def write(path: pathlib.Path, layers: int, width: int, seed: int = 0) -> int:
    """Write ``layers`` linear layers [width, width] with Tanh between; return bytes of weights.

    Input ``x`` and output ``y`` are float32 [batch, width]; the weights lie in ``<path>.data``.
    """
    rng = np.random.default_rng(seed)
    graph = helper.make_graph(
        [], "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", width])],
    )  # fmt: skip
    size, read = width * width * 4, "x"
    with open(f"{path}.data", "wb") as file:
        for number in range(layers):
            weight = rng.standard_normal((width, width), np.float32)
            weight /= np.float32(np.sqrt(width / 2))
            file.write(weight.data)
            tensor = graph.initializer.add()
            tensor.name, tensor.data_type = f"w{number}", TensorProto.FLOAT
            tensor.dims.extend([width, width])
            tensor.data_location = TensorProto.EXTERNAL
            place = {"location": f"{path.name}.data", "offset": number * size, "length": size}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            last = number == layers - 1
            graph.node.append(
                helper.make_node("MatMul", [read, f"w{number}"], [f"m{number}"], name=f"fc{number}")
            )
            read = "y" if last else f"r{number}"
            graph.node.append(
                helper.make_node("Tanh", [f"m{number}"], [read], name=f"tanh{number}")
            )
    opset = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8)
    path.write_bytes(model.SerializeToString())
    return layers * size
