"""Facts, entries and what is private, changed in an adapter's documents."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from loratools.decisions import warned
from loratools.dialects._frame.metadata import ALPHAS, OF_BYTES, RANKS
from loratools.dialects._frame.places import ALSO, Fact, Place, table_of
from loratools.errors import InvalidOption
from loratools.format.manifest import is_path
from loratools.storage.beside import making
from loratools.storage.beside.front import data_of, parted
from loratools.surgery.edit import privacy
from loratools.surgery.edit.documents import CARD, Documents
from loratools.surgery.edit.pictures import data_uri

DECISIVE = frozenset({
    "format", "loratools", "lora_adapter_metadata", "ss_network_module", "ss_network_args", "loratools_names",
    "_quantization_metadata", *ALPHAS, *RANKS,
})  # fmt: skip
"""Entries of a header that decide what an adapter's tensors do: they are no metadata."""
_TITLES = ("modelspec.title", "modelspec.merged_from", "ss_output_name", "name", "title")


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of one entry or field: where it stands, its key, the old and the new value, None for none.

    `why` says of what `strip` takes out what it is; it is empty for what was asked for by name.
    """

    where: str
    key: str
    old: str | None
    new: str | None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a call asks for."""

    facts: Mapping[Fact, str]
    entries: Mapping[str, str]
    unset: tuple[str, ...]
    strip: bool

    @property
    def anything(self) -> bool:
        """Whether anything is to be changed."""
        return bool(self.facts or self.entries or self.unset or self.strip)


def changed(documents: Documents, dialect: str, wanted: Wanted) -> tuple[Change, ...]:
    """Change the documents, and return every change; raise `InvalidOption` for all that cannot be done."""
    problems: list[str] = []
    reasons: dict[tuple[str, str], str] = {}
    if wanted.strip:
        reasons = _strip(documents, dialect, keep=frozenset(wanted.entries))
    for pattern in wanted.unset:
        problems += _unset(documents, pattern)
    for fact, value in wanted.facts.items():
        problems += _set_fact(documents, dialect, fact, value)
    for key, value in wanted.entries.items():
        problems += _set_entry(documents, key, value)
    if problems:
        raise InvalidOption(f"{documents.path}: nothing was changed", problems)
    documents.settle()
    return tuple(_differences(documents, reasons))


def _set_fact(documents: Documents, dialect: str, fact: Fact, value: str) -> Iterator[str]:
    """Write a fact into every place that the dialect has for it; yield what is wrong with it."""
    if fact == "base" and is_path(value):
        if documents.stated is not None:
            yield f"--base {value}: a sealed adapter names its base as the Hub does, and by no path of one machine"
            return
        warned(
            "%s: the base model is named by a path of this machine, %s, which means nothing elsewhere",
            documents.path,
            value,
        )
    if fact == "thumbnail" and value:
        value = data_uri(Path(value))
    places = [place for place in table_of(dialect).get(fact, ()) if documents.has(place)]
    if not places:
        yield f"--{fact}: {_no_place(documents, dialect, fact)}"
        return
    known = [Place("header", key) for key in ALSO.get(fact, ()) if key in (documents.entries or {})]
    for place in dict.fromkeys([*places, *known]):
        documents.put(place, _as_before(documents, place, value) if value else None)


def _as_before(documents: Documents, place: Place, value: str) -> str:
    """Return a value in the form of the one that stands there: a list of JSON where that is one."""
    old = documents.get(place)
    if place.where == "header" and isinstance(old, str) and old.startswith("[") and not value.startswith("["):
        return json.dumps([part.strip() for part in value.split(",") if part.strip()], ensure_ascii=False)
    return value


def _no_place(documents: Documents, dialect: str, fact: Fact) -> str:
    if documents.entries is None:
        return f"no safetensors file holds this adapter, and its other files have no place for a {fact}"
    return f"files of {dialect} have no place for it"


def _set_entry(documents: Documents, key: str, value: str) -> Iterator[str]:
    if documents.entries is None:
        yield f"--set {key}: no safetensors file holds this adapter, and only such a file has entries"
    elif not key:
        yield "--set: an entry has a name before its ="
    elif key in DECISIVE:
        yield f"--set {key}: it decides what the tensors do, and is no metadata; convert or resize the adapter"
    elif key in OF_BYTES:
        yield f"--set {key}: it is computed from the tensors"
    elif key == making.ENTRY:
        yield f"--set {key}: it says how the file was made, which the command that makes one writes"
    else:
        documents.put_entry(key, value)


def _unset(documents: Documents, pattern: str) -> Iterator[str]:
    """Take out the entries that a name or a glob names; yield what is wrong with it."""
    entries = documents.entries or {}
    if pattern in DECISIVE:
        why = "it is the seal" if pattern == "loratools" else "it decides what the tensors do"
        yield f"--unset {pattern}: {why}, and stays"
        return
    matching = [key for key in entries if fnmatchcase(key, pattern)]
    if not matching:
        warned("%s: no entry %s; there are %s", documents.path, pattern, ", ".join(sorted(entries))[:500] or "none")
    if kept := [key for key in matching if key in DECISIVE]:
        warned("%s: --unset %s: %s stay, for they decide what the tensors do", documents.path, pattern, ", ".join(kept))
    for key in matching:
        if key not in kept:
            documents.put_entry(key, None)
            documents.silent |= key == making.ENTRY


def _strip(documents: Documents, dialect: str, keep: frozenset[str]) -> dict[tuple[str, str], str]:
    """Take out what is private; return (document, field) -> what it was."""
    published = frozenset(ALSO["trigger"]) | keep
    stays = DECISIVE | {*OF_BYTES}
    documents.silent = True  # what was asked of a file, now and before, holds what is taken out
    said = documents.said()
    names = privacy.names_in(text for part in said.values() for text in privacy.strings_in(part))
    authors = {str((documents.entries or {}).get(key, "")).strip() for key in ALSO["author"]} - {""}
    reasons: dict[tuple[str, str], str] = {}
    for key, value in list((documents.entries or {}).items()):
        called = names | authors if key in _TITLES else names
        if key not in stays and (found := privacy.private(key, value, called, published)):
            left = privacy.tidy(found.value) if key in _TITLES and found.value else found.value
            documents.put_entry(key, left or None)
            reasons["header", key] = found.reason
    for where, document in (
        ("adapter_config.json", documents.config), ("manifest", (documents.stated or {}).get("settings")),
    ):  # fmt: skip
        for key, value in list((document or {}).items()):
            if key in privacy.DECISIVE_FIELDS or (where == "manifest" and key == "metadata"):
                continue
            if document is not None and (found := privacy.private(key, value, names, published)):
                field = f"settings.{key}" if where == "manifest" else key
                reasons[where, field] = found.reason
                if found.value is None:
                    del document[key]
                else:
                    document[key] = found.value
    if documents.card is not None:
        before = documents.card
        documents.card, why = privacy.text_without(before, names)
        front, old = data_of(parted(documents.card)[0]), data_of(parted(before)[0])
        for key in old.keys() | front.keys():
            if old.get(key) != front.get(key):
                reasons[CARD, key] = " and ".join(why)
        reasons[CARD, ""] = " and ".join(why)
    return reasons


def _differences(documents: Documents, reasons: Mapping[tuple[str, str], str]) -> Iterator[Change]:
    now = documents.said()
    for where, old in documents.before.items():
        new = now[where]
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                why = reasons.get((where, key), "")
                yield from _parts(Change(where, key or "text", _shown(old.get(key)), _shown(new.get(key)), why))


def _parts(change: Change) -> Iterator[Change]:
    """Yield a change, or one for each field of JSON where old and new are objects."""
    old, new = (_object(value) for value in (change.old, change.new))
    if old is None or new is None or (old.keys() != new.keys() and _is_list(change.old)):
        yield change
        return
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            was, now = (None if each.get(key) is None else _text(each[key]) for each in (old, new))
            yield from _parts(Change(change.where, f"{change.key}.{key}", was, now, change.why))


def _is_list(text: str | None) -> bool:
    return bool(text and text.startswith("["))


def _object(text: str | None) -> dict[str, Any] | None:
    """Return the object of JSON that a text is, or a list of objects by their place; None for anything else."""
    try:
        value = json.loads(text) if text and text.startswith(("{", "[{")) else None
    except (ValueError, RecursionError):
        return None
    if isinstance(value, list) and all(isinstance(each, dict) for each in value):
        return {str(place): each for place, each in enumerate(value, 1)}
    return value if isinstance(value, dict) else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _shown(value: Any) -> str | None:
    return None if value is None else _text(value)
