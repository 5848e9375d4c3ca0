"""The names and regular expressions of a config, matched as PEFT matches them, in bounded time.

A config comes from anywhere. Names are looked up: a module costs as many look-ups as its path has segments, however
many names there are. Regular expressions run in the `regex` package, which stops them after a time, where it and
Python's `re`, which PEFT uses, read them alike, as they do what trainers write; the others in `re`, in a process of
their own (`isolated.py`).
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.adapter.naming.compact import suffixes
from loratools.dialects.peft.isolated import Isolated
from loratools.errors import UnsupportedAdapter

if TYPE_CHECKING:
    import regex

MAX_PATTERN = 20_000
"""Characters of one regular expression; the longest that trainers write have a few hundred."""

MAX_REPEATS = 10_000
"""Product of the counts in one expression: `regex` writes out what `(.{99}){99}` repeats."""

SECONDS = 2.0
"""Processor time that one expression may take for one module; a real one takes a microsecond."""

SECONDS_OF_CONFIG = 20.0
"""Processor time that all expressions of one config may take for all modules."""

MAX_EXPRESSIONS, MAX_CHARACTERS = 1_000, 100_000
"""Regular expressions of one config, and characters of all of them; names are none."""

# The parts of an expression that `regex` and `re` read alike.
_PART = r"""
    \\[dDwWsSbBAZ]                                                      # a class of characters, or a place
    | \\[^a-zA-Z0-9]                                                    # an escaped character
    | \[\^?\]? (?: (?!--|&&|~~|\|\|) [^\]\\\[] | \\[dDwWsS] | \\[^a-zA-Z0-9] )* \]   # a set, without sets in it
    | \( (?: \?(?: P<\w+> | : | = | ! | <= | <! ) | (?!\?) ) | \) | \|  # groups and alternatives, looking around
    | (?: [*+?] | \{(?:\d+(?:,\d*)?|,\d+)\} ) \?? (?!\+)                # repeats, not possessive
    | [^\\\[(){}*+?|]                                                   # a character, also ^ . $
"""
_READ_ALIKE = rf"(?:\(\?i\))?(?:{_PART})*+"
# Letters and digits of other scripts are classified, and their case is folded, by tables of each package's own.
_BY_TABLE = r"\\[dDwWsSbB]|^\(\?i\)"

# A key of a pattern that is a name: each character means itself, and a dot any character.
_NAME = r"(\^?)((?:\\[^a-zA-Z0-9\n]|[^\\^$*+?{}\[\]|()\n]++)*+)\$?"
_SEGMENT = r"[\w-]+"
_ESCAPED_OR_DOT = r"\\(.)|\."
_ANY = "\n"  # what stands for any character; no name of a module has it
_MOST_SHAPES = 64  # of names of one length; real configs have one or two

_ByLength = dict[int, dict[tuple[int, ...], dict[Any, int]]]
"""Length of a name -> its shape: how long its parts are, between characters that may be any -> parts -> its place."""


@dataclass(slots=True, eq=False, repr=False)
class ConfigFile:
    """The file of a config, what is wrong with its expressions, and the processor time that they have left.

    `python` runs those that `regex` may read otherwise.
    """

    path: Path
    problems: list[str] = field(default_factory=list)
    seconds: float = SECONDS_OF_CONFIG
    expressions: int = MAX_EXPRESSIONS
    characters: int = MAX_CHARACTERS
    python: Isolated = field(default_factory=Isolated)

    def take(self, pattern: str) -> None:
        """Count an expression; raise `UnsupportedAdapter` for one too many: to compile them all takes too long."""
        self.expressions -= 1
        self.characters -= len(pattern)
        if self.expressions < 0 or self.characters < 0:
            raise UnsupportedAdapter(
                f"{self.path}: more regular expressions than are read: at most {MAX_EXPRESSIONS},"
                f" of {MAX_CHARACTERS} characters together",
                hint="List the names of the modules instead of regular expressions.",
            )


class NameList:
    """A list of names; a module answers to its path and to each suffix of it after a dot."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = {name: position for position, name in enumerate(dict.fromkeys(names))}

    def first(self, module: str) -> str | None:
        """Return the first name of the list that a module answers to, or None."""
        if not self.names:
            return None
        return min((name for name in suffixes(module) if name in self.names), key=self.names.__getitem__, default=None)

    def matches(self, module: str) -> bool:
        """Tell whether a module answers to any of the names."""
        return bool(self.names) and not self.names.keys().isdisjoint(suffixes(module))


class Expression:
    """One regular expression in a `field` of a config.

    `pattern` matches a whole name, as `re.fullmatch` does, or with `whole=False` its beginning, as `re.match` does. One
    that cannot be used becomes a line of the config's `problems`.
    """

    def __init__(self, pattern: str, field: str, config: ConfigFile, *, whole: bool = True) -> None:
        self._pattern, self._field, self._config, self._whole = pattern, field, config, whole
        self._by_table = re.search(_BY_TABLE, pattern) is not None
        self._alike: regex.Pattern[str] | None = None
        if len(pattern) > MAX_PATTERN:  # it is not compiled
            found = f"a regular expression of {len(pattern)} characters; at most {MAX_PATTERN} are read"
            config.problems.append(f"{field}: {found}")
            return
        config.take(pattern)
        try:
            self._alike = compile_alike(pattern)
            if self._alike is None:
                self._in_python(None)
        except ValueError as error:
            config.problems.append(f"{field}: {pattern[:80]!r} is not a regular expression: {error}")
        except TimeoutError:
            config.problems.append(f"{field}: the regular expression {pattern[:80]!r} takes too long to compile")

    def matches(self, name: str) -> bool:
        """Tell whether the expression matches a module's name; raise `UnsupportedAdapter` where that takes too long."""
        return self.groups(name) is not None

    def groups(self, name: str) -> Mapping[str, str] | None:
        """Return the named groups of a match, None where there is none; raise as `matches`."""
        try:
            if self._config.seconds <= 0:
                raise TimeoutError
            # Which letters beyond ASCII are words, each package knows by a table of its own.
            if self._alike is None or (self._by_table and not (name.isascii() and name.isprintable())):
                return self._in_python(name)
            start = time.thread_time()
            match = self._alike.fullmatch if self._whole else self._alike.match
            found = match(name, timeout=min(SECONDS, self._config.seconds))
            self._config.seconds -= time.thread_time() - start
            return None if found is None else found.groupdict()
        except TimeoutError:
            raise UnsupportedAdapter(
                f"{self._config.path}: {self._field}: the regular expression {self._pattern[:80]!r} takes too long to"
                f" match {name[:80]!r}",
                hint="Write it without repeats within repeats, or list the names of the modules.",
            ) from None

    def _in_python(self, name: str | None) -> Mapping[str, str] | None:
        """Return the named groups as Python's own `re` has them, in a process of its own; `name` None only compiles."""
        seconds = min(SECONDS, self._config.seconds)
        groups, taken = self._config.python.ask(self._pattern, name, self._whole, seconds)
        self._config.seconds -= taken
        return groups


class _Names:
    """The keys that are names: `others` are the places of those that are none. What a module finds is remembered.

    In an unescaped name a dot stands for any character, so names are kept by where their dots are, and a module is
    looked up without the characters in those places.
    """

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._anchored: _ByLength = {}
        self._suffixes: _ByLength = {}
        self._found: dict[str, int] = {}
        self._none = len(keys)
        self.others = [position for position, key in enumerate(keys) if not self._add(position, key)]

    def first(self, module: str) -> int:
        """Return the place of the first name that a module answers to; the number of all keys where there is none."""
        if module not in self._found:
            best = self._none
            for by_length, names in ((self._anchored, (module,)), (self._suffixes, suffixes(module))):
                for name in names if by_length else ():
                    for shape, positions in by_length.get(len(name), {}).items():
                        best = min(best, positions.get(_parts(shape)(name), best))
            self._found[module] = best
        return self._found[module]

    def _add(self, position: int, key: str) -> bool:
        """Keep a key that is a name; return False for one that is not, or whose shape is one too many."""
        if (found := _as_name(key)) is None:
            return False
        anchored, name, shape = found
        shapes = (self._anchored if anchored else self._suffixes).setdefault(len(name), {})
        if shape not in shapes and len(shapes) == _MOST_SHAPES:
            return False
        shapes.setdefault(shape, {}).setdefault(_parts(shape)(name), position)
        return True


_names = lru_cache(maxsize=8)(_Names)  # those of ranks and of alphas, and of the next adapter, are often the same


class PatternKeys:
    r"""The keys of a rank or alpha pattern: K is that of a module for which `re.match(rf"(.*\.)?({K})$")`."""

    def __init__(self, keys: Iterable[str], field: str, config: ConfigFile) -> None:
        self._keys = tuple(keys)
        self._names = _names(self._keys)
        self._first: dict[str, str | None] = {}
        self._expressions = [
            (position, Expression(rf"(.*\.)?({self._keys[position]})$", field, config, whole=False))
            for position in self._names.others
        ]

    def first(self, module: str) -> str | None:
        """Return the first key, in the order of the file, that matches a module's name; None where none does."""
        if module not in self._first:
            self._first[module] = self._find(module)
        return self._first[module]

    def unused(self) -> list[str]:
        """Return the keys that were the first for no module so far, in the order of the file."""
        used = set(self._first.values())
        return [key for key in self._keys if key not in used]

    def _find(self, module: str) -> str | None:
        if "\n" in module:
            raise UnsupportedAdapter(f"a module name with a line break in it: {module[:80]!r}")
        if not self._keys:
            return None
        best = self._names.first(module)
        earlier = (i for i, expression in self._expressions if i < best and expression.matches(module))
        best = next(earlier, best)
        return self._keys[best] if best < len(self._keys) else None


class SavedModules:
    r"""The names in `modules_to_save`: N is that of a module for which `re.match(rf"(^|.*\.){N}($|\..*)")`."""

    def __init__(self, names: Iterable[str], config: ConfigFile) -> None:
        names = frozenset(names)
        self._segments = frozenset(name for name in names if re.fullmatch(_SEGMENT, name))
        self._expressions = [
            Expression(rf"(^|.*\.){name}($|\..*)", "modules_to_save", config, whole=False)
            for name in sorted(names - self._segments)
        ]

    def matches(self, module: str) -> bool:
        """Tell whether a module is saved whole, or lies inside one that is."""
        inside = not self._segments.isdisjoint(module.split("."))
        return inside or any(expression.matches(module) for expression in self._expressions)


@lru_cache(maxsize=4096)
def compile_alike(pattern: str) -> regex.Pattern[str] | None:
    """Return an expression, compiled by `regex`; None for one that it may read otherwise than `re`, or at great length.

    Raises `ValueError` with what `re` says of one that is wrong.
    """
    import regex  # most configs need none

    counts = re.findall(r"\d+", " ".join(re.findall(r"\{[\d,]*\}", pattern)))
    foreign = pattern.startswith("(?i)") and not pattern.isascii()
    if foreign or prod(map(int, counts)) > MAX_REPEATS or not re.fullmatch(_READ_ALIKE, pattern, re.VERBOSE | re.ASCII):
        return None
    try:
        re.compile(pattern)  # what PEFT cannot use is refused, also where `regex` could
        return regex.compile(pattern, regex.V0, cache_pattern=False)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from None
    except regex.error:
        return None


def _as_name(key: str) -> tuple[bool, str, tuple[int, ...]] | None:
    """Return whether a key that is a name begins with ^, the name, and its shape; None for an expression."""
    match = re.fullmatch(_NAME, key)
    if match is None or len(key) > MAX_PATTERN:
        return None
    name: str = match[2].replace(".", _ANY)
    if "\\" in name:
        name = re.sub(_ESCAPED_OR_DOT, lambda character: character[1] or _ANY, match[2])
    return bool(match[1]), name, tuple(map(len, name.split(_ANY)))


@lru_cache(maxsize=1024)
def _parts(shape: tuple[int, ...]) -> itemgetter[Any]:
    """Return what takes the parts of a name of this shape, between characters that may be any."""
    parts, start = [], 0
    for length in shape:
        parts.append(slice(start, start + length))
        start += length + 1
    return itemgetter(*parts)
