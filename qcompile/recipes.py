"""Named pipelines, as text: ``@int8``, or ``@my.txt`` for a file with one pass a line."""

from __future__ import annotations

import pathlib

from qcompile.errors import QCompileError, nearest

_FRONT = "simplify,recompose,fold-bn,"
_RANGES = "calibrate{method=percentile percentile=99.999},quantize{least=0.1}"
_FITTED = f",{_RANGES},gptq,insert-qdq"
_FOUR = "quantize{weight=int4 input=float granularity=block method=mse embedding=int8}"
_BEST_FOUR = f"{_FRONT}equalize{{weight=int4 input=float block=32}},{_FOUR}"

# Each is text, as a user would write it; ``qcompile passes @NAME`` prints it.
RECIPES = {
    "fp16": _FRONT + "cast-half",
    "int8": _FRONT + "smooth-hadamard{block=32}" + _FITTED,
    "int8-fast": _FRONT + "smooth-hadamard{block=32 max-cost=1.5}" + _FITTED,
    "int8-best": _FRONT + "smooth-hadamard{max-cost=15},"
    f"{_RANGES},gptaq{{damping=0.01}},insert-qdq",
    "int8-dynamic": _FRONT + "quantize{scale=dynamic},insert-qdq",
    "int8-fp16": _FRONT + "calibrate,quantize,gptq,cast-half,insert-qdq",
    "int4": _FRONT + _FOUR + ",gptq{damping=0.1},insert-qdq",
    "int4-best": f"{_BEST_FOUR},gptaq{{samples=256 rows=256 rescale=true}},insert-qdq",
    "int4-lm": f"{_BEST_FOUR},gptaq{{samples=256 rows=256 rescale=true}},"
    "learn-scales{loss=kl},insert-qdq",
}  # fmt: skip

# What each is for.
MEANINGS = {
    "fp16": "half floats where nothing overflows: the safe fallback",
    "int8": "8-bit weights and activations: the default, accurate and fast",
    "int8-fast": "8 bits with fewer rotations: less accurate, faster",
    "int8-best": "8 bits with more rotations, layers fitted in order (torch): slower",
    "int8-dynamic": "8 bits with scales taken at run time for linear layers: needs no data",
    "int8-fp16": "8 bits beside half floats, for TensorRT",
    "int4": "4-bit weights in blocks of 32, activations in float, tables in 8 bits",
    "int4-best": "4-bit weights, channels equalized, layers fitted in order on more data (torch)",
    "int4-lm": "4-bit weights of a language model, then scales learned on its next token (torch)",
}


def expand(text: str) -> str:
    """The pipeline text that ``text`` stands for; itself unless it starts with ``@``.

    Raises QCompileError for an unknown recipe or an unreadable file.
    """
    if not text.startswith("@"):
        return text
    name = text[1:]
    if name in RECIPES:
        return RECIPES[name]
    path = pathlib.Path(name)
    if not path.is_file():
        raise QCompileError(f"no recipe and no file is called {name!r}; {nearest(name, RECIPES)}")
    try:
        whole = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise QCompileError(f"the recipe file {name!r} is not readable text: {error}") from error
    lines = [line.partition("#")[0].strip().rstrip(",") for line in whole.splitlines()]
    kept = [line for line in lines if line]
    if not kept:
        raise QCompileError(f"the recipe file {name!r} names no pass")
    return ",".join(kept)
