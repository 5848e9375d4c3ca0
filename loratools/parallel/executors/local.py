"""Processes of this machine, which a Dask scheduler of their own looks after: one that ends is begun anew.

15 s after it lost a process Dask looks whether there is a new one, and stops beginning it anew if there is none. Where
that one has just been lost as well, for another reason, it ends for good so, and the work would stand still: that look
is put off for ever.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from tempfile import TemporaryDirectory

from loratools.errors import LoraToolsError
from loratools.parallel.executors._dask import connected, package
from loratools.parallel.executors._pool import Pool

SUMMARY = "processes of this machine, by their number"

_HERE = "127.0.0.1"

_ANY_PORT = {"dashboard_address": f"{_HERE}:0", "dashboard": False}
"""A scheduler opens a port for its state, dashboard or not: 8787 if left to itself, and a warning if that is taken."""

_NO_LOOK = {"distributed.deploy.lost-worker-timeout": "3650 days"}

_NO_PAGES: dict[str, list[str]] = {"distributed.scheduler.http.routes": [], "distributed.worker.http.routes": []}
"""Dask opens that port whatever it is told, and a worker one as well: they answer nothing."""

PATIENCE = 120
"""Seconds in which there may be no process at all; beginning one takes two, or ten where much else is done."""


@contextmanager
def opened(address: str) -> Iterator[Pool]:
    """Begin as many processes as `address` says; they listen on this machine's own address only, with no dashboard."""
    count, distributed = int(address), package()
    import dask

    name = f"{count} processes of this machine"
    # Left to itself Dask puts its processes' folder beside, and leaves it there, empty.
    scratch = TemporaryDirectory(prefix="loratools-workers-", ignore_cleanup_errors=True)
    with ExitStack() as stack:
        settings = {**_NO_LOOK, **_NO_PAGES, "temporary-directory": stack.enter_context(scratch)}
        stack.enter_context(dask.config.set(settings))
        try:
            with _deaf():
                cluster = distributed.LocalCluster(
                    n_workers=count, threads_per_worker=1, processes=True, host=_HERE, scheduler_kwargs=_ANY_PORT,
                    silence_logs=logging.CRITICAL, memory_limit=0,
                )  # fmt: skip
                stack.enter_context(cluster)
        except (RuntimeError, OSError) as error:
            hint = "A process may have been ended for want of memory; try fewer."
            raise LoraToolsError(f"{name}: they could not be begun: {error}", hint=hint) from None
        yield stack.enter_context(connected(cluster, name, count=count, local=True, patience=PATIENCE))


@contextmanager
def _deaf() -> Iterator[None]:
    """Keep Ctrl-C, which a terminal sends to all, from processes that the threads begun in the block begin, ever.

    They are ended by this one, which hears of it after the block.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # begun later, by a thread, it would let the signal through to what comes after
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
