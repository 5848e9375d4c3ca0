"""Which group of compressed-tensors' `config_groups` describes a module: by name, by pattern, by class."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from math import prod
from typing import Any

MAX_PATTERN, MAX_REPEATS = 1_000, 10_000
"""Characters of a pattern, and the product of the counts in it; real ones have a hundred characters."""

SECONDS = 0.5
"""Time that a pattern may take for one name; one that takes longer names nothing from then on."""

_CLASSES = ("Linear", "LinearBase", "Embedding", "ParallelLMHead", "VocabParallelEmbedding")


def group_of(statement: Mapping[str, Any], path: str) -> tuple[Mapping[str, Any], str | None] | None:
    """Return the weights' arguments of the group that a module is of, and its format; None where none names it.

    A target names a module, is a pattern (`re:…`, matched from the beginning), or a class; in this order the first
    group is taken, as the library does. Where no name fits, for the file's names have other beginnings than the
    model's, and there is one group with weights, it is that.
    """
    groups = statement.get("config_groups")
    if not isinstance(groups, Mapping):
        return None
    with_weights = [group for group in groups.values() if isinstance(group, Mapping) and _weights(group)]
    ranked = sorted(
        ((rank, i) for i, group in enumerate(with_weights) if (rank := _rank(group, path)) is not None),
    )
    if ranked:
        group = with_weights[ranked[0][1]]
    elif len(with_weights) == 1:
        group = with_weights[0]
    else:
        return None
    stated = group.get("format") or statement.get("format")
    return _weights(group), str(stated) if stated and stated != "mixed-precision" else None


def _weights(group: Mapping[str, Any]) -> Mapping[str, Any]:
    weights = group.get("weights")
    return weights if isinstance(weights, Mapping) else {}


def _rank(group: Mapping[str, Any], path: str) -> int | None:
    targets = group.get("targets")
    names = [target for target in targets if isinstance(target, str)] if isinstance(targets, list) else []
    ranks = [rank for target in names if (rank := _fits(target, path)) is not None]
    return min(ranks, default=None)


def _fits(target: str, path: str) -> int | None:
    if target == path:
        return 0
    if target.startswith("re:"):
        return 1 if matches(target, path) else None
    return 2 if target in _CLASSES else None


def matches(target: str, path: str) -> bool:
    """Tell whether an entry of `targets` or `ignore` names a module; a pattern that cannot be used names nothing."""
    return _pattern(target[3:]).names(path) if target.startswith("re:") else target == path


class _Pattern:
    """A pattern from a config, which comes from anywhere: matched in bounded time."""

    def __init__(self, pattern: str) -> None:
        import regex

        self._compiled: Any = None
        counts = re.findall(r"\{(?:\d*,)?(\d{1,9})", pattern)
        if len(pattern) <= MAX_PATTERN and prod(map(int, counts)) <= MAX_REPEATS:
            try:
                self._compiled = regex.compile(pattern)
            except (regex.error, RecursionError, OverflowError):
                return

    def names(self, path: str) -> bool:
        if self._compiled is None:
            return False
        try:
            return self._compiled.match(path, timeout=SECONDS) is not None
        except TimeoutError:
            self._compiled = None
            return False


@lru_cache(maxsize=4096)
def _pattern(pattern: str) -> _Pattern:
    return _Pattern(pattern)


def listed(entries: Any, paths: Iterable[str]) -> list[str]:
    """Return a list of names and patterns, with those of these paths that it does not have yet."""
    known = [entry for entry in entries if isinstance(entry, str)] if isinstance(entries, list | tuple) else []
    names, patterns = set(known), [entry for entry in known if entry.startswith("re:")]
    return [*known, *(path for path in paths if path not in names and not any(matches(p, path) for p in patterns))]
