"""Collect the range of every activation that a decision or a dialect may need.

Range searches: percentile and MSE as in Nagel et al., "A White Paper on Neural Network
Quantization" (arXiv 2106.08295, section 3.1); p-norm after LAPQ (arXiv 1911.07190); entropy after
Migacz, "8-bit Inference with TensorRT" (GTC 2017).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, cast

import onnx_ir as ir

from qcompile import calibrate, graph, numerics
from qcompile.errors import PassError
from qcompile.numerics import ActivationMethod, IntFormat
from qcompile.pipeline import Context, Pass, Stats


@dataclasses.dataclass(frozen=True)
class Calibrate(Pass):
    """Write ``<value>/range``, float32 [low, high], for what layers read and write and what stands
    between them.

    The extremes are those of every element of every sample. Raises PassError without calibration
    data, and CalibrationError if a value is NaN or infinite.

    * ``method``: the extremes, the two-sided ``percentile``, each end shrunk until the mean
      squared error (``mse``) or the mean of a power of it (``pnorm``) is least, or both ends cut at
      the magnitude where the quantized histogram diverges least from the true one (``entropy``).
    * ``percentile``: above 50, up to 100; of ``method=percentile``.
    * ``bits``: of the grid of ``mse``, ``pnorm`` and ``entropy``, over a histogram of 2048 bins.

    A histogram spans the extremes. It counts about 8 million numbers of a picture, every few pixels
    of all samples, and of another value all numbers of about 128 samples.
    """

    name: ClassVar[str] = "calibrate"
    produces: ClassVar[frozenset[str]] = frozenset({"ranges"})
    keeps_float: ClassVar[bool] = True
    reads_data: ClassVar[bool] = True

    method: ActivationMethod = "minmax"
    percentile: float = 99.99
    bits: int = 8

    def __post_init__(self) -> None:
        if not 50.0 < self.percentile <= 100.0:
            raise PassError(f"percentile must lie between 50 and 100, got {self.percentile:g}")
        if not 2 <= self.bits <= 8:
            raise PassError(f"bits must be 2 to 8, got {self.bits}")

    def run(self, model: ir.Model, ctx: Context) -> Stats:
        values = calibrate.quantizable_values(model)
        observer = "minmax" if self.method == "minmax" else "histogram"
        found = ctx.data().stats(model, values, observer)
        form = IntFormat(self.bits, signed=False)
        by_name = {
            v.name: v for v in (*model.graph.inputs, *(o for n in model.graph for o in n.outputs))
        }
        for name, statistic in found.items():
            if isinstance(statistic, calibrate.MinMax):
                low, high = statistic.low, statistic.high
            else:
                histogram = cast("calibrate.Histogram", statistic)
                low, high = numerics.histogram_range(
                    histogram.counts, histogram.edges, form, self.method, self.percentile
                )
            graph.set_range(model, by_name[name], low, high)
        return {"values": len(values), "samples": len(ctx.data().samples)}
