"""Our dataclasses do what the library's do."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import field
from functools import cached_property
from typing import Any, ClassVar, Protocol

import pytest

from loratools import records

MAKERS: dict[str, Any] = {"ours": records.dataclass, "the library's": dataclasses.dataclass}
OPTIONS: list[dict[str, bool]] = [
    {"frozen": True}, {"frozen": True, "eq": False}, {"eq": False}, {}, {"frozen": True, "repr": False},
    {"frozen": True, "kw_only": True}, {"frozen": True, "order": True}, {"frozen": True, "slots": False},
    {"slots": False},
]  # fmt: skip


def kinds(make: Any, **options: bool) -> dict[str, type[Any]]:
    """Return classes of every form, made by one of `MAKERS`."""
    decorate = make(**({"slots": True} | options))

    class Asked(Protocol):
        @property
        def b(self) -> object:
            return None

        @abstractmethod
        def told(self) -> object: ...

    @decorate
    class Base(Asked):
        """Fields with defaults of every form; one takes the place of a property."""

        a: int
        b: str = "b"
        c: list[int] = field(default_factory=list)
        d: float = field(default=0.5, repr=False, compare=False)
        count: int = field(init=False, default=7)
        made: tuple[int, ...] = field(init=False)
        kind: ClassVar[str] = "base"

        def __post_init__(self) -> None:
            object.__setattr__(self, "made", (self.a, len(self.c)))

        def told(self) -> object:
            return self.b

    @decorate
    class Derived(Base):
        """One field more, one with another default."""

        b: str = "other"
        e: int = 3
        kind = "derived"

    class Plain(Derived):
        """No dataclass itself."""

        __slots__ = ()

        def __init__(self, a: int) -> None:
            Derived.__init__(self, a=a, e=9)

    @decorate
    class One:
        """One field."""

        x: object

    @decorate
    class Own:
        """Functions of its own."""

        x: int

        def __repr__(self) -> str:
            return "own"

        def __eq__(self, other: object) -> bool:
            return True

        def __hash__(self) -> int:
            return 5

    @decorate
    class Empty:
        """No fields."""

    return {kind.__name__: kind for kind in (Base, Derived, Plain, One, Own, Empty)}


def seen(work: Callable[[], object]) -> str:
    """Return what something comes to, or its exception, in words."""
    try:
        return repr(work()).partition(" object at ")[0]
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def facts(made: dict[str, type[Any]]) -> list[str]:
    """Return everything that can be seen of classes and values."""
    Base, Derived, Plain, One, Own, Empty = made.values()
    told = [seen(lambda kind=kind: inspect.signature(kind)) for kind in (Base, Derived, Plain, One, Empty)]  # type: ignore[misc]
    one, two = Base(a=1), Base(a=1, b="b", c=[], d=9.0)
    values = [one, two, Base(a=2), Derived(a=1), Plain(4), One(x=1), One(x=(1,)), Own(x=1), Empty()]
    told += [seen(lambda kind=kind: inspect.signature(kind)) for kind in (Base, Derived, Plain, One, Empty)]  # type: ignore[misc]
    for value in values:
        told += [
            repr(value).partition(" object at ")[0], str(dataclasses.astuple(value)), str(dataclasses.asdict(value)),
            str([value == other for other in values]), seen(lambda value=value: hash(value) == hash(copy.copy(value))),  # type: ignore[misc]
            str([field.name for field in dataclasses.fields(value)]), type(value).__qualname__,
            str(getattr(value, "__match_args__", None)), str(getattr(type(value), "__slots__", None)),
            repr(copy.deepcopy(value)).partition(" object at ")[0], seen(lambda value=value: value.__dict__),  # type: ignore[misc]
        ]  # fmt: skip
    told += [repr(dataclasses.replace(one, a=5, c=[1])).partition(" object at ")[0], one.told(), Derived(a=1).kind]
    told += [
        seen(Base), seen(lambda: Base(1, 2, 3, 4, 5, 6)), seen(lambda: Base(1)), seen(lambda: Base(a=1, z=2)),
        seen(lambda: setattr(one, "a", 2)), seen(lambda: delattr(one, "b")), seen(lambda: One(x=1) < One(x=2)),
        seen(lambda: dataclasses.replace(one, count=2)),
        seen(lambda: one.c is Base(a=1).c), seen(lambda: Base.__init__.__qualname__), str(Base.__doc__),
        seen(lambda: Base.__init__.__annotations__), seen(lambda: {one: 1}[two]), seen(lambda: Plain(3).e),
    ]  # fmt: skip
    return told


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_they_are_as_the_librarys(options: dict[str, bool]) -> None:
    ours, theirs = (facts(kinds(make, **options)) for make in MAKERS.values())
    assert ours == theirs


def test_there_are_no_other_attributes() -> None:
    for options in ({"frozen": True}, {}):
        with pytest.raises(AttributeError, match="strange"):
            kinds(records.dataclass, **options)["One"](1).strange = 2


def test_the_first_to_come_may_be_several() -> None:
    from concurrent.futures import ThreadPoolExecutor

    for _ in range(20):
        Plain = kinds(records.dataclass, frozen=True)["Plain"]
        with ThreadPoolExecutor(4) as pool:
            assert {value.e for value in pool.map(Plain, range(8))} == {9}


@records.dataclass(frozen=True, slots=True)
class Travels:
    """A value that goes to another process."""

    a: int
    b: tuple[int, ...] = ()


@records.dataclass(frozen=True)
class Wide:
    """A value without slots, which may remember more."""

    a: int

    @cached_property
    def twice(self) -> int:
        """Double its field."""
        return 2 * self.a


def test_they_travel() -> None:
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        back = pickle.loads(pickle.dumps(Travels(1, (2, 3)), protocol))  # noqa: S301  (our own)
        assert back == Travels(1, (2, 3))
        with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'a'"):
            back.a = 2
    wide = pickle.loads(pickle.dumps(Wide(1)))  # noqa: S301  (our own)
    assert (wide.twice, wide.__dict__) == (2, {"a": 1, "twice": 2})


def test_nothing_is_compiled_before_it_is_needed() -> None:
    @records.dataclass(frozen=True, slots=True)
    class Point:
        """A place."""

        x: int

    before: Any = Point.__init__
    assert Point(3).x == 3
    assert before is not Point.__init__
    assert before.__code__.co_varnames[:2] == ("self", "args")
