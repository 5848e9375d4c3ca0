"""A Dask scheduler at an address, whose workers see the same folders under the same names."""

from __future__ import annotations

from contextlib import AbstractContextManager

from loratools.parallel.executors import _dask
from loratools.parallel.executors._dask import connected
from loratools.parallel.executors._pool import Pool

SUMMARY = "a Dask scheduler, tcp://host:8786"


def opened(address: str) -> AbstractContextManager[Pool]:
    """Connect to the scheduler at an address."""
    return connected(address, address, patience=_dask.ALONE)
