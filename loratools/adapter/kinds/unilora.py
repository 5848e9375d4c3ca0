"""Uni-LoRA: ΔW = B·A, all numbers of A and B picked out of a few that modules share (arXiv 2506.00799), as in PEFT.

A = θ[a]∘p and B = θ[b]∘q: `unilora_theta_d` is θ (d,), `unilora_indices_A` and `_B` are a (r, in) and b (out, r), and
`unilora_scales_A` and `_B` p and q, 1/√ of how often an index comes in the whole adapter. There is no alpha.

PEFT usually stores θ alone and draws the indices of all modules at once from a seed, in the order of the modules in the
model's code. Then `layout` has the `seed`, how many indices there are in all (`count`), the `first` of this module,
its `rank`, the `shape` of its weight and the `dtype` of the base, to which PEFT rounds p and q.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from loratools.adapter.kinds import Factors, Tensor
from loratools.adapter.kinds._product import LowRank
from loratools.errors import BadFile
from loratools.storage import dtypes
from loratools.storage.lazy import LazyTensor

THETA = "unilora_theta_d"
_INDICES, _SCALES = "unilora_indices_", "unilora_scales_"
_NAMES = frozenset({THETA, *(f"{name}{side}" for name in (_INDICES, _SCALES) for side in "AB")})
_LAYOUT = ("seed", "count", "first", "rank", "shape", "dtype")


@dataclass(frozen=True, slots=True, eq=False)
class UniloraUpdate(LowRank):
    """What all share, and a module's indices and scales. Raises `ValueError` where they do not go together."""

    parts: Mapping[str, LazyTensor]
    layout: Mapping[str, Any] = field(default_factory=dict)

    kind = "unilora"
    scaling = alpha = 1.0

    def __post_init__(self) -> None:
        shapes = {name: lazy.shape for name, lazy in self.parts.items()}
        a, b = self._sides()
        fits = len(a) == len(b) == 2 and a[0] == b[1] and len(shapes[THETA]) == 1
        scales = [shapes.get(f"{_SCALES}{side}", own) for side, own in (("A", a), ("B", b))]
        if not fits or scales != [a, b]:
            raise ValueError(f"Uni-LoRA's tensors do not go together: {shapes}")

    def _sides(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B."""
        if self.layout:
            (out, inner), rank = self.layout["shape"], self.layout["rank"]
            return (rank, inner), (out, rank)
        return self.parts[f"{_INDICES}A"].shape, self.parts[f"{_INDICES}B"].shape

    @property
    def rank(self) -> int:
        return self._sides()[0][0]

    @property
    def shape(self) -> tuple[int, ...]:
        a, b = self._sides()
        return b[0], a[1]

    def factored(self) -> Factors:
        """Return B and A in float64."""
        return Factors(self._factor("B"), self._factor("A"), 1.0)

    def _factor(self, side: str) -> LazyTensor:
        theta, shape = self.parts[THETA], self._sides()["AB".index(side)]

        def load() -> Tensor:
            values = theta.load().double()
            at, scales = self._drawn(side) if self.layout else self._stored(side)
            if not 0 <= int(at.min()) <= int(at.max()) < len(values):
                found = int(at.min()) if int(at.min()) < 0 else int(at.max())
                raise BadFile(f"Uni-LoRA: an index of {side} is {found}, {THETA} has {len(values)} numbers")
            return values[at] * scales.double()

        return LazyTensor("F64", shape, load, file=theta.file or (theta.spec.file if theta.spec else None))

    def _stored(self, side: str) -> tuple[Tensor, Tensor]:
        return self.parts[f"{_INDICES}{side}"].load().long(), self.parts[f"{_SCALES}{side}"].load()

    def _drawn(self, side: str) -> tuple[Tensor, Tensor]:
        indices, scales = drawn(self.layout["seed"], self.layout["count"], self.parts[THETA].shape[0])
        (rank, inner), b = self._sides()
        first = self.layout["first"] + (rank * inner if side == "B" else 0)
        at = indices[first : first + (rank * inner if side == "A" else b[0] * rank)]
        at = at.reshape((rank, inner) if side == "A" else b)
        return at, scales.to(dtypes.to_torch(self.layout["dtype"]))[at]


@lru_cache(maxsize=2)
def drawn(seed: int, count: int, length: int) -> tuple[Tensor, Tensor]:
    """Return the indices of all modules as PEFT draws them, and 1/√ of how often each comes, in float32.

    Each of `length` numbers comes as often as any other, but for the rest, which is drawn, and their order is random.
    """
    import numpy as np
    import torch

    random = np.random.default_rng(seed)
    indices = np.repeat(np.arange(length), count // length)
    if rest := count % length:
        indices = np.concatenate([indices, random.choice(length, size=rest, replace=False)])
    random.shuffle(indices)
    counts = torch.from_numpy(np.bincount(indices, minlength=length))
    return torch.from_numpy(indices), torch.where(counts > 0, counts.float().rsqrt(), 0.0)


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are the shared numbers, with indices and scales of both factors or without."""
    return set(parts) in (set(_NAMES), {THETA})


def build(
    parts: Mapping[str, LazyTensor], scaling: float, alpha: float, layout: Mapping[str, Any] | None = None
) -> UniloraUpdate:
    """Return the update, which has no scaling; raise `ValueError` where nothing says which number stands where."""
    if set(parts) == _NAMES:
        return UniloraUpdate(dict(parts))
    if not layout or any(name not in layout for name in _LAYOUT):
        raise ValueError("nothing says which number stands where in its factors (unilora_indices, or the base model)")
    return UniloraUpdate(dict(parts), {name: layout[name] for name in _LAYOUT})
