"""A verb and its arguments as plain data: what a worker needs to plan the same work."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Self

from loratools.errors import BadFile, InvalidOption
from loratools.parallel.plain import NotPlain, to_plain
from loratools.version import __version__


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a verb that pickles, and goes to JSON and back: paths are texts, and nothing in it is in memory only.

    `version` is that of loratools which wrote it; another one may plan otherwise.
    """

    verb: str
    arguments: Mapping[str, Any]
    version: str = __version__

    @classmethod
    def of(cls, verb: str, arguments: Mapping[str, Any], places: Collection[str] = ()) -> Self:
        """Make a call of a function's arguments.

        Args:
            verb: The name of the verb, as its command has it.
            arguments: Its arguments by name: numbers, texts, paths, and lists and mappings of such.
            places: Which of them are paths or references: a relative path means one place only in one process.

        Raises:
            InvalidOption: An argument is held in memory, and other processes cannot read it; all are listed.

        Example:
            >>> Call.of("merge", {"base": Path("base"), "weights": [0.5]}).arguments
            {'base': 'base', 'weights': [0.5]}
        """
        problems: list[str] = []
        plain = {name: _plain(name, value, problems) for name, value in arguments.items()}
        plain |= {name: _absolute(plain[name]) for name in places if name in plain}
        if problems:
            raise InvalidOption(
                f"{verb} shares its work with other processes, which cannot read what is held in memory", problems,
                hint="Save it first, and give its path.",
            )  # fmt: skip
        return cls(verb, plain)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {"verb": self.verb, "arguments": dict(self.arguments), "version": self.version}

    @classmethod
    def from_json(cls, document: Any, source: Path | str) -> Self:
        """Return what `to_json` made; raise `BadFile`, which names its `source`, for what it did not make."""
        return cls(*fields_of(document, {"verb": str, "arguments": dict, "version": str}, "a call", source))

    def check_version(self) -> None:
        """Raise `InvalidOption` where another version of loratools made the call."""
        if self.version != __version__:
            raise InvalidOption(
                f"the call is of loratools {self.version}, and this is {__version__}",
                hint="Install one version wherever parts of one result are made.",
            )


def fields_of(document: Any, kinds: Mapping[str, type], what: str, source: Path | str) -> list[Any]:
    """Return the values of a document by the names of `kinds`; raise `BadFile` where one is of another kind, or none.

    Args:
        document: What JSON holds.
        kinds: Names of the fields, in the order of the result -> what each is.
        what: What the document is expected to be, as `"a call"`.
        source: The file, as the error names it.

    Example:
        >>> fields_of({"verb": "merge", "more": 1}, {"verb": str}, "a call", "part.json")
        ['merge']
    """
    if not isinstance(document, dict) or any(not isinstance(document.get(name), kind) for name, kind in kinds.items()):
        raise BadFile(f"{source}: expected {what} with {', '.join(kinds)}")
    return [document[name] for name in kinds]


def _absolute(value: Any) -> Any:
    """Return a path, or a list of such, from the root on; a reference as it is."""
    if isinstance(value, list):
        return [_absolute(each) for each in value]
    return str(Path.cwd() / value) if isinstance(value, str) and "://" not in value else value


def _plain(name: str, value: Any, problems: list[str]) -> Any:
    """Return a value as JSON has it; add a problem for what lives in memory only."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, PathLike):
        return fspath(value)
    if is_dataclass(value) and not isinstance(value, type):
        try:
            return to_plain(value, name)
        except NotPlain as error:
            problems.append(str(error))
            return None
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(f"{name}[{key!r}]", each, problems) for key, each in value.items()}
    if isinstance(value, Sequence):
        return [_plain(f"{name}[{i}]", each, problems) for i, each in enumerate(value)]
    problems.append(f"{name} is a {type(value).__name__}")
    return None
