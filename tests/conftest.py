"""Settings that all tests share."""

from __future__ import annotations

import sys

import hypothesis
import pytest
from command import Command, Result

from qcompile import cli

# Derandomized, so that a run of the tests is the same everywhere; no deadline, since the first
# example may load a runtime.
hypothesis.settings.register_profile("qcompile", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("qcompile")


@pytest.fixture
def qcompile(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command line in this process; no answer of it may be a traceback."""

    def command(*words: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["qcompile", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return Result(int(caught.value.code or 0), out, err)

    return command
