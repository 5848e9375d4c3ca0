"""How much of something a file holds, and what its tensors are, from headers alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from loratools.storage.header import TensorSpec
    from loratools.storage.lazy import LazyTensor

    Tensor = LazyTensor | TensorSpec


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
    listed = list(tensors)
    return Amount(len(listed), sum([tensor.parameters for tensor in listed]), sum([tensor.nbytes for tensor in listed]))


def total_of(amounts: Iterable[Amount]) -> Amount:
    """Return the sum of amounts."""
    listed = list(amounts)
    return Amount(
        sum([each.tensors for each in listed]), sum([each.parameters for each in listed]),
        sum([each.nbytes for each in listed]),
    )  # fmt: skip


def by_dtype(tensors: Iterable[Tensor]) -> dict[str, Amount]:
    groups: dict[str, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.dtype].append(tensor)
    return {dtype: amount_of(group) for dtype, group in sorted(groups.items())}
