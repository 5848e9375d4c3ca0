"""OSF: W' = Wₖ + U·diag(S)·V, the base's small singular values replaced, as in PEFT.

`osf_svd_params.U_low` (out, m), `.S_low` (m,) and `.V_low` (m, in) were begun as the m smallest singular values of the
base's weight with their vectors, and trained; Wₖ is what the k = min(out, in) − m largest make, which no file has. W is
the unchanged base, whatever other adapters have made of it. There is no alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loratools.adapter.kinds import Device, DType, Tensor, Underlying
from loratools.adapter.kinds._onweight import Change, Changing
from loratools.storage.lazy import LazyTensor

_PARTS = ("osf_svd_params.U_low", "osf_svd_params.S_low", "osf_svd_params.V_low")


@dataclass(frozen=True, slots=True, eq=False)
class OsfUpdate(Changing):
    """The small singular values. Raises `ValueError` where they do not go together."""

    kind = "osf"
    together = 0
    of_base = True

    def check(self) -> None:
        """Raise `ValueError` for tensors that do not share a rank, more than the weight has, or another weight."""
        u, s, v = (self.tensors[name].shape for name in _PARTS)
        if len(u) != 2 or len(v) != 2 or s != u[1:] or s != v[:1] or s[0] > min(u[0], v[1]):
            raise ValueError(f"OSF's tensors do not go together: U {u}, S {s}, V {v}")
        Changing.check(self)

    @property
    def rank(self) -> int:
        return self.tensors[_PARTS[1]].shape[0]

    @property
    def own_shape(self) -> tuple[int, ...]:
        return self.tensors[_PARTS[0]].shape[0], self.tensors[_PARTS[2]].shape[1]

    def change(self, dtype: DType, device: Device) -> Change:
        """Return W without its small singular values, by eigenvectors along its shorter side, but the adapter's."""
        import torch

        U, S, V = (self.number(name).to(device) for name in _PARTS)
        out, inner = self.own_shape

        def change(W: Tensor, rows: slice) -> Tensor:
            W = W.double()
            if inner <= out:
                small = torch.linalg.eigh(W.T @ W).eigenvectors[:, : self.rank]
                taken = (W @ small) @ small.T
            else:
                small = torch.linalg.eigh(W @ W.T).eigenvectors[:, : self.rank]
                taken = small @ (small.T @ W)
            after: Tensor = W - taken + (U * S) @ V
            return after.to(dtype)

        return change

    def outputs(self, X: Tensor, under: Underlying) -> Tensor:
        """Return X·Wₖᵀ + ((X·Vᵀ)∘S)·Uᵀ; Wₖ by the projection on eigenvectors of the smaller of W·Wᵀ and Wᵀ·W."""
        import torch

        U, S, V = (self.number(name).to(X) for name in _PARTS)
        Wt, count = under.below(torch.eye(X.shape[1], dtype=X.dtype)), min(self.own_shape) - self.rank
        wide = Wt.shape[0] >= Wt.shape[1]
        _, vectors = torch.linalg.eigh(Wt.T @ Wt if wide else Wt @ Wt.T)
        large = vectors[:, vectors.shape[1] - count :]
        kept = under.below(X) @ large @ large.T if wide else under.below(X @ large @ large.T)
        return kept + ((X @ V.T) * S) @ U.T


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are singular values with their vectors."""
    return parts.keys() == set(_PARTS)


def build(parts: Mapping[str, LazyTensor], scaling: float, alpha: float) -> OsfUpdate:
    """Return the update; it has no scaling."""
    return OsfUpdate(dict(parts))
