"""Named pipelines, as text: ``@int8``, or ``@my.txt`` for a file with one pass a line."""

from __future__ import annotations

import pathlib

from qcompile.errors import QCompileError, nearest

RECIPES = {
    "fp16": "simplify,recompose,fold-bn,cast-half",
    "int8-fp16": "simplify,recompose,fold-bn,calibrate,quantize,cast-half,insert-qdq",
    "int8": "simplify,recompose,fold-bn,calibrate,quantize,insert-qdq",
    "int8-dynamic": "simplify,recompose,fold-bn,quantize{scale=dynamic},insert-qdq",
    "int8-rotated": "simplify,recompose,fold-bn,smooth-hadamard,calibrate,quantize,insert-qdq",
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
