"""An executor that is open."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import BrokenExecutor, CancelledError, Executor
from dataclasses import dataclass

from loratools.errors import MissingExtra


def of_itself(error: BaseException) -> str | None:
    """Return in words why an executor of the standard library does no more tasks; None for any other exception."""
    broken = isinstance(error, BrokenExecutor | CancelledError)
    return f"{type(error).__name__}: {error}".rstrip(": ") if broken else None


def somebody() -> str | None:
    """Return None: there is somebody to do the work, as far as anybody knows."""


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """An executor that is open, what it is called, and how many tasks it runs at once; None where that may change.

    `local` says that its workers share this machine, and so its cores. `lost` are the exceptions by which it says that
    a task was not done for a worker's sake, and may be begun again. `killed` are those by which it
    says that one task was the end of several workers. `final` puts an exception in words by which it says that it does
    not do a task any more, and returns None for any other. `nobody` is asked every few seconds in which
    nothing ends: it says in words that no worker is left to wait for, and returns None while there is one.
    """

    executor: Executor
    name: str
    count: int | None = None
    local: bool = False
    lost: tuple[type[BaseException], ...] = ()
    killed: tuple[type[BaseException], ...] = ()
    final: Callable[[BaseException], str | None] = of_itself
    nobody: Callable[[], str | None] = somebody


def missing(package: str) -> MissingExtra:
    """Return the error of a kind whose package is not installed."""
    return MissingExtra(f"{package} is not installed", hint="pip install 'loratools[cluster]'")
