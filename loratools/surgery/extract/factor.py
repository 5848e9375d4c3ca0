"""Factor one ΔW or a stack of them, keep the factors on disk, and remember what the certificate needs.

Stacked experts, W (E, out, in), are factored one at a time, with one rank for all, as PEFT's layout asks. A few changed
rows of an embedding are exact factors at once: ΔW (V, d) with n rows that are not zero is (B·A)ᵀ with A (n, V) of zeros
and ones, which selects the tokens, and B (d, n): n·(V + d) numbers where the whole embedding has V·d.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loratools.linalg.ranks.noise import rounding_edge
from loratools.linalg.ranks.rules import Fixed, RankRule
from loratools.parallel import Progress, no_progress, one_torch_thread
from loratools.storage import dtypes, files
from loratools.storage.digest import Hasher
from loratools.storage.header import TensorSpec
from loratools.surgery.extract.decompose import Decomposed, decompose
from loratools.surgery.extract.options import ExtractOptions
from loratools.surgery.extract.pairs import Pair
from loratools.surgery.extract.read import Delta, common_dtype, one_of, read_delta
from loratools.surgery.extract.spool import Spool, Spooled

Array = np.ndarray[Any, np.dtype[Any]]

MOST_ROWS = 64
"""Beyond these the selection costs more than it is worth, and the embedding is saved whole."""


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
        from loratools.linalg.factored import rounding2

        wanted = dtypes.to_torch(dtype)
        B, A = self.factors.load(rank)
        B, A = B.view(self.blocks, -1, rank), A.view(rank, self.blocks, -1).transpose(0, 1)
        return rounding2((B, A), (B.to(wanted), A.to(wanted)))


def factor(
    pair: Pair, delta: Delta, tuned: TensorSpec, shapes: Sequence[tuple[int, int]], options: ExtractOptions,
    spool: Spool, rule: RankRule | None = None,
) -> Factored:  # fmt: skip
    """Return the truncated SVD of a ΔW at the rank that the options choose, or a `rule` given here."""
    rule = rule or _first_rule(tuned, shapes, options)
    found = decompose(delta, rule, options, transposed=pair.transposed or pair.kind == "embedding")
    sides = len(found.B), found.A.shape[1]
    return Factored(
        spool.add(found.B, found.A), tuple(found.sigma.tolist()), _is_complete(found.rank, sides, rule), found.error2,
        found.rounded2, found.excess2, found.bound2, rounded=found.rounded,
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

    def look(e: int, rule: RankRule, told: Progress, hashers: Sequence[Hasher]) -> tuple[Delta, Decomposed | None]:
        old, new = one_of(base, e), one_of(tuned, e)
        delta = read_delta(old, new, told, keep=True, rounded=options.rounds, hashed=False, hashers=hashers)
        if delta.D is None:
            return delta, None
        return delta, decompose(delta, rule, options, transposed=pair.transposed)

    shown, energies = [], []
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
        sum(svd.error2 for svd in svds), sum(svd.rounded2 for svd in svds),
        sum(svd.excess2 for svd in svds), sum(svd.bound2 for svd in svds), len(shown),
        any(svd.rounded for svd in svds),
    )  # fmt: skip
    return factored, norm2, base_norm2, noise2


def _stacked(
    shown: Sequence[Decomposed | None], sides: tuple[int, ...], dtype: type[np.floating[Any]]
) -> tuple[Array, Array, list[float]]:
    """Return B (E·out, r), A (r, E·in), and the energy of each direction summed over the experts."""
    rank, (out, inner) = max(svd.rank for svd in shown if svd), sides
    B = np.zeros((len(shown), out, rank), dtype)
    A = np.zeros((rank, len(shown), inner), dtype)
    sigma2 = np.zeros(rank)
    for e, svd in enumerate(shown):
        if svd is not None:
            B[e, :, : svd.rank], A[: svd.rank, e] = svd.B, svd.A
            sigma2[: svd.rank] += np.square(svd.sigma)
    return B.reshape(-1, rank), A.reshape(rank, -1), sigma2.tolist()


def row_factors(base: TensorSpec, tuned: TensorSpec, rows: Sequence[int]) -> tuple[Array, Array]:
    """Return B (d, n) and A (n, V) of the rows that changed, float32 (float64 where one of the two is)."""
    import torch

    wide = common_dtype(base, tuned)
    twin = torch.float64 if wide is np.float64 else torch.float32
    old, new = ([files.read_tensor(one_of(spec, row)).to(twin) for row in rows] for spec in (base, tuned))
    A = np.zeros((len(rows), tuned.shape[0]), wide)
    A[np.arange(len(rows)), list(rows)] = 1
    return (torch.stack(new, 1) - torch.stack(old, 1)).numpy(), A


def is_sparse(pair: Pair, delta: Delta, shape: tuple[int, ...]) -> bool:
    """Tell whether a changed embedding, which nobody asked to save whole, is worth saving row by row."""
    return pair.sparse and 0 < len(delta.rows) <= min(MOST_ROWS, shape[0] // 4)


def _first_rule(tuned: TensorSpec, shapes: Sequence[tuple[int, int]], options: ExtractOptions) -> RankRule:
    """Return the rule of the first look at a weight of the fine-tune."""
    return options.rank_choice.first(shapes, _noise_edge(tuned) if options.rank_choice.noise else 0.0)


def _is_complete(rank: int, sides: Sequence[int], rule: RankRule) -> bool:
    """Tell whether no more is to be seen: the rank fills the short side, or a fixed one was not reached."""
    return rank == min(sides) or (isinstance(rule, Fixed) and rank < rule.r)


def _noise_edge(spec: TensorSpec) -> float:
    """Return the largest singular value that rounding this weight to its dtype can leave."""
    with one_torch_thread():
        W = files.read_tensor(spec)
        return rounding_edge(W.view(len(W), -1), W.dtype)
