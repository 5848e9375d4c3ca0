"""A client of a Dask scheduler, and the executor that it gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loratools.errors import LoraToolsError
from loratools.parallel.executors._pool import Pool, missing

ANSWER = "15s"
"""How long a scheduler has to answer."""


def package() -> Any:
    """Return `distributed`; raise `MissingExtra` where it is not installed."""
    try:
        import distributed
    except ImportError:
        raise missing("distributed (Dask)") from None
    return distributed


def lost() -> tuple[type[BaseException], ...]:
    """Return the exceptions by which Dask says that a task's worker is gone, or the scheduler."""
    from distributed.client import FutureCancelledError
    from distributed.comm.core import CommClosedError
    from distributed.scheduler import KilledWorker, NoValidWorkerError

    return (KilledWorker, NoValidWorkerError, CommClosedError, FutureCancelledError)


@contextmanager
def connected(cluster: Any, name: str, *, count: int | None = None, local: bool = False) -> Iterator[Pool]:
    """Connect to a cluster, or a scheduler's address; give its executor, and cancel what it has not done at the end.

    A task whose worker is gone is done again by Dask itself, three times (`distributed.scheduler.allowed-failures`).
    """
    distributed = package()
    try:
        client = distributed.Client(cluster, timeout=ANSWER, set_as_default=False)
    except (OSError, TimeoutError, ValueError, TypeError) as error:
        raise LoraToolsError(f"{name}: no scheduler answers: {error}") from None
    try:
        executor = client.get_executor(pure=False)
        try:
            yield Pool(executor, name, count, local, lost())
        finally:
            executor.shutdown(wait=False)
    finally:
        client.close(timeout=5)
