"""A model from ONNX or torch.export as a graph IR: named, sorted, checked, at a known opset.

Capture repairs what every later step relies on: unique names, topological order, constants as
initializers, functions inlined, opset 18 or above, shapes inferred. It changes no arithmetic. Names
of the user are kept; only empty and duplicate ones are replaced. From torch, names are module
paths, and BatchNorm is kept (torch's own exporter would fold it unless told not to).
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import logging
import os
import pathlib
import re
import sys
import warnings
from collections.abc import Generator, Sequence
from typing import Any, cast

import networkx
import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from qcompile import execute, graph, opset, sound, strip, verify
from qcompile.errors import CaptureError, nearest, reason

# The names that torch's exporter makes up, such as val_12.
_COUNTED = re.compile(r"val_\d+|_val_\d+")
# The opset of what torch.export captures: old enough for every target, new enough for 4-bit types.
TORCH_OPSET = 21
# Where a captured model says the opset of the ONNX model that it came from.
_GIVEN_OPSET = "qcompile.given-opset"
# Operators that only an already quantized model has.
_QUANTIZED = {
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger",
    "QLinearConv", "QLinearMatMul", "QGemm", "QLinearAdd", "MatMulNBits", "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul", "QAttention", "GatherBlockQuantized", "TRT_FP4DynamicQuantize",
}  # fmt: skip


def capture(source: str | os.PathLike[str] | ir.Model | Any, requantize: bool = False) -> ir.Model:
    """Read a model and repair it.

    Args:
        source: the path of an ``.onnx`` file; the text ``package.module:factory``; an
            ``onnx_ir.Model`` or ``onnx.ModelProto``; or what a factory may return (below).
        requantize: take the Q/DQ of a model away that is quantized already.

    A factory takes no arguments and returns a ``torch.export.ExportedProgram``, or
    ``(module, example_inputs)``, or ``(module, example_inputs, dynamic_shapes)`` with
    ``example_inputs`` a tuple, or a dict by argument name, of tensors, and ``dynamic_shapes`` as
    torch.export takes it. A dict that the module returns names the outputs, and a ``Dim`` the
    dimensions.

    Raises:
        CaptureError: the file is missing or unreadable, the opset is not supported, the export
            failed, or the model is quantized already.
    """
    model = read(source)
    if model is not None:
        given = opset.of(model)
        model = _repair(model, requantize)
        model.meta[_GIVEN_OPSET] = given
        return model
    if isinstance(source, str):
        source = load_object(source, "model")
    return _repair(_from_torch(source), requantize)


def given_opset(model: ir.Model) -> int | None:
    """The opset that a captured ``model`` had as ONNX before repairs; None if it came of torch."""
    meta: Any = model.meta  # partly untyped; a clone has none of it
    return meta.get(_GIVEN_OPSET)


def read(source: str | os.PathLike[str] | ir.Model | Any) -> ir.Model | None:
    """The ONNX model of ``source`` as it is, without repairs; None if ``source`` is of torch.

    Raises CaptureError if it cannot be read or is broken (see sound.check).
    """
    model = _load(source)
    if model is None:
        return None
    sound.check(model)
    if model is source:
        model = model.clone()
    execute.read_external(model)
    return model


def _load(source: str | os.PathLike[str] | ir.Model | Any) -> ir.Model | None:
    if isinstance(source, ir.Model):
        return source
    if isinstance(source, onnx.ModelProto):
        return _from_proto(source)
    if isinstance(source, str | os.PathLike):
        text = str(os.fspath(cast("str", source)))
        if ":" in text and not os.path.exists(text) and not text.endswith(".onnx"):
            return None
        return _from_file(pathlib.Path(text))
    return None


def load_object(text: str, what: str) -> Any:
    """The object that ``package.module:name`` names; called if it is a function.

    Raises CaptureError, in the user's words, if module or name do not exist.
    """
    module_name, _, attribute = text.partition(":")
    if not module_name or not attribute:
        raise CaptureError(f"{what} {text!r} is not of the form package.module:name")
    # The command line is started by a script, so the user's own folder is not on the path yet.
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        missing = getattr(error, "name", None) or module_name
        hint = "; pip install 'qcompile[torch]'" if missing == "torch" else ""
        raise CaptureError(f"{what} {text!r}: cannot import {missing!r}: {error}{hint}") from error
    except (Exception, SystemExit) as error:  # whatever the user's own code raises
        said = f"importing {module_name} raises {type(error).__name__}: {error}"
        raise CaptureError(f"{what} {text!r}: {said}") from error
    if not hasattr(module, attribute):
        own = [  # not what it imports
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == module_name
        ]
        hint = nearest(attribute, own) if own else "it defines nothing public"
        raise CaptureError(f"{what} {text!r}: {module_name} has no {attribute!r}; {hint}")
    return getattr(module, attribute)


def _from_file(path: pathlib.Path) -> ir.Model:
    if not os.path.exists(path):  # false as well for a name that no file can have
        raise CaptureError(f"there is no file {str(path)!r}")
    if path.is_dir():
        raise CaptureError(f"{str(path)!r} is a folder; name the .onnx file")
    try:
        model = execute.load(path)
    except Exception as error:  # protobuf, onnx-ir and numpy each raise their own kinds
        raise CaptureError(
            f"{str(path)!r} is not a readable ONNX model: {reason(error)}"
        ) from error
    if not model.graph.outputs:
        raise CaptureError(f"{str(path)!r} is not an ONNX model: its graph has no outputs")
    sound.check_places(model)
    return model


def _from_proto(proto: onnx.ModelProto) -> ir.Model:
    try:
        return ir.from_proto(proto)
    except Exception as error:  # see above
        raise CaptureError(f"the model is broken: {reason(error)}") from error


def _repair(model: ir.Model, requantize: bool) -> ir.Model:
    opset.of(model)
    _sort(model)
    if not requantize:
        _refuse_quantized(model)
    try:
        model = opset.inline(model)
        _clean(model)
        _tidy(model)
        if requantize:
            strip.strip(model)
            _refuse_quantized(model)
        converted = opset.convert(model)
        if converted is not model:
            model = converted
            _tidy(model)  # the converter adds constants and nodes without names
        with _quiet():  # shapes that contradict each other are a finding, not a traceback
            common.ShapeInferencePass()(model)
    except CaptureError:
        raise
    except Exception as error:  # whatever an odd model makes these raise, it is the model's fault
        raise CaptureError(f"the model cannot be repaired: {reason(error)}") from error
    graph.remove_dead(model)
    found = verify.structure(model)
    if any(" reads " in f or "two values" in f or "written by nothing" in f for f in found):
        raise CaptureError(f"the model is broken: {found[0]}")
    for layer in graph.layers(model):
        graph.set_origins(layer.node, [layer.name])
        # Inference knows no types behind an operator of another domain; a layer has one type.
        for value in (layer.weight.value, layer.input and layer.input.value, layer.output):
            if value is not None and value.type is None and layer.weight.value.dtype is not None:
                value.type = ir.TensorType(layer.weight.value.dtype)
    return model


def _refuse_quantized(model: ir.Model) -> None:
    inside = (node for function in model.functions.values() for node in function.all_nodes())
    for node in (*model.graph.all_nodes(), *inside):
        if node.op_type in _QUANTIZED:
            name = node.name or next((v.name for v in node.outputs if v.name), "")
            raise CaptureError(
                f"the model is quantized already: node {name!r} is {node.op_type}; start from the "
                "float model, or give --requantize, which takes pairs of QuantizeLinear and "
                "DequantizeLinear away"
            )


def _clean(model: ir.Model) -> None:
    """Take away what other compilations noted, and sizes below 0 or named "?".

    Those stand for a dynamic dimension. A role stays: it says that a node is no layer. A type that
    says it is none is none.
    """
    values = list(graph.values(model))
    for holder in (*model.graph.all_nodes(), *values):
        props = holder.metadata_props
        for key in [k for k in props if k.startswith("qcompile.") and k != graph.ROLE]:
            del props[key]
    for value in values:
        if value.dtype == ir.DataType.UNDEFINED:
            value.type = None
        if value.shape is not None and any(map(_nameless, value.shape)):
            value.shape = ir.Shape([None if _nameless(d) else d for d in value.shape])


def _nameless(size: int | ir.SymbolicDim) -> bool:
    """Whether ``size`` is below 0, or "?", which is no name: two of it need not be equal."""
    return size < 0 if isinstance(size, int) else size.value == "?"


def _tidy(model: ir.Model) -> None:
    """Constants as initializers, initializers that are no inputs, topological order, names."""
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.RemoveInitializersFromInputsPass()(model)
    _sort(model)
    _fill_names(model)


def _sort(model: ir.Model) -> None:
    """Topological order; CaptureError, naming a node, if there is none."""
    try:
        model.graph.sort()
    except ValueError as error:
        library: Any = networkx  # partly untyped
        reads = library.DiGraph((p, node) for node in model.graph for p in node.predecessors())
        circles = (c for c in library.strongly_connected_components(reads) if len(c) > 1)
        found = next(circles, None) or {n for n in model.graph if n in n.predecessors()}
        names = sorted(sound.name_of(node) for node in found)
        raise CaptureError(
            f"the model is broken: nodes read in a circle: {', '.join(map(repr, names[:5]))}"
        ) from error


def _fill_names(model: ir.Model) -> None:
    """Give every node and value a unique, readable name; keep the user's where they are unique."""
    seen_values: set[str] = {v.name or "" for v in (*model.graph.inputs, *model.graph.outputs)}
    ports = {id(v) for v in (*model.graph.inputs, *model.graph.outputs)}
    seen_values |= set(model.graph.initializers)
    seen_nodes: set[str] = set()

    def free(name: str, taken: set[str]) -> str:
        candidate, count = name, 0
        while not candidate or candidate in taken:
            count += 1
            candidate = f"{name}.{count}"
        taken.add(candidate)
        return candidate

    for node in model.graph.all_nodes():
        first = node.outputs[0].name if node.outputs and node.outputs[0].name else ""
        node.name = free(node.name or first or node.op_type, seen_nodes)
        for position, value in enumerate(node.outputs):
            # An empty name means an output that is left out, which only the first cannot be.
            if id(value) in ports or (not value.name and not value.uses()):
                continue
            suffix = f".{position}" if position else ""
            value.name = free(value.name or f"{node.name}{suffix}", seen_values)


# -- torch --------------------------------------------------------------------------------------


def _from_torch(source: Any) -> ir.Model:
    try:
        import torch
    except ImportError as error:
        raise CaptureError("a torch model needs torch: pip install 'qcompile[torch]'") from error
    if callable(source) and not isinstance(source, torch.nn.Module):
        try:
            source = source()
        except (Exception, SystemExit) as error:  # whatever the user's own code raises
            said = f"{type(error).__name__}: {error}"
            raise CaptureError(f"the factory of the model raises {said}") from error
    several = isinstance(source, tuple | list)
    given = list(cast("Sequence[Any]", source)) if several else [cast("Any", source)]
    whole = isinstance(source, torch.export.ExportedProgram)
    if not whole and not (len(given) in (2, 3) and isinstance(given[0], torch.nn.Module)):
        kinds = ", ".join(type(part).__name__ for part in given)
        raise CaptureError(
            "a factory must return (module, example_inputs), (module, example_inputs, "
            f"dynamic_shapes) or an ExportedProgram, not ({kinds})"
        )
    try:
        with _quiet():
            program: Any = cast("Any", source)
            shapes: list[Any] = []
            if not whole:
                module, example, *shapes = given
                named = isinstance(example, dict)
                program = torch.export.export(
                    module.eval(),
                    cast("Any", () if named else tuple(example)),
                    cast("Any", example) if named else None,
                    dynamic_shapes=shapes[0] if shapes else None,
                )
            exporter: Any = torch.onnx  # partly untyped
            exported = exporter.export(
                program, dynamo=True, optimize=False, opset_version=TORCH_OPSET, verbose=False,
                dynamic_shapes=shapes[0] if shapes else None, output_names=_output_names(program),
            )  # fmt: skip
            assert exported is not None
            model: ir.Model = exported.model
    except Exception as error:  # torch raises dozens of types for what it cannot export
        raise CaptureError(f"torch.export failed: {_refusal(error)}") from error
    library: Any = importlib.import_module("onnxscript.optimizer")  # 22 MB, so not sooner
    library.fold_constants(model)
    common.IdentityEliminationPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.RemoveUnusedNodesPass()(model)
    for value in model.graph.initializers.values():  # a folded Transpose is a view of its weight
        tensor = value.const_value
        if tensor is not None and not (array := tensor.numpy()).flags.c_contiguous:
            copy = np.ascontiguousarray(array)
            value.const_value = ir.Tensor(copy, dtype=tensor.dtype, name=value.name)
    _module_names(model)
    for node in model.graph.all_nodes():  # stack traces hold paths of the machine
        for key in [k for k in node.metadata_props if k.startswith(("pkg.torch", "namespace"))]:
            del node.metadata_props[key]
    return model.clone()  # the original still counts inputs that are gone, and holds them


def _output_names(program: Any) -> list[str] | None:
    """The names of the outputs of a module that returns a dict; None of any other.

    Those of a list in the dict are numbered, as torch.export numbers inputs: ``present_key_0``.
    """
    from torch.utils import _pytree

    library: Any = _pytree  # partly untyped
    spec = program.call_spec.out_spec
    if spec is None or spec.type is not dict:
        return None
    result = library.tree_unflatten([0] * spec.num_leaves, spec)
    paths = [path for path, _ in library.tree_flatten_with_path(result)[0]]
    return ["_".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path) for path in paths]


def _module_names(model: ir.Model) -> None:
    """Name nodes by module path, as in ``layer1.0.conv1/Conv``, and their values like them."""
    ports = {id(v) for v in (*model.graph.inputs, *model.graph.outputs)}
    taken = {v.name or "" for v in (*model.graph.inputs, *model.graph.outputs)}
    taken |= {name for name in model.graph.initializers if not _COUNTED.fullmatch(name)}

    def free(name: str) -> str:
        candidate, count = name, 0
        while candidate in taken:
            count += 1
            candidate = f"{name}.{count}"
        taken.add(candidate)
        return candidate

    for node in model.graph:
        path = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        scopes: list[str] = ast.literal_eval(path) if path else []
        # What asks for the sizes of inputs is in a scope of torch's own, which is no module.
        parts = [part for part in scopes if part and "_metadata_hook" not in part]
        module = parts[-2] if len(parts) > 1 else ""
        name = free(f"{module}/{node.op_type}" if module else node.op_type)
        node.name = name
        for position, value in enumerate(node.outputs):
            if id(value) not in ports:
                value.name = free(f"{name}.{position}") if position else name
        for position, value in enumerate(node.inputs):
            # Constants that the exporter computed carry a number that shifts with every change.
            if (
                value is not None
                and value.is_initializer()
                and _COUNTED.fullmatch(value.name or "")
            ):
                value.name = free(f"{name}.{position}")


def _refusal(error: BaseException) -> str:
    """What torch says; of an operator that it cannot translate to ONNX, which one, and why."""
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(before)
    found = next(filter(None, (_OPERATOR.search(str(one)) for one in chain)), None)
    if found is not None:
        return f"no translation of {found[1]} to ONNX: {_first_line(chain[-1])}"
    return _first_line(error)


# The operator of a node in what the exporter says.
_OPERATOR = re.compile(r"translating node .*call_function\[target=torch\.ops\.([\w.]+)\]")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Keep torch's own progress and warnings off the terminal while it exports."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
