"""PTQ4VM, part by part, on a recurrent matting network: errors against the true alpha.

    python tests/benchmarks/ptq4vm.py [--quick] [--seeds N] [--picture FILE] [--json FILE]

Each variant is its control and one step more. A seed draws its own 16 calibration clips of 8
frames, on which all is fitted, and the randomness of the fits; strengths were chosen on the tuning
clips; the judge clips, of other pictures, judge. MAD and MSE are times 1e3, dtSSD times 1e2, lower
is better; SQNR is that of alpha against the float model, in dB. Figures are means over judge clips
and seeds, with the 95 % interval of a bootstrap over both, and medians. Differences are of the same
clips and seeds, one variant less the other. First and last weights and their inputs have 8 bits.
4-bit activations run as int8 with 16 levels: no speed is claimed.

The control of the flow term, a weight of 0 with as many steps, is the row "+ GAC": that they are
one is asserted. The symmetric setting is that of the paper's code: signed activations, also behind
a ReLU.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import common
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from common import Claim
from rich.table import Table

from qcompile import blocks, capture, execute, flow, graph, pipeline, ports, registry, rounding
from qcompile.backends.onnxruntime import OrtCpu
from qcompile.calibrate import Calibration
from qcompile.models import matting_metrics as metrics
from qcompile.models import matting_video as video
from qcompile.pipeline import Context
from qcompile.prefix import Prefix
from qcompile.quantized import Gain, Quantized
from qcompile.sequences import Samples
from qcompile.sources import load

Array = npt.NDArray[Any]
STATE = ports.parse_state(video.STATE)
METRICS = {"MAD": 1e3, "MSE": 1e3, "dtSSD": 1e2, "SQNR": 1.0}
TARGET = OrtCpu()

PREPARE = "simplify,recompose,fold-bn"
# Ranges by the squared error of as many levels as a tensor behind a ReLU has.
SETTINGS = {
    "W8A8": "calibrate,quantize",
    "W4A8": "calibrate,quantize{weight=int4 method=mse ends=int8}",
    "W4A4": "calibrate{method=mse bits=4},quantize{weight=int4 input=int4 method=mse ends=int8}",
    "W4A4 symmetric": "calibrate{method=mse bits=3},"
    "quantize{weight=int4 input=int4 method=mse symmetric=true ends=int8}",
}
FIT = "reconstruct{{steps={0} batch=2 rate=0.1 range-rate=0.01 samples={1}}}"
AFFINE = "calibrate-affine{{steps={0} batch=4 rate={1:g} samples={2}{3}}}"


@dataclasses.dataclass(frozen=True)
class Effort:
    """Steps of Adam of both fits, and how many calibration samples they use."""

    fit: int = 40
    affine: int = 150
    samples: int = 64

    def reconstruct(self) -> str:
        """The pass."""
        return FIT.format(self.fit, self.samples)

    def calibrate(self, options: str = "", rate: float = 0.0003) -> str:
        """The pass ``calibrate-affine``."""
        return AFFINE.format(self.affine, rate, 2 * self.samples, options and f" {options}")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A step more than ``behind``; ``among`` are the settings that it is measured in."""

    name: str
    behind: str
    step: str
    among: tuple[str, ...]


def variants(effort: Effort) -> list[Variant]:
    """What is compared, each behind the one that it goes on from."""
    narrow, all_four = ("W4A8", "W4A4"), ("W4A8", "W4A4", "W4A4 symmetric")
    affine, fours = effort.calibrate, ("W4A4", "W4A4 symmetric")
    return [
        Variant("nearest", "", "", tuple(SETTINGS)),
        Variant("gptq", "nearest", "gptq", narrow),
        Variant("gptaq", "nearest", "gptaq", narrow),
        Variant("nearest + ranges alone", "nearest", affine("gains=none", 0.003), ("W4A4",)),
        Variant("nearest + GAC", "nearest", affine("", 0.003), ("W4A4",)),
        Variant("nearest + GAC of weights", "nearest", affine("form=weight", 0.003), ("W4A4",)),
        Variant("reconstruct", "nearest", effort.reconstruct(), all_four),
        Variant("+ ranges alone", "reconstruct", affine("gains=none"), ("W4A4",)),
        Variant("+ GAC", "reconstruct", affine(), narrow),
        Variant("+ GAC of weights", "reconstruct", affine("form=weight"), ("W4A4",)),
        Variant("+ GAC + OFA", "reconstruct", affine("temporal=flow"), fours),
        Variant("+ gains a channel", "reconstruct", affine("gains=channel"), ("W4A4",)),
    ]


@dataclasses.dataclass(frozen=True)
class Row:
    """One variant of one seed: its errors on each judge clip, in the units of the table."""

    setting: str
    variant: str
    seed: int
    errors: dict[str, list[float]]


Alpha = npt.NDArray[np.float32]


def alphas(model: ir.Model, clips: Sequence[video.Clip], optimize: bool = True) -> list[Alpha]:
    """The alpha [T, 1, H, W] that ``model`` gives of each clip, its state from zero on."""
    session = execute.Session(model, optimize=optimize)
    start = {
        value.name or "": np.zeros([1, *(d for d in value.shape or () if isinstance(d, int))])
        for value in model.graph.inputs
        if value.name in STATE
    }
    found: list[Alpha] = []
    for clip in clips:
        state = {name: zeros.astype(np.float32) for name, zeros in start.items()}
        frames: list[Alpha] = []
        for frame in clip.frames:
            outputs = session.run({"frame": frame[None], **state})
            frames.append(outputs["alpha"])
            state = {taken: outputs[given] for taken, given in STATE.items()}
        found.append(np.concatenate(frames))
    return found


def lowered(decided: ir.Model) -> ir.Model:
    """What runs."""
    model = decided.clone()
    TARGET.lower(model)
    return model


def judged(
    found: Sequence[Alpha], clips: Sequence[video.Clip], reference: Sequence[Alpha]
) -> dict[str, list[float]]:
    """The errors of each clip, in the units of the table."""
    rows: dict[str, list[float]] = {name: [] for name in METRICS}
    for alpha, clip, wanted in zip(found, clips, reference, strict=True):
        errors = metrics.errors(alpha, clip.alpha)
        noise = np.sum((alpha.astype(np.float64) - wanted) ** 2)
        sqnr = 10 * np.log10(np.sum(wanted.astype(np.float64) ** 2) / max(noise, 1e-12))
        each = (errors.mad, errors.mse, errors.dtssd, float(sqnr))
        for (name, unit), value in zip(METRICS.items(), each, strict=True):
            rows[name].append(unit * value)
    return rows


class Seed:
    """The calibration clips of a seed, and the models that were decided and fitted on them."""

    def __init__(self, model: ir.Model, number: int) -> None:
        self.number = number
        self.reference = model
        draws = (video.labelled("calibration", 2 * number + half) for half in (0, 1))
        clips = [clip.sequence() for clip in itertools.chain(*draws)]
        self.data = Calibration(load(clips, ports.inputs_of(model), state=STATE))

    def run(self, model: ir.Model, text: str) -> ir.Model:
        """``model`` behind the passes of ``text``; itself stays as it is."""
        made = model.clone()
        context = Context(
            seed=self.number, calibration=self.data, target=TARGET, reference=self.reference.clone()
        )
        pipeline.run(made, pipeline.parse(text, registry.passes()), context)
        return made

    def lost_apart(self, decided: ir.Model) -> float:
        """The relative error of alpha on the samples that decide whether a fit is kept."""
        _, apart = self.data.to_fit(1)
        return ran(Quantized(decided, TARGET), apart).error()


def ran(quantized: Quantized, samples: Samples) -> Prefix:
    """``quantized``, run over ``samples`` by torch."""
    prefix = Prefix(quantized, [blocks.whole(quantized.model)], samples)
    prefix.run()
    return prefix


def unfolded(before: ir.Model, after: ir.Model, samples: Samples) -> float:
    """SQNR in dB of alpha, by torch, of ``after`` against ``before`` with its gains apart.

    What ``after`` has in its scales and biases stands behind the layers of ``before`` instead.
    Activations are in float: a fold moves the last bit of some, and a rounding makes a step of it.
    """
    old, new = (Quantized(model, TARGET) for model in (before, after))
    layers = {layer.name: layer for layer in graph.layers(after)}
    for layer in graph.layers(before):
        twin, bias, moved = layers[layer.name], old.bias(layer), new.bias(layers[layer.name])
        one, two = layer.weight.spec, twin.weight.spec
        if one is None or two is None or bias is None or moved is None:
            continue
        ratio = constant(after, two.scale) / constant(before, one.scale)
        gain = np.mean(ratio, dtype=np.float64, keepdims=True).reshape(1)
        shift = (moved - gain * bias).reshape(-1)
        factor, moved = (rounding.tensor(a.astype(np.float32), "cpu") for a in (gain, shift))
        old.gains[layer.name] = Gain(factor, moved)
    for quantized in (old, new):
        quantized.roundings = dataclasses.replace(quantized.roundings, uses={}, values={})
    each = [ran(quantized, samples).rounded for quantized in (old, new)]
    one, two = (np.stack([run.value("alpha", n) for n in range(len(samples))]) for run in each)
    return decibel(one, two)


def constant(model: ir.Model, name: str) -> Array:
    """The initializer ``name``."""
    return graph.constant(model.graph.initializers[name])


def measure(
    seeds: int, effort: Effort, settings: Iterable[str], clips: Sequence[video.Clip]
) -> tuple[list[Row], list[Claim], dict[str, list[Alpha]]]:
    """All rows, what is asserted, and the alphas of the last seed by setting and variant."""
    model = capture.capture(str(video.path(video.MODEL)))
    reference = alphas(model, clips)
    rows = [Row("float", "float", 0, judged(reference, clips, reference))]
    pictures = {"float": reference}
    worst, folded, nodes, same = 0.0, np.inf, 0, np.inf
    for number in range(seeds):
        seed = Seed(model, number)
        prepared = seed.run(model, PREPARE)
        for setting in settings:
            made: dict[str, ir.Model] = {"": seed.run(prepared, SETTINGS[setting])}
            for variant in variants(effort):
                if setting not in variant.among:
                    continue
                decided = made[variant.behind]
                made[variant.name] = seed.run(decided, variant.step) if variant.step else decided
                found = alphas(lowered(made[variant.name]), clips)
                rows.append(Row(setting, variant.name, number, judged(found, clips, reference)))
                pictures[f"{setting}, {variant.name}"] = found
                said = {name: round(float(np.mean(v)), 2) for name, v in rows[-1].errors.items()}
                print(f"seed {number}, {setting}, {variant.name}: {said}", file=sys.stderr)
            if "reconstruct" in made:
                ratio = seed.lost_apart(made["reconstruct"]) / seed.lost_apart(made["nearest"])
                worst = max(worst, ratio)
            for name in {"+ GAC", "+ GAC + OFA"} & made.keys():
                samples, _ = seed.data.to_fit(1)
                folded = min(folded, unfolded(made["reconstruct"], made[name], samples))
                nodes = max(nodes, len(made[name].graph) - len(made[""].graph))
            if number == 0 and "+ GAC + OFA" in made and "+ GAC" in made:
                control = effort.calibrate("temporal=flow flow-weight=0")
                alike = alphas(lowered(seed.run(made["reconstruct"], control)), clips[:1])
                same = decibel(alphas(lowered(made["+ GAC"]), clips[:1])[0], alike[0])
    image = rounding.tensor(clips[0].frames, "cpu")
    still = flow.warp(image, torch.zeros(len(image), 2, *image.shape[2:]))
    moved = float((still - image).abs().max())
    eight, floats = (
        rows_of(rows, *names)["MAD"] for names in (("W8A8", "nearest"), ("float", "float"))
    )
    lost = eight - floats
    most = 0.02 * float(floats.mean())
    return (
        rows,
        [
            Claim("reconstruct over nearest, error apart, the worst", worst <= 1, worst, 1.0),
            Claim("GAC and OFA against unfolded, dB", folded >= 90, folded, 90.0, None, seeds),
            Claim("nodes that GAC and OFA leave", nodes == 0, nodes, 0.0, None, seeds),
            Claim("OFA of weight 0 against GAC, dB", same >= 50, same, 50.0),
            Claim("change by a flow of zero", moved == 0, moved, 0.0),
            Claim(
                "W8A8 less float, MAD",
                bool(lost.mean() <= most),
                float(lost.mean()),
                most,
                interval(lost),
                seeds,
            ),
        ],
        pictures,
    )


def decibel(wanted: Array, found: Array) -> float:
    """SQNR of ``found``, at most 200."""
    noise = np.sum((found.astype(np.float64) - wanted) ** 2)
    return float(10 * np.log10(np.sum(wanted.astype(np.float64) ** 2) / noise)) if noise else 200.0


def rows_of(rows: Iterable[Row], setting: str, variant: str) -> Mapping[str, Array]:
    """The errors of a variant, [seeds, clips] by metric."""
    chosen = [row for row in rows if (row.setting, row.variant) == (setting, variant)]
    return {name: np.array([row.errors[name] for row in chosen]) for name in METRICS}


def interval(values: Array) -> tuple[float, float]:
    """95 % interval of the mean of ``values`` [seeds, clips] over seeds and clips drawn anew."""
    rng = np.random.default_rng(0)
    seeds, clips = values.shape
    drawn = [
        values[rng.integers(0, seeds, seeds)][:, rng.integers(0, clips, clips)].mean()
        for _ in range(2000)
    ]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def table(rows: Sequence[Row]) -> Table:
    """The rows for people."""
    shown = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("bits", "variant"):
        shown.add_column(column)
    for column in METRICS:
        shown.add_column(f"{column} (median)", justify="right")
    for setting, variant in dict.fromkeys((row.setting, row.variant) for row in rows):
        cells: list[str] = []
        for values in rows_of(rows, setting, variant).values():
            low, high = interval(values)
            cells.append(f"{values.mean():.2f} [{low:.2f}, {high:.2f}] ({np.median(values):.2f})")
        shown.add_row(setting, variant, *cells)
    return shown


COMPARED = (
    ("W4A8", "reconstruct", "nearest"), ("W4A8", "reconstruct", "gptaq"),
    ("W4A8", "+ GAC", "reconstruct"), ("W4A4", "reconstruct", "nearest"),
    ("W4A4", "nearest + GAC", "nearest"), ("W4A4", "nearest + GAC", "nearest + ranges alone"),
    ("W4A4", "nearest + GAC of weights", "nearest + GAC"),
    ("W4A4", "reconstruct", "gptaq"), ("W4A4", "+ ranges alone", "reconstruct"),
    ("W4A4", "+ GAC", "reconstruct"), ("W4A4", "+ GAC", "+ ranges alone"),
    ("W4A4", "+ GAC of weights", "+ GAC"), ("W4A4", "+ GAC + OFA", "+ GAC"),
    ("W4A4", "+ gains a channel", "+ GAC"),
)  # fmt: skip


def differences(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What each step changes against its control, of the same clips and seeds."""
    known = {(row.setting, row.variant) for row in rows}
    found: list[dict[str, Any]] = []
    for setting, variant, control in COMPARED:
        if not {(setting, variant), (setting, control)} <= known:
            continue
        one, two = (rows_of(rows, setting, name) for name in (variant, control))
        for name in METRICS:
            values = one[name] - two[name]
            found.append(
                {
                    "setting": setting, "variant": variant, "control": control, "metric": name,
                    "mean": float(values.mean()), "interval": interval(values),
                }
            )  # fmt: skip
    return found


def difference_table(found: Sequence[dict[str, Any]]) -> Table:
    """The differences for people."""
    shown = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("bits", "difference"):
        shown.add_column(column)
    for column in METRICS:
        shown.add_column(column, justify="right")
    key = ("setting", "variant", "control")
    for names, group in itertools.groupby(found, lambda row: tuple(row[k] for k in key)):
        cells = [
            f"{row['mean']:+.2f} [{row['interval'][0]:+.2f}, {row['interval'][1]:+.2f}]"
            for row in group
        ]
        shown.add_row(names[0], f"{names[1]} less {names[2]}", *cells)
    return shown


def picture(path: pathlib.Path, clip: video.Clip, found: Mapping[str, Alpha]) -> None:
    """Every third frame of ``clip``, its truth, and the alphas ``found``, a row each."""
    from PIL import Image

    grey = [clip.alpha, *found.values()]
    rows = [clip.frames, *(np.repeat(alpha, 3, axis=1) for alpha in grey)]
    image = np.concatenate([np.concatenate(list(row[::3]), axis=2) for row in rows], axis=1)
    pixels = np.round(255 * np.clip(image, 0, 1)).astype(np.uint8).transpose(1, 2, 0)
    doubled = functools.reduce(lambda a, axis: np.repeat(a, 2, axis), (0, 1), pixels)
    Image.fromarray(doubled).save(path)


def main() -> int:
    """Measure, print, write."""
    parser = common.parser(__doc__, quick="one seed, few steps, two clips, W8A8 and W4A4 alone")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--picture", type=pathlib.Path, help="write frames and alphas as a PNG")
    arguments = parser.parse_args()
    clips = list(itertools.islice(video.labelled("judge"), 2 if arguments.quick else None))
    if arguments.quick:
        rows, claims, made = measure(1, Effort(3, 3, 16), ("W8A8", "W4A4"), clips)
    else:
        rows, claims, made = measure(arguments.seeds, Effort(), SETTINGS, clips)
    if arguments.picture is not None:
        names = ("float", "W4A4, nearest", "W4A4, + GAC")
        picture(arguments.picture, clips[0], {name: made[name][0] for name in names})
    found = differences(rows)
    tables = [table(rows), difference_table(found)]
    return common.finish(claims, arguments.json, tables, rows=rows, differences=found)


if __name__ == "__main__":
    sys.exit(main())
