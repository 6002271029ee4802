"""ONNX Runtime on the CPU: the target ``ort-cpu``, and the proof from the optimized graph."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from qcompile import execute, graph, packing
from qcompile.backends import ort_isa, ort_measure, ort_rules
from qcompile.backends.base import Ran, Target, float_in_file, together, why_float
from qcompile.backends.lowering import NARROW, Kernels, Rule
from qcompile.backends.ort_isa import Isa
from qcompile.errors import TargetError
from qcompile.timing import Timing

if TYPE_CHECKING:
    from qcompile.calibrate import Calibration

# What the runtime's optimizer turns a layer into, and the precision that it multiplies in.
INTEGER_KERNELS = {
    "QLinearConv": "int8", "QLinearMatMul": "int8", "QGemm": "int8", "MatMulIntegerToFloat": "int8",
    "MatMulInteger": "int8", "ConvInteger": "int8", "DynamicQuantizeMatMul": "int8",
    "MatMulNBits": "int4 weights", "GatherBlockQuantized": "int4 weights",
}  # fmt: skip
NO_INT16 = "the runtime multiplies no 16-bit activations: float between Q/DQ pairs"
FLOAT_KERNELS = {
    "Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "ConvTranspose", "Gather",
    *graph.RECURRENT,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class OrtCpu(Target):
    """ONNX Runtime, CPU provider, on one instruction set.

    Holds int8 activations (stored as uint8 with a zero point) with int2 to int8 weights, and int2
    to int8 weights alone. Kernels read weights of 8 bits, or of 4 or 8 alone; the file has a scale
    a channel with codes packed to the bits that they have (2 to 6), which the runtime unpacks when
    it makes a session. Linear layers take the scale of their input at run time where that is asked
    for. Narrower activations have no kernel: they run as int8 with fewer levels; int16 ones run in
    float between 16-bit Q/DQ pairs. Both are for the accuracy alone.

    * ``isa``: with VNNI weights keep 8 bits; ``avx2`` is x86 without it, where they have 7 beside a
      quantized input; on ``arm`` activations are signed. ``auto`` is this machine's. ``avx2`` and
      ``arm`` are untested: their rules are, and the graph that the runtime makes, but no device was
      there to run it.
    * ``version``: the release that will run the file, from 1.17; ``auto`` is the one installed.
    """

    name: ClassVar[str] = "ort-cpu"
    weight_formats: ClassVar[tuple[str, ...]] = tuple(f"int{b}" for b in range(8, 1, -1))
    input_formats: ClassVar[tuple[str, ...]] = ("int8", "int16", *NARROW)
    scales: ClassVar[tuple[str, ...]] = ("static", "tensor")
    dialect: ClassVar[tuple[Rule, ...]] = ort_rules.DIALECT
    newest_opset: ClassVar[int] = 25
    float_formats: ClassVar[tuple[str, ...]] = ("float16",)
    runs_here: ClassVar[bool] = True

    isa: Isa = "auto"
    version: str = "auto"

    def __post_init__(self) -> None:
        # Resolved here, so that the text of the target says what a file was made for.
        if self.isa == "auto":
            object.__setattr__(self, "isa", ort_isa.machine())
        if self.version == "auto":
            object.__setattr__(self, "version", ort_isa.installed())
        ort_isa.number(self.version)

    def kernels(self) -> Kernels:
        return ort_isa.kernels(self.isa, self.version)

    def opset_limit(self) -> int:
        return ort_isa.newest_opset(self.version)

    def available(self) -> None:
        """Always there: ONNX Runtime is a dependency."""

    def written(self, model: ir.Model) -> ir.Model:
        """With codes packed, which the runtime unpacks."""
        return packing.packed(model)

    def emit(
        self, model: ir.Model, folder: pathlib.Path, calibration: Calibration | None
    ) -> pathlib.Path:
        """Write ``model.onnx`` (with ``model.onnx.data`` when large)."""
        path = folder / "model.onnx"
        execute.save(self.written(model), path)
        return path

    def check_measure(self) -> None:
        if self.isa != ort_isa.machine():
            raise TargetError(
                f"what measures measures this machine, which is {ort_isa.machine()}, not {self.isa}"
            )

    def measure(
        self, decided: ir.Model, calibration: Calibration, log: Callable[[str], None]
    ) -> list[str]:
        """Time the layers in float and in integers, and take the faster (see ort_measure)."""
        return ort_measure.choose(decided, self, calibration, log).texts()

    def timing(self, decided: Mapping[str, ir.Model], calibration: Calibration) -> Timing:
        """Profile the whole model in each form, so that layers are timed where they stand."""
        self.check_measure()
        return ort_measure.timing(decided, self, calibration)

    def ratio(self, decided: ir.Model, floats: ir.Model, calibration: Calibration) -> float:
        """Run both models in turn (see bench)."""
        self.check_measure()
        return ort_measure.ratio(decided, floats, self, calibration)

    def prove(self, model: ir.Model, folder: pathlib.Path) -> dict[str, Ran]:
        """Open the graph as the runtime optimized it and find each layer's kernel by node name."""
        with tempfile.TemporaryDirectory(prefix="qcompile-") as scratch:
            path = pathlib.Path(scratch) / "optimized.onnx"
            # On ARM the runtime fuses pairs of int8 as well; this makes it do so anywhere.
            options = {"session.qdqisint8allowed": "1"} if self.isa == "arm" else {}
            execute.optimize(folder / "model.onnx", path, options)
            return kernels(execute.load(path), model)

    def notes(self, model: ir.Model, folder: pathlib.Path) -> list[str]:
        """What was not tested, and where another machine or release opened the file."""
        found = super().notes(model, folder)
        if self.isa in ort_isa.UNTESTED:
            found.append(f"isa={self.isa} is untested: no such device ran a file of ours")
        here = ort_isa.machine(), ort_isa.installed()
        if here != (self.isa, self.version):
            found.append(
                f"made for {self.isa} and ONNX Runtime {self.version}; proof, accuracy and latency "
                f"are of {here[0]} and {here[1]}"
            )
        wide = {ir.DataType.UINT16, ir.DataType.INT16}
        if any(value.dtype in wide for node in model.graph for value in node.outputs):
            found.append(f"16-bit activations are for the accuracy alone: {NO_INT16}")
        return found


def kernels(optimized: ir.Model, lowered: ir.Model) -> dict[str, Ran]:
    """How each captured layer of ``lowered`` runs in the graph ``optimized`` by the runtime.

    A kernel is matched by the unique name that the lowering gave its node, else by the name of the
    weight that it reads; what is not found is "unknown", never "quantized".
    """
    by_node = {n.name or "": graph.origins(n) for n in lowered.graph if graph.origins(n)}
    owners = Counter(w for n in lowered.graph if graph.origins(n) for w in _weights(n))
    by_weight = {
        w: graph.origins(n)
        for n in lowered.graph
        if graph.origins(n)
        for w in _weights(n)
        if owners[w] == 1
    }
    reasons = {
        o: _WIDENED if _half(n) else why_float(n, _missed(n))
        for n in lowered.graph
        for o in graph.origins(n)
    }
    floats = {o for n in lowered.graph if float_in_file(n) for o in graph.origins(n)}
    found: dict[str, Ran] = {}
    for node in optimized.graph.all_nodes():
        precision = INTEGER_KERNELS.get(node.op_type)
        if precision is None and node.op_type not in FLOAT_KERNELS:
            continue
        if precision == "int4 weights":
            precision = f"int{graph.attribute(node, 'bits', 4)} weights"
        ids = _by_name(node.name or "", by_node) or next(
            (by_weight[v.name] for v in node.inputs if v is not None and v.name in by_weight), ()
        )
        for layer in ids:
            if precision is None and _half(node):
                ran = Ran("float16", node.op_type)
            elif precision is None:
                ran = Ran("float", node.op_type, reasons[layer])
            else:
                ran = Ran(precision, node.op_type, _UNASKED if layer in floats else "")
            found[layer] = together(found.get(layer), ran)
    for node in lowered.graph:
        for layer in graph.origins(node):
            if layer in found:
                continue
            if float_in_file(node):
                found[layer] = Ran("float", "", reasons[layer])
            else:
                found[layer] = Ran("unknown", "", "no kernel of this name in the optimized graph")
    return found


_UNASKED = "the runtime rounds its weight, which the file has in float"
_WIDENED = "the runtime casts it back to float32: it has no float16 kernel for it"


def _half(node: ir.Node) -> bool:
    """Whether ``node`` reads a weight or an activation in float16, as far as types are known."""
    return any(v is not None and v.dtype == ir.DataType.FLOAT16 for v in node.inputs[:2])


def _missed(node: ir.Node) -> str:
    """Why a layer behind Q/DQ pairs runs in float."""
    dequantize = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    codes = dequantize.inputs[0] if dequantize is not None and dequantize.inputs else None
    if codes is not None and codes.dtype in (ir.DataType.UINT16, ir.DataType.INT16):
        return NO_INT16
    return "the runtime found no integer kernel for the pattern"


def _by_name(name: str, by_node: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The layers of a kernel: the runtime keeps a node's name, or wraps it: ``fused N/Fusion``."""
    # A kernel whose weight others share as well gets a name with a number.
    stem = re.sub(r"_token_\d+$", "", name.removeprefix("fused "))
    while stem:
        if stem in by_node:
            return by_node[stem]
        stem = stem.rpartition("/")[0]
    return ()


def _weights(node: ir.Node) -> list[str]:
    """The names of the stored codes, or of the float weight, that ``node`` reads."""
    names: list[str] = []
    for value in node.inputs[:2]:
        producer = value.producer() if value is not None else None
        if producer is not None and producer.op_type == "DequantizeLinear":
            value = producer.inputs[0]
        if value is not None and value.is_initializer():
            names.append(value.name or "")
    return names
