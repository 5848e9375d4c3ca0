"""The header entries of a file, which stay with an adapter from reading to writing: trigger phrase, tags, thumbnail.

A file of another dialect has them all again: ranks and alphas are those of its factors, hashes those of its bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loratools.adapter.kinds import Update
from loratools.adapter.model import HEADER, Adapter
from loratools.decisions import warned
from loratools.storage.beside.making import ENTRY
from loratools.storage.lazy import LazyTensor

OF_BYTES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
"""Hashes of one file, which another one makes false: they are computed anew."""
ALPHAS = ("ss_network_alpha", "lora_alpha", "network_alpha", "alpha")
"""Entries that trainers write the alpha of all modules into."""
RANKS = ("ss_network_dim", "lora_rank", "network_dim", "rank")
"""Entries that trainers write the rank of all modules into."""
DYNAMIC = "Dynamic"
"""What sd-scripts writes as rank and alpha where modules differ."""


def settings_with(metadata: Mapping[str, str], keep: Callable[[str], bool]) -> dict[str, Any]:
    """Return the settings of an adapter that hold the entries to `keep`; {} where there are none.

    How a file was made is said of that file, and never of one that is made of it.
    """
    entries = {name: value for name, value in metadata.items() if name != ENTRY and keep(name)}
    return {HEADER: entries} if entries else {}


def metadata_of(adapter: Adapter) -> dict[str, str]:
    """Return the header entries of the file that an adapter was read from; {} where no dialect kept them."""
    entries = adapter.settings.get(HEADER)
    return {str(name): str(value) for name, value in entries.items()} if isinstance(entries, Mapping) else {}


def carried(adapter: Adapter, tensors: Mapping[str, LazyTensor], *own: str) -> dict[str, str]:
    """Return the entries for a file of these tensors of the adapter: its own, with rank, alpha and hashes as they are.

    `own` are the entries that the dialect writes itself. All tensors are read where there is a hash among the entries.
    """
    from loratools.dialects._frame.hashes import hashes  # `inspect` need not wait for it

    entries = {name: value for name, value in metadata_of(adapter).items() if name not in own}
    hashed = [name for name in OF_BYTES if name in entries]
    entries = sized({name: value for name, value in entries.items() if name not in hashed}, adapter.updates)
    return entries | hashes(tensors, entries, hashed)


def sized(entries: Mapping[str, str], updates: Mapping[str, Update], *, anew: bool = False) -> dict[str, str]:
    """Return entries whose ranks and alphas are those of updates, `Dynamic` where these differ, as sd-scripts has it.

    One that is the rank or the alpha of some update stays, unless all are made `anew`.
    """
    ranked = [update for update in updates.values() if update.rank]
    ranks = {float(update.rank) for update in ranked}
    alphas = {float(update.scaling * update.rank) for update in ranked}
    stated = {update.alpha for update in ranked}
    written = dict(entries)
    for names, values, form, others in ((RANKS, ranks, "{:g}", frozenset()), (ALPHAS, alphas, "{!r}", stated)):
        for name in names:
            value = _number(entries.get(name))
            stale = anew and name in entries if value is None else anew or value not in values | others
            if values and stale:
                written[name] = form.format(next(iter(values))) if len(values) == 1 else DYNAMIC
    return written


def tell_lost(adapter: Adapter, target: Path, dialect: str) -> None:
    """Warn of the entries that a dialect without a header for them leaves behind."""
    if entries := sorted(metadata_of(adapter)):
        warned("%s: %s has no place for what the header said: %s", target, dialect, ", ".join(entries)[:500])


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
