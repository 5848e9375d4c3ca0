"""Factor one ΔW, keep its factors on disk, and remember what its certificate needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loratools.linalg.factored import rounding2
from loratools.linalg.ranks.noise import rounding_noise
from loratools.linalg.ranks.rules import Fixed, RankRule
from loratools.linalg.svd.truncated import TruncatedSVD, truncated_svd
from loratools.storage import dtypes, files
from loratools.storage.header import TensorSpec
from loratools.surgery.extract.options import ExtractOptions
from loratools.surgery.extract.pairs import Pair
from loratools.surgery.extract.read import Delta
from loratools.surgery.extract.spool import Spool, Spooled


@dataclass(frozen=True, slots=True, eq=False)
class Factored:
    """The leading part of one ΔW: its factors on disk, its singular values σ, and its error at full rank.

    `complete` says that there is no more to be seen of it: all σ are known, or no rule may take more. `lost2` is the
    squared error at full rank, `rounded2` what storing the factors at full rank in the wanted dtype adds. In a stack of
    `blocks` experts (`experts.py`) σᵢ is the root of the energy that all their i-th directions hold.
    """

    factors: Spooled
    sigma: tuple[float, ...]
    complete: bool
    lost2: float
    rounded2: float
    excess2: float
    bound2: float
    blocks: int = 1

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
    assert delta.D is not None
    D = delta.D.T if pair.transposed or pair.kind == "embedding" else delta.D
    rule = rule or first_rule(tuned, shapes, options)
    svd = decompose(D, rule, options)
    return Factored(
        spool.add(*svd.factors()), tuple(svd.S.tolist()), is_complete(svd.rank, D.shape, rule), svd.error2,
        stored2(svd, options.stored), svd.excess_estimate, svd.excess_bound,
    )  # fmt: skip


def first_rule(tuned: TensorSpec, shapes: Sequence[tuple[int, int]], options: ExtractOptions) -> RankRule:
    """Return the rule of the first look at a weight of the fine-tune."""
    return options.rank_choice.first(shapes, _noise_edge(tuned) if options.rank_choice.noise else 0.0)


def is_complete(rank: int, sides: Sequence[int], rule: RankRule) -> bool:
    """Tell whether no more is to be seen: the rank fills the short side, or a fixed one was not reached."""
    return rank == min(sides) or (isinstance(rule, Fixed) and rank < rule.r)


def decompose(D: torch.Tensor, rule: RankRule, options: ExtractOptions) -> TruncatedSVD:
    """Return the truncated SVD of a matrix as the options ask for it."""
    most, probe = options.rank_choice.maximum, options.tight
    return truncated_svd(D, rule, tolerance=options.tolerance, seed=options.seed, max_rank=most, probe=probe)


def stored2(svd: TruncatedSVD, dtype: str) -> float:
    """Return what storing the balanced factors in a dtype adds to the squared error."""
    wanted, root = dtypes.to_torch(dtype), svd.S.sqrt()
    B, A = svd.factors()
    return rounding2((svd.U.double() * root, root[:, None] * svd.Vh.double()), (B.to(wanted), A.to(wanted)))


def _noise_edge(spec: TensorSpec) -> float:
    """Return the largest singular value that rounding this weight to its dtype can leave."""
    W: torch.Tensor = files.read_tensor(spec)
    return rounding_noise(W.view(len(W), -1), W.dtype).edge
