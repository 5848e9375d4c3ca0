"""One stop of the tour."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Stop:
    """One stop of the tour: what is done, the command that does it, what came of it in words and in numbers."""

    title: str
    command: str
    lines: tuple[str, ...]
    measured: dict[str, Any] = field(default_factory=dict)
