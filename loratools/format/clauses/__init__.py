"""The clauses of the specification, one small function each, in one file for each chapter of `spec/v1`.

A clause function takes a `Subject` and yields `(where, message)` for every fault. It looks only at what is well formed
as far as other clauses go, so that one fault gives one problem.

    layout       chapter 2: the files of an adapter, and what `adapter_config.json` says to PEFT
    manifest     chapter 3: the fields of the manifest
    tensors      chapter 4: every tensor accounted for
    integrity    chapters 5, 6 and 8: digests, extensions, versions
    container    chapter 7: the safetensors file itself
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import Repr
from typing import Any

from loratools.format import keys
from loratools.format.registry import KINDS, Kind
from loratools.storage.header import TensorSpec

ADAPTER_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"

Fault = tuple[str, str]
Check = Callable[["Subject"], Iterator[Fault]]
Form = tuple[Callable[[Any], bool], str]
"""Whether a JSON value is well formed, and what was expected, in words."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What the clauses look at: the header of one adapter, its manifest, and its config where it is a folder.

    `specs` is None for an adapter that is not written yet.
    """

    path: Path
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    manifest: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    config: Mapping[str, Any] | None = None
    specs: Mapping[str, TensorSpec] | None = None

    def entries(self, *fields: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the well-formed entries of fields, `modules` or `replacements`; of `modules` if none is named."""
        for name in fields or ("modules",):
            value = self.manifest.get(name)
            if isinstance(value, Mapping):
                yield from ((path, entry) for path, entry in value.items() if isinstance(entry, Mapping))

    def modules(self) -> Iterator[tuple[str, Mapping[str, Any], Kind]]:
        """Yield the modules of a registered kind that have a rank: (path, entry, kind)."""
        for path, entry in self.entries():
            kind = KINDS.get(entry.get("kind", "")) if isinstance(entry.get("kind"), str) else None
            if kind and natural(entry.get("rank"), 1):
                yield path, entry, kind

    def parts(self) -> dict[str, dict[str, str]]:
        """Return module path -> part -> tensor name, as the names in the file say."""
        names: dict[str, dict[str, str]] = {}
        for name in self.tensors:
            if (pair := keys.split(name)) and pair[1]:
                names.setdefault(pair[0], {})[pair[1]] = name
        return names


def natural(value: Any, least: int = 0) -> bool:
    """Tell whether a JSON value is an integer of at least `least` (and not a boolean)."""
    return type(value) is int and least <= value < 2**53


def text(value: Any) -> bool:
    """Tell whether a JSON value is a string that is not empty."""
    return isinstance(value, str) and value != ""


def number(value: Any) -> bool:
    """Tell whether a JSON value is a finite number (and not a boolean)."""
    return type(value) in (int, float) and abs(value) < float("inf")


def shown(value: Any) -> str:
    """Return a value for a message, cut short: it comes from a file that nobody has checked."""
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxstring = 2, 3, 3, 60


COUNT: Form = (lambda value: natural(value, 1), "a positive integer")
REAL: Form = (number, "a finite number")
TEXT: Form = (text, "a non-empty string")
FLAG: Form = (lambda value: isinstance(value, bool), "true or false")


class Chapter(dict[str, Check]):
    """The clause functions of one chapter by id."""

    def clause(self, identifier: str) -> Callable[[Check], Check]:
        """Register a function under a clause id."""

        def register(check: Check) -> Check:
            self[identifier] = check
            return check

        return register
