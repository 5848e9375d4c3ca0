"""DEFT: W' = W + Q·(s·R − Pᵀ₊·W), a projection of the outputs taken out and another put in, as in PEFT.

`deft_P` is P (out, r), `deft_R` R (r, in). With `layout["method"]` "relu" Q = P and P₊ = max(P, 0); with "qr" both are
the orthonormal factor of P = Q·R'. s = α/r, or 1 without an alpha. Without R (PEFT's `para`) W' = W − Q·Pᵀ₊·W. W is the
unchanged base, whatever other adapters have made of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratools.adapter.kinds import Device, DType, Tensor, Underlying
from loratools.adapter.kinds._onweight import Change, Changing
from loratools.storage.lazy import LazyTensor

P, R = "deft_P", "deft_R"
METHODS = ("relu", "qr")


@dataclass(frozen=True, slots=True, eq=False)
class DeftUpdate(Changing):
    """The projection, and what is put in. Raises `ValueError` where their shapes do not go together."""

    kind = "deft"
    together = 0
    of_base = True

    def check(self) -> None:
        """Raise `ValueError` for factors that do not share a rank, or of another weight."""
        p, r = self.tensors[P].shape, self.tensors[R].shape if R in self.tensors else None
        if len(p) != 2 or 0 in p or (r is not None and (len(r) != 2 or r[0] != p[1])):
            raise ValueError(f"DEFT's tensors do not go together: P {p}, R {r}")
        Changing.check(self)

    @property
    def rank(self) -> int:
        return self.tensors[P].shape[1]

    @property
    def own_shape(self) -> tuple[int, ...]:
        return self.tensors[P].shape[0], self.tensors[R].shape[1] if R in self.tensors else 0

    def change(self, dtype: DType, device: Device) -> Change:
        """Return W + Q·(s·R − Pᵀ₊·W)."""
        import torch

        p = self.number(P)
        Q, right = (p, p.relu()) if self.layout["method"] == "relu" else (torch.linalg.qr(p)[0],) * 2
        Q, right = Q.to(device, dtype), right.T.to(device, dtype)
        put = self.scaling * self.number(R).to(device) if R in self.tensors else 0.0

        def change(W: Tensor, rows: slice) -> Tensor:
            return torch.addmm(W, Q, (put - (right @ W).double()).to(dtype))

        return change

    def outputs(self, X: Tensor, under: Underlying) -> Tensor:
        """Return Y + (s·X·Rᵀ − Y·P₊)·Qᵀ with Y = X·Wᵀ; Q by reflections, one column of P after the other."""
        p, Y = self.number(P).to(X), under.below(X)
        Q, right = (p, p.clamp(min=0)) if self.layout["method"] == "relu" else (_orthonormal(p),) * 2
        taken = Y @ right
        put = self.scaling * X @ self.number(R).to(X).T if R in self.tensors else 0.0
        return Y + (put - taken) @ Q.T


def _orthonormal(p: Tensor) -> Tensor:
    """Return Q of P = Q·R' by Gram-Schmidt, each column with the sign that Householder's reflections give it."""
    Q, rest = p.clone(), p.clone()
    reflections = []
    for i in range(p.shape[1]):
        Q[:, i] -= Q[:, :i] @ (Q[:, :i].T @ Q[:, i])
        Q[:, i] -= Q[:, :i] @ (Q[:, :i].T @ Q[:, i])
        Q[:, i] /= Q[:, i].norm()
        tail = rest[i:, i]
        if len(tail) > 1 and float(tail[1:].norm()) > 0:  # where nothing is below it LAPACK leaves the column
            sign = -1.0 if float(tail[0]) >= 0 else 1.0
            v = tail.clone()
            v[0] -= sign * tail.norm()
            reflections.append(v)
            rest[i:] -= 2 * v[:, None] * (v @ rest[i:]) / (v @ v)
        else:
            sign = 1.0 if float(tail[0]) >= 0 else -1.0
        Q[:, i] *= sign
    return Q


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether this is a projection, with or without what is put in."""
    return P in parts and parts.keys() <= {P, R}


def build(
    parts: Mapping[str, LazyTensor], scaling: float, alpha: float, layout: Mapping[str, Any] | None = None
) -> DeftUpdate:
    """Return the update; raise `ValueError` where nothing says how P becomes a projection."""
    if not layout or layout.get("method") not in METHODS:
        raise ValueError(f"nothing says how P becomes a projection (decomposition_method, one of {', '.join(METHODS)})")
    return DeftUpdate(dict(parts), scaling, alpha, {"method": layout["method"]})
