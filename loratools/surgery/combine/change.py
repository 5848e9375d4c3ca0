"""The combined change of every module, decomposed: one task for each module, several at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from loratools.adapter import low_rank
from loratools.adapter.naming.compact import natural
from loratools.errors import IncompatibleAdapter
from loratools.linalg.factored import squared_norm
from loratools.linalg.ranks.rules import Fixed, RankRule
from loratools.parallel import Progress, cores, each
from loratools.surgery.combine import methods, truncate
from loratools.surgery.combine.align import Aligned, Member
from loratools.surgery.combine.inputs import Input
from loratools.surgery.combine.methods._chance import AsPeft, Seeded
from loratools.surgery.combine.methods._terms import Chance, Term
from loratools.surgery.combine.options import CombineOptions

Item = TypeVar("Item")
Result = TypeVar("Result")

Changes = dict[str, truncate.Decomposed | None]
"""module -> its decomposed change, None where it is zero"""


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """What is to be combined, and how: the adapters, their modules side by side, the options."""

    inputs: Sequence[Input]
    aligned: Aligned
    options: CombineOptions

    def run(self, progress: Progress) -> Changes:
        """Return the change of every module; no number depends on the threads.

        Raises `IncompatibleAdapter` with every module that fails: numbers that are not finite, rules that do not apply.
        """
        seed, threads = self.options.seed or 0, self.options.threads
        chance: Chance = Seeded(seed)
        if self.options.like == "peft" and methods.seed_of(self.options.method, self.options) is not None:
            # One stream for all modules: they must draw from it one after the other.
            chance, threads = AsPeft(seed), 1
        ordered = {module: self.aligned.modules[module] for module in sorted(self.aligned.modules, key=natural)}
        return for_each_module(partial(self._change, chance, progress), ordered, threads)

    def _change(
        self, chance: Chance, progress: Progress, module: str, members: Sequence[Member]
    ) -> truncate.Decomposed | None:
        terms = [term for member in members if (term := self._term(module, member)).weight != 0]
        change = methods.get(self.options.method).merge(terms, self.options, chance) if terms else None
        progress(sum(lazy.nbytes for member in members for lazy in member.update.parts.values()))
        if change is None:
            return None
        size = sum(abs(term.weight) * float(squared_norm(term.left, term.right)) ** 0.5 for term in terms)
        return truncate.decompose(change, self._rule(members), size)

    def _term(self, module: str, member: Member) -> Term:
        left, right = low_rank.load(member.update)
        for name, factor in (("B", left), ("A", right)):
            if not bool(factor.isfinite().all()):
                raise ValueError(f"adapter {member.adapter + 1} has NaN or infinite elements in factor {name}")
        source = self.inputs[member.adapter]
        return Term(source.weight.of(module), left, right, f"{source.digest}|{module}")

    def _rule(self, members: Sequence[Member]) -> RankRule:
        """Return how far a change that is no product is decomposed."""
        ranks = self.options.rule
        if ranks is not None and ranks.budget is None:
            return ranks.first([], 0.0)
        own = [member.update.rank for member in members]
        return Fixed(max(own) if self.options.like else sum(own))


def for_each_module(
    work: Callable[[str, Item], Result], modules: Mapping[str, Item], threads: int | None
) -> dict[str, Result]:
    """Return module -> work(module, item); each thread uses one of torch, so that no number depends on them.

    Raises `IncompatibleAdapter` with every module for which `work` raises `ValueError`, and why.
    """
    return each(work, modules, threads or min(8, cores()), torch_threads=1, refuse=_refuse)


def _refuse(problems: Sequence[str]) -> IncompatibleAdapter:
    return IncompatibleAdapter(f"{len(problems)} module(s) cannot be worked on", problems)
