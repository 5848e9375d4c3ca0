"""A client of a Dask scheduler, and the executor that it gives."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loratools.errors import LoraToolsError
from loratools.parallel.executors._pool import Pool, missing

ANSWER = "15s"
"""How long a scheduler has to answer."""

ALONE = 300
"""Seconds in which a scheduler may have no worker at all before it is given up."""


def package() -> Any:
    """Return `distributed`; raise `MissingExtra` where it is not installed."""
    try:
        import distributed
    except ImportError:
        raise missing("distributed (Dask)") from None
    return distributed


def lost() -> tuple[type[BaseException], ...]:
    """Return the exceptions by which Dask says that a task was not done for a connection's sake."""
    from distributed.comm.core import CommClosedError

    return (CommClosedError,)


def killed() -> tuple[type[BaseException], ...]:
    """Return the exceptions by which Dask says that a task was the end of several workers."""
    from distributed.scheduler import KilledWorker

    return (KilledWorker,)


def final(error: BaseException) -> str | None:
    """Return in words why Dask does not do a task any more; None where it says nothing of the kind."""
    from concurrent.futures import CancelledError

    from distributed.scheduler import KilledWorker, NoValidWorkerError

    if isinstance(error, KilledWorker):
        last = getattr(error.last_worker, "address", error.last_worker)
        return f"{error.allowed_failures + 1} workers were lost with it, the last of them {last}"
    if isinstance(error, CancelledError):  # of a future that nobody here has cancelled
        return "the connection to the scheduler is lost"
    if isinstance(error, NoValidWorkerError) or type(error).__name__ == "NoWorkerError":  # newer than our oldest Dask
        return "no worker is there"
    return None


class Watch:
    """Tells when a scheduler has had no worker for too long, and which it had before."""

    def __init__(self, client: Any, patience: float | None) -> None:
        """Look at the scheduler of a client; with `patience` None it may be without workers for ever."""
        self._client, self._patience = client, patience
        self._last: tuple[str, ...] = ()
        self._since: float | None = None

    def __call__(self) -> str | None:
        """Return in words that there has been no worker for longer than the patience goes, else None."""
        workers = tuple(sorted(self._client.nthreads()))
        if workers:
            self._last, self._since = workers, None
            return None
        now = time.monotonic()
        self._since = self._since or now
        if self._patience is None or now - self._since < self._patience:
            return None
        before = f", after {', '.join(self._last[:4])}" if self._last else ""
        return f"no worker has been there for {now - self._since:.0f} s{before}"


def given(executor: Any) -> Pool:
    """Return an executor of Dask that somebody else has opened, and will close."""
    return Pool(executor, type(executor).__name__, None, False, lost(), killed(), final, Watch(executor._client, ALONE))


@contextmanager
def connected(
    cluster: Any, name: str, *, patience: float | None, count: int | None = None, local: bool = False
) -> Iterator[Pool]:
    """Connect to a cluster, or a scheduler's address; give its executor, and cancel what it has not done at the end.

    A task whose worker is gone is done again by Dask itself, three times (`distributed.scheduler.allowed-failures`).
    `patience` is for how many seconds there may be no worker; None: for ever, as where jobs wait in a queue.
    """
    distributed = package()
    with _quiet():
        try:
            client = distributed.Client(cluster, timeout=ANSWER, set_as_default=False)
        except (OSError, TimeoutError, ValueError, TypeError) as error:
            raise LoraToolsError(f"{name}: no scheduler answers: {error}") from None
        try:
            executor = client.get_executor(pure=False)
            try:
                yield Pool(executor, name, count, local, lost(), killed(), final, Watch(client, patience))
            finally:
                if client.status == "running":  # else there is nobody to tell
                    executor.shutdown(wait=False)
        finally:
            client.close(timeout=5)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep from the terminal what Dask logs, pages where a connection is lost: an error says it in a sentence."""
    handlers = [each for name in ("distributed", "distributed.client") for each in logging.getLogger(name).handlers]
    levels = [each.level for each in handlers]
    for each in handlers:
        each.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for each, level in zip(handlers, levels, strict=True):
            each.setLevel(level)
