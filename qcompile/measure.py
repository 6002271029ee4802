"""What was made for one target, measured: proof, accuracy, size, latency; the report of it all."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections import Counter
from collections.abc import Sequence

import onnx_ir as ir

from qcompile import bench, bundle, execute, graph, report, simulate
from qcompile.accuracy import Bound, Evaluation
from qcompile.calibrate import Calibration
from qcompile.execute import Session
from qcompile.pipeline import Context, Step
from qcompile.report import Report
from qcompile.search import Found
from qcompile.spill import Spill

# Below this the compiled model is hardly the same model; the report says so in red.
POOR_DB = 10.0
# How far the SQNR of the optimized run may lie from that of the simulation. Their outputs differ by
# more (a rounding that flips early makes the roundings behind it independent), their distance to
# float does not: a sound file moves by at most 0.25 dB.
SIMULATION_MARGIN_DB = 0.5


@dataclasses.dataclass(frozen=True)
class Judged:
    """What judges a result, where there is data.

    * ``judge``: the samples that were kept.
    * ``evaluation``, ``bound``: the user's metric, and how much it may drop.
    * ``found``: what was given back to stay within it, and ``count`` how often the metric was
      measured before.
    """

    judge: simulate.Judge | None
    evaluation: Evaluation | None = None
    bound: Bound | None = None
    found: Found | None = None
    count: int = 0


@dataclasses.dataclass(frozen=True)
class Made:
    """What was made for one target: ``decided`` is the model just before it was ``lowered``.

    ``main`` is the file that runs, ``passes`` the text that makes it, ``steps`` what each did.
    """

    name: str
    decided: ir.Model
    lowered: ir.Model
    main: pathlib.Path
    passes: str
    steps: Sequence[Step]


def report_of(
    made: Made, context: Context, judged: Judged, findings: Sequence[str], latency: bool
) -> Report:
    """The report of ``made``; writes what a device needs to check it beside it.

    ``findings`` are warnings of what came before; ``latency`` measures it against float.
    """
    calibration, reference, target = context.calibration, context.reference, context.target
    assert reference is not None and target is not None
    lowered, judge = made.lowered, judged.judge
    proof = target.prove(lowered, made.main.parent)
    shapes = calibration.shapes(reference) if calibration else {}
    values = [layer.biased_output.name or "" for layer in graph.layers(made.decided)]
    computed = target.computed(lowered)
    sqnr = simulate.layer_sqnr(reference, computed, values, judge.samples[:4]) if judge else {}
    rows = report.layer_reports(reference, made.decided, lowered, proof, shapes, sqnr)
    size = report.Size(execute.weight_bytes(reference), _bytes_of(made.main))
    outputs: list[report.Output] = []
    apart: float | None = None
    accuracy: report.Accuracy | None = None
    timed: bench.Latency | None = None
    notes = [*target.notes(lowered, made.main.parent)]
    if judge is not None:
        expected = judge.simulated(computed)
        actual = judge.run(Session(made.main)) if target.runs_here else None
        outputs = _outputs(judge, expected, expected if actual is None else actual)
        if actual is not None:
            apart = min(judge.between(expected, actual).values(), default=math.inf)
        compared = bundle.Compared(
            reference, computed, expected, actual, target.module, str(target)
        )
        lacking = bundle.write(made.main.parent, compared, judge)
        notes += [lacking] if lacking else []
        if judged.evaluation is not None:
            here = target.runs_here
            session = Session(made.main) if here else Session(computed, optimize=False)
            accuracy = _accuracy(judged, judged.evaluation, session)
        if latency and actual is not None:
            floats = [Session(reference, threads=1) for _ in range(2)]
            compiled = Session(made.main, threads=1)
            timed = bench.interleaved(floats[0], floats[1], compiled, judge.samples)
    return Report(
        model=made.name,
        pipeline=made.passes,
        target=str(target),
        seed=context.seed,
        versions=report.versions(),
        data=_data_report(calibration) if calibration else None,
        passes=tuple(made.steps),
        layers=tuple(rows),
        outputs=tuple(outputs),
        accuracy=accuracy,
        left_alone=tuple(report.left_alone(reference, rows)),
        added=_added(made.decided, rows, calibration),
        share=report.shares(rows),
        size=size,
        latency=timed,
        simulated_against_run=apart,
        warnings=(*findings, *notes, *_warnings(calibration, outputs, size, timed)),
    )


def _added(
    decided: ir.Model, rows: Sequence[report.LayerReport], calibration: Calibration | None
) -> dict[str, float]:
    """The MACs of what passes added and is no layer (see ``graph.ROLE``), for one of the layers."""
    added = [node for node in decided.graph if node.metadata_props.get(graph.ROLE)]
    whole = sum(row.macs for row in rows)
    if not added or calibration is None or not whole:
        return {}
    shapes = calibration.shapes(decided)
    macs: Counter[str] = Counter()
    for node in added:
        if node.op_type not in ("Conv", "MatMul") or (factor := node.inputs[1]) is None:
            continue
        out, weight = shapes.get(node.outputs[0].name or ""), graph.shape_of(factor)
        if out is not None and weight is not None:
            each = math.prod(weight[1:]) if node.op_type == "Conv" else weight[-2]
            macs[node.metadata_props[graph.ROLE]] += math.prod(out) * each
    return {role: count / whole for role, count in macs.items()}


def _outputs(judge: simulate.Judge, simulated: Spill, runs: Spill) -> list[report.Output]:
    """The figures of each output; ``runs`` are ``simulated`` where the file does not run here."""
    found, cosine, uneven = judge.sqnr(runs), judge.cosine(runs), judge.uneven(runs)
    expected = judge.sqnr(simulated) if runs is not simulated else found
    nan = math.nan
    return [
        report.Output(n, found.get(n, nan), expected.get(n, nan), cosine.get(n, nan), uneven[n])
        for n in judge.outputs
    ]


def _accuracy(judged: Judged, evaluation: Evaluation, session: Session) -> report.Accuracy:
    """The user's metric of what was written, and what it took."""
    bound, found = judged.bound, judged.found
    value = evaluation.measure(session)
    drop = evaluation.drop(value)
    return report.Accuracy(
        metric=str(evaluation.metric),
        lower_is_better=evaluation.metric.lower_is_better,
        source=evaluation.data.source,
        digest=evaluation.data.digest,
        samples=len(evaluation.data.samples),
        in_float=evaluation.in_float,
        compiled=value,
        drop=drop,
        wanted=bound.text if bound else None,
        met=bound.allows(drop, evaluation.in_float) if bound else None,
        given_back=found.given_back if found else (),
        unnamed=found.unnamed if found else 0,
        evaluations=evaluation.count - judged.count,
        probes=found.probes if found else 0,
    )


def _warnings(
    calibration: Calibration | None,
    outputs: Sequence[report.Output],
    size: report.Size,
    latency: bench.Latency | None,
) -> list[str]:
    found: list[str] = []
    if calibration is not None and calibration.data.random:
        found.append("calibrated on random noise: ranges and accuracy say nothing about your data")
    if calibration is not None and not calibration.apart:
        what = "sequences" if calibration.state else "samples"
        found.append(f"too few {what} to keep any apart: accuracy is on the calibration samples")
    for output in outputs:
        if output.uneven:
            found.append(
                f"output {output.name!r} has another size than in float for {output.uneven} "
                "samples, which its figures leave out"
            )
        if math.isnan(output.sqnr):
            if not output.uneven:
                found.append(f"output {output.name!r} is not finite: its accuracy is unknown")
            continue
        if not output.sqnr >= POOR_DB:
            found.append(f"output {output.name!r} has only {output.sqnr:.1f} dB of SQNR")
        moved = output.sqnr != output.simulated  # equal infinities have no difference
        if moved and not abs(output.sqnr - output.simulated) <= SIMULATION_MARGIN_DB:
            found.append(
                f"output {output.name!r} has {output.sqnr:.1f} dB as the runtime optimizes it and "
                f"{output.simulated:.1f} dB without: the runtime changes the result"
            )
    if size.compiled_bytes >= size.float_bytes:
        found.append("the file did not shrink: it has more bytes than the weights in float")
    if latency is not None and latency.ratio > 1.0:
        found.append(f"the compiled model is slower than float: {latency.ratio:.2f}")
    return found


def _data_report(calibration: Calibration) -> report.DataReport:
    return report.DataReport(
        source=calibration.data.source,
        digest=calibration.data.digest,
        samples=len(calibration.samples),
        judged=len(calibration.judges),
        judged_apart=calibration.apart,
        random=calibration.data.random,
        sequences=calibration.data.samples.sequences,
        state=dict(calibration.state),
        mask=calibration.mask,
    )


def _bytes_of(main: pathlib.Path) -> int:
    return sum(p.stat().st_size for p in main.parent.glob(f"{main.name}*"))
