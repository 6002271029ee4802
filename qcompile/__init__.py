"""qcompile: a graph-level compiler for post-training quantization.

import qcompile
[result] = qcompile.compile("model.onnx", "out", calib="calibration.npz")
print(result.report.outputs)
"""

from __future__ import annotations

import importlib.metadata

from qcompile.compiler import Compiled, compile, diff, load
from qcompile.options import Options

__all__ = ["Compiled", "Options", "compile", "diff", "load"]
__version__ = importlib.metadata.version("qcompile")
