"""Factor one ΔW or a stack of them, keep the factors on disk, and remember what the certificate needs.

Stacked experts, W (E, out, in), are factored one at a time, with one rank for all, as PEFT's layout asks. A few changed
rows of an embedding are exact factors at once: ΔW (V, d) with n rows that are not zero is (B·A)ᵀ with A (n, V) of zeros
and ones, which selects the tokens, and B (d, n): n·(V + d) numbers where the whole embedding has V·d.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from loratools.engine.lane import Lane
from loratools.errors import LoraToolsError
from loratools.linalg.factored import rounding2
from loratools.linalg.products import Rounded
from loratools.linalg.ranks.noise import rounding_edge
from loratools.linalg.ranks.rules import Fixed, RankRule
from loratools.linalg.svd.truncated import TruncatedSVD, residual2, truncated_svd
from loratools.parallel import Progress, no_progress
from loratools.storage import dtypes, files
from loratools.storage.digest import Hasher
from loratools.storage.header import TensorSpec
from loratools.surgery.extract.options import ExtractOptions
from loratools.surgery.extract.pairs import Pair
from loratools.surgery.extract.read import Delta, common_dtype, one_of, read_delta
from loratools.surgery.extract.spool import Spool, Spooled

MOST_ROWS = 64
"""Beyond these the selection costs more than it is worth, and the embedding is saved whole."""

# Below this share of ‖ΔW‖² the error is float32's own, and the error of the stored factors is measured, not added up.
_AT_ROUNDING = 1e-10
# Singular values above which the factors have all of float32's digits, but for numbers that are nothing beside others.
_LARGE_ENOUGH = 1e-40


@dataclass(frozen=True, slots=True, eq=False)
class Factored:
    """The leading part of one ΔW: its factors on disk, its singular values σ, and its error at full rank.

    `complete` says that there is no more to be seen of it: all σ are known, or no rule may take more. `lost2` is the
    squared error at full rank, `rounded2` what storing the factors at full rank in the wanted dtype adds. In a stack of
    `blocks` experts σᵢ is the root of the energy that all their i-th directions hold. `rounded` tells that directions
    were found by products in bfloat16.
    """

    factors: Spooled
    sigma: tuple[float, ...]
    complete: bool
    lost2: float
    rounded2: float
    excess2: float
    bound2: float
    blocks: int = 1
    rounded: bool = False

    def error2(self, rank: int) -> float:
        """Return ‖ΔW − B·A‖_F² of the leading `rank` factors, before they are rounded."""
        return self.lost2 + sum(sigma * sigma for sigma in self.sigma[rank:])

    def rounding2(self, rank: int, dtype: str) -> float:
        """Return what storing the leading `rank` factors in `dtype` adds to the squared error."""
        if rank == len(self.sigma):
            return self.rounded2
        wanted = dtypes.to_torch(dtype)
        B, A = self.factors.load(rank)
        B, A = B.view(self.blocks, -1, rank), A.view(rank, self.blocks, -1).transpose(0, 1)
        return rounding2((B, A), (B.to(wanted), A.to(wanted)))


def factor(
    pair: Pair, delta: Delta, tuned: TensorSpec, shapes: Sequence[tuple[int, int]], options: ExtractOptions,
    spool: Spool, rule: RankRule | None = None,
) -> Factored:  # fmt: skip
    """Return the truncated SVD of a ΔW at the rank that the options choose, or a `rule` given here."""
    D, rounded = _oriented(delta, pair.transposed or pair.kind == "embedding")
    assert D is not None
    rule = rule or _first_rule(tuned, shapes, options)
    svd, factors, rounded2 = _decompose(D, rounded, delta.norm2, rule, options)
    return Factored(
        spool.add(*factors), tuple(svd.S.tolist()), _is_complete(svd.rank, D.shape, rule), svd.error2,
        rounded2, svd.excess_estimate, svd.excess_bound, rounded=svd.rounded,
    )  # fmt: skip


def factor_stack(
    pair: Pair, base: TensorSpec, tuned: TensorSpec, shapes: Sequence[tuple[int, int]], options: ExtractOptions,
    spool: Spool, rule: RankRule | None = None, *, hashers: Sequence[Hasher] = (), progress: Progress = no_progress,
) -> tuple[Factored | None, float, float, float]:  # fmt: skip
    """Return the truncated SVD of each expert's ΔW at the largest rank that any of them calls for, and three sums.

    These are `norm2`, `base_norm2` and `noise2` of a `Delta`, over all experts. On disk the factors are B (E·out, r)
    and A (r, E·in). An expert that did not change, or whose ΔW has a lower rank, gets zeros; where none changed there
    is no SVD. `hashers` take in what is read of both stacks, `progress` how much it was.
    """

    def look(e: int, rule: RankRule, told: Progress, hashers: Sequence[Hasher]) -> tuple[Delta, TruncatedSVD | None]:
        old, new = one_of(base, e), one_of(tuned, e)
        delta = read_delta(old, new, told, keep=True, rounded=options.rounds, hashed=False, hashers=hashers)
        D, rounded = _oriented(delta, pair.transposed)
        if D is None:
            return delta, None
        svd, _, rounded2[e] = _decompose(D, rounded, delta.norm2, rule, options)
        return delta, svd

    shown, energies = [], []
    rounded2: dict[int, float] = {}
    for e in range(tuned.shape[0]):
        used = rule or _first_rule(one_of(tuned, e), shapes, options)
        delta, svd = look(e, used, progress, hashers)
        shown.append(svd)
        energies.append((delta.norm2, delta.base_norm2, delta.noise2))
    most = max((svd.rank for svd in shown if svd), default=0)
    for e, svd in enumerate(shown):
        if svd and svd.rank < most:
            shown[e] = look(e, Fixed(most), no_progress, ())[1]
    norm2, base_norm2, noise2 = map(sum, zip(*energies, strict=True))
    svds = [svd for svd in shown if svd]
    if not svds:
        return None, norm2, base_norm2, noise2
    sides = tuned.shape[:0:-1] if pair.transposed else tuned.shape[1:]
    B, A, sigma2 = _stacked(shown, sides, common_dtype(base, tuned))
    factored = Factored(
        spool.add(B, A), tuple(value**0.5 for value in sigma2), _is_complete(len(sigma2), sides, used),
        sum(svd.error2 for svd in svds), sum(rounded2.values()),
        sum(svd.excess_estimate for svd in svds), sum(svd.excess_bound for svd in svds), len(shown),
        any(svd.rounded for svd in svds),
    )  # fmt: skip
    return factored, norm2, base_norm2, noise2


def _stacked(
    shown: Sequence[TruncatedSVD | None], sides: tuple[int, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """Return B (E·out, r), A (r, E·in), and the energy of each direction summed over the experts."""
    rank, (out, inner) = max(svd.rank for svd in shown if svd), sides
    B = torch.zeros(len(shown), out, rank, dtype=dtype)
    A = torch.zeros(rank, len(shown), inner, dtype=dtype)
    sigma2 = torch.zeros(rank, dtype=torch.float64)
    for e, svd in enumerate(shown):
        if svd is not None:
            B[e, :, : svd.rank], A[: svd.rank, e] = svd.factors()
            sigma2[: svd.rank] += svd.S.square()
    return B.view(-1, rank), A.view(rank, -1), sigma2.tolist()


def row_factors(base: TensorSpec, tuned: TensorSpec, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B (d, n) and A (n, V) of the rows that changed, float32 (float64 where one of the two is)."""
    wide = common_dtype(base, tuned)
    old, new = ([files.read_tensor(one_of(spec, row)).to(wide) for row in rows] for spec in (base, tuned))
    A = torch.zeros(len(rows), tuned.shape[0], dtype=wide)
    A[torch.arange(len(rows)), torch.tensor(rows)] = 1
    return torch.stack(new, 1) - torch.stack(old, 1), A


def is_sparse(pair: Pair, delta: Delta, shape: tuple[int, ...]) -> bool:
    """Tell whether a changed embedding, which nobody asked to save whole, is worth saving row by row."""
    return pair.sparse and 0 < len(delta.rows) <= min(MOST_ROWS, shape[0] // 4)


def _first_rule(tuned: TensorSpec, shapes: Sequence[tuple[int, int]], options: ExtractOptions) -> RankRule:
    """Return the rule of the first look at a weight of the fine-tune."""
    return options.rank_choice.first(shapes, _noise_edge(tuned) if options.rank_choice.noise else 0.0)


def _is_complete(rank: int, sides: Sequence[int], rule: RankRule) -> bool:
    """Tell whether no more is to be seen: the rank fills the short side, or a fixed one was not reached."""
    return rank == min(sides) or (isinstance(rule, Fixed) and rank < rule.r)


def _oriented(delta: Delta, transposed: bool) -> tuple[torch.Tensor | None, Rounded | None]:
    """Return D, and D in bfloat16, as the module has it."""
    D, rounded = delta.D, delta.rounded
    if not transposed:
        return D, rounded
    return None if D is None else D.T, None if rounded is None else rounded.T


def _decompose(
    D: torch.Tensor, rounded: Rounded | None, norm2: float, rule: RankRule, options: ExtractOptions
) -> tuple[TruncatedSVD, tuple[torch.Tensor, torch.Tensor], float]:
    """Return the truncated SVD of a matrix, whose ‖D‖² is known, its balanced factors, and what storing them costs.

    It is made on the options' device, and is in the processor's memory then.
    """
    lane = Lane.of(options.computes_on)
    with lane.open():
        D = lane.send(D)
        svd = truncated_svd(
            D, rule, tolerance=options.tolerance, seed=options.seed, max_rank=options.rank_choice.maximum,
            probe=options.tight, norm2=norm2, rounded=rounded,
        )  # fmt: skip
        B, A = svd.factors()
        rounded2 = _stored2(D, svd, (B, A), options.stored)
        return replace(svd, U=svd.U.cpu(), Vh=svd.Vh.cpu()), (B.cpu(), A.cpu()), rounded2


def _stored2(D: torch.Tensor, svd: TruncatedSVD, factors: tuple[torch.Tensor, torch.Tensor], dtype: str) -> float:
    """Return what storing the balanced factors of D in a dtype adds to the squared error, which it may also lessen.

    Raises `LoraToolsError` where a factor has a number beyond the dtype.
    """
    wanted, root = dtypes.to_torch(dtype), svd.S.sqrt().to(D.device)
    B, A = (factor.to(wanted) for factor in factors)
    if not (torch.isfinite(B).all() and torch.isfinite(A).all()):
        raise LoraToolsError(f"its factors have numbers beyond {dtype}; BF16 and F32 hold them (--dtype)")
    if svd.error2 <= _AT_ROUNDING * svd.norm2:  # the two roundings are of one size then, and not independent
        return residual2(D, B, A) - svd.error2
    if B.dtype == svd.U.dtype and float(svd.S[-1]) > _LARGE_ENOUGH:
        return 0.0  # the rounding of float32 factors is less than 1e-13 of what they hold
    return rounding2((svd.U.double() * root, root[:, None] * svd.Vh.double()), (B, A))


def _noise_edge(spec: TensorSpec) -> float:
    """Return the largest singular value that rounding this weight to its dtype can leave."""
    W: torch.Tensor = files.read_tensor(spec)
    return rounding_edge(W.view(len(W), -1), W.dtype)
