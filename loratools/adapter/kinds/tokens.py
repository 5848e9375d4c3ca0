"""Rows trained whole: W'[i] = rows of their own for the token indices i (PEFT's `trainable_token_indices`).

The tensor is called `trainable_tokens_delta`, (n, d), but holds what takes the place of the rows, not what is added.
Which rows, its file's config says; here they are the `layout`, `{"rows": [i₀, i₁, …]}`. PEFT gives a tied output head
the same rows, so that a tied model stays tied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loratools.adapter.kinds import Device, DType, Tensor, Term, Underlying
from loratools.adapter.kinds._shared import OnWeight
from loratools.adapter.site import Site
from loratools.storage.lazy import LazyTensor

ROWS_PART = "token_adapter.trainable_tokens_delta"


@dataclass(frozen=True, slots=True, eq=False)
class TokensUpdate(OnWeight):
    """Rows and the indices where they go. Raises `ValueError` where their numbers differ or an index comes twice."""

    values: LazyTensor
    indices: Sequence[int]
    vocabulary: int | None = None

    kind = "tokens"
    rank = 0
    alpha = scaling = 1.0

    def __post_init__(self) -> None:
        shape, count = self.values.shape, len(self.indices)
        if len(shape) != 2 or 0 in shape or shape[0] != count:
            raise ValueError(f"{ROWS_PART} has shape {shape}, expected a row for each of {count} token indices")
        if len(set(self.indices)) < count or min(self.indices) < 0:
            raise ValueError(f"the token indices {str(list(self.indices))[:80]} are not different rows")
        if self.vocabulary is not None and max(self.indices) >= self.vocabulary:
            raise ValueError(f"token index {max(self.indices)} is beyond the base's {self.vocabulary} rows")

    def fitted(self, shape: tuple[int, ...]) -> TokensUpdate:
        """Return the update of a base weight of this shape; the rows alone do not tell how many there are."""
        return replace(self, vocabulary=shape[0])

    @property
    def layout(self) -> Mapping[str, Any]:
        return {"rows": list(self.indices)}

    @property
    def replaced_rows(self) -> Sequence[int]:
        return self.indices

    @property
    def shape(self) -> tuple[int, ...]:
        """The base's rows once they are known, until then as many as the largest index needs."""
        return self.vocabulary or max(self.indices) + 1, self.values.shape[1]

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {ROWS_PART: self.values}

    def term(self, site: Site, weight: float, dtype: DType, device: Device) -> Rows:
        """Return the rows, in the order of their indices; a weight cannot scale what replaces."""
        import torch

        order = sorted(range(len(self.indices)), key=lambda i: self.indices[i])
        values = self.values.load().to(device=device, dtype=dtype)[order]
        return Rows(values, torch.tensor(sorted(self.indices), device=device))

    def project(self, X: Tensor, weight: float, under: Underlying) -> Tensor:
        """Return X·Wᵀ with the columns of the replaced rows put in their place."""
        Y = under.below(X).clone()
        Y[:, list(self.indices)] = X @ self.values.load().to(X).T
        return Y


@dataclass(frozen=True, slots=True, eq=False)
class Rows(Term):
    """The term W[indices] = values, indices ascending."""

    values: Tensor
    indices: Tensor

    def apply_rows(self, W: Tensor, rows: slice, base: Tensor | None) -> None:
        step = rows.step or 1
        inside = (self.indices >= rows.start) & (self.indices < rows.stop) & ((self.indices - rows.start) % step == 0)
        W[(self.indices[inside] - rows.start) // step] = self.values[inside]


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are rows for the place of others."""
    return parts.keys() == {ROWS_PART}


def build(
    parts: Mapping[str, LazyTensor], scaling: float, alpha: float, layout: Mapping[str, Any] | None = None
) -> TokensUpdate:
    """Return the update; raise `ValueError` where nothing says which rows these are."""
    if not layout:
        raise ValueError("nothing says which token indices these rows are for (trainable_token_indices)")
    return TokensUpdate(parts[ROWS_PART], tuple(layout["rows"]))
