"""PEFT's matching rules, exactly: which modules a config targets, and which pattern's rank and alpha they get.

The rules are those of `check_target_module_exists` and `get_pattern_key` of PEFT 0.21. A config comes from anywhere, so
its regular expressions are looked at before they run.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from loratools.dialects.peft import regex
from loratools.errors import UnsupportedAdapter

MAX_PATTERN = 20_000
"""Characters of one regular expression; the longest that trainers write have a few hundred."""

MAX_NAME = 1_000
"""Characters of a module name in which layers are counted; real ones have about fifty."""

ALL_LINEAR = "all-linear"

_MANY = re.compile(r"[*+]|\{\d*,\}|\{(\d*,)?\d\d+\}")


@dataclass(frozen=True, slots=True)
class Targets:
    """Which modules a config targets.

    `modules` are given by a regular expression (str), by names or suffixes (tuple), or not at all (None). `layers` are
    the only layer indices, or None for all; `layers_pattern` names the lists that they count. `saved` modules are
    trained whole, and `parameters` (experts) are targeted by their own path.
    """

    modules: str | tuple[str, ...] | None
    exclude: str | tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()

    def select(self, module: str) -> bool:
        """Tell whether PEFT would give this module an adapter; always true where the config leaves it open."""
        if any(matches_name(module, path.rpartition(".")[0]) for path in self.parameters):
            return True
        if self._excludes(module):
            return False
        if self.modules is None:
            return not self.parameters
        if isinstance(self.modules, str):
            return self.modules.lower() == ALL_LINEAR or fullmatch(self.modules, module)
        if module in self.modules:
            return True
        return any(module.endswith(f".{target}") for target in self.modules) and self._in_layers(module)

    def unused(self, modules: Collection[str]) -> list[str]:
        """Return the listed names that none of these modules answers to; [] for a regular expression."""
        names = self.modules if isinstance(self.modules, tuple) else ()
        return [name for name in names if not any(matches_name(module, name) for module in modules)]

    def _excludes(self, module: str) -> bool:
        if isinstance(self.exclude, str):
            if self.exclude and fullmatch(self.exclude, module):
                return True
        elif any(matches_name(module, name) for name in self.exclude):
            return True
        return any(begins(rf"(^|.*\.){name}($|\..*)", module) for name in self.saved)

    def _in_layers(self, module: str) -> bool:
        if not self.layers:
            return True
        if len(module) > MAX_NAME:
            raise UnsupportedAdapter(f"a module name of {len(module)} characters: {module[:80]!r}")
        # The first numbered segment is the layer; a greedy search would find an expert's number.
        patterns = [rf"(?:^|.*?\.){name}\.(?P<index>\d+)\." for name in self.layers_pattern] or [
            r".*?\.[^.]*\.(?P<index>\d+)\."
        ]
        found = next((match for pattern in patterns if (match := compiled(pattern).match(module))), None)
        return found is not None and int(found["index"]) in self.layers


def matches_name(module: str, name: str) -> bool:
    """Tell whether a module has this name, or ends in it after a dot."""
    return module == name or module.endswith(f".{name}")


def pattern_key(patterns: Iterable[str], module: str) -> str | None:
    r"""Return the first key K, in the order of the file, for which `re.match(rf"(.*\.)?({K})$", module)`, or None."""
    return next((key for key in patterns if begins(rf"(.*\.)?({key})$", module)), None)


def begins(pattern: str, text: str) -> bool:
    """Tell what `re.match` would, in bounded time."""
    return regex.matches(pattern, text, whole=False)


def fullmatch(pattern: str, text: str) -> bool:
    """Tell what `re.fullmatch` would, in bounded time."""
    return regex.matches(pattern, text, whole=True)


@lru_cache(maxsize=4096)
def compiled(pattern: str) -> re.Pattern[str]:
    """Return a compiled expression; raise `ValueError` if it is invalid, overlong, or could take exponential time."""
    if len(pattern) > MAX_PATTERN:
        raise ValueError(f"a regular expression of {len(pattern)} characters; at most {MAX_PATTERN} are read")
    if repeats_within_repeats(pattern):
        raise ValueError(
            f"{pattern[:80]!r} repeats a group that can match in several ways, which may take exponential time"
        )
    regex.check(pattern)
    return re.compile(pattern)


def repeats_within_repeats(pattern: str) -> bool:
    """Tell whether a repeated group can match one text in several ways, as `(a+)+` or `(a|a)*` can.

    Told by the look of it: a group with a repeat, an option or an alternative inside, itself repeated more than a few
    times. Harmless ones are among these, such as `(\\w+\\.)*`; trainers write none of them.
    """
    text = re.sub(r"\\.", "x", pattern, flags=re.DOTALL)
    text = re.sub(r"\[\^?\]?[^\]]*\]", "x", text)  # in a character class, nothing repeats
    text = re.sub(r"\(\?(P<\w+>|<?[=!]|\w*:)", "(", text)
    inside = [False]  # for each open group: whether something in it varies
    for i, character in enumerate(text):
        if character == "(":
            inside.append(False)
        elif character == ")" and len(inside) > 1:
            varies = inside.pop()
            if varies and _MANY.match(text, i + 1):
                return True
            inside[-1] = inside[-1] or varies
        elif character in "*+?|{":
            inside[-1] = True
    return False


_PLAIN = re.compile(r"[\w.-]+")


def problems(document: Mapping[str, Any]) -> list[str]:
    """List the regular expressions of a config that cannot be used."""
    found = []
    expressions: list[tuple[str, str]] = [
        (field, document[field])
        for field in ("target_modules", "exclude_modules")
        if isinstance(document.get(field), str)
    ]
    expressions += [("modules_to_save", rf"(^|.*\.){name}($|\..*)") for name in document.get("modules_to_save") or ()]
    for field in ("rank_pattern", "alpha_pattern"):
        expressions += [(field, rf"(.*\.)?({key})$") for key in document.get(field) or ()]
    pattern = document.get("layers_pattern") or ()
    pattern = (pattern,) if isinstance(pattern, str) else pattern
    found += [f"layers_pattern: {name[:80]!r} is no plain name" for name in pattern if not _PLAIN.fullmatch(name)]
    for field, expression in expressions:
        try:
            compiled(expression)
        except ValueError as error:
            found.append(f"{field}: {error}")
    if isinstance(document.get("target_modules"), str) and (
        document.get("layers_to_transform") is not None or document.get("layers_pattern")
    ):
        found.append(
            "target_modules is a regular expression, with which PEFT allows no layers_to_transform or layers_pattern"
        )
    return found
