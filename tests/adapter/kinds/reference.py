"""Every kind of update in a few lines of float64, and terms applied tile by tile as a merge does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import lcm

import torch

from loratools.adapter import kinds
from loratools.adapter.kinds import Underlying, Update
from loratools.adapter.site import Site
from loratools.storage.lazy import LazyTensor

Parts = dict[str, torch.Tensor]


def build(parts: Parts, scaling: float = 0.7) -> Update:
    """Return the update that these tensors are, of whatever kind claims them."""
    lazy = {part: LazyTensor.of(tensor) for part, tensor in parts.items()}
    kind = claimed(lazy)
    update: Update = kinds.get(kind).build(lazy, scaling, scaling * 4)
    assert update.kind == kind
    return update


def claimed(parts: Mapping[str, LazyTensor]) -> str:
    """Return the only kind that claims these parts, which it does by their names and numbers of sides alone."""
    blank = {part: LazyTensor("F32", (1,) * len(lazy.shape), lambda: torch.ones(1)) for part, lazy in parts.items()}
    (kind,) = (name for name in kinds.names() if kinds.get(name).claims(parts))
    assert [kind] == [name for name in kinds.names() if kinds.get(name).claims(blank)]
    assert kinds.claim(parts) == kind
    return kind


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return float64 numbers, the same every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def delta(parts: Parts, scaling: float) -> torch.Tensor:
    """Return s·B·A as the module defines it, by the definitions of the kinds."""
    if "lora_embedding_A" in parts:
        return scaling * (parts["lora_embedding_B"] @ parts["lora_embedding_A"]).T
    A, B = parts["lora_A.weight"], parts["lora_B.weight"]
    if A.dim() == 2:
        return scaling * B @ A
    return scaling * torch.einsum("oq,qi...->oi...", B.flatten(1), A)


def merged(W: torch.Tensor, parts: Parts, scaling: float, now: torch.Tensor | None = None) -> torch.Tensor:
    """Return W' for the base weight W, where earlier updates have made `now` of it."""
    now = W if now is None else now
    change = delta(parts, scaling)
    if "lora_magnitude_vector" not in parts:
        return now + change
    axis = 1 if "lora_embedding_A" in parts else 0
    others = [dim for dim in range(W.dim()) if dim != axis]
    norm = (W + change).square().sum(others, keepdim=True).sqrt()
    shape = [-1 if dim == axis else 1 for dim in range(W.dim())]
    return parts["lora_magnitude_vector"].reshape(shape) / norm * (now + change)


def applied(
    W: torch.Tensor, given: Sequence[tuple[Update, float]], *, transposed: bool, rows: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return what the terms make of W, in tiles of so many rows of the matrix that a base stores."""
    matrix = W.flatten(1).T.contiguous() if transposed else W.flatten(1)
    matrix = matrix.to(dtype)
    site = Site.whole("w", (matrix.shape[0], matrix.shape[1]), transposed=transposed)
    terms = [update.term(site, weight, dtype, torch.device("cpu")) for update, weight in given]
    together = lcm(*(term.together for term in terms))  # as a merge gives them: what needs rows together gets them
    rows = -(-rows // together) * together
    tiles = [slice(start, min(start + rows, len(matrix))) for start in range(0, len(matrix), rows)]
    for term in terms:
        for tile in tiles:
            if term.needs_pass:
                term.observe_rows(matrix[tile].clone(), tile)
    out = matrix.clone()
    for tile in tiles:
        for i, term in enumerate(terms):
            term.apply_rows(out[tile], tile, None if i == 0 else matrix[tile].clone())
    return (out.T if transposed else out).reshape(W.shape)


def projected(W: torch.Tensor, given: Sequence[tuple[Update, float]], X: torch.Tensor) -> torch.Tensor:
    """Return X·W'ᵀ by the updates' own projections."""
    matrix = W.flatten(1)
    site = Site.whole("w", (matrix.shape[0], matrix.shape[1]))

    def after(count: int, probes: torch.Tensor) -> torch.Tensor:
        if count == 0:
            return probes @ matrix.T
        update, weight = given[count - 1]
        return update.project(probes, weight, Underlying(site, lambda: matrix, partial(after, count - 1)))

    return after(len(given), X)
