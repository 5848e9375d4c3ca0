"""A frozen dataclass of ours is that of `dataclasses`: each test asks both for the same."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from collections.abc import Callable
from dataclasses import field
from typing import Any

import pytest

from loratools.options import frozen

Make = Callable[..., Any]
MAKERS = {"ours": frozen.dataclass, "theirs": dataclasses.dataclass}


@frozen.dataclass(frozen=True, slots=True)
class Kept:
    """A value at the top of a module, as pickle wants it."""

    name: str
    sizes: tuple[int, ...] = ()
    notes: list[str] = field(default_factory=list)


def values(make: Make) -> dict[str, Any]:
    """Return classes with all that ours use."""

    @make(frozen=True, slots=True)
    class Plain:
        """A value."""

        a: int
        b: str = "x"
        c: list[int] = field(default_factory=list)
        d: int = field(default=3, repr=False)
        e: int = field(default=4, compare=False)
        f: int = field(default=5, kw_only=True)
        g: int = field(default=6, init=False)

    @make(frozen=True, slots=True, eq=False)
    class Unequal:
        """A value that is itself."""

        a: int

    @make(frozen=True, slots=True, repr=False)
    class Own:
        """A value with methods of its own."""

        a: float

        def __post_init__(self) -> None:
            if self.a < 0:
                raise ValueError("below zero")

        def __eq__(self, other: object) -> bool:
            return isinstance(other, type(self)) and round(self.a) == round(other.a)

        def __hash__(self) -> int:
            return 7

        def __repr__(self) -> str:
            return f"<{self.a}>"

    @make(frozen=True, slots=True)
    class Base:
        """A value with heirs."""

        a: int

        @property
        def twice(self) -> int:
            """Return 2 a."""
            return 2 * self.a

    @make(frozen=True, slots=True)
    class Heir(Base):
        """A value with one field more."""

        b: int = 1

    @make(frozen=True, slots=True, kw_only=True)
    class Named:
        """A value by names."""

        a: int = 1
        b: int

    @make(frozen=True, slots=True)
    class Empty:
        """A value of nothing."""

    return {each.__name__: each for each in (Plain, Unequal, Own, Base, Heir, Named, Empty)}


def told(make: Make) -> list[Any]:
    """Return what classes and their values say of themselves."""
    made = values(make)
    plain, unequal, own, base, heir, named, empty = made.values()
    one, other = plain(1, c=[2]), plain(1, "x", [2], e=9)
    nan = float("nan")
    said: list[Any] = [
        repr(one).replace("told", ""), one == other, one == plain(2, c=[2]), one == 1, hash(base(3)) == hash(base(3)),
        len({base(1), base(1), base(2), base(nan)}), base(nan) == base(nan), unequal(1) == unequal(1),
        own(1.1) == own(0.9), hash(own(1.0)), repr(own(2.0)), heir(2).twice, heir(2, 3) == heir(2, 3),
        heir(2) == base(2), repr(heir(1))[-9:], empty() == empty(), hash(empty()) == hash(empty()), repr(empty())[-7:],
        copy.copy(one) == one, copy.deepcopy(one) == one, copy.deepcopy(one).c is not one.c, one.g,
        dataclasses.replace(one, a=5, f=8).f, dataclasses.asdict(one), dataclasses.astuple(heir(1)),
        plain(1).c is plain(1).c, named(b=3).b, named(b=2) == named(a=1, b=2),
    ]  # fmt: skip
    for each in made.values():
        said += [
            [(f.name, f.init, f.repr, f.compare, f.kw_only) for f in dataclasses.fields(each)], each.__slots__,
            each.__match_args__, repr(each.__dataclass_params__), dataclasses.is_dataclass(each), each.__doc__,
            [(p.name, str(p.kind), str(p.annotation)) for p in inspect.signature(each).parameters.values()],
        ]  # fmt: skip
    for call in (
        plain, lambda: plain(1, 2, 3, 4, 5, 6), lambda: plain(1, g=2), lambda: own(-1.0), lambda: hash(one),
        lambda: named(1, 2),
        lambda: setattr(one, "a", 2), lambda: delattr(one, "a"), lambda: setattr(heir(1), "b", 2),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError, dataclasses.FrozenInstanceError)) as refused:
            call()
        said += [refused.type.__name__, str(refused.value).partition("(")[0]]
    return said


def test_it_is_that_of_dataclasses() -> None:
    assert told(frozen.dataclass) == told(dataclasses.dataclass)


def test_it_goes_through_pickle() -> None:
    value = Kept("a", (1, 2), ["b"])
    again = pickle.loads(pickle.dumps(value))  # noqa: S301
    assert again == value
    assert (again.name, again.sizes, again.notes) == ("a", (1, 2), ["b"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        again.name = "c"


def test_nothing_is_added_to_a_value() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(Kept("a"), "more", 1)  # noqa: B010
