"""A Dask scheduler behind TLS: certificates are those of Dask's own configuration (`distributed.comm.tls`)."""

from __future__ import annotations

from contextlib import AbstractContextManager

from loratools.parallel.executors import _dask
from loratools.parallel.executors._dask import connected
from loratools.parallel.executors._pool import Pool

SUMMARY = "a Dask scheduler behind TLS, tls://host:8786"


def opened(address: str) -> AbstractContextManager[Pool]:
    """Connect to the scheduler at an address."""
    return connected(address, address, patience=_dask.ALONE)
