"""Super-Tuning without its indices: W' = W + ΔW with single elements where |W| is largest, or smallest, as in PEFT.

`supertuning_values` (n,) are for the n elements in the order in which `torch.topk` gives them for the whole weight,
`layout = {"largest": true}`; equal ones come as it puts them. PEFT looks for them again whenever it loads the adapter.
With `supertuning_lora_A.weight` and `supertuning_lora_B.weight` s·B·A is added, as kind `supertuning` does.
W is the unchanged base, whatever other adapters have made of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from loratools.adapter.kinds import Device, DType, Tensor, Underlying
from loratools.adapter.kinds._onweight import Change, Changing
from loratools.adapter.kinds.supertuning import VALUES, A, B
from loratools.storage.lazy import LazyTensor


@dataclass(frozen=True, slots=True, eq=False)
class SupertunedUpdate(Changing):
    """Numbers for single elements, and factors or none. Raises `ValueError` where they do not go together."""

    kind = "supertuned"
    together = 0
    of_base = True

    def check(self) -> None:
        """Raise `ValueError` for tensors that do not go together, or for more numbers than the weight has."""
        shapes = {name: lazy.shape for name, lazy in self.tensors.items()}
        factors = [shapes[name] for name in (A, B) if name in shapes]
        if len(shapes[VALUES]) != 1 or any(len(shape) != 2 for shape in factors):
            raise ValueError(f"Super-Tuning's tensors do not go together: {shapes}")
        if factors and factors[0][0] != factors[1][1]:
            raise ValueError(f"Super-Tuning's tensors do not go together: {shapes}")
        if self.weight_shape is not None and shapes[VALUES][0] > prod(self.weight_shape):
            raise ValueError(f"it has {shapes[VALUES][0]} numbers, the base's weight has shape {self.weight_shape}")
        Changing.check(self)

    @property
    def rank(self) -> int:
        """The rank of the factors; 0 where there are none."""
        return self.tensors[A].shape[0] if A in self.tensors else 0

    @property
    def own_shape(self) -> tuple[int, ...]:
        return (self.tensors[B].shape[0], self.tensors[A].shape[1]) if A in self.tensors else (0, 0)

    def _places(self, W: Tensor) -> Tensor:
        """Return the flat places of the elements, the largest or the smallest first."""
        import torch

        count: int = self.tensors[VALUES].shape[0]
        return torch.topk(W.abs().flatten(), count, largest=self.layout["largest"]).indices

    def change(self, dtype: DType, device: Device) -> Change:
        """Return W with the numbers added where they belong, and the product."""
        values = self.number(VALUES).to(device, dtype)
        factors = [self.scaling * self.number(B), self.number(A)] if self.rank else []
        factors = [factor.to(device, dtype) for factor in factors]

        def change(W: Tensor, rows: slice) -> Tensor:
            after = W.flatten().index_add(0, self._places(W), values).reshape(W.shape)
            return after.addmm_(*factors) if factors else after

        return change

    def outputs(self, X: Tensor, under: Underlying) -> Tensor:
        """Return X·Wᵀ, each number times its input added to its output, and s·(X·Aᵀ)·Bᵀ."""
        import torch

        W = under.below(torch.eye(X.shape[1], dtype=X.dtype)).T.contiguous()
        at = self._places(W)
        Y = under.below(X)
        Y = Y.index_add(1, at // W.shape[1], X[:, at % W.shape[1]] * self.number(VALUES).to(X))
        if not self.rank:
            return Y
        return Y + self.scaling * (X @ self.number(A).to(X).T) @ self.number(B).to(X).T


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are numbers without their places, with or without factors."""
    return set(parts) in ({VALUES}, {VALUES, A, B})


def build(
    parts: Mapping[str, LazyTensor], scaling: float, alpha: float, layout: Mapping[str, Any] | None = None
) -> SupertunedUpdate:
    """Return the update; raise `ValueError` where nothing says which elements it is for."""
    if not layout or not isinstance(layout.get("largest"), bool):
        raise ValueError("nothing says whether it is for the largest or the smallest elements (select_top)")
    return SupertunedUpdate(dict(parts), scaling if A in parts else 1.0, alpha, {"largest": layout["largest"]})
