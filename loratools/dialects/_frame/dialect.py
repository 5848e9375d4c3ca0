"""What a dialect's module offers, and what it says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

from loratools.adapter.model import Adapter, Loss
from loratools.dialects._frame.listing import Evidence, Listing


class Dialect(Protocol):
    """A dialect's module, as the docstring of `loratools.dialects` describes it."""

    SUMMARY: str
    EXTRA: str | None
    FILES: tuple[str, ...]
    CANNOT: tuple[str, ...]

    def detect(self, listing: Listing) -> Evidence | None:
        """Return how sure the dialect is that the listing is its own, or None."""
        ...

    def read(self, listing: Listing) -> Adapter:
        """Read the adapter."""
        ...

    def losses(self, adapter: Adapter) -> list[Loss]:
        """List what the dialect cannot say of the adapter."""
        ...

    def write(self, adapter: Adapter, target: Path, *, force: bool) -> Adapter:
        """Write what the dialect can say of the adapter, whole or not at all, and return that."""
        ...


class DialectSummary(NamedTuple):
    """What `Dialect` says of itself: its name, what it is, the files it writes, what it cannot say, and its extra."""

    name: str
    summary: str
    extra: str | None
    files: tuple[str, ...]
    cannot: tuple[str, ...]
