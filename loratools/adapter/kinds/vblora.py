"""VB-LoRA: ΔW = B·A, whose factors are tiled with mixtures of vectors from one bank (arXiv 2405.15179), as in PEFT.

`vblora_vector_bank` (h, b) is shared. `vblora_logits_A` (r, in/b, h) and `vblora_logits_B` (out/b, r, h) choose the
`topk` vectors of each piece (of the `layout`), mixed by the softmax of their logits; a file made small has
`…_topk_indices` and all but the last of `…_topk_weights` instead. There is no alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratools.adapter.kinds import Tensor
from loratools.adapter.kinds._named import NamedProduct
from loratools.storage.lazy import LazyTensor

BANK = "vblora_vector_bank"


@dataclass(frozen=True, slots=True, eq=False)
class VbloraUpdate(NamedProduct):
    """The bank and what chooses from it. Raises `ValueError` where sizes do not fit."""

    kind = "vblora"

    def check(self) -> None:
        bank, topk = self.tensors[BANK].shape, self.layout["topk"]
        if len(bank) != 2 or not 0 < topk <= bank[0]:
            raise ValueError(f"{BANK} has shape {bank}, expected (h, b) with at least {topk} vectors")
        for side in "AB":
            for name, last in self._chosen(side).items():
                shape, wanted = (
                    self.tensors[name].shape,
                    {"logits": bank[0], "indices": topk, "weights": topk - 1}[last],
                )
                if len(shape) != 3 or shape[2] != wanted:
                    raise ValueError(f"{name} has shape {shape}, expected three sides, the last {wanted}")
        if self._sides("A")[0] != self._sides("B")[1]:
            raise ValueError("the logits of A and B do not share a rank")
        NamedProduct.check(self)

    def _chosen(self, side: str) -> dict[str, str]:
        """Return the names of the tensors that choose, with what they are."""
        name = f"vblora_logits_{side}"
        if name in self.tensors:
            return {name: "logits"}
        return {f"{name}_topk_{what}": what for what in ("indices", "weights")}

    def _sides(self, side: str) -> tuple[int, ...]:
        return self.tensors[next(iter(self._chosen(side)))].shape[:2]

    @property
    def rank(self) -> int:
        return self._sides("A")[0]

    @property
    def own_shape(self) -> tuple[int, ...]:
        length = self.tensors[BANK].shape[1]
        return self._sides("B")[0] * length, self._sides("A")[1] * length

    def _choice(self, side: str) -> tuple[Tensor, Tensor]:
        """Return the indices of the vectors of each piece, and their weights in float64."""
        import torch

        names = list(self._chosen(side))
        if len(names) == 1:
            logits, indices = self.number(names[0]).topk(self.layout["topk"], dim=-1)
            return indices, logits.softmax(-1)
        indices, weights = self.tensors[names[0]].load().long(), self.number(names[1])
        return indices, torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)

    def _pieces(self, side: str) -> Tensor:
        """Return the mixed vectors, (…, b)."""
        indices, weights = self._choice(side)
        return (weights[..., None] * self.number(BANK)[indices]).sum(-2)

    def left(self) -> Tensor:
        """Return B: the vectors of a rank, one below the other."""
        return self._pieces("B").transpose(1, 2).reshape(self.own_shape[0], self.rank)

    def right(self) -> Tensor:
        """Return A: the vectors of a rank, one beside the other."""
        return self._pieces("A").reshape(self.rank, self.own_shape[1])

    def dense(self) -> Tensor:
        """Return the product, from weights over the whole bank."""
        import torch

        bank, over = self.number(BANK), []
        for side in "BA":
            indices, weights = self._choice(side)
            over.append(weights.new_zeros(*indices.shape[:2], len(bank)).scatter_add_(-1, indices, weights))
        return torch.einsum("orh,hx,rig,gy->oxiy", over[0], bank, over[1], bank).reshape(self.own_shape)


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these choose from a bank."""
    return BANK in parts and any(part.startswith("vblora_logits_A") for part in parts)


def build(
    parts: Mapping[str, LazyTensor], scaling: float, alpha: float, layout: Mapping[str, Any] | None = None
) -> VbloraUpdate:
    """Return the update; it has no scaling. Raises `ValueError` where nothing says how many vectors are mixed."""
    if not layout or "topk" not in layout:
        raise ValueError("nothing says how many vectors of the bank are mixed (topk)")
    return VbloraUpdate(dict(parts), layout=dict(layout))
