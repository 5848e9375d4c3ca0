"""Which modules a command works on: names, globs, or regular expressions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from loratools.adapter.naming.compact import suffixes
from loratools.adapter.naming.wrappers import Names
from loratools.errors import LoraToolsError, counted

KINDS = ("linear", "conv", "embedding", "experts")
"""Kinds of modules whose change can be factored."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What is factored, saved whole, or dropped.

    `include` and `exclude` choose among all tensors, `save` names those that are kept whole, `kinds` what is factored
    of the rest, and `drop_whole` leaves out everything that is not factored. Patterns are those of `matches`.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    save: tuple[str, ...] = ()
    kinds: frozenset[str] = frozenset({"linear", "conv", "experts"})
    drop_whole: bool = False

    def dropped(self, path: str) -> str | None:
        """Return why a module or parameter is left out on request, or None."""
        if self.include and not any(matches(pattern, path) for pattern in self.include):
            return "not in --include"
        return next((f"--exclude {pattern}" for pattern in self.exclude if matches(pattern, path)), None)

    def saved(self, path: str) -> str | None:
        """Return which pattern asks to keep it whole, or None."""
        return next((f"--save-module {pattern}" for pattern in self.save if matches(pattern, path)), None)

    def check(self, paths: Iterable[str]) -> None:
        """Raise `LoraToolsError` that lists every pattern which matches none of the paths, with similar names."""
        paths = list(paths)
        names = Names(paths)
        options = (("--include", self.include), ("--exclude", self.exclude), ("--save-module", self.save))
        problems = [
            f"{option} {pattern}: matches nothing" + (f"; nearest: {', '.join(near)}" if near else "")
            for option, patterns in options
            for pattern in patterns
            if not any(matches(pattern, path) for path in paths)
            for near in [names.nearest(pattern)]
        ]
        if problems:
            raise LoraToolsError(
                f"{counted(len(problems), 'pattern names', 'patterns name')} no module of this model", problems
            )


def matches(pattern: str, path: str) -> bool:
    """Tell whether a pattern names a module or parameter.

    A plain name means the path or what follows one of its dots (`q_proj`, as PEFT's target_modules); a glob is held
    against the same (`layers.*.mlp.*`); `re:` begins a regular expression for the whole path (as PEFT's string). The
    path of a parameter counts with and without `.weight`.

    >>> matches("q_proj", "model.layers.0.self_attn.q_proj"), matches("re:.*[qv]_proj", "h.0.v_proj")
    (True, True)
    """
    names = {path, path.removesuffix(".weight")}
    if pattern.startswith("re:"):
        try:
            return any(re.fullmatch(pattern[3:], name) for name in names)
        except re.error as error:
            raise LoraToolsError(f"{pattern!r} is no regular expression: {error}") from None
    return any(fnmatchcase(suffix, pattern) for name in names for suffix in suffixes(name))
