"""One thread for the linear algebra of numpy and scipy, so that no result depends on their number.

The library cuts a factorization or a large product into parts by the number of threads, and the
sums of other parts round otherwise: what gptq writes would differ from machine to machine.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import threadpoolctl

A = TypeVar("A")
B = TypeVar("B")


def one() -> AbstractContextManager[Any]:
    """Inside it linear algebra has one thread; runtimes of models keep theirs."""
    for name in ("numpy.linalg", "scipy.linalg"):  # only what is loaded is found
        importlib.import_module(name)
    library: Any = threadpoolctl  # untyped
    return library.ThreadpoolController().limit(limits=1, user_api="blas")


def with_one(function: Callable[[A], B], item: A) -> B:
    """``function`` of ``item``, with one thread; for a process of its own."""
    with one():
        return function(item)
