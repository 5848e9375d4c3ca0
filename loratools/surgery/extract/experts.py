"""Factor a stack of experts, W (E, out, in): one expert at a time, one rank for all, as PEFT's layout asks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loratools.linalg.ranks.rules import Fixed, RankRule
from loratools.linalg.svd.truncated import TruncatedSVD
from loratools.parallel import no_progress
from loratools.storage.header import TensorSpec
from loratools.surgery.extract.factor import Factored, decompose, first_rule, is_complete, stored2
from loratools.surgery.extract.options import ExtractOptions
from loratools.surgery.extract.pairs import Pair
from loratools.surgery.extract.read import Delta, common_dtype, one_of, read_delta
from loratools.surgery.extract.spool import Spool


def factor_stack(
    pair: Pair, base: TensorSpec, tuned: TensorSpec, shapes: Sequence[tuple[int, int]], options: ExtractOptions,
    spool: Spool, rule: RankRule | None = None,
) -> tuple[Factored, float, float, float]:  # fmt: skip
    """Return the truncated SVD of each expert's ΔW at the largest rank that any of them calls for, and three sums.

    These are `norm2`, `base_norm2` and `noise2` of a `Delta`, over all experts. On disk the factors are B (E·out, r)
    and A (r, E·in). An expert that did not change, or whose ΔW has a lower rank, gets zeros.
    """

    def look(e: int, rule: RankRule) -> tuple[Delta, TruncatedSVD | None]:
        delta = read_delta(one_of(base, e), one_of(tuned, e), no_progress, keep=True)
        D = delta.D.T if delta.D is not None and pair.transposed else delta.D
        return delta, None if D is None else decompose(D, rule, options)

    shown, energies = [], []
    for e in range(tuned.shape[0]):
        used = rule or first_rule(one_of(tuned, e), shapes, options)
        delta, svd = look(e, used)
        shown.append(svd)
        energies.append((delta.norm2, delta.base_norm2, delta.noise2))
    most = max((svd.rank for svd in shown if svd), default=0)
    for e, svd in enumerate(shown):
        if svd and svd.rank < most:
            shown[e] = look(e, Fixed(most))[1]
    svds = [svd for svd in shown if svd]
    sides = tuned.shape[:0:-1] if pair.transposed else tuned.shape[1:]
    B, A, sigma2 = _stacked(shown, sides, common_dtype(base, tuned))
    factored = Factored(
        spool.add(B, A), tuple(value**0.5 for value in sigma2), is_complete(len(sigma2), sides, used),
        sum(svd.error2 for svd in svds), sum(stored2(svd, options.stored) for svd in svds),
        sum(svd.excess_estimate for svd in svds), sum(svd.excess_bound for svd in svds), len(shown),
    )  # fmt: skip
    norm2, base_norm2, noise2 = map(sum, zip(*energies, strict=True))
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
