"""HRA: W' = W·H, input features reflected, H = (I − 2u₁u₁ᵀ)···(I − 2uᵣuᵣᵀ) (arXiv 2405.17484), as in PEFT.

`hra_u` (in·…, r) has the u, each scaled to length 1 first. With `layout = {"orthogonal": true}` (PEFT's `apply_GS`)
they are made orthogonal one after the other, and H = I − 2·Q·Qᵀ. Of a convolution the inputs are those of a kernel.
There is no alpha. It acts on the weight that it finds: the order counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from loratools.adapter.kinds import Device, DType, Tensor, Underlying
from loratools.adapter.kinds._onweight import Change, Changing
from loratools.errors import IncompatibleAdapter
from loratools.storage.lazy import LazyTensor

PART = "hra_u"


@dataclass(frozen=True, slots=True, eq=False)
class HraUpdate(Changing):
    """The directions. Raises `ValueError` where they are none of the weight's inputs."""

    kind = "hra"

    def check(self) -> None:
        """Raise `ValueError` for directions that are no matrix, or of other inputs than the base's."""
        shape, weight = self.tensors[PART].shape, self.weight_shape
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"{PART} has shape {shape}, expected (in, r)")
        if weight is not None and prod(weight[1:]) != shape[0]:
            raise ValueError(f"it reflects {shape[0]} inputs, the base's weight has shape {weight}")

    @property
    def rank(self) -> int:
        return self.tensors[PART].shape[1]

    @property
    def own_shape(self) -> tuple[int, ...]:
        return 0, self.tensors[PART].shape[0]

    def _directions(self) -> Tensor:
        u = self.number(PART)
        lengths: Tensor = u.norm(dim=0)
        if not bool(lengths.all()):
            raise IncompatibleAdapter(f"column {int(lengths.argmin())} of {PART} is zero and has no direction")
        return u / lengths

    def change(self, dtype: DType, device: Device) -> Change:
        """Return W + (W·left)·right, the product of all reflections as one: H = I − U·T·Uᵀ."""
        import torch

        U = self._directions()
        if self.layout["orthogonal"]:
            U, _ = torch.linalg.qr(U)
            T = 2 * torch.eye(self.rank, dtype=U.dtype)
        else:
            T = torch.zeros(self.rank, self.rank, dtype=U.dtype)
            for i in range(self.rank):
                T[:i, i] = -2 * T[:i, :i] @ (U[:, :i].T @ U[:, i])
                T[i, i] = 2
        left, right = (-U @ T).to(device, dtype), U.T.contiguous().to(device, dtype)
        return lambda W, rows: torch.addmm(W, W @ left, right)

    def outputs(self, X: Tensor, under: Underlying) -> Tensor:
        """Return (X·Hᵀ)·Wᵀ, one reflection of the probes after the other, or X less twice its projection."""
        import torch

        u = self._directions().to(X)
        if self.layout["orthogonal"]:
            return under.below(X - 2 * torch.linalg.solve(u.T @ u, (X @ u).T).T @ u.T)
        for i in reversed(range(self.rank)):
            X = X - 2 * (X @ u[:, i])[:, None] * u[:, i]
        return under.below(X)


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are directions."""
    return parts.keys() == {PART}


def build(
    parts: Mapping[str, LazyTensor], scaling: float, alpha: float, layout: Mapping[str, Any] | None = None
) -> HraUpdate:
    """Return the update; without a layout the directions stay as they are."""
    return HraUpdate(dict(parts), layout={"orthogonal": bool((layout or {}).get("orthogonal", False))})
