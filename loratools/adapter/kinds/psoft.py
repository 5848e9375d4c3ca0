"""PSOFT: W' = W + U·diag(S)·(R − I)·Vᵀ, a rotation between the base's largest singular vectors, as in PEFT.

U, S and V are the r largest singular values of the base's weight and their vectors. `psoft_R.weight` (r·(r − 1)/2,) is
the triangle of Q = −Qᵀ with R = (I + Q)·(I − Q)⁻¹, or the first `layout["terms"]` terms of its series, Q being scaled
down to ‖Q‖ = `layout["longest"]` first; of shape (r, r) it is R. `psoft_R.vector_b` and `psoft_R.vector_a` (r,) scale
rows and columns of R. With `layout["init"]` "pissa_init" it is U·√S·(R − I)·√S·Vᵀ.

R says which vectors it is between, so their signs and their rounding count: they are those that float32 LAPACK gives
for the whole weight, or with `layout["svd"]` "lowrank" torch's randomised method from `layout["seed"]` with
`layout["niter"]` iterations, as PEFT asks for them. W is the unchanged base, whatever other adapters have made of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratools.adapter.kinds import Device, DType, Tensor, Underlying
from loratools.adapter.kinds._onweight import Change, Changing
from loratools.adapter.kinds._vectors import largest, sketched
from loratools.storage.lazy import LazyTensor

PART, ROWS, COLUMNS = "psoft_R.weight", "psoft_R.vector_b", "psoft_R.vector_a"
_LAYOUT: Mapping[str, Any] = {
    "init": "psoft_init", "svd": "full", "niter": 10, "seed": 0, "terms": None, "longest": None
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class PsoftUpdate(Changing):
    """The rotation and its factors. Raises `ValueError` where they do not go together."""

    kind = "psoft"
    together = 0
    of_base = True

    def check(self) -> None:
        """Raise `ValueError` for numbers of no rotation, or a larger one than the weight has singular values."""
        shapes = {name: lazy.shape for name, lazy in self.tensors.items()}
        vectors = {shapes[name] for name in (ROWS, COLUMNS) if name in shapes}
        square = (self.rank, self.rank)
        triangle = (self.rank * (self.rank - 1) // 2,)
        if self.rank < 1 or shapes[PART] not in (square, triangle) or not vectors <= {(self.rank,)}:
            raise ValueError(f"PSOFT's tensors do not go together: {shapes} of rank {self.rank}")
        if self.weight_shape is not None and (len(self.weight_shape) != 2 or min(self.weight_shape) < self.rank):
            raise ValueError(f"it rotates {self.rank} singular vectors, the base's weight is {self.weight_shape}")

    @property
    def rank(self) -> int:
        rank: int = self.layout["rank"]
        return rank

    @property
    def own_shape(self) -> tuple[int, ...]:
        return 0, 0

    def _vectors(self, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return U, S and Vᵀ of the largest singular values, drawn as PEFT draws them."""
        if self.layout["svd"] == "full":
            U, S, Vt = largest(W, self.rank)
        else:
            U, S, Vt = sketched(W, self.rank, self.layout["niter"], self.layout["seed"])
        return U.double(), S.double(), Vt.double()

    def _skew(self) -> Tensor:
        """Return Q (r, r), scaled down where a longest is given."""
        import torch

        triangle, r = self.number(PART), self.rank
        Q = torch.zeros(r, r, dtype=torch.float64)
        Q[tuple(torch.triu_indices(r, r, 1))] = triangle
        Q, longest = Q - Q.T, self.layout["longest"]
        return Q * (longest / Q.norm()) if longest is not None and Q.norm() > longest else Q

    def _scaled(self, R: Tensor) -> Tensor:
        """Return R with its rows and columns scaled, less the identity."""
        import torch

        for name, sides in ((ROWS, (-1, 1)), (COLUMNS, (1, -1))):
            if name in self.tensors:
                R = R * self.number(name).reshape(sides)
        return R - torch.eye(self.rank, dtype=R.dtype)

    def change(self, dtype: DType, device: Device) -> Change:
        """Return W + U·diag(S)·(R − I)·Vᵀ."""
        import torch

        R, terms = self.number(PART), self.layout["terms"]
        if R.dim() == 1:
            Q, identity = self._skew(), torch.eye(self.rank, dtype=torch.float64)
            if terms is None:
                R = (identity + Q) @ torch.linalg.inv(identity - Q)
            else:  # I + 2Q + 2Q² + … , the last of them once; with one or two terms, and with three, as PEFT counts
                powers = [torch.linalg.matrix_power(Q, i) for i in range(max(terms, 4) if terms > 2 else max(terms, 1))]
                R = powers[0] + 2 * sum(powers[1:], 0 * Q)
                R = R - powers[-1] if terms > 2 else R
        M = self._scaled(R)

        def change(W: Tensor, rows: slice) -> Tensor:
            U, S, Vt = self._vectors(W.cpu())
            left, right = (U * S, Vt) if self.layout["init"] == "psoft_init" else (U * S.sqrt(), S.sqrt()[:, None] * Vt)
            return (W + ((left @ M) @ right).to(W.device)).to(dtype)

        return change

    def outputs(self, X: Tensor, under: Underlying) -> Tensor:
        """Return X·Wᵀ + (((X·V)·(R − I)ᵀ)∘S)·Uᵀ; R by solving, or its series by Horner's scheme."""
        import torch

        R, terms, identity = self.number(PART), self.layout["terms"], torch.eye(self.rank, dtype=torch.float64)
        if R.dim() == 1:
            Q = self._skew()
            if terms is None:
                R = torch.linalg.solve(identity - Q, identity + Q)  # they commute
            elif terms < 3:
                R = identity + 2 * Q if terms == 2 else identity
            else:
                last = max(terms, 4) - 1
                R = 2 * identity + Q
                for _ in range(last - 2):
                    R = 2 * identity + Q @ R
                R = identity + Q @ R
        U, S, Vt = (each.to(X) for each in self._vectors(under.below(torch.eye(X.shape[1], dtype=X.dtype)).T))
        M = self._scaled(R).to(X)
        if self.layout["init"] == "psoft_init":
            return under.below(X) + (((X @ Vt.T) @ M.T) * S) @ U.T
        root = S.sqrt()
        return under.below(X) + ((((X @ Vt.T) * root) @ M.T) * root) @ U.T


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether this is a rotation, with or without factors of rows and columns."""
    return PART in parts and parts.keys() <= {PART, ROWS, COLUMNS}


def build(
    parts: Mapping[str, LazyTensor], scaling: float, alpha: float, layout: Mapping[str, Any] | None = None
) -> PsoftUpdate:
    """Return the update; its scaling cancels, for PEFT divides the singular values by it."""
    shape = parts[PART].shape
    rank = shape[0] if len(shape) == 2 else round((1 + (1 + 8 * parts[PART].parameters) ** 0.5) / 2)
    return PsoftUpdate(dict(parts), 1.0, alpha, {**_LAYOUT, **(layout or {}), "rank": rank})
