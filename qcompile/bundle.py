"""Writes ``OUT/check``: what a device needs to tell whether it runs what was compiled.

    check.json     what runs the model, its outputs and their limits, sequences and state
    inputs.npz     a few judge samples, each array under <frame>.<number of the input>
    expected.npz   the outputs of the lowered graph, simulated: what the file must compute
    float.npz      the outputs of the float model
    verify.py      the program, which is qcompile/selfcheck.py itself

The limits are measured. No device computes bit by bit what another does, and a rounding that flips
early moves all behind it. So the lowered graph is simulated again with each of its float constants
(scales, biases, float weights) off by up to the rounding of TF32 and FP16, the coarsest arithmetic
that a runtime uses for what is not quantized. The SQNR of these runs in dB, against the simulation
and against float, spreads; the limit is what the next such run misses once in ``1 / MISSED`` times
(Student's t for a prediction), and lower if this runtime's own optimized run lies below their mean.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import scipy.special  # pyright: ignore[reportMissingTypeStubs]

from qcompile import graph, selfcheck, sequences
from qcompile.execute import Session
from qcompile.selfcheck import Figure
from qcompile.sequences import Sample, Samples
from qcompile.simulate import Judge, is_plain
from qcompile.spill import Spill

Array = npt.NDArray[Any]

# At most this many sequences, and this many bytes before compression; one frame is always kept.
SEQUENCES, BYTES = 4, 16 << 20
# Half a step of the last bit of TF32 and FP16, relative; how often it is drawn; and the share of
# such runs that miss a limit.
ROUNDING, DRAWS, MISSED = 2.0**-11, 6, 0.005
# A run that differs from the simulation by this much less than float does is sound:
# 15 dB below it, it changes the SQNR to float by 0.14 dB.
UNSEEN_DB = 15.0
# No comparison of float32 is nearer than this many dB.
FLOAT32_DB = 120.0


@dataclasses.dataclass(frozen=True)
class Compared:
    """What a bundle is made of: two models, and what models computed of the samples of a judge.

    ``actual`` is of the written file as it runs here, or None if it cannot.
    """

    reference: ir.Model
    lowered: ir.Model
    expected: Spill
    actual: Spill | None
    runtime: str
    target: str


def write(folder: pathlib.Path, made: Compared, judge: Judge) -> str:
    """Write ``folder/check``; return "", or why it holds less than it should."""
    names = [v.name or "" for v in made.reference.graph.outputs]
    frames, lengths, cut = _few(judge.samples)
    state = judge.samples.state
    reference, expected = judge.wanted[: len(frames)], made.expected[: len(frames)]
    kept = [n for n in names if all(is_plain(f.get(n)) for f in (*reference, *expected))]
    if not kept or not all(is_plain(a) for frame in frames for a in frame.values()):
        return "there is no check for the device: numpy holds no inputs or outputs of such types"
    frames, lengths, fits = _within(frames, lengths, [reference, expected], kept)
    reference, expected = reference[: len(frames)], expected[: len(frames)]
    moved: list[list[dict[str, Array]]] = []
    for draw in range(DRAWS):  # one at a time: each holds the weights once more
        model = rounded(made.lowered, draw)
        session = Session(model, optimize=False)
        moved.append([found for _, found in sequences.carry(session, frames, state, kept)])
        del session
        graph.drop_weights(model)
    here = [] if made.actual is None else [made.actual[: len(frames)]]
    inputs = list(dict.fromkeys(name for frame in frames for name in frame))
    spec = {
        "schema": selfcheck.SCHEMA_VERSION,
        "runtime": made.runtime,
        "target": made.target,
        "files": {p.name: selfcheck.digest(p) for p in sorted(folder.glob("*.onnx*"))},
        "inputs": inputs,
        "outputs": [_limits(name, reference, expected, moved, here) for name in kept],
        "sequences": lengths,
        "state": dict(state),
        "profile": _profile(made.reference, frames),
        "limits": {"sequences": SEQUENCES, "bytes": BYTES, "cut": cut or not fits},
    }
    place = folder / "check"
    place.mkdir(exist_ok=True)
    (place / "check.json").write_text(json.dumps(spec, indent=1) + "\n")
    _save(place / "inputs.npz", frames, inputs)
    _save(place / "expected.npz", expected, kept)
    _save(place / "float.npz", reference, kept)
    (place / "verify.py").write_text(pathlib.Path(selfcheck.__file__).read_text())
    missing = [n for n in names if n not in kept]
    return f"the check for the device lacks {', '.join(missing)}" if missing else ""


def _few(judges: Samples) -> tuple[list[Sample], list[int], bool]:
    """The frames of the first sequences, as many as fit, and the length of each sequence."""
    frames: list[Sample] = []
    lengths: list[int] = []
    total = 0
    for sequence in range(min(SEQUENCES, judges.sequences)):
        for number, frame in enumerate(judges.sequence(sequence)):
            total += sum(array.nbytes for array in frame.values())
            if frames and total > BYTES:
                return frames, lengths, True
            frames.append(frame)
            lengths[len(lengths) - (number > 0) :] = [number + 1]
    return frames, lengths, False


def _within(
    frames: list[Sample],
    lengths: list[int],
    results: Sequence[Sequence[Mapping[str, Array]]],
    names: Sequence[str],
) -> tuple[list[Sample], list[int], bool]:
    """The first of ``frames`` that fit with their ``results``; a sequence may end early."""
    total = count = 0
    for frame, *found in zip(frames, *results, strict=True):
        total += sum(array.nbytes for array in frame.values())
        total += sum(result[name].nbytes for result in found for name in names)
        if count and total > BYTES:
            break
        count += 1
    left, kept = count, list[int]()
    for length in lengths:
        kept += [min(length, left)] if left else []
        left -= min(length, left)
    return frames[:count], kept, count == len(frames)


def rounded(lowered: ir.Model, draw: int) -> ir.Model:
    """``lowered`` with each float constant in memory off by up to ``ROUNDING``, relative.

    All but those that say what is computed: the region and the factors of a Resize, and exponents
    (no power of a negative number is defined but for whole ones).
    """
    model, rng = lowered.clone(), np.random.default_rng(draw)
    said = (n for n in model.graph if n.op_type in ("Resize", "Pow"))
    exact = {value for node in said for value in node.inputs[1:]}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        # What lies in a file, or is computed when it is written, may be larger than memory.
        large = isinstance(tensor, ir.ExternalTensor | ir.LazyTensor)
        if value in exact or tensor is None or large or tensor.dtype != ir.DataType.FLOAT:
            continue
        array = tensor.numpy()
        factor = rng.random(array.shape, np.float32)
        factor *= np.float32(2.0 * ROUNDING)
        factor += np.float32(1.0 - ROUNDING)
        with np.errstate(over="ignore"):
            factor *= array
        # The most negative number, of which masks are made, stays a number.
        np.copyto(factor, array, where=~np.isfinite(factor))
        value.const_value = ir.Tensor(factor, name=value.name)
    return model


def _limits(
    name: str,
    reference: Sequence[Mapping[str, Array]],
    expected: Sequence[Mapping[str, Array]],
    moved: Sequence[Sequence[Mapping[str, Array]]],
    here: Sequence[Sequence[Mapping[str, Array]]],
) -> dict[str, Any]:
    """How near output ``name`` must be to what was compiled and to float, measured."""

    def near(
        wanted: Sequence[Mapping[str, Array]], runs: Sequence[Sequence[Mapping[str, Array]]]
    ) -> list[Figure]:
        pairs = ([f[name] for f in wanted], [[f[name] for f in run] for run in runs])
        return [selfcheck.compare(pairs[0], run) for run in pairs[1]]

    whole = reference[0][name].dtype.kind in "iub"
    limit = _share if whole else _sqnr
    [promised] = near(reference, [expected])
    compiled = limit(near(expected, moved), near(expected, here))
    if compiled is not None and not whole and math.isfinite(promised.value):
        compiled = min(compiled, promised.value + UNSEEN_DB)
    return {
        "name": name,
        "whole": whole,
        "promised": promised.value if math.isfinite(promised.value) else None,
        "compiled_limit": compiled,
        "float_limit": limit(near(reference, moved), [promised, *near(reference, here)]),
    }


def _sqnr(draws: Sequence[Figure], others: Sequence[Figure]) -> float | None:
    """The SQNR in dB that a sound run reaches; None if one of the runs was not finite."""
    values = [min(figure.value, FLOAT32_DB) for figure in draws]
    known = [min(figure.value, FLOAT32_DB) for figure in others]
    if not np.isfinite([*values, *known]).all():
        return None
    count = len(values)
    library: Any = scipy.special  # untyped
    student = float(library.stdtrit(count - 1, 1.0 - MISSED)) * math.sqrt(1.0 + 1.0 / count)
    # The power of n independent numbers has the relative deviation sqrt(2 / n), and what depends on
    # each other a larger one: the least spread, where few draws happen to lie near each other.
    least = 10.0 / math.log(10.0) * math.sqrt(2.0 / min(figure.count for figure in draws))
    spread = max(float(np.std(values, ddof=1)), least)
    return min([float(np.mean(values)), *known]) - student * spread


def _share(draws: Sequence[Figure], others: Sequence[Figure]) -> float | None:
    """The share of equal elements that a sound run reaches (Laplace's estimate, three sigma)."""
    figures = [*draws, *others]
    if any(math.isnan(figure.value) for figure in figures):
        return None
    worst = min(figures, key=lambda figure: figure.value)
    share = (worst.value * worst.count + 1.0) / (worst.count + 2.0)
    return max(share - 3.0 * math.sqrt(share * (1.0 - share) / worst.count), 0.0)


def _profile(model: ir.Model, frames: Sequence[Sample]) -> dict[str, list[list[int]]]:
    """For each dynamic input its smallest, first and largest shape in ``frames``."""
    found: dict[str, list[list[int]]] = {}
    for value in model.graph.inputs:
        seen = [frame[n].shape for frame in frames if (n := value.name or "") in frame]
        fixed = value.shape is not None and all(isinstance(d, int) for d in value.shape)
        if seen and not fixed:
            least, most = ([f(dims) for dims in zip(*seen, strict=True)] for f in (min, max))
            found[value.name or ""] = [least, list(seen[0]), most]
    return found


def _save(path: pathlib.Path, frames: Sequence[Mapping[str, Array]], names: Sequence[str]) -> None:
    arrays = {
        f"{number}.{names.index(name)}": frame[name]
        for number, frame in enumerate(frames)
        for name in names
        if name in frame
    }
    keyed: Any = arrays  # keys are strings of our own
    np.savez_compressed(path, **keyed)
