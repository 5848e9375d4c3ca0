"""The combined change of every module, and from there to factors of a chosen rank: decompose, choose, round once.

ΔW = U·Σ·Vᵀ of factors costs a QR of each and an SVD of their small core, in float64; what is kept is U√Σ and √ΣVᵀ,
rounded once. The error of the result, as stored, is √(Σ_{i>r} σᵢ² + ‖rounding‖²): the optimum, and what rounding adds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from loratools.adapter import low_rank
from loratools.adapter.naming.compact import natural
from loratools.errors import IncompatibleAdapter
from loratools.linalg.factored import factored_svd, rounding2, squared_norm
from loratools.linalg.ranks.allocate import Ranks
from loratools.linalg.ranks.rules import Fixed, RankRule, Spectrum, bounded
from loratools.linalg.svd.truncated import truncated_svd
from loratools.parallel import Progress, cores, each
from loratools.storage import dtypes
from loratools.surgery.combine import methods
from loratools.surgery.combine.inputs import Aligned, Input, Member
from loratools.surgery.combine.methods._chance import AsPeft, Seeded
from loratools.surgery.combine.methods._terms import Chance, Term
from loratools.surgery.combine.options import CombineOptions

Item = TypeVar("Item")
Result = TypeVar("Result")


class Known(NamedTuple):
    """Singular values of one matrix, ‖ΔW‖_F², what of it they leave out, and its sides."""

    sigma: tuple[float, ...]
    norm2: float
    lost2: float
    sides: tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Decomposed:
    """The leading part left·right of one change, balanced, in float64: left (m, k), right (k, n), `sigma` descending.

    `norm2` is ‖ΔW‖_F², `lost2` what is not in left·right; 0 for a product, whose rank is k. `size` is Σ |wᵢ|·‖ΔWᵢ‖_F of
    what it was made of: where that is far larger, the terms cancel. Of a stack of experts left is (E, m, k), right
    (E, k, n), `each` the change of every expert without its factors, and σᵢ the root of the energy that all their i-th
    directions hold, since one rank is for all.
    """

    left: Tensor
    right: Tensor
    sigma: tuple[float, ...]
    norm2: float
    lost2: float = 0.0
    size: float = 0.0
    each: tuple[Known, ...] = ()

    @property
    def sides(self) -> tuple[int, int]:
        """Sides (m, n) of the matrix, whose sum a rank costs; of a stack those of all experts together."""
        count = len(self.left) if self.left.ndim > 2 else 1
        return count * self.left.shape[-2], count * self.right.shape[-1]

    @property
    def spectra(self) -> tuple[Known, ...]:
        """What is known of each matrix by itself."""
        return self.each or (Known(self.sigma, self.norm2, self.lost2, self.sides),)


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What is stored of a change: factors in their final dtype, and the squared errors, as stored and at best."""

    left: Tensor
    right: Tensor
    error2: float
    optimum2: float


@dataclass(frozen=True, slots=True)
class Share:
    """What one module keeps.

    `given` is the sum of the ranks that came in, `true_rank` the number of nonzero singular values, `rank` what is
    kept; `norm` is ‖ΔW‖_F, `error` ‖ΔW − result‖_F as stored, `optimum` the least that any result of this rank has.
    """

    module: str
    kind: str
    shape: tuple[int, ...]
    given: int
    true_rank: int
    rank: int
    norm: float
    error: float
    optimum: float
    largest: float
    smallest: float

    @property
    def energy(self) -> float:
        """Share of ‖ΔW‖_F² that is kept."""
        return 1 - (self.error / self.norm) ** 2 if self.norm else 1.0


def combined(
    inputs: Sequence[Input], aligned: Aligned, options: CombineOptions, progress: Progress
) -> dict[str, Decomposed | None]:
    """Return module -> its decomposed change, None where it is zero; no number depends on the threads.

    Raises `IncompatibleAdapter` with every module that fails: numbers that are not finite, rules that do not apply.
    """
    seed, threads = options.seed or 0, options.threads
    chance: Chance = Seeded(seed)
    if options.like == "peft" and methods.seed_of(options.method, options) is not None:
        # One stream for all modules: they must draw from it one after the other.
        chance, threads = AsPeft(seed), 1

    def change(module: str, members: Sequence[Member]) -> Decomposed | None:
        rule = _rule(members, options)
        single = not members[0].update.members
        each = []
        for expert in [None] if single else range(members[0].update.shape[0]):
            terms = [term for member in members if (term := _term(module, member, inputs, expert)).weight != 0]
            merged = methods.get(options.method).merge(terms, options, chance) if terms else None
            size = sum(abs(term.weight) * float(squared_norm(term.left, term.right)) ** 0.5 for term in terms)
            each.append(None if merged is None else _decompose(merged, rule, size))
        progress(sum(lazy.nbytes for member in members for lazy in member.update.parts.values()))
        return each[0] if single else _stacked(each)

    ordered = {module: aligned.modules[module] for module in sorted(aligned.modules, key=natural)}
    return for_each_module(change, ordered, threads)


def _term(module: str, member: Member, inputs: Sequence[Input], expert: int | None) -> Term:
    source = inputs[member.adapter]
    part = member.update if expert is None else member.update.members[expert]
    left, right = low_rank.load(part)
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


def _decompose(change: tuple[Tensor, Tensor] | Tensor, rule: RankRule, size: float) -> Decomposed | None:
    """Return the singular value decomposition of a change, or None if it is zero.

    A product is decomposed completely. A dense matrix is decomposed as far as `rule` asks (`linalg.truncated`), and its
    rank is then decided. Raises `ValueError` where numbers are not finite.
    """
    if isinstance(change, tuple):
        svd = factored_svd(*change)
        rank = int(svd.rank())
        if not rank:
            return None
        left, right, _ = svd.truncated(rank)
        norm2 = math.fsum(sigma * sigma for sigma in svd.S.tolist())
        return Decomposed(left, right, tuple(svd.S[:rank].tolist()), norm2, size=size)
    leading = truncated_svd(change, rule)
    if not leading.rank:
        return None
    root = leading.S.sqrt()
    left, right = leading.U.double() * root, root[:, None] * leading.Vh.double()
    return Decomposed(left, right, tuple(leading.S.tolist()), leading.norm2, leading.error2, size)


def _stacked(each: Sequence[Decomposed | None]) -> Decomposed | None:
    """Return the changes of a stack's experts as one, with zeros where one has a lower rank; None if all are zero."""
    changes = [change for change in each if change is not None]
    if not changes:
        return None
    rank, (out, inner) = max(len(change.sigma) for change in changes), changes[0].sides
    left = torch.zeros(len(each), out, rank, dtype=torch.float64)
    right = torch.zeros(len(each), rank, inner, dtype=torch.float64)
    sigma2 = torch.zeros(rank, dtype=torch.float64)
    for e, change in enumerate(each):
        if change is not None:
            own = len(change.sigma)
            left[e, :, :own], right[e, :own] = change.left, change.right
            sigma2[:own] += torch.tensor(change.sigma, dtype=torch.float64).square()
    return Decomposed(
        left, right, tuple(sigma2.sqrt().tolist()), math.fsum(change.norm2 for change in changes),
        math.fsum(change.lost2 for change in changes), math.hypot(*(change.size for change in changes)),
        tuple(spectrum for change in changes for spectrum in change.spectra),
    )  # fmt: skip


def choose(changes: Sequence[Decomposed], ranks: Ranks | None) -> list[int]:
    """Return the rank that each change keeps, at least 1: all there is without `ranks`.

    Raises `ValueError` for a budget that is too small.
    """
    most = [len(change.sigma) for change in changes]
    if ranks is None or not changes:
        return most
    shapes = [change.sides for change in changes]
    if ranks.budget is not None:
        return list(ranks.decide([change.sigma for change in changes], shapes, [True] * len(changes)).ranks)
    rule, wanted = ranks.first(shapes, 0.0), []
    for change, limit in zip(changes, most, strict=True):
        asked = [
            None if lost2 else rule.rank(Spectrum(torch.tensor(sigma, dtype=torch.float64), norm2, sides))
            for sigma, norm2, lost2, sides in change.spectra
        ]
        wanted.append(min(limit, max(limit if rank is None else rank for rank in asked)))
    if ranks.uniform:
        rank = bounded(max(wanted), ranks.minimum, ranks.maximum, ranks.multiple_of)
        wanted = [min(rank, limit) for limit in most]
    return wanted


def keep(change: Decomposed, rank: int, dtype: str) -> Kept:
    """Return the leading `rank` of a change, rounded to `dtype` (a safetensors name).

    Raises `ValueError` where the factors have numbers beyond the dtype, or are so small that they would become zero.
    """
    left, right = change.left[..., :rank], change.right[..., :rank, :]
    stored = left.to(dtypes.to_torch(dtype)), right.to(dtypes.to_torch(dtype))
    if not all(torch.isfinite(factor).all() for factor in stored):
        raise ValueError(f"its factors have numbers beyond {dtype}; BF16 and F32 hold them (--dtype)")
    rounding, energy = rounding2((left, right), stored), float(squared_norm(left, right).sum())
    if energy > 0 and rounding > 0.999 * energy:
        raise ValueError(
            f"its factors are too small for {dtype} and would become zero; BF16 and F32 hold them (--dtype)"
        )
    optimum2 = change.lost2 + math.fsum(sigma * sigma for sigma in change.sigma[rank:])
    return Kept(*stored, optimum2 + rounding, optimum2)


def for_each_module(
    work: Callable[[str, Item], Result], modules: Mapping[str, Item], threads: int | None
) -> dict[str, Result]:
    """Return module -> work(module, item); each thread uses one of torch, so that no number depends on them.

    Raises `IncompatibleAdapter` with every module for which `work` raises `ValueError`, and why.
    """
    return each(work, modules, threads or min(8, cores()), torch_threads=1, refuse=_refuse)


def _refuse(problems: Sequence[str]) -> IncompatibleAdapter:
    return IncompatibleAdapter(f"{len(problems)} module(s) cannot be worked on", problems)
