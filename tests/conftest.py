"""Settings that all tests share."""

from __future__ import annotations

import hypothesis

# Derandomized, so that a run of the tests is the same everywhere; no deadline, since the first
# example may load a runtime.
hypothesis.settings.register_profile("qcompile", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("qcompile")
