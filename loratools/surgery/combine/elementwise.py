"""What the methods that are no sum of products make of a module, one module after the other, with torch.

A dense matrix is decomposed as far as the rule of ranks asks (`linalg.svd`), a product completely.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from loratools.adapter import low_rank
from loratools.adapter.naming.compact import natural
from loratools.engine.device import computing
from loratools.engine.lane import Lane
from loratools.errors import LoraToolsError
from loratools.linalg import stacks
from loratools.linalg.factored import factored_svd, rounding2, squared_norm
from loratools.linalg.ranks.rules import Fixed, RankRule
from loratools.linalg.svd.truncated import truncated_svd
from loratools.parallel import Progress, cores, each
from loratools.parallel.shared import alone, shared
from loratools.storage import dtypes
from loratools.storage.lazy import LazyTensor
from loratools.storage.save import Spool
from loratools.surgery.combine import methods, travel
from loratools.surgery.combine.change import Change, Kept, Known, Settled, choose, refused
from loratools.surgery.combine.inputs import Aligned, Input, Member
from loratools.surgery.combine.methods import Merge
from loratools.surgery.combine.methods._chance import AsPeft, Seeded
from loratools.surgery.combine.methods._terms import Chance, MethodOptions, Term, Terms
from loratools.surgery.combine.options import CombineOptions

_LEAST = 1e-36  # of a change in float32, whose least number with all its digits is 1e-38


@dataclass(frozen=True, slots=True, eq=False)
class _Decomposed:
    """A change and its leading part left·right, balanced, in float64: (m, k) and (k, n); of a stack (E, …) each."""

    change: Change
    left: Tensor
    right: Tensor


class _Laid(NamedTuple):
    """The same, in a file or in memory."""

    change: Change
    left: LazyTensor
    right: LazyTensor

    @classmethod
    def of(cls, found: _Decomposed, into: Spool | None) -> _Laid:
        left, right = LazyTensor.of(found.left), LazyTensor.of(found.right)
        return cls(found.change, *((left, right) if into is None else (into.stored(left), into.stored(right))))


def settle(
    inputs: Sequence[Input], aligned: Aligned, options: CombineOptions, progress: Progress, merge: Merge
) -> dict[str, Settled | None]:
    """Return module -> its change by a method's `merge`, and what is stored of it; None where that is zero.

    No number depends on the threads, and others may share the work, module by module. Raises `IncompatibleAdapter` with
    every module that fails, and `ValueError` for a budget that is too small.
    """
    seed, threads = options.seed or 0, options.threads or min(8, cores())
    chance: Chance = Seeded(seed)
    problems: dict[str, str] = {}
    if options.like == "peft" and methods.seed_of(options.method, options) is not None:
        # One stream for all modules: they must draw from it one after the other.
        alone(
            f"{options.method} with like 'peft' draws from one stream for all modules, in their order",
            "Leave out --like, which gives each module its own; or work in this process.",
        )
        chance, threads = AsPeft(seed), 1

    into = travel.spool()

    def change(module: str, members: Sequence[Member]) -> _Laid | None:
        with Lane.of(options.computes_on).open():
            found = changed(module, members)
            Lane.of(options.computes_on).wait()  # another thread may go on with it
            return None if found is None else _Laid.of(found, into)

    def changed(module: str, members: Sequence[Member]) -> _Decomposed | None:
        rule = _rule(members, options)
        single = not members[0].update.members
        of_each = []
        try:
            for expert in [None] if single else range(members[0].update.shape[0]):
                terms = [
                    term for member in members if (term := _term(module, member, inputs, expert, options)).weight != 0
                ]
                merged = merge(terms, options, chance) if terms else None
                size = sum(abs(term.weight) * float(squared_norm(term.left, term.right)) ** 0.5 for term in terms)
                if isinstance(merged, Tensor) and not _is_held(merged, terms, size):
                    raise ValueError(f"its change is too large or too small for float32, which {options.method} takes")
                of_each.append(None if merged is None else _decompose(merged, rule, size))
        except (LoraToolsError, ValueError) as error:
            problems[module] = str(error)
            return None
        progress(sum(lazy.nbytes for member in members for lazy in member.update.parts.values()))
        return of_each[0] if single else _stacked(of_each)

    def several(some: Mapping[str, Sequence[Member]]) -> dict[str, _Laid | None]:
        with computing(options.computes_on):
            done = each(change, some, threads, torch_threads=1)
        if problems:
            raise refused(problems)
        return done

    ordered = {module: aligned.modules[module] for module in sorted(aligned.modules, key=natural)}
    looked = {module: found for module, found in shared(several, ordered, _numbers).items() if found}
    names = sorted(looked)
    ranks = dict(zip(names, choose([looked[name].change for name in names], options.rule), strict=True))
    with computing(options.computes_on):
        kept = each(lambda name, rank: _keep(looked[name], rank, options), ranks, threads, torch_threads=1)
    if faults := {name: fault for name, each in kept.items() if (fault := each.fault(options.stored))}:
        raise refused(faults)
    return dict.fromkeys(ordered) | {name: Settled(looked[name].change, ranks[name], kept[name]) for name in names}


def side_by_side(terms: Terms, options: MethodOptions, chance: Chance) -> tuple[Tensor, Tensor]:
    """Return the sum of products as one, Σ wᵢ·Bᵢ·Aᵢ: B = [√|w₁|·B₁ | …] and A = [sgn(w₁)√|w₁|·A₁; …]."""
    left = torch.cat([math.sqrt(abs(term.weight)) * term.left for term in terms], 1)
    right = [math.copysign(math.sqrt(abs(term.weight)), term.weight) * term.right for term in terms]
    return left, torch.cat(right)


def _term(module: str, member: Member, inputs: Sequence[Input], expert: int | None, options: CombineOptions) -> Term:
    source = inputs[member.adapter]
    part = member.update if expert is None else member.update.members[expert]
    left, right = (factor.to(options.computes_on) for factor in low_rank.load(part))
    number = "" if expert is None else f".{expert}"
    for name, factor in (("B", left), ("A", right)):
        if not bool(factor.isfinite().all()):
            raise ValueError(f"adapter {member.adapter + 1} has NaN or infinite elements in factor {name}")
    return Term(source.weight.of(module), left, right, f"{source.digest}|{module}{number}")


def _rule(members: Sequence[Member], options: CombineOptions) -> RankRule:
    """Return how far a change that is no product is decomposed."""
    if options.rule is not None and options.rule.budget is None:
        return options.rule.first([], 0.0)
    own = [member.update.rank for member in members]
    return Fixed(max(own) if options.like == "peft" else sum(own))


def _is_held(merged: Tensor, terms: Terms, size: float) -> bool:
    """Tell whether float32 holds what a method made of terms in it, whose norms add up to `size`."""
    acting = size > 0 or any(bool(term.left.any()) and bool(term.right.any()) for term in terms)
    return bool(merged.isfinite().all()) and (size > _LEAST or not acting)


def _decompose(change: tuple[Tensor, Tensor] | Tensor, rule: RankRule, size: float) -> _Decomposed | None:
    """Return the singular value decomposition of a change, or None if it is zero.

    Raises `ValueError` where numbers are not finite, or their squares are none of float64's.
    """
    if isinstance(change, tuple):
        svd = factored_svd(*change)
        rank = int(svd.rank())
        if not rank:
            return None
        if not stacks.LEAST < float(svd.S[0]) < 1 / stacks.LEAST:
            raise ValueError(stacks.NO_SQUARES)
        left, right, _ = svd.truncated(rank)
        norm2 = math.fsum(sigma * sigma for sigma in svd.S.tolist())
        return _Decomposed(Change(tuple(svd.S[:rank].tolist()), norm2, 0.0, _sides(left, right), size), left, right)
    leading = truncated_svd(change, rule)
    if not leading.rank:
        return None
    root = leading.S.sqrt().to(leading.U.device)
    left, right = leading.U.double() * root, root[:, None] * leading.Vh.double()
    known = Change(tuple(leading.S.tolist()), leading.norm2, leading.error2, _sides(left, right), size)
    return _Decomposed(known, left, right)


def _sides(left: Tensor, right: Tensor) -> tuple[int, int]:
    return len(left), right.shape[1]


def _stacked(each: Sequence[_Decomposed | None]) -> _Decomposed | None:
    """Return the changes of a stack's experts as one, with zeros where one has a lower rank; None if all are zero."""
    known = [found for found in each if found is not None]
    if not known:
        return None
    rank, (out, inner) = max(len(found.change.sigma) for found in known), known[0].change.sides
    left = known[0].left.new_zeros(len(each), out, rank)
    right = known[0].right.new_zeros(len(each), rank, inner)
    for e, found in enumerate(each):
        if found is not None:
            own = len(found.change.sigma)
            left[e, :, :own], right[e, :own] = found.left, found.right
    spectra: list[Known] = [spectrum for found in known for spectrum in found.change.spectra]
    size = math.hypot(*(found.change.size for found in known))
    return _Decomposed(Change.of_stack(spectra, len(each), size), left, right)


def _numbers(members: Sequence[Member]) -> int:
    """Return how many numbers the change of a module has: by them the work of modules is compared."""
    return math.prod(members[0].update.shape)


def _keep(found: _Laid, rank: int, options: CombineOptions) -> Kept:
    """Return the leading `rank` of a change, rounded to the dtype that is stored, in the processor's memory."""
    with Lane.of(options.computes_on).open():
        left, right = (factor.load().to(options.computes_on) for factor in (found.left, found.right))
        return _rounded(left[..., :rank], right[..., :rank, :], dtypes.to_torch(options.stored))


def _rounded(left: Tensor, right: Tensor, dtype: torch.dtype) -> Kept:
    stored = left.to(dtype).contiguous(), right.to(dtype).contiguous()
    held = LazyTensor.of(stored[0].cpu()), LazyTensor.of(stored[1].cpu())
    energy = float(squared_norm(left, right).sum())
    if not all(torch.isfinite(factor).all() for factor in stored):
        return Kept(*held, math.inf, energy)
    return Kept(*held, rounding2((left, right), stored), energy)
