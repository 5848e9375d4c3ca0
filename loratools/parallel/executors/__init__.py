"""What runs tasks on several processes or machines: one file for each kind of address, found by its name.

A kind is a module here with

    SUMMARY         what it runs tasks on, in one line
    opened(address) a context with a `Pool`; the kind's own processes end with it

    local   processes of this machine, by their number: "4"
    tcp     a Dask scheduler: "tcp://host:8786"
    tls     the same behind TLS, with the certificates of Dask's own configuration: "tls://host:8786"
    slurm   jobs of a SLURM cluster, by dask-jobqueue's own configuration: "slurm", or "slurm:16" for so many
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Protocol, cast

from loratools.errors import InvalidOption
from loratools.options import either
from loratools.parallel.executors import _dask
from loratools.parallel.executors._pool import Pool

Workers = int | str | Executor
"""Who does the work: so many processes of this machine, the address of a scheduler, or an executor that is open."""


class Kind(Protocol):
    """A module of this folder."""

    SUMMARY: str

    def opened(self, address: str) -> AbstractContextManager[Pool]:
        """Open what an address of this kind names."""
        ...


@cache
def names() -> tuple[str, ...]:
    """Return the kinds of addresses, sorted.

    Example:
        >>> names()
        ('local', 'slurm', 'tcp', 'tls')
    """
    return tuple(sorted(module.name for module in iter_modules(__path__) if not module.name.startswith("_")))


@contextmanager
def opened(workers: Workers) -> Iterator[Pool]:
    """Open who does the work, and close it with the block.

    Args:
        workers: A number of processes, the address of a scheduler, or an `Executor`, which stays open.

    Raises:
        InvalidOption: No kind of executor has such an address.
        MissingExtra: Dask is not installed.
        LoraToolsError: No scheduler answers.

    Example:
        >>> with opened(2) as pool:  # doctest: +SKIP
        ...     pool.executor.submit(abs, -1).result()
        1
    """
    if isinstance(workers, Executor):
        of_dask = type(workers).__module__.partition(".")[0] == "distributed"
        yield _dask.given(workers) if of_dask else Pool(workers, type(workers).__name__)
        return
    with _kind(workers).opened(str(workers)) as pool:
        yield pool


def check(workers: object) -> None:
    """Raise `InvalidOption` for what `opened` cannot take, before anything is read."""
    if not isinstance(workers, Executor):
        _kind(workers)


def _kind(workers: object) -> Kind:
    address = "" if isinstance(workers, bool) else str(workers)
    name = "local" if address.isdecimal() and int(address) > 0 else address.partition(":")[0]
    if not isinstance(workers, int | str) or name not in names() or name == address == "local":
        others = either([f"{each}:…" for each in names() if each != "local"])
        raise InvalidOption(f"workers is {workers!r}; it can be a number of processes, or {others}")
    return cast(Kind, import_module(f"{__name__}.{name}"))
