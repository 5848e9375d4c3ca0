"""GLoRA: ΔW = s·(W·a1·a2 + b1·b2), a change that depends on the weight itself (LyCORIS; arXiv 2306.07967).

a1 (in, r) and a2 (r, in) mix input features, b1 (out, r) and b2 (r, in, …) add as LoRA does; s = α/r. W is the weight
that the update finds, so among several updates the order counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from loratools.adapter.basis import Basis, along
from loratools.adapter.kinds import Device, DType, Tensor, Term, Underlying
from loratools.adapter.kinds._shared import OnWeight
from loratools.adapter.site import Site
from loratools.errors import IncompatibleAdapter
from loratools.storage.lazy import LazyTensor

_PARTS = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")


@dataclass(frozen=True, slots=True, eq=False)
class GloraUpdate(OnWeight):
    """The four factors. Raises `ValueError` where their shapes do not go together."""

    parts: Mapping[str, LazyTensor]
    scaling: float
    alpha: float

    kind = "glora"

    def __post_init__(self) -> None:
        a1, a2, b1, b2 = (self.parts[name].shape for name in _PARTS)
        flat = all(len(shape) > 1 and set(shape[2:]) <= {1} for shape in (a1, a2, b1))
        if not flat or a1[:2] != a2[1::-1] or b1[1] != b2[0] or a2[1] != b2[1]:
            raise ValueError(f"GLoRA's factors do not go together: a1 {a1}, a2 {a2}, b1 {b1}, b2 {b2}")

    @property
    def rank(self) -> int:
        return self.parts["a2.weight"].shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts["b1.weight"].shape[0], *self.parts["b2.weight"].shape[1:]

    def carried(self, basis: Basis) -> Self:
        """Return diag(1/columns)·a1, a2·diag(columns), diag(rows)·b1 and b2·diag(columns)."""
        inverse = None if basis.columns is None else 1 / basis.columns
        each = zip(_PARTS, (inverse, basis.columns, basis.rows, basis.columns), (0, 1, 0, 1), strict=True)
        return replace(self, parts={name: along(self.parts[name], factors, axis) for name, factors, axis in each})

    def _factors(self) -> list[Tensor]:
        return [self.parts[name].load().double().flatten(1) for name in _PARTS]

    def term(self, site: Site, weight: float, dtype: DType, device: Device) -> Mixing:
        """Return the term; raise `IncompatibleAdapter` where the base stores the weight transposed."""
        if site.transposed:
            raise IncompatibleAdapter(f"{site.tensor}: GLoRA on a weight stored [in, out] is not supported")
        a1, a2, b1, b2 = (factor.to(device, dtype) for factor in self._factors())
        scale = weight * self.scaling
        return Mixing(a1 * scale, a2, b1[site.part_rows] * scale, b2)

    def project(self, X: Tensor, weight: float, under: Underlying) -> Tensor:
        """Return Y(X) + w·s·(Y(X·(a1·a2)ᵀ) + X·(b1·b2)ᵀ), Y(X) = X·Wᵀ."""
        a1, a2, b1, b2 = (factor.to(X) for factor in self._factors())
        inner = len(a1)
        mixed = ((a1 @ a2) @ X.view(len(X), inner, -1)).flatten(1)
        return under.below(X) + weight * self.scaling * (under.below(mixed) + X @ (b1[under.site.part_rows] @ b2).T)


@dataclass(frozen=True, slots=True, eq=False)
class Mixing(Term):
    """The term W += (W·a1)·a2 + b1·b2; the factors on the left are scaled."""

    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor

    def apply_rows(self, W: Tensor, rows: slice, base: Tensor | None) -> None:
        import torch

        kernel = W.reshape(len(W), len(self.a1), -1)
        mixed = torch.einsum("oik,ir,rj->ojk", kernel, self.a1, self.a2)
        W.add_(mixed.reshape(W.shape)).addmm_(self.b1[rows], self.b2)


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are the four factors."""
    return parts.keys() == set(_PARTS)


def build(parts: Mapping[str, LazyTensor], scaling: float, alpha: float) -> GloraUpdate:
    """Return the update of the factors."""
    return GloraUpdate(dict(parts), scaling, alpha)
