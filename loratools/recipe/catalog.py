"""The commands as a recipe sees them: their keys are the long names of options and arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal, Protocol

Role = Literal["adapter", "model"]
"""What an input of a command is."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key that a step of a command can have.

    `takes` is "value", "flag" (true, or left out) or "switch" (true and false both say something); `many` says that a
    list stands for several. `role` is what an input is, None for what is no input. `recorded` says that the result
    depends on it.
    """

    name: str
    takes: Literal["value", "flag", "switch"] = "value"
    many: bool = False
    role: Role | None = None
    positional: bool = False
    required: bool = False
    recorded: bool = True


@dataclass(frozen=True, slots=True)
class Command:
    """A command that a recipe can run. `refused` are keys that it has on the command line only, and why."""

    name: str
    keys: Mapping[str, Key]
    refused: Mapping[str, str] = field(default_factory=dict)
    writes: bool = True
    plans: bool = False
    forces: bool = True


@dataclass(frozen=True, slots=True)
class Result:
    """What a command found: its JSON document, its lines, and whether the answer is yes."""

    document: Mapping[str, Any]
    lines: tuple[str, ...] = ()
    ok: bool = True


class Catalog(Protocol):
    """The commands, and how one is run."""

    def names(self) -> Sequence[str]:
        """Return the names of the commands that a recipe can run, sorted."""
        ...

    def why_not(self, name: str) -> str | None:
        """Return why a recipe does not run a command; None where it does, or there is no such command."""
        ...

    def get(self, name: str) -> Command:
        """Return a command by one of the `names`."""
        ...

    def check(self, name: str, arguments: Sequence[str]) -> None:
        """Raise `InvalidOption` unless the command line of a command can be."""
        ...

    def run(self, name: str, arguments: Sequence[str]) -> Result:
        """Run a command; raise what it raises."""
        ...


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` for the known name that is most like one, "" where none is.

    Example:
        >>> nearest("dtpye", ["dtype", "weight"])
        '; did you mean dtype?'
    """
    like = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {like[0]}?" if like else ""
