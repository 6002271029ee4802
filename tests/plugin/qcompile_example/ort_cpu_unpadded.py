"""ONNX Runtime on the CPU without padded Convs, where the file must be small."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from qcompile.backends.lowering import Rule
from qcompile.backends.onnxruntime import OrtCpu


@dataclasses.dataclass(frozen=True)
class OrtCpuUnpadded(OrtCpu):
    """As ort-cpu, but no Conv is padded to a multiple of four input channels."""

    name: ClassVar[str] = "ort-cpu-unpadded"
    dialect: ClassVar[tuple[Rule, ...]] = tuple(
        rule for rule in OrtCpu.dialect if rule.name != "channels-of-four"
    )
