"""How the output that is being written is made: who runs a command says it, and what writes a record takes it along.

The account is JSON: `command`, `tool`, `options` and `inputs` by digest (`recipe/account.py` makes it). A model has it
in the field `recipe` of its record; a file of tensors as the entry `loratools.recipe` of its header.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

FIELD = "recipe"
"""Field of a model's record that holds the account."""
ENTRY = "loratools.recipe"
"""Entry of the header of a file of tensors, and field of a GGUF file, that holds the account as JSON."""

Describe = Callable[[], Mapping[str, Any] | None]
"""Makes the account when it is asked for: it opens the inputs, which only an output that is written is worth."""

_CURRENT: ContextVar[Describe | None] = ContextVar("making", default=None)
_ROOTS: ContextVar[dict[Path, str] | None] = ContextVar("roots", default=None)


@contextmanager
def making(describe: Describe) -> Iterator[None]:
    """Have what is written while the block runs say how it was made; `describe` is called once, if at all."""
    made: list[Mapping[str, Any] | None] = []

    def once() -> Mapping[str, Any] | None:
        if not made:
            made.append(describe())
        return made[0]

    tokens = _CURRENT.set(once), _ROOTS.set({})
    try:
        yield
    finally:
        _CURRENT.reset(tokens[0])
        _ROOTS.reset(tokens[1])


def note_root(model: Path, root: str) -> None:
    """Note the root hash of a model, which the command has read all of: the account need not read it again."""
    roots = _ROOTS.get()
    if roots is not None:
        roots[model.resolve()] = root


def noted_root(model: Path) -> str | None:
    """Return the root hash that was noted of a model while the block of `making` runs; None where none was."""
    return (_ROOTS.get() or {}).get(model.resolve())


def account() -> Mapping[str, Any] | None:
    """Return how the output that is being written is made; None where nobody said it."""
    describe = _CURRENT.get()
    return describe() if describe else None


def field() -> dict[str, Any]:
    """Return the account as a field of a record; {} where there is none."""
    made = account()
    return {FIELD: dict(made)} if made else {}


def entry() -> dict[str, str]:
    """Return the account as an entry of a header; {} where there is none."""
    made = account()
    return {ENTRY: json.dumps(made, sort_keys=True, separators=(",", ":"), ensure_ascii=False)} if made else {}
