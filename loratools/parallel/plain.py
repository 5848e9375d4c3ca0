"""Values of loratools as JSON has them, and back: what a part writes down, another process reads again.

A number, a text, a list and a mapping are themselves. Anything else is a mapping with the key `=`, which says what it
is: a tuple, a set, a path, or a dataclass or named tuple of loratools, by its module and name. Nothing but such is ever
made of a document, so that one from a stranger can make no other object.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from loratools.errors import BadFile

_WHAT = "="
_OWN = "PLAIN"
"""Attribute of a dataclass that is not made of its fields: the names of what it is made of, by its `from_plain`."""

_PACKAGE = __name__.partition(".")[0]


class NotPlain(TypeError):
    """A value that only lives in memory, at the place that the message names."""


def to_plain(value: Any, place: str = "value") -> Any:
    """Return a value as JSON has it; `from_plain` makes an equal one of that.

    Args:
        value: Numbers, texts, paths, lists, tuples, sets and mappings with texts as keys, and dataclasses and
            named tuples of loratools.
        place: What the value is called in an error. Default: `"value"`.

    Raises:
        NotPlain: A part of it is anything else.

    Example:
        >>> to_plain((1, Path("a")))
        {'=': 'tuple', 'items': [1, {'=': 'path', 'path': 'a'}]}
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Path):
        return {_WHAT: "path", "path": str(value)}
    if isinstance(value, list):
        return [to_plain(each, f"{place}[{i}]") for i, each in enumerate(value)]
    kind = type(value)
    if isinstance(value, tuple) and not _names(kind):
        return {_WHAT: "tuple", "items": [to_plain(each, f"{place}[{i}]") for i, each in enumerate(value)]}
    if isinstance(value, frozenset | set):
        return {_WHAT: "frozenset", "items": sorted(to_plain(each, f"{place}{{}}") for each in value)}
    if isinstance(value, Mapping) and all(isinstance(key, str) and key != _WHAT for key in value):
        return {key: to_plain(each, f"{place}[{key!r}]") for key, each in value.items()}
    if (names := _names(kind)) and kind.__module__.partition(".")[0] == _PACKAGE:
        if hasattr(kind, _OWN) and any(getattr(value, name) is None for name in names):
            raise NotPlain(f"{place} is a {kind.__name__} that is held in memory")
        named = {name: to_plain(getattr(value, name), f"{place}.{name}") for name in names}
        return {_WHAT: f"{kind.__module__}:{kind.__qualname__}", **named}
    raise NotPlain(f"{place} is a {kind.__name__}")


def from_plain(document: Any) -> Any:
    """Return the value that `to_plain` made a document of; raise `BadFile` for another document.

    Example:
        >>> from_plain(to_plain((1, Path("a"))))[0]
        1
    """
    if isinstance(document, list):
        return [from_plain(each) for each in document]
    if not isinstance(document, dict):
        return document
    rest = {key: from_plain(each) for key, each in document.items() if key != _WHAT}
    if _WHAT not in document:
        return rest
    what = document[_WHAT]
    try:
        if what in _KINDS:
            return _KINDS[what](*rest.values())
        kind = _dataclass(what)
        return (kind.from_plain if hasattr(kind, _OWN) else kind)(**rest)
    except (TypeError, ValueError, AttributeError, ImportError) as error:
        raise BadFile(f"{what!r} cannot be read back: {error}") from None


_KINDS: Mapping[Any, Any] = {"tuple": tuple, "frozenset": frozenset, "path": Path}


def _dataclass(what: Any) -> Any:
    """Return the dataclass or named tuple of loratools of a name such as `loratools.parallel.shares:Part`."""
    module, _, name = what.partition(":")
    if module.partition(".")[0] != _PACKAGE or not name.isidentifier():
        raise ValueError("it is no value of loratools")
    kind = getattr(import_module(module), name)
    if not (isinstance(kind, type) and _names(kind) and kind.__module__ == module):
        raise ValueError("it is no value of loratools")
    return kind


def _names(kind: type) -> tuple[str, ...]:
    """Return the names of the fields of a dataclass or a named tuple; () of any other type."""
    if own := getattr(kind, _OWN, None):
        return tuple(own)
    return tuple(each.name for each in fields(kind)) if is_dataclass(kind) else getattr(kind, "_fields", ())
