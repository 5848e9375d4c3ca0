"""The order of rows in q and k: llama.cpp and Meta turn pairs of neighbouring rows by RoPE, transformers two halves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.storage.lazy import LazyTensor

if TYPE_CHECKING:
    import torch


def permuted(lazy: LazyTensor, heads: int | None, *, back: bool = False) -> LazyTensor:
    """Return B with the rows of each head in pairs, as llama.cpp has them; with `back`, in transformers' halves again.

    `heads` is the number of heads, None for rows that keep their order. Raises `ValueError` where the rows are
    not those of so many heads.
    """
    if heads is None:
        return lazy
    out, rank = lazy.shape
    if out % heads or out // heads % 2:
        raise ValueError(f"{out} output features are not those of {heads} heads")
    sides = (heads, out // heads // 2, 2, rank) if back else (heads, 2, out // heads // 2, rank)

    def change(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(sides).transpose(1, 2).reshape(out, rank).contiguous()

    return lazy.map(change, lazy.shape)
