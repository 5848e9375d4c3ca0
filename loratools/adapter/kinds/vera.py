"""VeRA: ΔW = diag(b)·B·diag(d)·A, with A and B random and shared by all modules (arXiv 2310.11454), as PEFT has it.

d is `vera_lambda_d` (r,), b is `vera_lambda_b` (out,); of `vera_A` (r, most inputs) and `vera_B` (most outputs, r) each
module takes its first columns and rows. There is no alpha. Where a file has no A and B, they are drawn from the seed of
its config, of the size of the largest module: the `layout` is `{"seed": …}`, and `dims` once the base is known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Self

from loratools.adapter.kinds import Tensor
from loratools.adapter.kinds._named import NamedProduct
from loratools.storage.lazy import LazyTensor


@dataclass(frozen=True, slots=True, eq=False)
class VeraUpdate(NamedProduct):
    """The two scales, and the shared projections or their seed. Raises `ValueError` where sizes do not fit."""

    kind = "vera"
    prefix: ClassVar[str] = "vera"
    halves: ClassVar[int] = 1  # of d and A, of which the first is taken

    def check(self) -> None:
        NamedProduct.check(self)
        shapes = {part: lazy.shape for part, lazy in self.tensors.items()}
        b, d = (shapes[self._name(part)] for part in ("lambda_b", "lambda_d"))
        if len(b) != 1 or len(d) != 1:
            raise ValueError(f"{self.prefix}_lambda_b has shape {b} and {self.prefix}_lambda_d {d}, expected vectors")
        if d[0] % self.halves:
            raise ValueError(f"{self.prefix}_lambda_d has shape {d}, expected two numbers for each rank")
        if self.saved:
            A, B = (shapes[self._name(part)] for part in "AB")
            if len(A) != 2 or len(B) != 2 or A[0] != d[0] or B[1] != self.rank or B[0] < b[0]:
                raise ValueError(f"the shared projections {A} and {B} do not fit {self.rank} ranks and {b[0]} outputs")
            if self.weight_shape and A[1] < self.weight_shape[1]:
                raise ValueError(f"the shared projection has {A[1]} inputs, the base's weight {self.weight_shape[1]}")

    @classmethod
    def claims(cls, parts: Mapping[str, LazyTensor]) -> bool:
        """Tell whether these are the two scales, with both projections or none."""
        scales = {cls._name("lambda_b"), cls._name("lambda_d")}
        return parts.keys() in (scales, scales | {cls._name("A"), cls._name("B")})

    @classmethod
    def build(
        cls, parts: Mapping[str, LazyTensor], scaling: float, alpha: float, layout: Mapping[str, Any] | None = None
    ) -> Self:
        """Return the update; it has no scaling. Raises `ValueError` where it has neither projections nor a seed."""
        update = cls(dict(parts), layout=dict(layout or {}))
        if not update.saved and "seed" not in update.layout:
            raise ValueError("no shared projections, and no seed to draw them from")
        return update

    @classmethod
    def _name(cls, part: str) -> str:
        return f"{cls.prefix}_{part}"

    @property
    def saved(self) -> bool:
        """Whether the file has the projections."""
        return self._name("A") in self.tensors

    @property
    def rank(self) -> int:
        return self.tensors[self._name("lambda_d")].parameters // self.halves

    @property
    def own_shape(self) -> tuple[int, ...]:
        return self.tensors[self._name("lambda_b")].shape[0], 0

    @property
    def needs_all(self) -> bool:
        return not self.saved and "dims" not in self.layout

    def among(self, shapes: Sequence[tuple[int, ...]]) -> Self:
        """Return the update whose projections are as large as the largest of these weights."""
        dims = [max(shape[side] for shape in shapes) for side in (0, 1)]
        return replace(self, layout={**self.layout, "dims": dims})

    def _shared(self) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r) of this module, in float64."""
        if self.saved:
            A, B = self.number(self._name("A")), self.number(self._name("B"))
        else:
            A, B = (drawn.double() for drawn in draw(self.layout["seed"], self.rank, self.halves, *self.layout["dims"]))
        return A[: self.rank, : self.shape[1]], B[: self.shape[0]]

    def left(self) -> Tensor:
        """Return diag(b)·B."""
        return self.number(self._name("lambda_b"))[:, None] * self._shared()[1]

    def right(self) -> Tensor:
        """Return diag(d)·A."""
        return self.number(self._name("lambda_d"))[: self.rank, None] * self._shared()[0]

    def dense(self) -> Tensor:
        """Return the product as one sum over the rank."""
        import torch

        A, B = self._shared()
        b, d = (self.number(self._name(part)) for part in ("lambda_b", "lambda_d"))
        return torch.einsum("o,or,r,ri->oi", b, B, d[: self.rank], A)


@lru_cache(maxsize=4)
def draw(seed: int, rank: int, halves: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Draw A (halves·r, inputs) and B (outputs, r) as PEFT does: one generator, each uniform in ±√3·√2/√fan_in."""
    import torch

    generator = torch.Generator(device="cpu").manual_seed(seed)

    def uniform(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns))
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

    A = uniform(halves * rank, inputs)
    return A, uniform(outputs, rank)


claims, build = VeraUpdate.claims, VeraUpdate.build
