"""Changes of a weight that has several names: which of them break the tie, and how they come onto other names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loratools.adapter.model import Adapter
from loratools.errors import IncompatibleAdapter

if TYPE_CHECKING:
    from loratools.adapter.placement.classes import Name, Tie
    from loratools.adapter.placement.shared import Ties

    Names = Callable[[Tie], Collection[str]]

_TIED_BY_PEFT = ("embed_tokens", "lm_head")  # PEFT's EMBEDDING_LAYER_NAMES


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
    """Return the paths whose change keeps the tie.

    Those are rows of single tokens, one change of head and embedding alike, an embedding that PEFT is told to keep tied
    (`ensure_weight_tying`), and biases.
    """
    changes = {**adapter.updates, **adapter.replacements}
    pairs = {path: pair for path in changes if (pair := ties.find(path))}
    heads = {path for path, (_, name) in pairs.items() if name.is_head}
    rows = {path for path, update in adapter.updates.items() if path in pairs and update.replaced_rows}
    alone = rows if not heads & adapter.updates.keys() else set()  # beside a changed head they are the embedding's
    of_heads = {id(changes[path]) for path in heads}
    of_others = {id(change) for path, change in changes.items() if path in pairs.keys() - heads}
    same = {path for path in pairs if id(changes[path]) in of_heads & of_others}
    told = adapter.updates.keys() & pairs.keys() if adapter.settings.get("ensure_weight_tying") else set()
    kept_tied = {path for path in told if len(told) == 1 and path.rpartition(".")[2] in _TIED_BY_PEFT}
    return alone | same | kept_tied | {path for path, (tie, _) in pairs.items() if tie.is_bias}
