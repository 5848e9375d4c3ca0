"""LoKr: ΔW = w1 ⊗ w2, the Kronecker product, (a·b, c·d) from w1 (a, c) and w2 (b, d·kh·kw) (LyCORIS; KronA).

Either is stored whole or as w*_a·w*_b; w2 also as a Tucker core t2 (r, r, kh, kw) with w2_a (r, b) and w2_b (r, d).
s = α/r with the rank of whichever is factored, w2 before w1; where both are whole s is 1, whatever alpha says, unless
the layout says `scaled`, as PEFT does it, whose config has the rank. PEFT takes the whole w2 of a Conv1d, (b, d, k),
for the left factor: the layout `swapped` is ΔW = w2 ⊗ w1 at each position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratools.adapter.kinds import Device, DType, Rows, Tensor
from loratools.adapter.kinds._rowwise import Named
from loratools.storage.lazy import LazyTensor

_NAMES = frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"})
_FIRST = (frozenset({"lokr_w1"}), frozenset({"lokr_w1_a", "lokr_w1_b"}))
_SECOND = (
    frozenset({"lokr_w2"}), frozenset({"lokr_w2_a", "lokr_w2_b"}), frozenset({"lokr_w2_a", "lokr_w2_b", "lokr_t2"}),
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class LokrUpdate(Named):
    """The factors of w1 and w2. Raises `ValueError` where their shapes do not go together."""

    scaled: bool = False

    kind = "lokr"

    @property
    def layout(self) -> Mapping[str, Any]:
        whole = self.scaled and {"lokr_w1", "lokr_w2"} <= self.tensors.keys()
        return {
            **({"scaled": True} if whole or self.swapped else {}),
            **({"swapped": True} if self.swapped else {}),
        }

    @property
    def swapped(self) -> bool:
        """Tell whether w2 stands on the left: `torch.kron` puts the sides that w1 lacks in front, not behind."""
        return self.scaled and "lokr_w2" in self.tensors and len(self.tensors["lokr_w2"].shape) == 3

    def __post_init__(self) -> None:
        shapes = {name: lazy.shape for name, lazy in self.tensors.items()}
        pairs = [(shapes[f"lokr_{w}_a"], shapes[f"lokr_{w}_b"]) for w in ("w1", "w2") if f"lokr_{w}_a" in shapes]
        if core := shapes.get("lokr_t2"):
            a, b = pairs.pop()
            if len(core) < 3 or core[:2] != (a[0], b[0]) or len(a) != 2 or len(b) != 2:
                raise ValueError(f"LoKr's core {core} does not go with {a} and {b}")
        if any(len(a) != 2 or len(b) < 2 or a[1] != b[0] for a, b in pairs) or len(shapes.get("lokr_w1", (1, 1))) != 2:
            raise ValueError(f"LoKr's factors do not go together: {shapes}")

    @property
    def rank(self) -> int:
        """The rank of w2, or of w1; 0 where both are whole."""
        ranks = [self.tensors[name].shape[0] for name in ("lokr_w2_b", "lokr_w1_b") if name in self.tensors]
        return ranks[0] if ranks else 0

    @property
    def shape(self) -> tuple[int, ...]:
        if self.weight_shape:
            return self.weight_shape
        (a, c), (b, d, *sides) = self._sides("w1"), self._sides("w2")
        return a * b, c * d, *sides

    def _sides(self, w: str) -> tuple[int, ...]:
        if whole := self.tensors.get(f"lokr_{w}"):
            return whole.shape
        a, b = self.tensors[f"lokr_{w}_a"].shape, self.tensors[f"lokr_{w}_b"].shape
        if core := self.tensors.get("lokr_t2") if w == "w2" else None:
            return a[1], b[1], *core.shape[2:]
        return a[0], *b[1:]

    def matrix(self, w: str) -> Tensor:
        """Return w1 or w2 in float64, with all its sides."""
        import torch

        if whole := self.tensors.get(f"lokr_{w}"):
            return whole.load().double()
        a, b = (self.tensors[f"lokr_{w}_{side}"].load().double() for side in "ab")
        if w == "w2" and "lokr_t2" in self.tensors:
            return torch.einsum("pq...,pb,qd->bd...", self.tensors["lokr_t2"].load().double(), a, b)
        return torch.einsum("or,r...->o...", a, b)

    def rows(self, dtype: DType, device: Device, transposed: bool) -> Rows:
        """Return rows of the Kronecker product: row o is row o // b of w1 with row o % b of w2."""
        import torch

        if self.swapped:
            first, second = (self.matrix(w).to(device, dtype) for w in ("w2", "w1"))
            width, positions = len(second), first.shape[2]

            def swapped(rows: slice) -> Tensor:
                o = torch.arange(rows.start, rows.stop, device=device)
                left, right = first[o // width], second[o % width]
                return (left[:, :, None, :] * right[:, None, :, None]).reshape(len(o), -1, positions).flatten(1)

            if not transposed:
                return swapped
            whole = swapped(slice(0, self.shape[0])).T
            return lambda rows: whole[rows]
        w1, w2 = (self.matrix(w).flatten(1).to(device, dtype) for w in ("w1", "w2"))
        w1, w2 = (w1.T, w2.T) if transposed else (w1, w2)

        def made(rows: slice) -> Tensor:
            at = torch.arange(rows.start, rows.stop, device=device)
            left, right = w1[at // len(w2)], w2[at % len(w2)]
            return (left[:, :, None] * right[:, None, :]).flatten(1)

        return made

    def dense(self) -> Tensor:
        """Return the Kronecker product."""
        import torch

        if self.swapped:
            return torch.einsum("ac,bdk->badck", self.matrix("w1"), self.matrix("w2")).reshape(self.shape[0], -1)
        return torch.kron(self.matrix("w1"), self.matrix("w2").flatten(1).contiguous())


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are w1 and w2, each whole or factored."""
    names = frozenset(parts)
    return names <= _NAMES and any(names == first | second for first in _FIRST for second in _SECOND)


def build(
    parts: Mapping[str, LazyTensor], scaling: float, alpha: float, layout: Mapping[str, Any] | None = None
) -> LokrUpdate:
    """Return the update of the factors; two whole ones have no scaling unless the layout says so."""
    scaled = bool(layout and layout.get("scaled"))
    whole = {"lokr_w1", "lokr_w2"} <= parts.keys() and not scaled
    return LokrUpdate(dict(parts), 1.0 if whole else scaling, alpha, scaled=scaled)
