"""Truncated singular value decomposition of a dense matrix, near-optimal and with its error known exactly.

No full SVD of a matrix with both sides over 512 happens here: small sides are solved exactly through a float64 Gram
matrix, everything else by block Krylov iteration (`krylov.py`). Nothing here can fail to converge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from loratools.linalg.orthonormal import frobenius2, product64, row_chunks
from loratools.linalg.precision import full_float32
from loratools.linalg.products import Rounded
from loratools.linalg.ranks.rules import Fixed, RankRule, Spectrum
from loratools.linalg.svd import krylov
from loratools.linalg.svd.basis import FINE, LEFT, MODERATE, OFF, block_of, is_exact
from loratools.linalg.svd.certificate import energy_beyond, excess_bound

# Below this a sum of squares has lost digits in float64, or all of them; that of one float32 number is above it.
_FEWEST = 1e-280
# Below this share of ‖D‖² the residual is summed itself.
_CANCELLED = LEFT
# Below this float32 has no digits left for the residual; one step of subspace iteration in float64 then follows.
_AT_ROUNDING = 1e-5
# Of the tolerance, where a rule chooses the rank: it hangs on single singular values, not only on their sum.
_FINER = 0.1
# Directions beyond the rank that go into the last products with them, where a rule chooses the rank by the result.
_SPARE = 16


@dataclass(frozen=True, slots=True, eq=False)
class TruncatedSVD:
    """The rank-r part U·diag(S)·Vh of a matrix D, with its certificate.

    `U` (m, r) and `Vh` (r, n) are in D's dtype, `S` (r,) float64 on the CPU, descending. `norm2` is ‖D‖_F², `error2`
    is ‖D - U·diag(S)·Vh‖_F², exact up to rounding; no rank-r matrix comes closer than error2 - `excess_bound`, and
    error2 - `excess_estimate` is where the iteration was heading. `rounded` tells that the directions were found by
    products with D in bfloat16; they, σ and error2 are of products in float32 all the same. Rank 0 means that D is
    zero, and nothing else.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    norm2: float
    error2: float
    excess_bound: float
    excess_estimate: float
    method: str
    seed: int | None
    products: int
    rounded: bool = False

    @property
    def rank(self) -> int:
        """Return r, the number of singular values kept."""
        return len(self.S)

    @property
    def relative_error(self) -> float:
        """Return ‖D - D_r‖_F / ‖D‖_F, 0 for a zero matrix."""
        return math.sqrt(self.error2 / self.norm2) if self.norm2 > 0 else 0.0

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the balanced LoRA factors B = U·√S (m, r) and A = √S·Vh (r, n); B·A is the rank-r part, alpha = r."""
        root = self.S.sqrt().to(self.U.device)
        return (self.U.double() * root).to(self.U.dtype), (root[:, None] * self.Vh.double()).to(self.Vh.dtype)

    def truncated(self, rank: int) -> TruncatedSVD:
        """Return the leading `rank` ≤ r part with its exact error: error2 grows by the σ² let go.

        Raises ValueError for a rank that is not between 1 and r.
        """
        if not 1 <= rank <= self.rank:
            raise ValueError(f"rank {rank} was asked of a decomposition of rank {self.rank}; use 1 to {self.rank}")
        error2 = self.error2 + float((self.S[rank:] ** 2).sum())
        return replace(self, U=self.U[:, :rank], S=self.S[:rank], Vh=self.Vh[:rank], error2=error2)


def truncated_svd(
    D: Tensor, rule: RankRule | int, *, tolerance: float = 3e-4, seed: int = 0, max_rank: int | None = None,
    probe: bool = False, norm2: float | None = None, rounded: Rounded | None = None,
) -> TruncatedSVD:  # fmt: skip
    """Return the truncated SVD of D whose rank `rule` chooses, within `tolerance` of the optimal error².

    min over rank-r X of ‖D - X‖_F, with the excess ‖D - D_r‖_F² - optimum ≤ about tolerance·optimum, so that the error
    is within 1 + tolerance/2 of the best. D is (m, n), float32 or float64 (bfloat16 and float16 are widened); form it
    as float32 minus float32. `rule` is a rank or a rule of `ranks/rules.py`, for which the basis grows until it is met.
    `max_rank` caps the rank (default: none; above m·n/(m+n) the factors outgrow D). `probe` spends about as much
    again on a far tighter `excess_bound`, true with probability 1 - 1.6e-9. `norm2` is ‖D‖_F², summed in float64, where
    it is known already (default: it is summed here). `rounded` is D in bfloat16, with which all products but the last
    are formed where they suffice and nobody probes (default: float32 throughout). Deterministic: the same D, seed and
    thread count give the same bits. Raises ValueError when D is not a matrix, is empty, or holds NaN or infinity.
    Method: block Krylov iteration, Musco & Musco 2015; Tropp & Webber 2023 (arXiv 2306.12418).
    """
    D = _checked(D)
    m, n = D.shape
    norm2 = frobenius2(D) if norm2 is None else norm2
    if not math.isfinite(norm2):
        bad = int((~torch.isfinite(D)).sum())
        raise ValueError(
            f"the {m} x {n} matrix holds {bad} NaN or infinite element{'s' * (bad != 1)}; a decomposition needs finite "
            "numbers: check the two tensors that it is the difference of"
            if bad
            else f"the squared norm of the {m} x {n} matrix is beyond float64; scale it down"
        )
    if norm2 < _FEWEST and bool(D.any()):
        raise ValueError(f"the squared norm of the {m} x {n} matrix is too near to zero for float64; scale it up")
    if norm2 == 0:
        nothing = torch.empty(0, dtype=torch.float64)
        return TruncatedSVD(D.new_empty(m, 0), nothing, D.new_empty(0, n), 0.0, 0.0, 0.0, 0.0, "zero", None, 0)
    chosen: RankRule = Fixed(rule) if isinstance(rule, int) else rule
    power = math.frexp(math.sqrt(norm2))[1]
    if abs(power) <= MODERATE:
        power = 0
    else:  # by a power of two, which rounds nothing, in two factors that float32 can hold
        D = D * 2.0 ** -(power // 2) * 2.0 ** -(power - power // 2)
    scaled = norm2 / 4.0**power
    wanted = _Wanted(chosen, norm2, (m, n), torch.finfo(D.dtype).eps, max_rank, 2.0**power)
    # Orient so that the basis lives on the short side.
    tall = D if m >= n else D.T
    low = None if rounded is None or probe or power else rounded if m >= n else rounded.T
    with full_float32():
        basis, rank, estimate, method, beyond = _basis(tall, scaled, wanted, tolerance, seed, low)
        left, sigma, right, error2 = _leading(tall, scaled, basis, rank)
        unseen = _unseen(tall, scaled, basis, rank, error2)
        unseen = unseen if beyond is None else min(unseen, max(error2 - beyond, 0.0))
        bound = excess_bound(basis, rank, scaled, probe=probe, seed=seed, unseen=unseen)
    U, Vh = (left, right.T) if m >= n else (right, left.T)
    error2, bound, estimate = (4.0**power * value for value in (error2, bound, estimate))
    return TruncatedSVD(
        U.contiguous(), sigma * 2.0**power, Vh.contiguous(), norm2, error2, min(bound, error2), min(estimate, error2),
        method, None if method == "gram" else seed, basis.products, beyond is not None,
    )  # fmt: skip


def _leading(D: Tensor, norm2: float, basis: krylov.Krylov, rank: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return U (m, r), σ (r,), V (n, r) and ‖D - U·diag(σ)·Vᵀ‖_F² of the `rank` leading directions of a basis."""
    # Where most of D is left, its rounding is no part of the error; elsewhere factors are rounded once, at the end.
    rounded = norm2 - float(basis.spectrum()[:rank].sum()) > _CANCELLED * norm2
    Y, theta, V = basis.leading(rank, rounded=rounded)
    error2 = norm2 - float(theta.sum())
    if error2 < _AT_ROUNDING * norm2 and basis.width < D.shape[1]:
        Q = torch.linalg.qr(product64(D, torch.linalg.qr(V)[0]))[0]
        V, sigma, X = torch.linalg.svd(product64(D.T, Q), full_matrices=False)
        left, right = (Q @ X.T).to(D.dtype), V.to(D.dtype)
        sigma = sigma.cpu()
    else:
        sigma = theta.sqrt()
        left, right = (Y / sigma.to(Y.device)).to(D.dtype), V.to(D.dtype)
    if error2 < _CANCELLED * norm2:
        error2 = residual2(D, left.double() * sigma.to(left.device), right.T)
    elif basis.width < D.shape[1]:
        error2 += _miscounted(D, left, sigma, right, error2)
    return left, sigma, right, max(error2, 0.0)


def _miscounted(D: Tensor, left: Tensor, sigma: Tensor, right: Tensor, error2: float) -> float:
    """Do what that of `usual.py` does: return what rounding in the products left out of an error that is `error2`."""
    narrow = sum((X.double() ** 4).sum(0).sqrt().cpu() for X in (left, right))
    chosen = OFF * torch.finfo(D.dtype).eps * sigma**2 * narrow > FINE * error2
    if not chosen.any():
        return 0.0
    B, A = left[:, chosen].double() * sigma[chosen].to(left.device), right[:, chosen].double()
    inner, square = (product64(D, A) * B).sum(), ((B.T @ B) * (A.T @ A)).sum()
    return float(square - 2 * inner) + float((sigma[chosen] ** 2).sum())


def _unseen(D: Tensor, norm2: float, basis: krylov.Krylov, rank: int, error2: float) -> float:
    """Return ‖D·(I - VVᵀ)‖_F²: as a difference of sums, or where they would cancel as it is."""
    if basis.width >= D.shape[1]:
        return 0.0
    unseen = error2 - float(basis.spectrum()[rank:].sum())
    if error2 >= _CANCELLED * norm2:
        return max(unseen, 0.0)
    V = torch.linalg.qr(basis.V.double())[0]
    return residual2(D, product64(D, V), V.T)


def residual2(D: Tensor, B: Tensor, A: Tensor) -> float:
    """Return ‖D - B·A‖_F² in float64, a few rows at a time; D is (m, n), B (m, r), A (r, n), of any float dtype."""
    A64, tiles = A.double(), row_chunks(D)
    matching = zip(tiles, torch.split(B, len(tiles[0])), strict=True)
    return sum(frobenius2(rows.double() - left.double() @ A64) for rows, left in matching)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The rank that a rule wants, given the basis grown so far of D / `scale`."""

    rule: RankRule
    norm2: float
    shape: tuple[int, int]
    eps: float
    max_rank: int | None
    scale: float

    def __call__(self, basis: krylov.Krylov, complete: bool) -> int | None:
        sigma = basis.spectrum().sqrt() * self.scale
        # Below this the singular values are those of rounding, D's and ours.
        sigma = sigma[sigma > 4 * self.eps * sigma[0]]
        most = min(len(sigma), self.most()) if complete else self.most()
        edges = partial(_scaled_edges, basis, self.scale)
        rank = self.rule.rank(Spectrum(sigma, self.norm2, self.shape, complete, edges))
        if rank is None:
            return most if complete or len(sigma) >= most else None
        return max(1, min(rank, most))

    def most(self) -> int:
        """Return the highest rank there can be."""
        return min(*self.shape, self.max_rank or min(self.shape))


def _scaled_edges(basis: krylov.Krylov, scale: float) -> Tensor:
    return basis.residual_edges() * scale


def _basis(
    D: Tensor, norm2: float, wanted: _Wanted, tolerance: float, seed: int, rounded: Rounded | None
) -> tuple[krylov.Krylov, int, float, str, float | None]:
    """Return a basis, the rank, what may be missing, the method, and of a `rounded` D what it proves to lie beyond."""
    short, counted = D.shape[1], not isinstance(wanted.rule, Fixed)
    fixed = wanted.rule.r if isinstance(wanted.rule, Fixed) else 16
    if is_exact(short, fixed):
        basis = krylov.Krylov.exact(D)
        return basis, wanted(basis, True) or 1, 0.0, "gram", None
    narrow, wide = block_of(fixed, wide=False), block_of(fixed, wide=True)
    tolerance = _FINER * tolerance if counted else tolerance
    iterate = partial(krylov.iterate, D, norm2, wanted, tolerance=tolerance, seed=seed, counted=counted)
    if rounded is not None and (found := iterate(block=wide, least=fixed + wide, low=rounded.low)):
        rough, rank, estimate = found
        V = rough.directions(min(rank + _SPARE * counted, rough.width))
        basis = krylov.Krylov(D, V.to(D.dtype), seed=seed)
        basis.products += rough.products
        last = wanted(basis, False)
        captured = float(basis.spectrum()[:last].sum()) if last is not None and last <= basis.width else norm2
        if last is not None and norm2 - captured >= LEFT * norm2:
            return basis, last, estimate, "krylov", energy_beyond(rough, last, rounded.lost2)
    found = iterate(block=narrow, least=fixed + narrow)
    assert found is not None  # without `low` it always returns
    basis, rank, estimate = found
    return basis, rank, estimate, "krylov", None


def _checked(D: Tensor) -> Tensor:
    if D.ndim != 2 or D.numel() == 0 or not D.is_floating_point():
        given = f"{D.dtype} of {tuple(D.shape)}"
        raise ValueError(f"a matrix of real numbers with at least one element is needed, not {given}")
    return D if D.dtype in (torch.float32, torch.float64) else D.float()
