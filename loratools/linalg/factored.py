"""Algebra of ΔW = B·A in factor space: nothing here ever builds the dense (out, in) matrix.

B is (..., out, r), A is (..., r, in), with the scaling in either; leading dimensions are a batch of layers of equal
shape. `stacks` sums products up, and decomposes many at once, in NumPy. Factors may be of any float dtype; arithmetic
is float64, so that small differences of large terms stay exact, and costs O((out + in)·r²).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loratools.errors import counted

_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True, slots=True, eq=False)
class FactoredSVD:
    """The thin SVD of B·A: U (..., out, k), S (..., k) descending, Vh (..., k, in), all float64; k ≤ r.

    `floor` (...,) is the size below which a singular value is only the rounding of float64 arithmetic on terms as
    large as ‖B‖·‖A‖.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    floor: Tensor

    def rank(self) -> Tensor:
        """Return the true rank of each matrix, the number of σ > floor, int64 (...,); 0 only for ΔW = 0."""
        return self.S.gt(self.floor[..., None]).sum(-1)

    def truncated(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return balanced factors B = U√S (..., out, rank), A = √S·Vh (..., rank, in), and the error (...,).

        The error is ‖ΔW - B·A‖_F = √Σ_{i>rank} σᵢ², the smallest that any matrix of that rank has (Eckart-Young).
        Raises ValueError when `rank` is not between 1 and the number of singular values.
        """
        if not 1 <= rank <= self.S.shape[-1]:
            raise ValueError(f"rank {rank} was asked of factors of rank {self.S.shape[-1]}; use 1 to that rank")
        root = self.S[..., :rank].sqrt()
        B, A = self.U[..., :rank] * root[..., None, :], root[..., :, None] * self.Vh[..., :rank, :]
        return B, A, (self.S[..., rank:] ** 2).sum(-1).sqrt()


def factored_svd(B: Tensor, A: Tensor) -> FactoredSVD:
    """Return the SVD of B·A from thin QRs of B and Aᵀ and the SVD of the r × r core R_B·R_Aᵀ, in float64.

    Raises ValueError when shapes do not match or an element is NaN or infinite.
    """
    _check(B, A)
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().mT)
    # The core is small: on the host it takes as long as on a GPU, and converges.
    U, S, Vh = (part.to(Q_B.device) for part in torch.linalg.svd((R_B @ R_A.mT).cpu(), full_matrices=False))
    return FactoredSVD(Q_B @ U, S, Vh @ Q_A.mT, _floor(B, A, R_B, R_A))


def singular_values(B: Tensor, A: Tensor) -> Tensor:
    """Return the singular values of B·A, float64 (..., k) with k = min(out, r, in), descending; rounding set to 0.

    Values at the floor of `FactoredSVD` come back as 0, so that counting nonzero ones gives the true rank. Raises
    ValueError as `factored_svd` does.
    """
    _check(B, A)
    R_B, R_A = torch.linalg.qr(B.double(), mode="r")[1], torch.linalg.qr(A.double().mT, mode="r")[1]
    S: Tensor = torch.linalg.svdvals(R_B @ R_A.mT)
    return S.masked_fill(S.le(_floor(B, A, R_B, R_A)[..., None]), 0.0)


def inner_product(B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor) -> Tensor:
    """Return ⟨B₁A₁, B₂A₂⟩ = tr((B₁ᵀB₂)(A₂A₁ᵀ)) for each matrix of the batch, float64 (...,).

    Raises ValueError when shapes do not match or an element is NaN or infinite.
    """
    _check(B1, A1)
    _check(B2, A2)
    if B1.shape[:-1] != B2.shape[:-1] or A1.shape[-1] != A2.shape[-1]:
        raise ValueError(f"an inner product needs updates of one shape, not {_shape(B1, A1)} and {_shape(B2, A2)}")
    left = B1.double().mT @ B2.double()
    right = A1.double() @ A2.double().mT
    return (left * right).sum((-2, -1))


def squared_norm(B: Tensor, A: Tensor) -> Tensor:
    """Return ‖B·A‖_F² = tr((BᵀB)(AAᵀ)) for each matrix of the batch, float64 (...,), never negative."""
    return inner_product(B, A, B, A).clamp_min(0)


def rounding2(exact: tuple[Tensor, Tensor], stored: tuple[Tensor, Tensor]) -> float:
    """Return ‖B̃Ã − BA‖_F² of rounded and exact factors (B (…, out, r), A (…, r, in)), in float64 and in factor space.

    B̃Ã − BA = (B̃ − B)·Ã + B·(Ã − A), a sum of small terms: nothing cancels. Leading dimensions are summed over.
    """
    B, A = (factor.double() for factor in exact)
    B_stored, A_stored = (factor.double() for factor in stored)
    return float(squared_norm(torch.cat([B_stored - B, B], -1), torch.cat([A_stored, A_stored - A], -2)).sum())


def cosine(B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor) -> Tensor:
    """Return ⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖·‖ΔW₂‖) in [-1, 1], float64 (...,); 0 where one of them is zero."""
    norms = (squared_norm(B1, A1) * squared_norm(B2, A2)).sqrt()
    product = inner_product(B1, A1, B2, A2)
    return torch.where(norms > 0, product / norms.clamp_min(torch.finfo(torch.float64).tiny), 0.0).clamp(-1, 1)


def _floor(B: Tensor, A: Tensor, R_B: Tensor, R_A: Tensor) -> Tensor:
    # The rounding of B·A is that of its terms, however much they cancel: measured against Σₖ ‖bₖ‖·‖aₖ‖.
    lengths = torch.linalg.vector_norm(R_B, dim=-2) * torch.linalg.vector_norm(R_A, dim=-2)
    floor: Tensor = _EPS * max(B.shape[-2], A.shape[-1]) * lengths.sum(-1)
    return floor


def _shape(B: Tensor, A: Tensor) -> str:
    return f"{tuple(B.shape)}·{tuple(A.shape)}"


def _check(B: Tensor, A: Tensor) -> None:
    if B.ndim < 2 or A.ndim < 2 or B.shape[-1] != A.shape[-2] or B.shape[:-2] != A.shape[:-2]:
        shapes = f"{tuple(B.shape)} and {tuple(A.shape)}"
        raise ValueError(f"factors must be B (..., out, r) and A (..., r, in), not {shapes}")
    for name, factor in (("B", B), ("A", A)):
        if not bool(torch.isfinite(factor).all()):
            bad = int((~torch.isfinite(factor)).sum())
            raise ValueError(f"factor {name} {tuple(factor.shape)} holds {counted(bad, 'NaN or infinite element')}")
