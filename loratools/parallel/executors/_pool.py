"""An executor that is open."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass

from loratools.errors import MissingExtra


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """An executor that is open, what it is called, and how many tasks it runs at once; None where that may change.

    `local` says that its workers share this machine, and so its cores. `lost` are the exceptions by which it says that
    a worker is gone and its tasks were not done.
    """

    executor: Executor
    name: str
    count: int | None = None
    local: bool = False
    lost: tuple[type[BaseException], ...] = ()


def missing(package: str) -> MissingExtra:
    """Return the error of a kind whose package is not installed."""
    return MissingExtra(f"{package} is not installed", hint="pip install 'loratools[cluster]'")
