"""Every error that qcompile raises on purpose.

QCompileError            something the user can put right; shown without a traceback
  PipelineSyntaxError    a pipeline or target text that cannot be read; points at the column
  CaptureError           a model that cannot be read or captured
  CalibrationError       calibration data that is missing or does not fit the model
  PassError              a pass was asked for what cannot be had
  TargetError            a target cannot hold a format, or a runtime refused the file
  PluginError            a pass or target of an installed package cannot be used
  RequirementError       the result misses what the user required (--require-fused, ...)
VerifyError              a pass broke the graph: a bug of ours
PassBug                  anything else that escaped from a pass, with the state before it
Bug                      what the user is told of a bug: one sentence, and where to find the
                         reproducer with its traceback
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pathlib

    import onnx_ir as ir


class QCompileError(Exception):
    """Base of what the user can put right: says what was wrong, the value, and what to do."""


class PipelineSyntaxError(QCompileError):
    """A text that cannot be read. ``column`` counts from 0; the message shows a caret below it."""

    def __init__(self, message: str, text: str, column: int) -> None:
        self.text = text
        self.column = column
        super().__init__(f"{message}\n  {text}\n  {' ' * column}^")


class CaptureError(QCompileError):
    """A model that cannot be read, exported or repaired."""


class CalibrationError(QCompileError):
    """Calibration data that is missing, empty, or does not fit the inputs of the model."""


class PassError(QCompileError):
    """A pass was asked for what cannot be had, such as a block size that does not exist."""


class TargetError(QCompileError):
    """A target cannot hold what was decided, or its runtime refused the lowered model."""


class PluginError(QCompileError):
    """A pass or target of an installed package cannot be used; names the package to remove."""


class RequirementError(QCompileError):
    """The model was compiled and written, but misses what the user required (exit code 3).

    ``results`` is what compile() would have returned.
    """

    def __init__(self, message: str, results: Sequence[Any]) -> None:
        self.results = list(results)
        super().__init__(message)


class VerifyError(Exception):
    """A pass left the graph broken. A bug of the pass, never the user's mistake."""


class PassBug(Exception):
    """What escaped from a pass and is no QCompileError.

    ``model`` is the model before the pass ``name``, which stands at ``position`` of the pipeline.
    """

    def __init__(self, name: str, cause: Exception, model: ir.Model, position: int) -> None:
        self.name, self.model, self.position = name, model, position
        said = isinstance(cause, VerifyError)
        what = str(cause) if said else f"failed with {type(cause).__name__}: {cause}"
        super().__init__(f"pass {name} {what}")


class Bug(Exception):
    """A bug of qcompile (exit code 70); ``folder`` holds its reproducer, if one was written."""

    def __init__(self, message: str, folder: pathlib.Path | None) -> None:
        self.folder = folder
        super().__init__(message)


# What the errors of ONNX and ONNX Runtime hold beside what is wrong, such as places in their C++.
_NOISE = re.compile(
    r"\[ONNXRuntimeError\] : \d+ : \w+ : |Exception during initialization: |"
    r"^onnxruntime\.capi\.\S+ |This is an invalid model\. |Node ?\(.*?\) with schema\(.*?:\d+\) |"
    r"\[(?:Shape|Type)InferenceError\] |\[with [^\]]*\] | Please contribute by .*|"
    r"\S+\.(?:cc|h):\d+: \w+: (?:Assertion `[^`]*` failed: (?=\S))?|"
    r"\S*/onnxruntime\S*/\S+\.(?:cc|h):\d+ (?:.*?\)(?: const)? )?|\w+\.(?:cc|h):\d+ \w+ "
)
_NODE = re.compile(
    r"In Node, \(\"(?P<name>.*?)\", (?P<kind>\w*),.*? , Error |"
    r"Node \((?P<name_2>.*?)\) Op \((?P<kind_2>.*?)\) |"
    r"Non-zero status code returned while running (?P<kind_3>\w+) node\. "
    r"Name:'(?P<name_3>.*?)' Status Message: "
)
_INSIDE = "Graph attribute inferencing failed: "
_UNKNOWN = re.compile(r"Fatal error: (.*):(\w*)\(-?\d+\) is not a registered function/op", re.S)
# Letters of a reason that are shown.
_LONGEST = 600


def reason(error: BaseException) -> str:
    """What was wrong, in one line: what the first cause of a library's ``error`` says."""
    # An error in the handling of another one hides what was wrong.
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    unknown = _UNKNOWN.search(str(error))
    if unknown is not None:
        domain, kind = unknown.groups()
        return f"it has no operator {kind!r} of the domain {domain or 'ai.onnx'!r}"
    said = " ".join(str(error).split()) or type(error).__name__
    # What is wrong in a body of a body of a body is said once, of the innermost node.
    said = _NOISE.sub("", _NODE.sub(_named, said)).rpartition(_INSIDE)[2].strip()
    return said if len(said) <= _LONGEST else f"{said[:_LONGEST]}..."


def _named(found: re.Match[str]) -> str:
    name = found["name"] or found["name_2"] or found["name_3"] or ""
    return f"node {name!r} ({found['kind'] or found['kind_2'] or found['kind_3']}): "


def nearest(word: str, known: Iterable[str]) -> str:
    """Hint for an unknown word: the nearest known one, then all of them."""
    words = sorted(known)
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known are {', '.join(words)}"
