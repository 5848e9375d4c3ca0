"""Frozen dataclasses with slots, as `dataclasses` makes them, in a third of the time.

Python compiles six methods for each such class whenever a process starts, which was a quarter of the start of
`loratools inspect`. Here one is compiled, `__init__`; the others are closures over the names of the fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import MISSING, FrozenInstanceError
from operator import attrgetter
from reprlib import recursive_repr
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # type checkers know the original
    from dataclasses import dataclass as dataclass
else:

    def dataclass(**options: bool) -> Callable[[type], type]:
        """Return the decorator that makes a class a frozen dataclass with slots.

        Args:
            options: As `dataclasses.dataclass` takes them, with `frozen` and `slots`. With others than `eq`, `repr` and
                `kw_only` it is that one which makes the class.
        """
        eq, repr = options.get("eq", True), options.get("repr", True)
        ours = options.keys() <= {"frozen", "slots", "eq", "repr", "kw_only"} and options["frozen"] and options["slots"]

        def make(cls: type) -> type:
            if not ours or any(dataclasses.is_dataclass(base) for base in cls.__mro__[1:]):
                return dataclasses.dataclass(**options)(cls)
            own = dict(vars(cls))
            made = dataclasses.dataclass(**options | {"init": False, "eq": False, "repr": False, "frozen": False})(cls)
            methods = _of_frozen(made, own)
            methods |= _of_equal(made, own) if eq else {}
            methods |= _of_shown(made, own) if repr else {}
            for name, method in methods.items():
                method.__qualname__ = f"{made.__qualname__}.{name}"
                setattr(made, name, method)
            params = made.__dataclass_params__
            params.init, params.eq, params.repr, params.frozen = True, eq, repr, True
            return made

        return make


Methods = dict[str, Callable[..., Any]]


def _of_frozen(cls: Any, own: dict[str, Any]) -> Methods:
    """Return what makes a value once, and neither changes nor loses a field; its state for `pickle` and `copy`."""
    fields = dataclasses.fields(cls)
    names = [field.name for field in fields]
    put = [vars(cls)[name].__set__ for name in names]  # of the slots, past `__setattr__`

    def __setattr__(self: Any, name: str, value: Any) -> None:
        if type(self) is cls or name in names:
            raise FrozenInstanceError(f"cannot assign to field {name!r}")
        super(cls, self).__setattr__(name, value)

    def __delattr__(self: Any, name: str) -> None:
        if type(self) is cls or name in names:
            raise FrozenInstanceError(f"cannot delete field {name!r}")
        super(cls, self).__delattr__(name)

    def __getstate__(self: Any) -> list[Any]:
        return [get(self) for get in map(attrgetter, names)]

    def __setstate__(self: Any, state: list[Any]) -> None:
        for put_one, value in zip(put, state, strict=True):
            put_one(self, value)

    made: Methods = {"__setattr__": __setattr__, "__delattr__": __delattr__, "__init__": _init(cls, fields, put)}
    state: Methods = {"__getstate__": __getstate__, "__setstate__": __setstate__}
    return made | {name: method for name, method in state.items() if name not in own}


def _init(cls: Any, fields: tuple[dataclasses.Field[Any], ...], put: list[Any]) -> Callable[..., None]:
    known: dict[str, Any] = {"_missing": MISSING}
    asked: list[str] = []
    by_name: list[str] = []
    lines: list[str] = []
    for number, field in enumerate(fields):
        known[f"_put{number}"], known[f"_default{number}"], known[f"_make{number}"] = (
            put[number], field.default, field.default_factory,
        )  # fmt: skip
        made = field.default_factory is not MISSING
        default = "" if field.default is MISSING and not made else f"=_missing if {made} else _default{number}"
        if field.init:
            (by_name if field.kw_only else asked).append(f"{field.name}{default}")
            value = f"_make{number}() if {field.name} is _missing else {field.name}" if made else field.name
            lines.append(f"_put{number}(self, {value})")
        elif made or field.default is not MISSING:
            lines.append(f"_put{number}(self, {f'_make{number}()' if made else f'_default{number}'})")
    lines += ["self.__post_init__()"] if any("__post_init__" in vars(each) for each in cls.__mro__) else []
    parameters = ", ".join(["self", *asked, *(["*", *by_name] if by_name else [])])
    text = "\n  ".join([f"def __init__({parameters}):", *(lines or ["pass"])])
    exec(text, known)
    init: Callable[..., None] = known["__init__"]
    init.__module__ = cls.__module__
    init.__annotations__ = {field.name: field.type for field in fields if field.init} | {"return": None}
    return init


def _of_equal(cls: Any, own: dict[str, Any]) -> Methods:
    """Return `==` and the hash of the fields that are compared."""
    compared = [field.name for field in dataclasses.fields(cls) if field.compare]
    hashed = [f.name for f in dataclasses.fields(cls) if (f.compare if f.hash is None else f.hash)]
    values, signs = _values(compared), _values(hashed)

    def __eq__(self: Any, other: object) -> Any:
        return values(self) == values(other) if other.__class__ is self.__class__ else NotImplemented

    def __hash__(self: Any) -> int:
        return hash(signs(self))

    methods: Methods = {} if "__eq__" in own else {"__eq__": __eq__}
    return methods if own.get("__hash__") else methods | {"__hash__": __hash__}


def _values(names: list[str]) -> Callable[[Any], Any]:
    """Return a function that returns the tuple of these attributes."""
    if len(names) > 1:
        return attrgetter(*names)
    return lambda value: tuple([getattr(value, name) for name in names])


def _of_shown(cls: Any, own: dict[str, Any]) -> Methods:
    """Return `repr`, with the fields that are shown."""
    if "__repr__" in own:
        return {}
    names = [field.name for field in dataclasses.fields(cls) if field.repr]

    @recursive_repr()
    def __repr__(self: Any) -> str:
        shown = ", ".join([f"{name}={getattr(self, name)!r}" for name in names])
        return f"{self.__class__.__qualname__}({shown})"

    return {"__repr__": __repr__}
