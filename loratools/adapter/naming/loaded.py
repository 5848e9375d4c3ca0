"""The tensors of a base's files as transformers loads them: by the names of modules, and made into others."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from loratools.adapter.naming.conversions import Conversion, Made, Rule, templated

# Leading segments that only wrap a model, whichever it is; the name that its class gives an inner model comes to them.
_WRAPPERS = frozenset({"base_model", "model", "module", "_orig_mod", "_fsdp_wrapped_module"})


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A tensor that files may have (`own`, after renaming), source `number` of a rule that makes `targets` of it."""

    own: str
    rule: Rule
    number: int
    targets: tuple[str, ...]

    def made(self, experts: int) -> Made:
        """Return what the rule makes of this tensor and of others like it, of so many `experts` where it stacks them.

        Only this tensor bears its own name.
        """
        pattern = self.rule.sources[self.number]
        match = re.search(pattern.replace("*", r"(\d+)"), self.own) if "*" in pattern else None
        count, at = (experts, int(match[1])) if match else (1, 0)
        sources = [[f"{number}.{i}" for i in range(max(count, at + 1))] for number in range(len(self.rule.sources))]
        sources[self.number][at] = self.own
        return Made(self.rule, tuple(map(tuple, sources)), self.targets)


class Loaded:
    """Names of a model's tensors, looked up in its files by transformers' rules for the model.

    A name is first the module's, as adapters have it that transformers 5 trains; then one of files, older ones among
    them, which the same rules bring to the module's.
    """

    def __init__(self, rules: Conversion, tensors: Collection[str]) -> None:
        self._rules, self._tensors = rules, tensors
        self._groups = rules.groups(tensors)
        self.blocks: dict[int, Any] = {}  # what placement made of the rules, by the id of the `Made`
        self._wrappers = _WRAPPERS | {rules.prefix}
        self._new_name = templated(lambda name: rules.renamed(name, self._groups))
        if any(rule.offset for rule in rules.rules):
            self._new_name = lambda name: rules.renamed(name, self._groups)

    def find(self, name: str) -> str | None:
        """Return the one tensor of the files that transformers loads, as it is, into a tensor of this name."""
        for wanted in self._spellings(name):
            bare = self._bare(wanted)
            for known, key in ((self._renamed, wanted), (self._by_bare_renamed, bare), (self._by_bare, bare)):
                if len(tensors := known.get(key, [])) == 1:
                    return tensors[0]
        return None

    def made(self, name: str) -> tuple[str, Made] | None:
        """Return the full name of a tensor that transformers makes of others of the files, and of which."""
        for wanted in self._spellings(name):
            full = wanted if wanted in self._made else self._made_by_bare.get(self._bare(wanted))
            if full is not None:
                return full, self._made[full]
        return None

    def part(self, name: str) -> Part | None:
        """Return what a tensor of this name, which the files lack, becomes part of in transformers; None if of none."""
        named = (self._new_name(each) for each in self._names(name))
        own, converted = next(((own, each) for own in named if (each := self._rules.converted(own))), (name, None))
        if converted is None:
            return None
        target, rule, number = converted
        targets = tuple(target.replace(rule.targets[0], other, 1) for other in rule.targets)
        return Part(own, rule, number, targets)

    def tensor(self, renamed: str) -> str:
        """Return the tensor of the files that has this name after renaming."""
        return self._renamed[renamed][0]

    def _spellings(self, name: str) -> dict[str, None]:
        """Return a name as it is and after renaming; the same of the part that is trained alone."""
        return dict.fromkeys(spelled for each in self._names(name) for spelled in (each, self._new_name(each)))

    def _names(self, name: str) -> tuple[str, ...]:
        return (name, f"{self._rules.alone}.{name}") if self._rules.alone else (name,)

    def _bare(self, name: str) -> str:
        segments = name.split(".")
        while len(segments) > 1 and segments[0] in self._wrappers:
            segments.pop(0)
        return ".".join(segments)

    @cached_property
    def _renamed(self) -> dict[str, list[str]]:
        return _grouped((self._new_name(tensor), tensor) for tensor in sorted(self._tensors))

    @cached_property
    def _by_bare_renamed(self) -> dict[str, list[str]]:
        return _grouped((self._bare(name), tensor) for name, tensors in self._renamed.items() for tensor in tensors)

    @cached_property
    def _by_bare(self) -> dict[str, list[str]]:
        return _grouped((self._bare(name), name) for name in sorted(self._tensors))

    @cached_property
    def _made(self) -> dict[str, Made]:
        return self._rules.makes(self._renamed)

    @cached_property
    def _made_by_bare(self) -> dict[str, str]:
        bare = _grouped((self._bare(name), name) for name in self._made)
        return {key: names[0] for key, names in bare.items() if len(names) == 1}


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Return the values of each key, in their order."""
    groups: dict[str, list[str]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups
