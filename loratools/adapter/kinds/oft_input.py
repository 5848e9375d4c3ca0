"""OFT on inputs, as PEFT has it since 0.15: W' = W·Rᵀ with a block-diagonal rotation R (arXiv 2306.07280, 2506.19847).

`oft_R.weight` (n, b(b − 1)/2) has the upper triangles, row by row, of skew matrices Q; R = (I − Q)(I + Q)⁻¹ of each, or
with `terms` the sum I + 2Q + 2Q² + … + Q^m of Cayley and Neumann, as many as PEFT takes. `eps` scales Q of each block
down to a length of eps/√n (constrained OFT); `share` says that one block stands for all. These are the `layout`. A
kernel is flattened: its rotation mixes inputs and positions; `turned_kernels`: it is W·R. Of an embedding, whose
part is `oft_embedding_R.weight`, W' = W·R: PEFT turns its rows the other way. With a weight w it is W + w·(W' − W).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratools.adapter.kinds import Device, DType, Tensor, Underlying
from loratools.adapter.kinds._onweight import Change, Changing
from loratools.storage.lazy import LazyTensor

PART, OF_EMBEDDING = "oft_R.weight", "oft_embedding_R.weight"


@dataclass(frozen=True, slots=True, eq=False)
class OftInputUpdate(Changing):
    """The triangles, and how they become rotations. Raises `ValueError` for shapes that are none of rotations."""

    kind = "oft_input"

    @property
    def part(self) -> str:
        """The name of the triangles."""
        return next(iter(self.tensors))

    def check(self) -> None:
        shape = self.tensors[self.part].shape
        if len(shape) != 2 or 0 in shape or self.rank * (self.rank - 1) // 2 != shape[1]:
            raise ValueError(f"{self.part} has shape {shape}, expected (n, b(b − 1)/2)")
        if self.weight_shape is not None:
            inputs, blocks = math.prod(self.weight_shape[1:]), inputs_of(shape[0], self.rank, self.layout)
            if inputs % self.rank or blocks not in (0, inputs):
                raise ValueError(f"its {shape[0]} blocks of {self.rank} rotate no {inputs} inputs of the base's weight")

    @property
    def rank(self) -> int:
        """The size b of a block."""
        return (1 + math.isqrt(1 + 8 * self.tensors[self.part].shape[1])) // 2

    @property
    def own_shape(self) -> tuple[int, ...]:
        return 0, inputs_of(self.tensors[self.part].shape[0], self.rank, self.layout)

    def skew(self) -> Tensor:
        """Return Q of each block, (n, b, b), constrained where the layout says so, in float64; −Q of an embedding's."""
        import torch

        triangles, size = self.number(self.part), self.rank
        if (eps := self.layout.get("eps")) is not None:
            lengths = math.sqrt(2) * triangles.norm(dim=1, keepdim=True)  # of Q, in which each number stands twice
            limit = eps / math.sqrt(len(triangles))
            triangles = torch.where(lengths <= limit, triangles, triangles * (limit / lengths))
        Q = triangles.new_zeros(len(triangles), size, size)
        rows, columns = torch.triu_indices(size, size, 1)
        Q[:, rows, columns] = triangles
        turned = self.part == OF_EMBEDDING or (self.layout.get("turned_kernels") and len(self.shape) > 2)
        return Q.transpose(1, 2) - Q if turned else Q - Q.transpose(1, 2)  # R of −Q is Rᵀ

    def change(self, dtype: DType, device: Device) -> Change:
        """Return the rotation of rows: each block of a row times Rᵀ of its block."""
        import torch

        Q, identity = self.skew(), torch.eye(self.rank, dtype=torch.float64)
        terms = self.layout.get("terms")
        if terms is None:
            R = torch.linalg.solve(identity + Q, identity - Q, left=False)
        else:
            R = identity.expand_as(Q).clone()
            power = identity
            for k in range(1, degree(terms) + 1):
                power = power @ Q
                R += power if terms > 2 and k == degree(terms) else 2 * power
        turned = R.transpose(1, 2).to(device, dtype)
        return lambda W, _: (W.reshape(len(W), -1, 1, self.rank) @ turned).reshape(W.shape)

    def outputs(self, X: Tensor, under: Underlying) -> Tensor:
        """Return (X·R)·Wᵀ, with R from Q's eigenvectors: Q = V·diag(λ)·Vᴴ has R = V·diag(f(λ))·Vᴴ."""
        import torch

        real, vectors = torch.linalg.eigh(1j * self.skew())
        values = -1j * real
        terms = self.layout.get("terms")
        if terms is None:
            mapped = (1 - values) / (1 + values)
        else:
            last = degree(terms)
            mapped = sum((2 * values**k for k in range(1, last + 1)), torch.ones_like(values))
            mapped = mapped - values**last if terms > 2 else mapped
        # i·Q is Hermitian: its eigenvectors are orthonormal, also where values are equal.
        R = (vectors * mapped[:, None, :]) @ vectors.mH
        blocks = X.view(len(X), -1, 1, self.rank) @ R.real.to(X)
        return under.below(blocks.reshape(X.shape))


def degree(terms: int) -> int:
    """Return the highest power of Q in PEFT's sum of so many terms: 3 terms are taken for 4."""
    return {0: 0, 1: 0, 2: 1}.get(terms, max(terms - 1, 3))


def inputs_of(blocks: int, size: int, layout: Mapping[str, Any]) -> int:
    """Return how many inputs the blocks are for; 0 where one stands for all."""
    return 0 if layout.get("share") else blocks * size


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are the triangles of rotations of inputs."""
    return parts.keys() in ({PART}, {OF_EMBEDDING})


def build(
    parts: Mapping[str, LazyTensor], scaling: float, alpha: float, layout: Mapping[str, Any] | None = None
) -> OftInputUpdate:
    """Return the update; it has no scaling. Raises `ValueError` where nothing says how rotations are made."""
    if layout is None:
        raise ValueError("nothing says how its numbers become rotations")
    return OftInputUpdate(dict(parts), layout=dict(layout))
