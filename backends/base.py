"""What a target is.

A target holds formats, has a dialect of named rules that turns decisions into the Q/DQ form that
its runtime runs fast, writes the file, and proves from what the runtime made of it which layer runs
in which precision.
"""

from __future__ import annotations

import abc
import dataclasses
import pathlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from qcompile import graph, syntax
from qcompile.backends.lowering import (
    NO_RECURRENT,
    NOMINAL_BITS,
    Kernels,
    Lowering,
    Roundings,
    Rule,
)
from qcompile.errors import TargetError
from qcompile.timing import Timing

if TYPE_CHECKING:
    from qcompile.calibrate import Calibration


@dataclasses.dataclass(frozen=True)
class Ran:
    """How a layer runs: ``precision`` ("int8", "int4 weights", "float", "unknown"), and why."""

    precision: str
    kernel: str
    reason: str = ""


def together(one: Ran | None, other: Ran) -> Ran:
    """How a layer runs that two kernels do parts of: in float as soon as one of them does."""
    if one is None or one.precision == other.precision:
        return other
    for ran in (one, other):
        if ran.precision in ("unknown", "float"):
            return dataclasses.replace(ran, reason=f"a part of the layer: {ran.reason}")
    return Ran(f"{one.precision} + {other.precision}", f"{one.kernel} + {other.kernel}")


@dataclasses.dataclass(frozen=True)
class Target(abc.ABC):
    """A runtime that a decided model is lowered to. The fields of a subclass are its options.

    * ``weight_formats``: for layers whose input is quantized as well, or weight-only.
    * ``input_formats``: of activations.
    * ``scales``: where the scale of an activation may come from (see TensorSpec.scale_from).
    * ``dialect``: the rules, in order.
    * ``float_formats``: half floats that the runtime computes in, or reads at least.
    * ``newest_opset``: the highest that the runtime reads.
    * ``runs_here``: whether what is written is run here, by ONNX Runtime.
    * ``module``: the Python package that runs what ``emit`` writes, for the self-check.
    """

    name: ClassVar[str]
    weight_formats: ClassVar[tuple[str, ...]]
    input_formats: ClassVar[tuple[str, ...]]
    scales: ClassVar[tuple[str, ...]] = ("static",)
    dialect: ClassVar[tuple[Rule, ...]]
    newest_opset: ClassVar[int]
    float_formats: ClassVar[tuple[str, ...]] = ()
    runs_here: ClassVar[bool] = False
    module: ClassVar[str] = "onnxruntime"

    def refuse_weight(self, form: str, where: str) -> None:
        """Raise TargetError if weights of ``form`` cannot be held."""
        self._refuse(form, self.weight_formats, "weights", where)

    def refuse_input(self, form: str, where: str) -> None:
        """Raise TargetError if activations of ``form`` cannot be held."""
        self._refuse(form, self.input_formats, "activations", where)

    def refuse_float(self, form: str, where: str) -> None:
        """Raise TargetError if the runtime cannot compute in ``form``."""
        self._refuse(form, self.float_formats, "floats", where)

    def refuse_scale(self, scale_from: str, where: str) -> None:
        """Raise TargetError if the scale of an activation cannot come from ``scale_from``."""
        if scale_from not in self.scales:
            raise TargetError(
                f"{self.name} takes no scale of an activation from the {scale_from} at run time "
                f"(asked for by {where}); it has {', '.join(self.scales)} ones"
            )

    def _refuse(self, form: str, held: Sequence[str], what: str, where: str) -> None:
        if form not in (*held, "float"):
            raise TargetError(
                f"{self.name} holds no {form} {what} (asked for by {where}); "
                f"it holds {', '.join(held) or 'float alone'}"
            )

    def lower(self, model: ir.Model) -> dict[str, int]:
        """Turn the decisions of ``model`` into this dialect, in place; counts by rule."""
        lowering = Lowering(model, self.kernels())
        counts = {rule.name: rule.apply(lowering) for rule in self.dialect}
        lowering.finish(self.opset_limit())
        return counts

    def roundings(self, model: ir.Model) -> Roundings:
        """Where this dialect rounds activations of the decided ``model``, which stays as it is."""
        lowering = Lowering(model.clone(), self.kernels())
        for rule in self.dialect:
            rule.apply(lowering)
        return lowering.roundings()

    def kernels(self) -> Kernels:
        """What the kernels take, for the options of this target."""
        return Kernels()

    def opset_limit(self) -> int:
        """The highest opset that the runtime reads, with the options of this target."""
        return self.newest_opset

    def computed(self, model: ir.Model) -> ir.Model:
        """``model`` as this runtime computes it, for ONNX Runtime to run: what simulation runs."""
        return model

    def check_shapes(  # noqa: B027 (nothing to check by default)
        self, model: ir.Model, calibration: Calibration | None
    ) -> None:
        """Raise TargetError for a dynamic input of which it must know more than there is."""

    @abc.abstractmethod
    def available(self) -> None:
        """Raise TargetError, with the command that installs it, if the runtime is missing."""

    def written(self, model: ir.Model) -> ir.Model:
        """The lowered ``model`` as its file has it."""
        return model

    @abc.abstractmethod
    def emit(
        self, model: ir.Model, folder: pathlib.Path, calibration: Calibration | None
    ) -> pathlib.Path:
        """Write the lowered ``model`` into ``folder`` and return the file that runs."""

    @abc.abstractmethod
    def prove(self, model: ir.Model, folder: pathlib.Path) -> dict[str, Ran]:
        """How each captured layer of the lowered ``model`` runs in what ``emit`` wrote."""

    def check_measure(self) -> None:
        """Raise TargetError if this machine is not the one that the target is for."""
        raise TargetError(f"{self.name} does not run here: there is nothing to measure")

    def measure(
        self, decided: ir.Model, calibration: Calibration, log: Callable[[str], None]
    ) -> list[str]:
        """The passes, as text, that make ``decided`` faster on this machine; see --measure."""
        self.check_measure()
        return []

    def timing(self, decided: Mapping[str, ir.Model], calibration: Calibration) -> Timing:
        """What layers take on this machine: all of a model decided alike, by what they are called.

        One of ``decided`` is ``timing.FLOAT``, in which nothing is decided.
        """
        self.check_measure()
        raise TargetError(f"{self.name} has no times of layers")

    def ratio(self, decided: ir.Model, floats: ir.Model, calibration: Calibration) -> float:
        """The latency of ``decided`` on this machine, in that of ``floats``."""
        self.check_measure()
        raise TargetError(f"{self.name} has no times of layers")

    def notes(self, model: ir.Model, folder: pathlib.Path) -> list[str]:
        """What the user must know of what ``emit`` wrote of the lowered ``model``."""
        narrow = Counter(
            bits for node in model.graph if (bits := node.metadata_props.get(NOMINAL_BITS))
        )
        return [
            f"no kernel for {bits}-bit activations: {count} of them run as int8 with "
            f"{1 << int(bits)} levels (nominal {bits}, stored 8 bits), no speed claimed"
            for bits, count in sorted(narrow.items())
        ]

    def __str__(self) -> str:
        return syntax.render(self.name, self)


def float_in_file(node: ir.Node) -> bool:
    """Whether the weight of ``node`` was not dequantized: then no runtime lowers it further."""
    if node.domain not in ("", "ai.onnx"):
        return False
    index = 0 if node.op_type == "Gather" else 1
    weight = node.inputs[index] if len(node.inputs) > index else None
    writer = weight.producer() if weight is not None else None
    return writer is None or writer.op_type != "DequantizeLinear"


def why_float(node: ir.Node, otherwise: str) -> str:
    """Why a layer of the lowered graph runs in float: what a rule said, or what was asked."""
    said = node.metadata_props.get(graph.REASON)
    if said:
        return said
    if node.op_type in graph.RECURRENT:
        return NO_RECURRENT
    return "float was asked for" if float_in_file(node) else otherwise
