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

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field
from functools import cached_property
from pathlib import Path
from reprlib import Repr
from typing import Any

from loratools.format import keys, registry
from loratools.format.manifest import names_of
from loratools.format.registry import KINDS, Kind
from loratools.records import dataclass
from loratools.storage.header import TensorSpec

ADAPTER_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"

Fault = tuple[str, str]
Check = Callable[["Subject"], Iterator[Fault]]
Form = tuple[Callable[[Any], bool], str]
"""Whether a JSON value is well formed, and what was expected, in words."""


@dataclass(frozen=True)
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

    def entries(self, *fields: str) -> Sequence[tuple[str, Mapping[str, Any]]]:
        """Return the well-formed entries of fields, `modules` or `replacements`; of `modules` if none is named."""
        of = self._entries
        return [pair for name in fields for pair in of[name]] if len(fields) > 1 else of[(*fields, "modules")[0]]

    @cached_property
    def _entries(self) -> Mapping[str, Sequence[tuple[str, Mapping[str, Any]]]]:
        """The well-formed entries of either field: (path, entry)."""
        values = ((name, self.manifest.get(name)) for name in ("modules", "replacements"))
        return {
            name: [(path, entry) for path, entry in value.items() if isinstance(entry, dict)]
            if isinstance(value, dict)
            else []
            for name, value in values
        }

    def kind(self, entry: Mapping[str, Any]) -> Kind | None:
        """Return the kind of a module's entry; None for one that the file's own version does not register."""
        name = entry.get("kind")
        kind = KINDS.get(name) if isinstance(name, str) else None
        return kind if kind and kind.since <= self.version else None

    @cached_property
    def version(self) -> tuple[int, ...]:
        """The version of the format that the file states."""
        return tuple(map(int, str(self.manifest.get("format_version", "1.0")).split(".")))

    def modules(self) -> Sequence[tuple[str, Mapping[str, Any], Kind]]:
        """Return the modules of a registered kind that have a rank: (path, entry, kind)."""
        return self._modules

    @cached_property
    def _modules(self) -> Sequence[tuple[str, Mapping[str, Any], Kind]]:
        return [(path, entry, kind) for path, entry, kind in self.kinds if kind and natural(entry.get("rank"), 1)]

    @cached_property
    def kinds(self) -> Sequence[tuple[str, Mapping[str, Any], Kind | None]]:
        """The well-formed entries of modules, and the kind of each, None for one that is not registered."""
        return [(path, entry, self.kind(entry)) for path, entry in self.entries()]

    @cached_property
    def whole(self) -> Mapping[str, frozenset[str]]:
        """Path -> parts, of those of `modules()` that have exactly the parts of their kind."""
        have = ((path, kind, frozenset(self.parts.get(path, ()))) for path, _, kind in self._modules)
        return {path: parts for path, kind, parts in have if kind.accepts(parts)}

    @cached_property
    def ranked(self) -> Mapping[str, Sequence[tuple[str, Mapping[str, Any], Kind]]]:
        """Name of a kind -> those of `modules()` that are of it, and have its parts."""
        grouped: dict[str, list[tuple[str, Mapping[str, Any], Kind]]] = {}
        for path, entry, kind in self._modules:
            if path in self.whole:
                grouped.setdefault(kind.name, []).append((path, entry, kind))
        return grouped

    @cached_property
    def laid_out(self) -> Sequence[tuple[str, Mapping[str, Any], Kind]]:
        """Those of `modules()` that have a layout, or need one."""
        return [(path, entry, kind) for path, entry, kind in self._modules if kind.layout or "layout" in entry]

    @cached_property
    def foreign(self) -> Sequence[str]:
        """The modules of kinds that PEFT's LoRA does not have."""
        return [path for path, _, kind in self._modules if not kind.peft]

    def targeted(self) -> list[str]:
        """Return the modules that PEFT finds by `target_modules`; those of an unknown kind are among them."""
        return [path for path, _, kind in self.kinds if kind is None or kind.targeted]

    @cached_property
    def replaced(self) -> Mapping[str, str]:
        """Replaced parameter's path -> the name that its tensor has in the file."""
        return names_of({"modules": dict(self.entries()), "replacements": dict(self.entries("replacements"))})

    @cached_property
    def names(self) -> Mapping[str, tuple[str, str] | None]:
        """Tensor's name -> (module, part), or (its path, "") if it is no part, or None if it has no prefix."""
        kinds = {path: kind for path, _, kind in self.kinds if kind}
        replaced = set(self.replaced.values())

        def split(name: str) -> tuple[str, str] | None:
            pair = keys.split(name)
            return pair if pair is None or pair[1] or name in replaced else registry.split(pair[0], kinds) or pair

        return {name: split(name) for name in self.tensors}

    @cached_property
    def parts(self) -> Mapping[str, Mapping[str, str]]:
        """Module path -> part -> tensor name, as the names in the file and the kinds of its modules say."""
        found: dict[str, dict[str, str]] = {}
        for name, pair in self.names.items():
            if pair and pair[1]:
                found.setdefault(pair[0], {})[pair[1]] = name
        return found


def natural(value: Any, least: int = 0) -> bool:
    """Tell whether a JSON value is an integer of at least `least` (and not a boolean)."""
    return type(value) is int and least <= value < 2**53


def text(value: Any) -> bool:
    """Tell whether a JSON value is a string that is not empty."""
    return isinstance(value, str) and value != ""


def number(value: Any) -> bool:
    """Tell whether a JSON value is a finite number (and not a boolean)."""
    return type(value) in (int, float) and -math.inf < value < math.inf


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
