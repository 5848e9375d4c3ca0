"""How much of something a file holds, and what its tensors are, from headers alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from loratools.storage.header import TensorSpec
    from loratools.storage.lazy import LazyTensor

    Tensor = LazyTensor | TensorSpec

Size = tuple[str, int, int]
"""A tensor's dtype, parameters and bytes."""


class Amount(NamedTuple):
    """How much of something: tensors, parameters (elements), bytes."""

    tensors: int
    parameters: int
    nbytes: int


class TensorSummary(NamedTuple):
    """One tensor of a checkpoint, or one that an adapter replaces whole."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def summary_of(name: str, tensor: Tensor) -> TensorSummary:
    return TensorSummary(name, tensor.dtype, tensor.shape, tensor.nbytes)


def amount_of(tensors: Iterable[Tensor]) -> Amount:
    return _amount(sizes_of(tensors))


def sizes_of(tensors: Iterable[Tensor]) -> list[Size]:
    return [(tensor.dtype, tensor.parameters, tensor.nbytes) for tensor in tensors]


def _amount(sizes: Sequence[Size]) -> Amount:
    return Amount(len(sizes), sum([size[1] for size in sizes]), sum([size[2] for size in sizes]))


def total_of(amounts: Iterable[Amount]) -> Amount:
    """Return the sum of amounts."""
    listed = list(amounts)
    return Amount(
        sum([each.tensors for each in listed]), sum([each.parameters for each in listed]),
        sum([each.nbytes for each in listed]),
    )  # fmt: skip


def by_dtype(sizes: Iterable[Size]) -> dict[str, Amount]:
    """Return the amounts of each dtype."""
    groups: dict[str, list[Size]] = defaultdict(list)
    for size in sizes:
        groups[size[0]].append(size)
    return {dtype: _amount(group) for dtype, group in sorted(groups.items())}
