"""TinyLoRA: ΔW = B·(Σₖ vₖ·Pₖ)·A with the base's singular vectors in A and B (arXiv 2602.04118), as in PEFT.

`tinylora_A` (r, in) and `tinylora_B` (out, r) are √S·Vᵀ and U·√S of the base's largest singular values, as the adapter
stores them; `tinylora_P` (u, r, r) are random matrices, and `tinylora_v` (u,) is trained, and shared by modules. Of an
embedding A is (r, d) and B (V, r). Where P is not stored, it is drawn from `layout["seed"]`. There is no alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loratools.adapter.kinds import Factors, Tensor
from loratools.adapter.kinds._product import LowRank
from loratools.adapter.kinds._rounded import as_in
from loratools.storage.lazy import LazyTensor

A, B, P, V = "tinylora_A", "tinylora_B", "tinylora_P", "tinylora_v"


@dataclass(frozen=True, slots=True, eq=False)
class TinyloraUpdate(LowRank):
    """The factors, the random matrices and their weights. Raises `ValueError` where they do not go together."""

    parts: Mapping[str, LazyTensor]

    layout: Mapping[str, Any] = field(default_factory=dict)

    kind = "tinylora"
    scaling = alpha = 1.0

    def __post_init__(self) -> None:
        a, b, v = (self.parts[name].shape for name in (A, B, V))
        p = self.parts[P].shape if P in self.parts else (*v, *a[:1], *a[:1])
        if len(a) != 2 or len(b) != 2 or len(v) != 1 or a[0] != b[1] or p != (*v, a[0], a[0]):
            raise ValueError(f"TinyLoRA's tensors do not go together: A {a}, B {b}, P {p}, v {v}")

    @property
    def rank(self) -> int:
        return self.parts[A].shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[B].shape[0], self.parts[A].shape[1]

    def _drawn(self, count: int) -> Tensor:
        """Return the random matrices, rounded to the base's dtype, as the singular vectors are."""
        return as_in(self.parts[A].load(), matrices(self.layout["seed"], (count, self.rank, self.rank)))

    def factored(self) -> Factors:
        """Return B·Σ vₖ·Pₖ in float64, and A."""

        def left() -> Tensor:
            b, v = (self.parts[name].load().double() for name in (B, V))
            drawn = P not in self.parts
            p = self._drawn(len(v)) if drawn else self.parts[P].load()
            return b @ (v @ p.double().flatten(1)).reshape(self.rank, self.rank)

        b = self.parts[B]
        return Factors(LazyTensor("F64", b.shape, left, file=b.file), self.parts[A], 1.0)


def matrices(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Return the random matrices (u, r, r) of a module, in float32, drawn as PEFT draws them."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.normal(mean=0.0, std=1.0 / shape[1] ** 0.5, size=shape, generator=generator)


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are the four tensors, or those without the random matrices."""
    return parts.keys() in ({A, B, P, V}, {A, B, V})


def build(
    parts: Mapping[str, LazyTensor], scaling: float, alpha: float, layout: Mapping[str, Any] | None = None
) -> TinyloraUpdate:
    """Return the update, which has no scaling; raise `ValueError` where nothing says the random matrices."""
    if P in parts:
        return TinyloraUpdate(dict(parts))
    if not layout or "seed" not in layout:
        raise ValueError(f"no {P}, and nothing says from which seed it is drawn")
    return TinyloraUpdate(dict(parts), {"seed": layout["seed"]})
