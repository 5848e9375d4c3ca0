"""RandLoRA: ΔW = s·B̂·Â, sums of scaled random bases that all modules share (arXiv 2502.00987), as PEFT computes it.

`randlora_lambda` (r, n) and `randlora_gamma` (n, m), m the smaller side of the weight, scale `randlora_A` (r, 1, …):
Â is A∘λ∘γ of (r, n, m), flattened to (r·n, m); B̂ is the first n bases of `randlora_B` (…, N, r), flattened to (M, n·r),
M the larger side. PEFT multiplies the two as they lie, λ's rank by B's basis; of a weight with more columns than rows
it is the transpose. s = α/r. Without A and B they are drawn from the `layout`'s `seed`, `sparse` as that says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Self

from loratools.adapter.kinds import Tensor
from loratools.adapter.kinds._named import NamedProduct
from loratools.storage.lazy import LazyTensor

_LAMBDA, _GAMMA, _A, _B = "randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"


@dataclass(frozen=True, slots=True, eq=False)
class RandloraUpdate(NamedProduct):
    """The scales, and the bases or their seed. Raises `ValueError` where sizes do not fit."""

    kind = "randlora"

    def check(self) -> None:
        scales, gamma = self.tensors[_LAMBDA].shape, self.tensors[_GAMMA].shape
        if len(scales) != 2 or len(gamma) != 2 or scales[1] != gamma[0]:
            raise ValueError(f"{_LAMBDA} {scales} and {_GAMMA} {gamma} do not go together; expected (r, n) and (n, m)")
        if self.saved:
            A, B = self.tensors[_A].shape, self.tensors[_B].shape
            large = max(self.weight_shape or (0,))
            if len(A) != 3 or len(B) != 3 or A[:2] != (scales[0], 1) or A[2] < gamma[1] or B[2] != scales[0]:
                raise ValueError(f"the shared bases {A} and {B} do not fit {_LAMBDA} {scales} and {_GAMMA} {gamma}")
            if B[0] < large or B[1] < scales[1]:
                raise ValueError(f"the shared bases {B} are too small for a weight of shape {self.weight_shape}")
        if self.weight_shape and (len(self.weight_shape) != 2 or min(self.weight_shape) != gamma[1]):
            raise ValueError(f"its smaller side has {gamma[1]} features, the base's weight is {self.weight_shape}")

    @property
    def saved(self) -> bool:
        """Whether the file has the bases."""
        return _A in self.tensors

    @property
    def rank(self) -> int:
        return self.tensors[_LAMBDA].shape[0]

    @property
    def width(self) -> int:
        return self.tensors[_LAMBDA].parameters

    @property
    def own_shape(self) -> tuple[int, ...]:
        return 0, 0

    @property
    def needs_all(self) -> bool:
        return not self.saved and "dims" not in self.layout

    def among(self, shapes: Sequence[tuple[int, ...]]) -> Self:
        """Return the update whose bases are as large as the largest of these weights."""
        sides = [max(shape[side] for shape in shapes) for side in (0, 1)]
        return replace(self, layout={**self.layout, "dims": [max(sides), min(sides)]})

    def _bases(self) -> tuple[Tensor, Tensor]:
        """Return the part of A and B that is this module's, in float64."""
        bases, small = self.tensors[_GAMMA].shape
        if self.saved:
            A, B = self.number(_A), self.number(_B)
        else:
            A, B = draw(self.layout["seed"], self.rank, *self.layout["dims"], self.layout.get("sparse", ""))
        return A[:, :, :small].double(), B[: max(self.shape), :bases].double()

    def _hats(self) -> tuple[Tensor, Tensor]:
        """Return Â (r·n, m) and B̂ (M, n·r)."""
        A, B = self._bases()
        return (self.number(_LAMBDA)[:, :, None] * A * self.number(_GAMMA)).flatten(0, 1), B.flatten(1)

    @property
    def _tall(self) -> bool:
        return self.shape[1] == min(self.shape)

    def left(self) -> Tensor:
        """Return B̂, or Âᵀ."""
        return self._hats()[1] if self._tall else self._hats()[0].T

    def right(self) -> Tensor:
        """Return Â, or B̂ᵀ."""
        return self._hats()[0] if self._tall else self._hats()[1].T

    def dense(self) -> Tensor:
        """Return the sum over the flattened index, entry by entry of its two readings (rank, basis)."""
        import torch

        A, B = self._bases()
        scales, gamma = self.number(_LAMBDA), self.number(_GAMMA)
        at = torch.arange(scales.numel())
        (rank, basis), (of_basis, of_rank) = divmods(at, scales.shape[1]), divmods(at, scales.shape[0])
        whole = torch.einsum("Mk,k,km,km->Mm", B[:, of_basis, of_rank], scales[rank, basis], A[rank, 0], gamma[basis])
        return whole if self._tall else whole.T


def divmods(at: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """Return quotients and remainders."""
    return at // by, at % by


@lru_cache(maxsize=4)
def draw(seed: int, rank: int, large: int, small: int, sparse: str) -> tuple[Tensor, Tensor]:
    """Draw A (r, 1, small) and B (large, N, r) as PEFT does; `sparse` is "", "sparse" or "very_sparse".

    Dense bases are drawn in bfloat16, as PEFT does on machines that have it.
    """
    import torch

    generator = torch.Generator(device="cpu").manual_seed(seed)
    bases = -(-small // rank)
    if not sparse:

        def uniform(*shape: int) -> Tensor:
            values = torch.empty(shape, dtype=torch.bfloat16)
            return torch.nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)

        A = uniform(rank, 1, small)
        B = torch.cat([uniform(large, 1, rank) for _ in range(bases)], dim=1)
        return A / A.std(), B / B.std()
    share = 1 / (2 * (math.sqrt(small) if sparse == "very_sparse" else 3))
    signs = []
    for shape in ((rank, 1, small), (large, bases, rank)):
        values = torch.rand(shape, generator=generator)
        signs.append((values > 1 - share).float() - (values < share).float())
    A, B = signs
    return A / A.std(), B / B.std()


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are the scales of RandLoRA."""
    return parts.keys() in ({_LAMBDA, _GAMMA}, {_LAMBDA, _GAMMA, _A, _B})


def build(
    parts: Mapping[str, LazyTensor], scaling: float, alpha: float, layout: Mapping[str, Any] | None = None
) -> RandloraUpdate:
    """Return the update. Raises `ValueError` where it has neither bases nor a seed."""
    update = RandloraUpdate(dict(parts), scaling, alpha, dict(layout or {}))
    if not update.saved and "seed" not in update.layout:
        raise ValueError("no shared bases, and no seed to draw them from")
    return update
