"""Changes of a weight that has several names: which of them break the tie, and how they come onto other names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from loratools.adapter.model import Adapter
from loratools.adapter.placement.shared import Name, Tie, Ties
from loratools.errors import IncompatibleAdapter
from loratools.storage.lazy import LazyTensor

Names = Callable[[Tie], Collection[str]]


def breaking(adapter: Adapter, ties: Ties) -> list[str]:
    """Return the modules and parameters of an adapter whose change breaks a tie."""
    if not ties.ties:
        return []
    kept = _kept(adapter, ties)
    return [path for path in (*adapter.updates, *adapter.replacements) if path not in kept and ties.find(path)]


def acting(
    adapters: Sequence[Adapter], breaking_paths: Sequence[Collection[str]], ties: Ties
) -> dict[Any, tuple[int, ...]]:
    """Return (tie, name) -> the changes that break it there, each by a number of its own."""
    numbers: dict[tuple[Tie, Name], tuple[int, ...]] = {}
    for adapter, paths in zip(adapters, breaking_paths, strict=True):
        for path in paths:
            change = adapter.updates[path] if path in adapter.updates else adapter.replacements[path]
            if pair := ties.find(path):
                numbers[pair] = (*numbers.get(pair, ()), id(change))
    return numbers


def spread(
    adapter: Adapter, ties: Ties, names: Names = lambda tie: tie.stored, *, chosen: Collection[str] = ()
) -> Adapter:
    """Return the adapter with changes of one name of a weight on all `names` that an output stores it under.

    Those are the changes that keep the tie, and the paths `chosen`. Raises `IncompatibleAdapter` where two changes come
    onto one name.
    """
    moved = {*chosen, *_kept(adapter, ties)} if ties.ties else set()
    if not moved:
        return adapter
    updates = _spread(adapter.updates, moved, ties, names, module=True)
    return replace(adapter, updates=updates, replacements=_spread(adapter.replacements, moved, ties, names))


def _spread(changes: Any, moved: Collection[str], ties: Ties, names: Names, *, module: bool = False) -> dict[str, Any]:
    spread: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for path, change in changes.items():
        pair = ties.find(path) if path in moved else None
        for name in names(pair[0]) if pair else [path]:
            place = name.removesuffix(".weight") if pair and module else name
            if origins.setdefault(place, path) != path and spread[place] is not change:
                raise IncompatibleAdapter(
                    f"--tied both: one adapter changes the head and its embedding, which are one weight, {name}: "
                    f"{origins[place]} and {path}",
                    hint="Use --tied untie.",
                )
            spread[place] = change
    return spread


def _kept(adapter: Adapter, ties: Ties) -> set[str]:
    """Return the paths whose change keeps the tie: rows, one tensor for head and embedding, and biases."""
    rows = {path for path, update in adapter.updates.items() if update.replaced_rows and ties.find(path)}
    heads = {path for path in adapter.updates if (pair := ties.find(path)) and pair[1].is_head}
    alone = rows if not heads else set()  # rows of a head that has a change of its own are the embedding's
    pairs = {path: (lazy, pair) for path, lazy in adapter.replacements.items() if (pair := ties.find(path))}
    of_heads: list[LazyTensor] = [lazy for lazy, (_, name) in pairs.values() if name.is_head]
    of_others: list[LazyTensor] = [lazy for lazy, (_, name) in pairs.values() if not name.is_head]
    same = {path for path, (lazy, _) in pairs.items() if lazy in of_heads and lazy in of_others}
    return alone | same | {path for path, (_, (tie, _)) in pairs.items() if tie.is_bias}
