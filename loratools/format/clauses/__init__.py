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
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from reprlib import Repr
from typing import Any

from loratools.format import keys, registry
from loratools.format.canonical import texts_of
from loratools.format.manifest import names_of
from loratools.format.registry import KINDS, Kind
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

    @cached_property
    def fields(self) -> Mapping[str, str]:
        """The canonical text of each field of the manifest; `ValueError` where it has none."""
        return texts_of(self.manifest)

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
        """The well-formed entries of modules, and the kind of each, None for one that the file's version has not."""
        known = {name: kind for name, kind in KINDS.items() if kind.since <= self.version}
        names = [entry.get("kind") for _, entry in self._entries["modules"]]
        found = [known.get(name) if isinstance(name, str) else None for name in names]
        return [(path, entry, kind) for (path, entry), kind in zip(self._entries["modules"], found, strict=True)]

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
        return self._split[0]

    @cached_property
    def parts(self) -> Mapping[str, Mapping[str, str]]:
        """Module path -> part -> tensor name, as the names in the file and the kinds of its modules say."""
        return self._split[1]

    @cached_property
    def _split(self) -> _Names:
        kinds = tuple([(path, kind.name) for path, _, kind in self.kinds if kind])
        split = _split if len(self.tensors) < _MANY else _split.__wrapped__
        return split(tuple(self.tensors), kinds, tuple(self.replaced.values()))


_MANY = 4096
"""Tensors of which an answer is not kept for the next adapter: it would take more memory than it is worth."""

_Names = tuple[Mapping[str, tuple[str, str] | None], Mapping[str, Mapping[str, str]]]


@lru_cache(64)  # the next adapter has the same names
def _split(names: tuple[str, ...], kinds_of: tuple[tuple[str, str], ...], replacing: tuple[str, ...]) -> _Names:
    """Return `names` and `parts` of a subject whose modules are of these kinds (path, kind)."""
    kinds, replaced = {path: KINDS[name] for path, name in kinds_of}, set(replacing)
    pairs: dict[str, tuple[str, str] | None] = {}
    parts: dict[str, dict[str, str]] = {}
    for name in names:
        pair = keys.split(name)
        if pair is not None and not pair[1] and name not in replaced:
            pair = registry.split(pair[0], kinds) or pair
        pairs[name] = pair
        if pair and pair[1]:
            parts.setdefault(pair[0], {})[pair[1]] = name
    return pairs, parts


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
