"""The truncated SVD of one ΔW that was read: without torch where that does, on a GPU where one is to compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loratools.errors import LoraToolsError
from loratools.linalg.ranks.rules import Fixed, RankRule
from loratools.linalg.svd import usual
from loratools.storage import dtypes
from loratools.surgery.extract.options import ExtractOptions
from loratools.surgery.extract.read import Delta

if TYPE_CHECKING:
    import torch

    from loratools.linalg.svd.truncated import TruncatedSVD

Array = np.ndarray[Any, np.dtype[Any]]

# Below this share of ‖ΔW‖² the error is float32's own, and the error of the stored factors is measured, not added up.
_AT_ROUNDING = 1e-10
# Singular values above which the factors have all of float32's digits, but for numbers that are nothing beside others.
_LARGE_ENOUGH = 1e-40


@dataclass(frozen=True, slots=True, eq=False)
class Decomposed:
    """Balanced factors B (m, r) and A (r, n) of ΔW, its σ (r,) in float64, and the certificate.

    `rounded2` is what storing the factors in the wanted dtype adds to `error2`, which it may also lessen; `excess2` and
    `bound2` are how far from the optimum that can be, as estimated and at most; `rounded` tells that directions were
    found by products in bfloat16.
    """

    B: Array
    A: Array
    sigma: Array
    error2: float
    rounded2: float
    excess2: float
    bound2: float
    rounded: bool

    @property
    def rank(self) -> int:
        """Return r."""
        return len(self.sigma)


def decompose(delta: Delta, rule: RankRule, options: ExtractOptions, *, transposed: bool) -> Decomposed:
    """Return the truncated SVD of a ΔW that was kept, as its module has it.

    Raises `LoraToolsError` where a factor has a number beyond the dtype that is wanted.
    """
    assert delta.D is not None
    D, low = (None if X is None else X.T if transposed else X for X in (delta.D, delta.low))
    assert D is not None
    found = _usual(D, low, delta, rule, options)
    if found is None:
        return _by_torch(D, low, delta, rule, options)
    return Decomposed(
        found.B, found.A, found.S, found.error2, 0.0, found.excess_estimate, found.excess_bound, found.rounded
    )


def _usual(D: Array, low: Array | None, delta: Delta, rule: RankRule, options: ExtractOptions) -> usual.Leading | None:
    """Return what needs no torch; None where it has to be asked."""
    here = options.computes_on == "cpu" and options.stored == "F32" and not options.tight
    if not here or not isinstance(rule, Fixed) or D.dtype != np.float32:
        return None
    found = usual.leading(
        D, min(rule.r, options.rank_choice.maximum or rule.r), delta.norm2, tolerance=options.tolerance,
        seed=options.seed, low=low, lost2=delta.lost2,
    )  # fmt: skip
    return found if found and _all_digits(found.S[-1]) else None


def _all_digits(least: float) -> bool:
    """Tell whether the rounding of float32 factors is less than 1e-13 of what they hold, by their least σ."""
    return float(least) > _LARGE_ENOUGH


def _by_torch(D: Array, low: Array | None, delta: Delta, rule: RankRule, options: ExtractOptions) -> Decomposed:
    """Do what `usual` does for every matrix, rule and device."""
    import torch

    from loratools.engine.lane import Lane
    from loratools.linalg.products import Rounded
    from loratools.linalg.svd.truncated import truncated_svd
    from loratools.parallel import one_torch_thread

    rounded = None if low is None else Rounded(torch.from_numpy(low.view(np.int16)).view(torch.bfloat16), delta.lost2)
    lane = Lane.of(options.computes_on)
    # On one thread of torch: its sums are in another order on another number.
    with one_torch_thread(), lane.open():
        sent = lane.send(torch.from_numpy(D))
        svd = truncated_svd(
            sent, rule, tolerance=options.tolerance, seed=options.seed, max_rank=options.rank_choice.maximum,
            probe=options.tight, norm2=delta.norm2, rounded=rounded,
        )  # fmt: skip
        B, A = svd.factors()
        rounded2 = _stored2(sent, svd, (B, A), options.stored)
        return Decomposed(
            B.cpu().numpy(), A.cpu().numpy(), svd.S.numpy(), svd.error2, rounded2, svd.excess_estimate,
            svd.excess_bound, svd.rounded,
        )  # fmt: skip


def _stored2(D: torch.Tensor, svd: TruncatedSVD, factors: tuple[torch.Tensor, torch.Tensor], dtype: str) -> float:
    """Return what storing the balanced factors of D in a dtype adds to the squared error, which it may also lessen."""
    import torch

    from loratools.linalg.factored import rounding2
    from loratools.linalg.svd.truncated import residual2

    wanted, root = dtypes.to_torch(dtype), svd.S.sqrt().to(D.device)
    B, A = (factor.to(wanted) for factor in factors)
    if not (torch.isfinite(B).all() and torch.isfinite(A).all()):
        raise LoraToolsError(f"its factors have numbers beyond {dtype}; {dtypes.holders(dtype)} (--dtype)")
    if svd.error2 <= _AT_ROUNDING * svd.norm2:  # the two roundings are of one size then, and not independent
        return residual2(D, B, A) - svd.error2
    if B.dtype == svd.U.dtype and _all_digits(float(svd.S[-1])):
        return 0.0
    return rounding2((svd.U.double() * root, root[:, None] * svd.Vh.double()), (B, A))
