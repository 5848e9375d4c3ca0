"""Where a verb lets others share its work: a function of named items, any of which may be done by anybody.

A verb decides what is to be done, from headers, and then calls `shared`. Alone, that does the work. Where a crew is at
work, the one who called divides the items and hands the parts out; each helper calls the same verb with the same
arguments, so that it comes to the same items, does those of its part, and stops there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol, TypeVar

from loratools.errors import InvalidOption

Item = TypeVar("Item")
Result = TypeVar("Result")

Work = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Does some of the items; returns name -> result."""


class Crew(Protocol):
    """Who shares the work of a verb, as one of them sees it."""

    def share(self, work: Work, items: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
        """Return the result of every item; where only a part of them is to be done, do that and do not return."""
        ...

    def room(self) -> Path | None:
        """Return the folder for what its part writes; None for whoever makes the output."""
        ...

    def agreed(self, value: int) -> int:
        """Return the number that the one who called has drawn, who returns this one."""
        ...


_CREW: ContextVar[Crew | None] = ContextVar("crew", default=None)


def shared(
    work: Callable[[Mapping[str, Item]], dict[str, Result]], items: Mapping[str, Item], size: Callable[[Item], int]
) -> dict[str, Result]:
    """Return work(items), which others may share; only the first call of a verb is shared.

    Args:
        work: Does some of the items, on the threads of one process; returns name -> result, values that pickle.
        items: Name -> what is to be done, decided from headers alone, so that everybody decides the same.
        size: The work that an item is, in bytes or in operations, by which the parts are balanced.

    Example:
        >>> shared(lambda some: {name: 2 * x for name, x in some.items()}, {"a": 1, "b": 2}, lambda x: x)
        {'a': 2, 'b': 4}
    """
    crew = _CREW.get()
    if crew is None:
        return work(items)
    token = _CREW.set(None)
    try:
        done = crew.share(work, items, {name: size(item) for name, item in items.items()})
    except BaseException:
        _CREW.reset(token)
        raise
    return {name: done[name] for name in items}


def agreed(value: int) -> int:
    """Return a number that was drawn at random, the same for all who share the work."""
    crew = _CREW.get()
    return crew.agreed(value) if crew else value


def room() -> Path | None:
    """Return the folder for what a part writes, in whoever does only that; None for whoever makes the output."""
    crew = _CREW.get()
    return crew.room() if crew else None


def place(opened: AbstractContextManager[Path]) -> AbstractContextManager[Path]:
    """Return the context of the folder to write into: that of the output, or of a part in whoever does only that."""
    own = room()
    return opened if own is None else nullcontext(own)


def alone(why: str, hint: str) -> None:
    """Raise `InvalidOption` where the work is shared: `why` it cannot be, and what to do."""
    if _CREW.get():
        raise InvalidOption(why, hint=hint)


@contextmanager
def by(crew: Crew) -> Iterator[None]:
    """Have the verb that is called in the block share its work with a crew."""
    token = _CREW.set(crew)
    try:
        yield
    finally:
        _CREW.reset(token)
