"""FRoD: W' = U·(S + diag(λ))·Vᵀ, where W = U·diag(l)·Vᵀ with a V that modules share, as in PEFT.

`frod_V` is V (in, in), `frod_lambda_l` λ (in,), and S is zero but for the numbers `frod_lambda_s_values` (n,) at the
places `frod_s_indices` (2, n). U is in no file: its columns are those of Z = W·V⁻ᵀ, scaled to length 1, so that with l
their lengths W' = W·V⁻ᵀ·diag(1/l)·(S + diag(λ))·Vᵀ. PEFT rounds U to the base's dtype, which V shows. W is the
unchanged base, whatever other adapters have made of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loratools.adapter.kinds import Device, DType, Tensor, Underlying
from loratools.adapter.kinds._onweight import Change, Changing
from loratools.adapter.kinds._rounded import as_in
from loratools.storage.lazy import LazyTensor

V, INDICES, LENGTHS, VALUES = "frod_V", "frod_s_indices", "frod_lambda_l", "frod_lambda_s_values"
_LEAST = 1e-12  # length of a column that has a direction


@dataclass(frozen=True, slots=True, eq=False)
class FrodUpdate(Changing):
    """What modules share, and the numbers of one. Raises `ValueError` where they do not go together."""

    kind = "frod"
    rank = 0
    together = 0
    of_base = True

    def check(self) -> None:
        """Raise `ValueError` for tensors that do not go together, or are of another weight."""
        v, indices, lengths, values = (self.tensors[name].shape for name in (V, INDICES, LENGTHS, VALUES))
        if len(v) != 2 or v[0] != v[1] or lengths != v[:1] or len(values) != 1 or indices != (2, *values):
            raise ValueError(f"FRoD's tensors do not go together: V {v}, indices {indices}, λ {lengths}, S {values}")
        Changing.check(self)

    @property
    def own_shape(self) -> tuple[int, ...]:
        return 0, self.tensors[V].shape[1]

    def change(self, dtype: DType, device: Device) -> Change:
        """Return Z∘(1/l)·(S + diag(λ))·Vᵀ."""
        import torch

        v, middle = self.number(V).to(device), self.number(LENGTHS).diag()
        middle = middle.index_put(tuple(self.tensors[INDICES].load().long()), self.number(VALUES), accumulate=True)
        after = middle.to(device) @ v.T

        def change(W: Tensor, rows: slice) -> Tensor:
            wide = W.double()
            try:
                Z = torch.linalg.solve(v, wide.T).T
            except RuntimeError:  # V is singular: so PEFT does then
                Z = wide @ torch.linalg.pinv(v, rtol=1e-6).T
            lengths = Z.norm(dim=0)
            U = as_in(v, torch.where(lengths > _LEAST, Z / lengths, 0.0))
            return (U @ after).to(dtype)

        return change

    def outputs(self, X: Tensor, under: Underlying) -> Tensor:
        """Return X·V·(S + diag(λ))ᵀ·Uᵀ, with Uᵀ the rows of V⁻¹·Wᵀ scaled to length 1."""
        import torch

        v, inner = self.number(V).to(X), X.shape[1]
        inverse = torch.linalg.pinv(v, rtol=1e-6 if int(torch.linalg.matrix_rank(v)) < inner else 0.0)
        Zt = under.below(inverse)
        lengths = Zt.norm(dim=1, keepdim=True)
        Y = X @ v
        through = Y * self.number(LENGTHS).to(X)
        rows, columns = self.tensors[INDICES].load().long()
        through.index_add_(1, rows, Y[:, columns] * self.number(VALUES).to(X))
        return through @ as_in(v, torch.where(lengths > _LEAST, Zt / lengths, 0.0))


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are what modules share, and numbers of one."""
    return parts.keys() == {V, INDICES, LENGTHS, VALUES}


def build(parts: Mapping[str, LazyTensor], scaling: float, alpha: float) -> FrodUpdate:
    """Return the update; it has no scaling."""
    return FrodUpdate(dict(parts))
