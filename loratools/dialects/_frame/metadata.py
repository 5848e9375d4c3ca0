"""The header entries of a file, which stay with an adapter from reading to writing: trigger phrase, tags, thumbnail."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loratools.adapter.model import Adapter
from loratools.decisions import warned
from loratools.dialects._frame.numbers import most_common

_KEY = "metadata"
_OF_BYTES = ("sshs_", "modelspec.hash_sha256")  # hashes of one file, which another one makes false
_LISTS = ("modelspec.trigger_phrase", "modelspec.tags", "ss_trigger_words")
_TAGS = "ss_tag_frequency"
_FIRST = ("modelspec.thumbnail",)


def settings_with(metadata: Mapping[str, str], keep: Callable[[str], bool]) -> dict[str, Any]:
    """Return the settings of an adapter that hold the entries to `keep`; {} where there are none."""
    entries = {name: value for name, value in metadata.items() if keep(name)}
    return {_KEY: entries} if entries else {}


def metadata_of(adapter: Adapter) -> dict[str, str]:
    """Return the header entries of the file that an adapter was read from; {} where no dialect kept them."""
    entries = adapter.settings.get(_KEY)
    return {str(name): str(value) for name, value in entries.items()} if isinstance(entries, Mapping) else {}


def carried(adapter: Adapter, *own: str) -> dict[str, str]:
    """Return the entries for another file of the adapter, with its rank and alpha, and without hashes of the old one.

    `own` are the entries that the dialect writes itself.
    """
    entries = {
        name: value
        for name, value in metadata_of(adapter).items()
        if name not in own and not name.startswith(_OF_BYTES)
    }
    ranked = [update for update in adapter.updates.values() if update.rank]
    for name, values in (
        ("ss_network_dim", [float(update.rank) for update in ranked]),
        ("ss_network_alpha", [float(update.scaling * update.rank) for update in ranked]),
    ):
        if values and _number(entries.get(name)) not in (None, *values, *(update.alpha for update in ranked)):
            entries[name] = f"{most_common(values):g}"
    return entries


def tell_lost(adapter: Adapter, target: Path, dialect: str) -> None:
    """Warn of the entries that a dialect without a header for them leaves behind."""
    if entries := sorted(carried(adapter)):
        warned("%s: %s has no place for what the header said: %s", target, dialect, ", ".join(entries)[:500])


def joined(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Return the settings that hold the entries of several adapters as one, and warn of those that are not carried.

    Entries that agree stay; trigger phrases and tags add up, a thumbnail is that of the first.
    """
    every = [metadata_of(adapter) for adapter in adapters]
    entries: dict[str, str] = {}
    lost = []
    for name in dict.fromkeys(name for each in every for name in each):
        values = list(dict.fromkeys(each[name] for each in every if name in each))
        if len(values) == 1 or name in _FIRST or name.startswith(_OF_BYTES):  # hashes are made anew, or left out
            entries[name] = values[0]
        elif name in _LISTS:
            words = (word.strip() for value in values for word in value.split(","))
            entries[name] = ", ".join(dict.fromkeys(word for word in words if word))
        elif name == _TAGS and (tags := _tags(values)) is not None:
            entries[name] = tags
        else:
            lost.append(name)
    if lost:
        warned("entries of the headers in which the adapters differ are not carried: %s", ", ".join(sorted(lost))[:500])
    if several := [name for name in _FIRST if len({each[name] for each in every if name in each}) > 1]:
        warned("of the adapters' %s the first is carried", ", ".join(several))
    return {_KEY: entries} if entries else {}


def _tags(values: Sequence[str]) -> str | None:
    """Return the counts of tags by folder, added up; None where one is no such JSON."""
    total: dict[str, dict[str, int]] = {}
    try:
        for value in values:
            for folder, counts in json.loads(value).items():
                kept = total.setdefault(folder, {})
                for tag, count in counts.items():
                    kept[tag] = kept.get(tag, 0) + count
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    return json.dumps(total, ensure_ascii=False)


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
