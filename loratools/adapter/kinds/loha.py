"""LoHa: ΔW = (w1a·w1b) ∘ (w2a·w2b), two low-rank matrices multiplied element by element (LyCORIS; arXiv 2108.06098).

w*_a is (out, r) and w*_b (r, in·kh·kw), s = α/r. With a Tucker core t* (r, r, kh, kw) the factors are w*_a (r, out) and
w*_b (r, in), and each matrix is Σ t[p,q,k,l]·a[p,o]·b[q,i]. Followed is `forward` of LyCORIS 4.1.3; its `merge_to`
multiplies by the scale twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from loratools.adapter.basis import Basis, along
from loratools.adapter.kinds import Device, DType, Rows, Tensor, Update
from loratools.adapter.kinds._rowwise import Named
from loratools.storage.lazy import LazyTensor

_W = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_T = ("hada_t1", "hada_t2")


@dataclass(frozen=True, slots=True, eq=False)
class LohaUpdate(Named):
    """Two pairs of factors, with or without cores. Raises `ValueError` where their shapes do not go together."""

    kind = "loha"

    def __post_init__(self) -> None:
        shapes = {name: lazy.shape for name, lazy in self.tensors.items()}
        if any(len(shapes[name]) != 2 or 0 in shapes[name] for name in _W):
            raise ValueError(f"LoHa's factors have shapes {shapes}, expected matrices")
        a1, b1, a2, b2 = (shapes[name] for name in _W)
        if _T[0] in shapes:
            t1, t2 = (shapes[name] for name in _T)
            good = (t1[:2], t2[:2]) == ((a1[0], b1[0]), (a2[0], b2[0])) and (a1[1], b1[1]) == (a2[1], b2[1])
            good = good and t1[2:] == t2[2:] != ()
        else:
            good = (a1[1], a2[1]) == (b1[0], b2[0]) and (a1[0], b1[1]) == (a2[0], b2[1])
        if not good:
            raise ValueError(f"LoHa's factors do not go together: {shapes}")

    @property
    def rank(self) -> int:
        return self.tensors["hada_w1_b"].shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        if self.weight_shape:
            return self.weight_shape
        a, b = self.tensors["hada_w1_a"].shape, self.tensors["hada_w1_b"].shape
        return (a[1], b[1], *self.tensors[_T[0]].shape[2:]) if _T[0] in self.tensors else (a[0], b[1])

    def rows(self, dtype: DType, device: Device, transposed: bool) -> Rows:
        """Return rows of each product, multiplied."""
        pairs = [(left.to(device, dtype), right.to(device, dtype)) for left, right in self._pairs()]
        (L1, R1), (L2, R2) = [(right.T, left.T) for left, right in pairs] if transposed else pairs
        return lambda rows: (L1[rows] @ R1).mul_(L2[rows] @ R2)

    def carried(self, basis: Basis) -> Update:
        """Return the first pair scaled, its rows and its columns; with cores, or a kernel, the whole difference."""
        if len(self.shape) != 2 or _T[0] in self.tensors:
            return Named.carried(self, basis)
        a, b = along(self.tensors["hada_w1_a"], basis.rows, 0), along(self.tensors["hada_w1_b"], basis.columns, 1)
        return replace(self, tensors={**self.tensors, "hada_w1_a": a, "hada_w1_b": b})

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return (left, right) of both matrices; a core goes into right."""
        import torch

        a1, b1, a2, b2 = (self.tensors[name].load().double() for name in _W)
        if _T[0] not in self.tensors:
            return [(a1, b1), (a2, b2)]
        cores = [self.tensors[name].load().double() for name in _T]
        folded = [torch.einsum("pq...,qi->pi...", t, b).flatten(1) for t, b in zip(cores, (b1, b2), strict=True)]
        return [(a1.T, folded[0]), (a2.T, folded[1])]

    def dense(self) -> Tensor:
        """Return the product of the two matrices, each as one sum over all its indices."""
        import torch

        a1, b1, a2, b2 = (self.tensors[name].load().double() for name in _W)
        if _T[0] not in self.tensors:
            return torch.einsum("or,ri,os,si->oi", a1, b1, a2, b2)
        t1, t2 = (self.tensors[name].load().double() for name in _T)
        first = torch.einsum("pq...,po,qi->oi...", t1, a1, b1)
        return (first * torch.einsum("pq...,po,qi->oi...", t2, a2, b2)).flatten(1)


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are the four factors of LoHa, with both cores or none."""
    return parts.keys() == set(_W) or parts.keys() == {*_W, *_T}


def build(parts: Mapping[str, LazyTensor], scaling: float, alpha: float) -> LohaUpdate:
    """Return the update of the factors."""
    return LohaUpdate(dict(parts), scaling, alpha)
