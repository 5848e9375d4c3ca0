"""HiRA: W' = W∘(1 + B·A), a low-rank matrix multiplied with the weight element by element (ICLR 2025), as in PEFT.

`hira_A` (r, in, …) and `hira_B` (out, r, 1…); of an embedding (V, d) `hira_embedding_A` (r, V) and `hira_embedding_B`
(d, r), B·A transposed. There is no alpha. W is the unchanged weight, so that two of them add.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratools.adapter.kinds import Device, DType, Tensor, Underlying
from loratools.adapter.kinds._onweight import Change, Changing
from loratools.storage.lazy import LazyTensor

_LINEAR, _EMBEDDING = ("hira_A", "hira_B"), ("hira_embedding_A", "hira_embedding_B")


@dataclass(frozen=True, slots=True, eq=False)
class HiraUpdate(Changing):
    """The two factors. Raises `ValueError` where they do not share a rank."""

    kind = "hira"

    def check(self) -> None:
        (A, B), of_embedding = self._shapes, _EMBEDDING[0] in self.tensors
        if len(A) < 2 or len(A) != len(B) or A[0] != B[1] or set(B[2:]) > {1} or (of_embedding and len(A) != 2):
            raise ValueError(f"HiRA's factors A {A} and B {B} do not share a rank; expected (r, in) and (out, r)")
        Changing.check(self)

    @property
    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        A, B = (self.tensors[name].shape for name in self._names)
        return A, B

    @property
    def _names(self) -> tuple[str, str]:
        return _EMBEDDING if _EMBEDDING[0] in self.tensors else _LINEAR

    @property
    def rank(self) -> int:
        return self._shapes[0][0]

    @property
    def own_shape(self) -> tuple[int, ...]:
        A, B = self._shapes
        return (A[1], B[0]) if self._names is _EMBEDDING else (B[0], *A[1:])

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return left (rows, r) and right (r, columns) in float64."""
        A, B = (self.number(name).flatten(1) for name in self._names)
        return (A.T, B.T) if self._names is _EMBEDDING else (B, A)

    def change(self, dtype: DType, device: Device) -> Change:
        """Return W∘(1 + left·right) of rows."""
        left, right = (factor.to(device, dtype) for factor in self._factors())
        return lambda W, rows: (left[rows] @ right).add_(1).view(W.shape) * W

    def outputs(self, X: Tensor, under: Underlying) -> Tensor:
        """Return X·Wᵀ + Σₖ ((X∘right_k)·Wᵀ)∘left_k."""
        left, right = (factor.to(X) for factor in self._factors())
        left = left[under.site.part_rows]
        return under.below(X) + sum(
            (under.below(X * right[k]) * left[:, k] for k in range(len(right))), X.new_zeros(len(X), len(left))
        )


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are HiRA's two factors."""
    return parts.keys() in (set(_LINEAR), set(_EMBEDDING))


def build(
    parts: Mapping[str, LazyTensor], scaling: float, alpha: float, layout: Mapping[str, Any] | None = None
) -> HiraUpdate:
    """Return the update; it has no scaling."""
    return HiraUpdate(dict(parts))
