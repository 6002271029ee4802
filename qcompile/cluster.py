"""A Dask cluster for what ``Context.map`` spreads.

Workers need the same qcompile, and read what is too large to send from the folder for temporary
files (``TMPDIR``), which machines must share.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Generator
from typing import Any

import joblib

from qcompile.errors import PassBug, QCompileError, reason

# Seconds for a scheduler to answer, and for a worker to start and to import qcompile.
_ANSWER, _START = 10, 30


def check() -> None:
    """Raise QCompileError, with the command that installs it, if Dask is missing."""
    if importlib.util.find_spec("distributed") is None:
        raise QCompileError("--cluster needs Dask: pip install 'qcompile[cluster]'")


@contextlib.contextmanager
def spread(address: str | None) -> Generator[None]:
    """Within it, work is spread over the Dask cluster with its scheduler at ``address``, if any.

    Raises QCompileError if no scheduler answers, if no worker can import this qcompile, if workers
    die of a task, and if the scheduler goes away.
    """
    if address is None:
        yield
        return
    check()
    import dask.config
    import distributed

    library: Any = joblib  # untyped
    # What a task holds is at most the weights of a layer; the warning is about data frames.
    with (
        dask.config.set({"distributed.admin.large-graph-warning-threshold": "4GiB"}),
        _client(address) as client,
        library.parallel_config(backend="dask", client=client),
    ):
        try:
            yield
        except PassBug as error:
            if isinstance(error.__cause__, distributed.KilledWorker):
                raise QCompileError(
                    f"workers of the cluster {address!r} die in {error.name}, perhaps because they "
                    f"have too little memory: {reason(error.__cause__)}"
                ) from error
            if client.status != "running":
                raise QCompileError(
                    f"the scheduler of the cluster {address!r} went away in {error.name}; start it "
                    "again with its workers, and give --resume to go on"
                ) from error
            raise


@contextlib.contextmanager
def _client(address: str) -> Generator[Any]:
    import distributed

    library: Any = distributed  # partly untyped
    try:
        # First, because a client of no address does not end well.
        library.comm.get_address_host_port(address)
        client = library.Client(address, timeout=_ANSWER, set_as_default=False)
    except (OSError, ValueError) as error:
        raise QCompileError(
            f"no Dask scheduler answers at --cluster {address!r} ({reason(error)}); start one with "
            "'dask scheduler', and give the address that it prints, such as tcp://host:8786"
        ) from error
    with client:
        try:
            there = client.submit(_version, pure=False).result(timeout=_START)
        except TimeoutError as error:
            raise QCompileError(
                f"the cluster {address!r} has no worker; start one with 'dask worker {address}'"
            ) from error
        except Exception as error:  # whatever a worker with other packages says
            raise QCompileError(
                f"a worker of the cluster {address!r} cannot import qcompile: {reason(error)}"
            ) from error
        if there != _version():
            raise QCompileError(
                f"a worker of the cluster {address!r} has qcompile {there}, here is {_version()}"
            )
        yield client


def _version() -> str:
    import qcompile

    return qcompile.__version__
