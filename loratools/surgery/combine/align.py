"""Adapters side by side: which of their modules are one module, and what keeps them from being added up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loratools.adapter import low_rank
from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter
from loratools.adapter.naming.wrappers import normalized
from loratools.errors import IncompatibleAdapter, UnsupportedAdapter


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One adapter's update of a module; `adapter` is its number from 0."""

    adapter: int
    update: Update


@dataclass(frozen=True, slots=True, eq=False)
class Aligned:
    """The modules of all adapters by one name each, and each adapter's own names -> that one, for modules and paths."""

    modules: Mapping[str, tuple[Member, ...]]
    renamed: tuple[Mapping[str, str], ...]

    def path(self, adapter: int, parameter: str) -> str:
        """Return the common path of an adapter's parameter: that of its module, where it has an update."""
        module, _, last = parameter.rpartition(".")
        common = self.renamed[adapter].get(module)
        return f"{common}.{last}" if common else parameter


def align(names: Sequence[str], adapters: Sequence[Adapter]) -> Aligned:
    """Put the updates of several adapters together, module by module.

    Modules are one where their names are, up to wrappers in front (`model.`, `base_model.`); the first adapter's name
    counts. Raises `UnsupportedAdapter` with every module whose update is no product, `IncompatibleAdapter` with every
    module whose updates differ in kind or shape.
    """
    refused = [
        f"{name}: {module}: {reason}"
        for name, adapter in zip(names, adapters, strict=True)
        for module, update in adapter.updates.items()
        if (reason := low_rank.refusal(update))
    ]
    if refused:
        raise UnsupportedAdapter(
            f"{len(refused)} module(s) cannot be combined or resized in factor space",
            refused,
            hint="Merge such an adapter into its base model instead.",
        )
    modules: dict[str, list[Member]] = {}
    renamed: list[dict[str, str]] = []
    for number, adapter in enumerate(adapters):
        known = Counter(map(normalized, modules))
        by_normalized = {normalized(module): module for module in modules if known[normalized(module)] == 1}
        own = Counter(map(normalized, adapter.updates))
        common = {}
        for module, update in adapter.updates.items():
            bare = normalized(module)
            alone = module not in modules and own[bare] == 1
            common[module] = by_normalized.get(bare, module) if alone else module
            modules.setdefault(common[module], []).append(Member(number, update))
        renamed.append(common)
    _check(names, modules)
    return Aligned({module: tuple(members) for module, members in modules.items()}, tuple(renamed))


def _check(names: Sequence[str], modules: Mapping[str, Sequence[Member]]) -> None:
    problems = []
    for module, members in modules.items():
        first = members[0]
        for other in members[1:]:
            kinds, shapes = (first.update.kind, other.update.kind), (first.update.shape, other.update.shape)
            if kinds[0] != kinds[1]:
                difference = f"kind {kinds[0]} in {names[first.adapter]}, {kinds[1]} in {names[other.adapter]}"
            elif shapes[0] != shapes[1]:
                difference = f"shape {shapes[0]} in {names[first.adapter]}, {shapes[1]} in {names[other.adapter]}"
            else:
                continue
            problems.append(f"{module}: {difference}")
    if problems:
        raise IncompatibleAdapter(f"the adapters differ in {len(problems)} module(s) that they share", problems)
