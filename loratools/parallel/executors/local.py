"""Processes of this machine, which a Dask scheduler of their own looks after: one that ends is begun anew."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from loratools.parallel.executors._dask import connected, package
from loratools.parallel.executors._pool import Pool

SUMMARY = "processes of this machine, by their number"

_HERE = "127.0.0.1"


@contextmanager
def opened(address: str) -> Iterator[Pool]:
    """Begin as many processes as `address` says; they listen on this machine's own address only, with no dashboard."""
    count, distributed = int(address), package()
    cluster = distributed.LocalCluster(
        n_workers=count, threads_per_worker=1, processes=True, host=_HERE, dashboard_address=None,
        silence_logs=logging.CRITICAL, memory_limit=0,
    )  # fmt: skip
    with cluster, connected(cluster, f"{count} processes of this machine", count=count, local=True) as pool:
        yield pool
