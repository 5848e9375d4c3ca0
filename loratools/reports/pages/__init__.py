"""The kinds of pages: each is a module here, found by its name, with

    NEEDS            what it is made of, as the error says it that finds no page for some inputs
    fits(subjects)   whether these inputs make such a page; no two kinds take the same
    page(subjects)   the page

A file whose name begins with `_` is no kind: it holds sections that several have.
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

from loratools.errors import InvalidOption, counted
from loratools.options import modules_in
from loratools.reports.page import Page
from loratools.reports.subjects import Subjects


class Kind(Protocol):
    """A kind's module, as the docstring of this package describes it."""

    NEEDS: str

    def fits(self, subjects: Subjects) -> bool:
        """Tell whether these inputs make such a page."""
        ...

    def page(self, subjects: Subjects) -> Page:
        """Make the page."""
        ...


def names() -> tuple[str, ...]:
    """Return the names of all kinds, sorted.

    Example:
        >>> "adapter" in names()
        True
    """
    return tuple(modules_in(__path__))


def get(name: str) -> Kind:
    """Return a kind's module by its name."""
    return cast(Kind, import_module(f"{__name__}.{name}"))


def of(subjects: Subjects) -> str:
    """Return the name of the kind that some inputs make; raise `InvalidOption` where no kind takes them."""
    for name in names():
        if get(name).fits(subjects):
            return name
    given = f"{counted(len(subjects.adapters), 'adapter')} and {counted(len(subjects.models), 'model')}"
    base = "with" if subjects.base else "without"
    raise InvalidOption(
        f"no page is made of {given} {base} a base model", [f"{name}: {get(name).NEEDS}" for name in names()]
    )
