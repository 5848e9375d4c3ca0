"""What the tour makes records how: the command that does it by itself, of which inputs, as that command records it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from loratools.recipe.account import describe
from loratools.recipe.catalog import Role
from loratools.storage.beside.making import making

_MODELS = frozenset({"base", "tuned", "model"})


def recorded(
    command: str, options: Mapping[str, Any] | None = None, /, **inputs: Path | Sequence[Path]
) -> AbstractContextManager[None]:
    """Have what is written in the block record a command with its options, by long names, and its inputs by digest."""
    places = {name: str(at) if isinstance(at, Path) else [str(each) for each in at] for name, at in inputs.items()}
    roles: dict[str, Role] = {name: "model" if name in _MODELS else "adapter" for name in inputs}
    return making(lambda: describe(command, options or {}, places, roles))


def by_hand() -> AbstractContextManager[None]:
    """Have what is written in the block record no command, so that recipes of what is made of it take it as input."""
    return making(lambda: None)
