"""The combined change of every module, decomposed: one task for each module, several at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from loratools.adapter import low_rank
from loratools.adapter.naming.compact import natural
from loratools.errors import IncompatibleAdapter
from loratools.linalg.factored import squared_norm
from loratools.linalg.ranks.rules import Fixed, RankRule
from loratools.parallel import Progress, cores, each
from loratools.surgery.combine import methods, truncate
from loratools.surgery.combine.inputs import Aligned, Input, Member
from loratools.surgery.combine.methods._chance import AsPeft, Seeded
from loratools.surgery.combine.methods._terms import Chance, Term
from loratools.surgery.combine.options import CombineOptions

Item = TypeVar("Item")
Result = TypeVar("Result")


def combined(
    inputs: Sequence[Input], aligned: Aligned, options: CombineOptions, progress: Progress
) -> dict[str, truncate.Decomposed | None]:
    """Return module -> its decomposed change, None where it is zero; no number depends on the threads.

    Raises `IncompatibleAdapter` with every module that fails: numbers that are not finite, rules that do not apply.
    """
    seed, threads = options.seed or 0, options.threads
    chance: Chance = Seeded(seed)
    if options.like == "peft" and methods.seed_of(options.method, options) is not None:
        # One stream for all modules: they must draw from it one after the other.
        chance, threads = AsPeft(seed), 1

    def change(module: str, members: Sequence[Member]) -> truncate.Decomposed | None:
        terms = [term for member in members if (term := _term(module, member, inputs[member.adapter])).weight != 0]
        merged = methods.get(options.method).merge(terms, options, chance) if terms else None
        progress(sum(lazy.nbytes for member in members for lazy in member.update.parts.values()))
        if merged is None:
            return None
        size = sum(abs(term.weight) * float(squared_norm(term.left, term.right)) ** 0.5 for term in terms)
        return truncate.decompose(merged, _rule(members, options), size)

    ordered = {module: aligned.modules[module] for module in sorted(aligned.modules, key=natural)}
    return for_each_module(change, ordered, threads)


def _term(module: str, member: Member, source: Input) -> Term:
    left, right = low_rank.load(member.update)
    for name, factor in (("B", left), ("A", right)):
        if not bool(factor.isfinite().all()):
            raise ValueError(f"adapter {member.adapter + 1} has NaN or infinite elements in factor {name}")
    return Term(source.weight.of(module), left, right, f"{source.digest}|{module}")


def _rule(members: Sequence[Member], options: CombineOptions) -> RankRule:
    """Return how far a change that is no product is decomposed."""
    if options.rule is not None and options.rule.budget is None:
        return options.rule.first([], 0.0)
    own = [member.update.rank for member in members]
    return Fixed(max(own) if options.like else sum(own))


def for_each_module(
    work: Callable[[str, Item], Result], modules: Mapping[str, Item], threads: int | None
) -> dict[str, Result]:
    """Return module -> work(module, item); each thread uses one of torch, so that no number depends on them.

    Raises `IncompatibleAdapter` with every module for which `work` raises `ValueError`, and why.
    """
    return each(work, modules, threads or min(8, cores()), torch_threads=1, refuse=_refuse)


def _refuse(problems: Sequence[str]) -> IncompatibleAdapter:
    return IncompatibleAdapter(f"{len(problems)} module(s) cannot be worked on", problems)
