"""Weights in 4 bits: accuracy, perplexity, what runs in 4 bits, size, and speed of decoding.

    python tests/benchmarks/int4.py [--quick] [--only WORD] [--seeds N] [--json FILE]

The recipe is ``@int4``; of SmolLM2, whose weights lie on an asymmetric grid of 32 already,
``@int4-lm`` with blocks of 64. Only weights are quantized, symmetrically, so that a row is its
own bound. The judge data calibrated nothing. SQNR is over all judge samples together; the
perplexity is of text apart from that to calibrate, in windows of 256 tokens without a past;
intervals are 95 % of a bootstrap over samples or windows, for the perplexity of its ratio to float.
Shares are of the bytes that weights have in float, by the proof; a table that is the head as well
counts twice. Decoding is one token at a time at batch 1 behind a prompt, the cache fed back, one
thread, in turns with float; the null is float against itself. ``--quick`` takes the shipped model
only, ``--only WORD`` those with it in their names. The recipe draws nothing at random, so seeds
change the bootstrap alone.
"""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import common
import int8
import numpy as np
import numpy.typing as npt
from common import Claim
from int8 import MINILM, SHIPPED, Work
from rich.table import Table

import qcompile
from qcompile import capture, compiler, execute, metrics, recipes, report
from qcompile.execute import Session

Array = npt.NDArray[Any]
WINDOW, WINDOWS = 256, 84
PROMPT, DECODED, ROUNDS = 32, 24, 6


def at_64(recipe: str) -> str:
    """A 4-bit recipe with blocks of 64 in place of 32, for weights that lie on a grid of 32."""
    text = recipes.RECIPES[recipe].replace("block=32", "block=64")
    return text.replace("granularity=block ", "granularity=block block=64 ")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; ``value`` is SQNR in dB or perplexity, ``control`` that of float."""

    work: str
    target: str
    passes: str
    metric: str
    value: float
    control: float | None
    interval: tuple[float, float]
    count: int
    bits: float
    share: dict[str, float]
    float_mb: float
    mb: float
    speed: float | None
    null: float | None
    tokens_per_second: tuple[float, float] | None = None


def row_of(made: report.Report, text: str, **measured: Any) -> Row:
    """What the report says, beside what was ``measured``."""
    weights = [row for row in made.layers if row.float_bytes]
    count = sum(row.float_bytes / 4 for row in weights)
    return Row(
        target=made.target.partition("{")[0],
        passes=text,
        bits=sum(row.effective_bits * row.float_bytes / 4 for row in weights) / count,
        share=made.share["weights"],
        float_mb=made.size.float_bytes / 1e6,
        mb=made.size.compiled_bytes / 1e6,
        **measured,
    )


# -- models judged by their output --------------------------------------------------------------


def judged(work: Work, seed: int) -> list[Row]:
    """Compile ``work`` for both targets in one run and compare with float."""
    judges = list(work.judge())
    reference, rows = Session(capture.capture(work.model)), list[Row]()
    with tempfile.TemporaryDirectory() as folder:
        results = qcompile.compile(
            work.model, pathlib.Path(folder) / "out",
            passes=work.passes, targets=work.targets, calib=work.calibration, latency=True,
        )  # fmt: skip
        for result in results:
            made = result.report
            compiled = Session(result.folder / "model.onnx", optimize=made.target.startswith("ort"))
            signal, noise, _, _ = int8.powers(reference, compiled, judges)
            latency = made.latency
            rows.append(
                row_of(
                    made,
                    work.passes,
                    work=work.name,
                    metric="SQNR dB",
                    value=float(10 * np.log10(signal.sum() / noise.sum())),
                    control=None,
                    interval=int8.bootstrap(signal, noise, seed),
                    count=len(judges),
                    speed=None if latency is None else 1 / latency.ratio,
                    null=None if latency is None else latency.null,
                )
            )
    return rows


# -- a language model ---------------------------------------------------------------------------


def smollm2(seed: int) -> list[Row]:
    """Perplexity and decoding of SmolLM2-135M."""
    from qcompile.models import language

    text = at_64("int4-lm")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        tokenizer = language.smollm2_tokenizer(folder / "tokenizer.json")
        data: dict[str, Any] = {}
        if any(step.needs_data() for step in compiler.Compiler(compiler.Options(text)).passes):
            data["calib"] = language.smollm2_text(folder / "calibration.txt")
            data |= {"tokenizer": str(tokenizer), "tokens": WINDOW}
        # Captured once: torch takes a minute.
        execute.save(capture.capture(language.decoder(language.load())), folder / "float.onnx")
        [result] = qcompile.compile(folder / "float.onnx", folder / "out", passes=text, **data)
        ids = tokens(tokenizer, language.smollm2_text(folder / "judge.txt", judge=True))
        paths = folder / "float.onnx", result.folder / "model.onnx"
        reference, compiled = (losses(path, ids) for path in paths)
        speeds = decode(paths[0], paths[1], ids[:1, :PROMPT])
        base, quantized, again = (statistics.median(times) for times in speeds)
    count = ids.shape[0] * (WINDOW - 1)
    return [
        row_of(
            result.report,
            text,
            work="SmolLM2-135M",
            metric="perplexity",
            value=metrics.perplexity(float(compiled.sum()), count),
            control=metrics.perplexity(float(reference.sum()), count),
            interval=ratios(compiled - reference, seed),
            count=count,
            speed=base / quantized,
            null=base / again,
            tokens_per_second=(1 / base, 1 / quantized),
        )
    ]


def tokens(tokenizer: pathlib.Path, text: pathlib.Path) -> Array:
    """The first WINDOWS windows of ``text``: int64 [windows, WINDOW]."""
    import tokenizers

    library: Any = tokenizers  # untyped
    ids = library.Tokenizer.from_file(str(tokenizer)).encode(text.read_text()).ids
    return np.array(ids[: WINDOWS * WINDOW], np.int64).reshape(WINDOWS, WINDOW)


def losses(path: pathlib.Path, ids: Array) -> Array:
    """The loss of each window, in nats."""
    from qcompile.models import decoding

    session = Session(path, threads=1)
    empty, found = decoding.empty_past(session), list[float]()
    for window in ids[:, None]:
        logits = session.run({"input_ids": window, **empty}, ["logits"])["logits"]
        found.append(metrics.next_token_loss(logits, window)[0])
    return np.array(found)


def ratios(differences: Array, seed: int) -> tuple[float, float]:
    """95 % interval of the ratio of two perplexities from the ``differences`` of losses."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(differences), (1000, len(differences)))
    drawn = np.exp(differences[picks].mean(axis=1) / (WINDOW - 1))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def decode(base: pathlib.Path, compiled: pathlib.Path, prompt: Array) -> list[list[float]]:
    """Seconds of each token of float, ``compiled`` and float again, decoding in turns."""
    from qcompile.models import decoding

    sessions = [Session(path, threads=1) for path in (base, compiled, base)]
    times: list[list[float]] = [[], [], []]
    for turn in range(ROUNDS + 1):
        for session, taken in zip(sessions, times, strict=True):
            logits, past = decoding.step(session, prompt, decoding.empty_past(session))
            for _ in range(DECODED):
                chosen = logits[:, -1:].argmax(axis=-1)
                started = time.perf_counter()
                logits, past = decoding.step(session, chosen, past)
                if turn:  # the first is to warm up
                    taken.append(time.perf_counter() - started)
    return times


# -- table and claims ---------------------------------------------------------------------------


def claims(rows: Sequence[Row], seeds: int) -> list[Claim]:
    """What the README says of these rows."""
    found: list[Claim] = []

    def say(claim: str, value: float, control: float, above: bool, row: Row) -> None:
        holds = value >= control if above else value <= control
        interval = row.interval if "SQNR" in claim or "perplexity" in claim else None
        found.append(Claim(claim, bool(holds), value, control, interval, seeds))

    least = {SHIPPED[1].name: 20.0, MINILM.name: 15.0}
    for row in rows:
        where = f"{row.work}, {row.target}"
        if row.work in least:
            say(f"{where}: SQNR", row.value, least[row.work], True, row)
        if row.work == MINILM.name and row.target == "ort-cpu":
            say(f"{where}: MB", row.mb, 20.0, False, row)
        if row.control is not None:
            ratio = row.value / row.control
            say(f"{where}: perplexity against float", ratio, 1.06, False, row)
            if row.speed is not None:
                say(f"{where}: speed of decoding", row.speed, 2.5, True, row)
        say(f"{where}: weights in float", row.share.get("float", 0.0), 0.05, False, row)
    return found


def table(rows: Sequence[Row]) -> Table:
    """The rows for people."""
    shown = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("model", "target"):
        shown.add_column(column)
    for column in ("value", "weights", "bits", "MB", "speed", "null", "tokens/s"):
        shown.add_column(column, justify="right")
    for row in rows:
        share = ", ".join(f"{v:.1%} {k.removesuffix(' weights')}" for k, v in row.share.items())
        against = "" if row.control is None else f" against {row.control:.1f}"
        low, high = row.interval
        rate = row.tokens_per_second
        shown.add_row(
            row.work, row.target, f"{row.value:.1f}{against} {row.metric} [{low:.3g}, {high:.3g}]",
            share, f"{row.bits:.2f}", f"{row.float_mb:.2f} -> {row.mb:.2f}",
            "" if row.speed is None else f"{row.speed:.2f}",
            "" if row.null is None else f"{row.null:.2f}",
            "" if rate is None else f"{rate[0]:.0f} -> {rate[1]:.0f}",
        )  # fmt: skip
    return shown


def main() -> int:
    """Measure, print, write."""
    parser = common.parser(__doc__, quick="the shipped model only")
    parser.add_argument("--only", help="the model with this word in its name alone")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of the bootstrap")
    arguments = parser.parse_args()
    works = SHIPPED[1:] if arguments.quick else (SHIPPED[1], MINILM)
    rows: list[Row] = []
    chosen = (arguments.only or "").lower()
    for work in works if not chosen else [w for w in works if chosen in w.name.lower()]:
        rows += judged(dataclasses.replace(work, passes="@int4"), arguments.seeds - 1)
    if not arguments.quick and chosen in "smollm2-135m":
        rows += smollm2(arguments.seeds - 1)
    said = claims(rows, arguments.seeds)
    return common.finish(said, arguments.json, [table(rows)], rows=rows)


if __name__ == "__main__":
    sys.exit(main())
