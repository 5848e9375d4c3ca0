"""An adapter's place with what its file does not say of itself: the dialect to read it as, the alpha of training."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratools.dialects._frame.numbers import is_number
from loratools.errors import InvalidOption
from loratools.options import Options
from loratools.storage.sources import Location


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ReadAs(os.PathLike[str]):
    """A path or a reference wherever one is taken; `open_adapter` reads it as `dialect` and with `alpha`."""

    location: Location
    dialect: str | None = None
    alpha: float | None = None

    def __fspath__(self) -> str:
        return os.fspath(self.location)

    def __str__(self) -> str:
        return str(self.location)


def plain(location: Any) -> Any:
    """Return where a `ReadAs` lies, and anything else as it is."""
    return location.location if isinstance(location, ReadAs) else location


def told(location: Any, dialect: str | None, alpha: float | None) -> tuple[Any, str | None, float | None]:
    """Return the place, the dialect and the alpha of a `ReadAs`, where a call does not say them; else what it says."""
    if not isinstance(location, ReadAs):
        return location, dialect, alpha
    return location.location, dialect or location.dialect, location.alpha if alpha is None else alpha


def check_alpha(alpha: object) -> None:
    """Raise `InvalidOption` unless an alpha is a finite number, or None."""
    if alpha is not None and not is_number(alpha):
        raise InvalidOption(f"alpha is {alpha!r}; it is a finite number")


def check_told(stated: Mapping[str, object], initial: object, *, in_memory: bool) -> None:
    """Raise `InvalidOption` where what a call says of an adapter (dialect, alpha, enabled, initial) cannot be."""
    if in_memory and (useless := [name for name, value in stated.items() if value is not None]):
        raise InvalidOption(f"{' and '.join(useless)}: for files only, and the adapter is open already")
    if in_memory:
        return
    check_alpha(stated["alpha"])
    Options().flag("initial", initial).done()
    enabled = stated["enabled"]
    if enabled is not None and not (isinstance(enabled, tuple | list) and all(isinstance(on, bool) for on in enabled)):
        raise InvalidOption(f"enabled is {enabled!r}; it can be several of True and False, or None")
