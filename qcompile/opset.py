"""The one conversion of a model's opset at capture, and the native raise at lowering.

Below 18 only ONNX's own converter in C converts truly (attributes that became inputs, operators
that changed meaning). It reads no weight of more than a kilobyte here, so that a model of any size
goes through it; it drops all metadata of nodes, so it runs before anything is annotated; and
``compile`` runs the file as it came against the converted graph, so that a conversion which changes
the function is an error. From 18 on onnxscript's converter works on the graph in place.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import onnx
import onnx.inliner
import onnx.version_converter
import onnx_ir as ir

from qcompile.errors import CaptureError, TargetError, reason

# The oldest that ONNX Runtime still runs, the opset that capture converts to, and the newest.
OLDEST, CONVERTED, NEWEST = 7, 18, 25
# The converter reads the value of small constants (scales, axes); weights are above this.
_SMALL_BYTES = 1024
# The oldest version of the file format that may hold an opset.
_FORMATS = {18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 12, 25: 13}


def of(model: ir.Model) -> int:
    """The opset of ``model``. Raises CaptureError if it imports none or an unsupported one."""
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    if opset is None:
        raise CaptureError("the model imports no ONNX opset")
    if not OLDEST <= opset <= NEWEST:
        raise CaptureError(
            f"opset {opset} is not supported; export the model at one of {OLDEST} to {NEWEST}"
        )
    return opset


def convert(model: ir.Model) -> ir.Model:
    """``model`` at opset 18 if it is below, else itself. The model must be sorted and named.

    Raises CaptureError if an operator has no conversion.
    """
    before = of(model)
    if before >= CONVERTED:
        return model
    for node in model.graph.all_nodes():
        if node.domain == "" and not onnx.defs.has(node.op_type, before):
            raise CaptureError(
                f"node {node.name!r}: ONNX has no operator {node.op_type!r} at opset {before}"
            )
    try:
        return _through_onnx(
            model, lambda proto: onnx.version_converter.convert_version(proto, CONVERTED)
        )
    except Exception as error:  # the converter raises RuntimeError and its own kinds
        raise CaptureError(
            f"opset {before} cannot be converted to {CONVERTED}: {reason(error)}; "
            f"export the model at opset {CONVERTED} or above"
        ) from error


def inline(model: ir.Model) -> ir.Model:
    """``model`` without functions; those of another opset are converted to that of the model."""
    if not model.functions:
        return model
    library: Any = onnx.inliner  # partly untyped
    return _through_onnx(
        model, lambda proto: library.inline_local_functions(proto, convert_version=True)
    )


def raise_to(model: ir.Model, oldest: int, newest: int) -> None:
    """Raise the opset to ``oldest`` if it is below; raise TargetError if it is above ``newest``."""
    opset = model.opset_imports.get("", 0)
    if opset > newest:
        raise TargetError(f"the model has opset {opset}; this target reads up to {newest}")
    if oldest > newest:
        raise TargetError(f"the formats need opset {oldest}; this target reads up to {newest}")
    if opset < oldest:
        # 22 MB, so not sooner.
        converter: Any = importlib.import_module("onnxscript.version_converter")
        kept = dict(model.graph.initializers)
        converter.convert_version(model, oldest, fallback=False)
        for name, value in kept.items():  # it drops those that only a decision names
            if name not in model.graph.initializers:
                model.graph.register_initializer(value)
        if model.opset_imports.get("", 0) != oldest:
            raise TargetError(f"the model could not be raised from opset {opset} to {oldest}")
    fit_format(model)


def lower_format(model: ir.Model, newest: int) -> None:
    """Lower the version of the file format to that of a runtime which reads opset ``newest``."""
    model.ir_version = min(model.ir_version, _FORMATS.get(newest, 8))


def fit_format(model: ir.Model) -> None:
    """Raise the version of the file format to the oldest that may hold the opset."""
    needed = _FORMATS.get(model.opset_imports.get("", 0), 8)
    model.ir_version = max(model.ir_version, needed)


def _through_onnx(
    model: ir.Model, function: Callable[[onnx.ModelProto], onnx.ModelProto]
) -> ir.Model:
    """``function`` of the model as protobuf, its large weights left out and put back."""
    hollow = model.clone()
    fit_format(hollow)  # some files name a format that never held their opset, or none
    weights: dict[str, ir.TensorProtocol] = {}
    inputs = {value.name for value in hollow.graph.inputs}
    for name, value in list(hollow.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= _SMALL_BYTES:
            continue
        weights[name] = tensor
        value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
        del hollow.graph.initializers[name]
        value.const_value = None
        if name not in inputs:
            hollow.graph.inputs.append(value)
    done = ir.from_proto(function(ir.to_proto(hollow)))
    for value in [v for v in done.graph.inputs if v.name in weights]:
        if value.name not in inputs:
            done.graph.inputs.remove(value)
        value.const_value = weights[value.name or ""]
        done.graph.register_initializer(value)
    done.metadata_props.update(model.metadata_props)
    done.doc_string, done.producer_name = model.doc_string, model.producer_name
    done.producer_version, done.domain = model.producer_version, model.domain
    fit_format(done)
    return done
