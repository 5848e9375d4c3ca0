"""Adapters side by side: which of their modules are one module, and what keeps them from being added up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loratools.adapter import low_rank
from loratools.adapter.kinds import Update
from loratools.adapter.naming.wrappers import normalized
from loratools.errors import IncompatibleAdapter, LoraToolsError, UnsupportedAdapter
from loratools.surgery.combine.inputs import Input


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


def align(inputs: Sequence[Input]) -> Aligned:
    """Put the updates of several adapters together, module by module.

    Modules are one where their names are, up to wrappers in front (`model.`, `base_model.`); the first adapter's name
    counts. Raises `UnsupportedAdapter` with every module whose update is no product, `IncompatibleAdapter` with every
    module whose updates differ in kind or shape, `LoraToolsError` with every pattern of a weight that names no module.
    """
    refused = [
        f"{each.name}: {module}: {reason}"
        for each in inputs
        for module, update in each.adapter.updates.items()
        if (reason := low_rank.refusal(update))
    ]
    if refused:
        message = f"{len(refused)} module(s) cannot be combined or resized in factor space"
        raise UnsupportedAdapter(message, refused, hint="Merge such an adapter into its base model instead.")
    modules: dict[str, list[Member]] = {}
    renamed: list[dict[str, str]] = []
    for number, each in enumerate(inputs):
        known = Counter(map(normalized, modules))
        by_normalized = {normalized(module): module for module in modules if known[normalized(module)] == 1}
        own = Counter(map(normalized, each.adapter.updates))
        common = {}
        for module, update in each.adapter.updates.items():
            bare = normalized(module)
            alone = module not in modules and own[bare] == 1
            common[module] = by_normalized.get(bare, module) if alone else module
            modules.setdefault(common[module], []).append(Member(number, update))
        renamed.append(common)
    _check([each.name for each in inputs], modules)
    unmatched = [
        f"{each.name}: {pattern} names none of its modules"
        for each, common in zip(inputs, renamed, strict=True)
        for pattern in each.weight.unmatched([*common.values(), *each.adapter.replacements])
    ]
    if unmatched:
        raise LoraToolsError(f"{len(unmatched)} weight(s) are for nothing", unmatched)
    return Aligned({module: tuple(members) for module, members in modules.items()}, tuple(renamed))


def _check(names: Sequence[str], modules: Mapping[str, Sequence[Member]]) -> None:
    problems = []
    for module, (first, *others) in modules.items():
        for other in others:
            kinds, shapes = (first.update.kind, other.update.kind), (first.update.shape, other.update.shape)
            what, (old, new) = ("shape", shapes) if kinds[0] == kinds[1] else ("kind", kinds)
            if old != new:
                problems.append(f"{module}: {what} {old} in {names[first.adapter]}, {new} in {names[other.adapter]}")
    if problems:
        raise IncompatibleAdapter(f"the adapters differ in {len(problems)} module(s) that they share", problems)
