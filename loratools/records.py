"""Dataclasses that cost little to define, and little to make one of.

The library's `dataclasses.dataclass` compiles up to five functions when a frozen class is defined, half a millisecond,
and a command defines a hundred classes before it does anything. Here all functions but one are the same for all classes
and written down below; `__init__` is compiled when the first value is made, of the fields that the library found. It
sets slots by their descriptors, which takes a fifth of the time that `object.__setattr__` takes. All else is the
library's: `fields`, `replace`, `asdict`, defaults, `__post_init__`; type checkers take it for a dataclass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import MISSING, FrozenInstanceError, field, fields, replace
from operator import attrgetter
from reprlib import recursive_repr
from types import MemberDescriptorType
from typing import Any, TypeVar, cast, dataclass_transform

__all__ = ["dataclass", "field", "replace"]

Kind = TypeVar("Kind")

_AFTER = "__post_init__"  # what is called when all fields are set


@dataclass_transform(field_specifiers=(field,))
def dataclass(
    *, frozen: bool = False, slots: bool = False, eq: bool = True, order: bool = False, repr: bool = True,
    kw_only: bool = False,
) -> Callable[[type[Kind]], type[Kind]]:  # fmt: skip
    """Make a dataclass, as `dataclasses.dataclass` does with the same options.

    One with an `order` is the library's own.

    Args:
        frozen: Whether its fields cannot be set again. Default: they can.
        slots: Whether it has its fields and no other attributes. Default: no.
        eq: Whether two are equal where their fields are; else where they are one. Default: yes.
        order: Whether it has an order, that of its fields. Default: no.
        repr: Whether its text says its fields. Default: yes.
        kw_only: Whether all fields are given by name. Default: no.

    Example:
        >>> @dataclass(frozen=True, slots=True)
        ... class Point:
        ...     "A place."
        ...     x: float
        ...     y: float = 0.0
        >>> Point(1.0), Point(1.0) == Point(1.0, 0.0)
        (Point(x=1.0, y=0.0), True)
    """
    if order:
        return dataclasses.dataclass(frozen=frozen, slots=slots, eq=eq, order=order, repr=repr, kw_only=kw_only)

    def made(kind: type[Kind]) -> type[Kind]:
        own: dict[str, Any] = {"__repr__": _repr} if repr else {}
        own |= {"__eq__": _eq} if eq else {}
        own |= {"__setattr__": _refuse_set, "__delattr__": _refuse_delete} if frozen else {}
        own |= {"__getstate__": _state, "__setstate__": _set_state} if frozen and slots else {}
        if eq and kind.__dict__.get("__hash__") is None:
            own["__hash__"] = _hash if frozen else None
        for name, function in own.items():
            if name == "__hash__" or name not in kind.__dict__:
                setattr(kind, name, function)
        final = dataclasses.dataclass(init=False, repr=False, eq=False, slots=slots, kw_only=kw_only)(kind)
        if "__init__" not in kind.__dict__:
            _be_compiled_later(final)
        return final

    return made


def _be_compiled_later(kind: Any) -> None:
    """Give a class an `__init__` that puts the compiled one in its place, and calls it."""

    def __init__(self: Any, *args: Any, **named: Any) -> None:
        compiled()(self, *args, **named)

    def compiled() -> Callable[..., None]:
        if kind.__init__ is __init__:
            kind.__init__ = _init_of(kind)
        made: Callable[..., None] = kind.__init__
        return made

    kind.__init__ = __init__
    kind.__signature__ = _Signature(kind, compiled)


def _init_of(kind: type[Any]) -> Callable[..., None]:
    scope: dict[str, Any] = {"__name__": kind.__module__, "_MADE": _MADE, "_set": object.__setattr__}
    given: dict[bool, list[str]] = {False: [], True: []}
    lines = []
    for each in fields(kind):
        name, value = each.name, each.name
        scope |= {f"_default_{name}": each.default, f"_make_{name}": each.default_factory}
        makes, slot = each.default_factory is not MISSING, cast(Any, getattr(kind, name, None))
        slotted = isinstance(slot, MemberDescriptorType)
        if each.init:
            default = "" if each.default is MISSING else f" = _default_{name}"
            given[bool(each.kw_only)].append(f"{name}{' = _MADE' if makes else default}")
            value = f"_make_{name}() if {name} is _MADE else {name}" if makes else name
        elif makes or (each.default is not MISSING and slotted):
            value = f"_make_{name}()" if makes else f"_default_{name}"
        else:
            continue  # `__post_init__` sets it, or it stands in the class
        if slotted:
            scope[f"_set_{name}"] = slot.__set__
            lines.append(f"    _set_{name}(self, {value})")
        else:
            lines.append(f"    _set(self, {name!r}, {value})")
    if getattr(kind, _AFTER, None):
        lines.append("    self.__post_init__()")
    parameters = ", ".join(["self", *given[False], *(["*", *given[True]] if given[True] else [])])
    exec("\n".join([f"def __init__({parameters}):", *lines, "    return None"]), scope)
    made: Callable[..., None] = scope["__init__"]
    made.__qualname__ = f"{kind.__qualname__}.__init__"
    made.__annotations__ = {each.name: each.type for each in fields(kind) if each.init} | {"return": None}
    return made


class _Made:
    """The default of a field that is made anew for each value."""

    def __repr__(self) -> str:
        return "<factory>"


_MADE = _Made()


class _Signature:
    """What `inspect.signature` asks a class for: that of its `__init__`, `compiled` now, without `self`.

    A class below it with an `__init__` of its own has the signature of that.
    """

    def __init__(self, owner: Any, compiled: Callable[[], Callable[..., None]]) -> None:
        self._owner, self._compiled = owner, compiled

    def __get__(self, value: object, kind: Any) -> Any:
        if value is not None or kind.__init__ is not self._owner.__init__:
            raise AttributeError("__signature__")
        from inspect import signature

        whole = signature(self._compiled())
        return whole.replace(parameters=[*whole.parameters.values()][1:])


@recursive_repr()
def _repr(self: Any) -> str:
    shown = ", ".join([f"{each.name}={getattr(self, each.name)!r}" for each in fields(self) if each.repr])
    return f"{type(self).__qualname__}({shown})"


_VALUES: dict[type[Any], tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {}
"""Class -> what makes of a value that which is compared, and that which is hashed."""


def _values(kind: type[Any]) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    if kind not in _VALUES:
        compared = [each.name for each in fields(kind) if each.compare]
        hashed = [each.name for each in fields(kind) if (each.compare if each.hash is None else each.hash)]
        _VALUES[kind] = _getter(compared), _getter(hashed)
    return _VALUES[kind]


def _getter(names: list[str]) -> Callable[[Any], Any]:
    if len(names) > 1:
        return attrgetter(*names)
    return lambda value: tuple([getattr(value, name) for name in names])


def _eq(self: Any, other: object) -> Any:
    if other.__class__ is not self.__class__:
        return NotImplemented
    get = _values(type(self))[0]
    return get(self) == get(other)


def _hash(self: Any) -> int:
    return hash(_values(type(self))[1](self))


def _refuse_set(self: object, name: str, value: object) -> None:
    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def _refuse_delete(self: object, name: str) -> None:
    raise FrozenInstanceError(f"cannot delete field {name!r}")


def _state(self: Any) -> list[Any]:
    return [getattr(self, each.name) for each in fields(self)]


def _set_state(self: Any, state: list[Any]) -> None:
    for each, value in zip(fields(self), state, strict=True):
        object.__setattr__(self, each.name, value)
