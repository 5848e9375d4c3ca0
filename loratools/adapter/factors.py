"""Changes of a factor that is not loaded yet: turned, cut, permuted, padded, scaled."""

from __future__ import annotations

import math
from collections.abc import Sequence

from loratools.storage.lazy import LazyTensor


def turned(lazy: LazyTensor) -> LazyTensor:
    """Swap the last two axes."""
    *front, rows, columns = lazy.shape
    return lazy.map(lambda tensor: tensor.transpose(-1, -2).contiguous(), (*front, columns, rows))


def rows(lazy: LazyTensor, start: int, stop: int) -> LazyTensor:
    """Take rows [start, stop) of the first axis."""
    return lazy.map(lambda tensor: tensor[start:stop].contiguous(), (stop - start, *lazy.shape[1:]))


def columns(lazy: LazyTensor, start: int, stop: int) -> LazyTensor:
    """Take columns [start, stop) of the second axis."""
    shape = (lazy.shape[0], stop - start, *lazy.shape[2:])
    return lazy.map(lambda tensor: tensor[:, start:stop].contiguous(), shape)


def reshaped(lazy: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    """See the same numbers in another shape."""
    return lazy.reshaped(shape)


def padded(lazy: LazyTensor, axis: int, size: int) -> LazyTensor:
    """Append zeros along an axis up to `size`; the rank axis of A and of B can grow so without changing B·A."""
    have = lazy.shape[axis]
    if have == size:
        return lazy
    shape = (*lazy.shape[:axis], size, *lazy.shape[axis + 1 :])

    def change(tensor: object) -> object:
        import torch

        assert isinstance(tensor, torch.Tensor)
        grown = tensor.new_zeros(shape)
        grown.narrow(axis, 0, have).copy_(tensor)
        return grown

    return lazy.map(change, shape)  # type: ignore[arg-type]


def scaled(lazy: LazyTensor, factor: float) -> LazyTensor:
    """Multiply by a factor, in float64, and round once.

    A power of two keeps the dtype, for it changes exponents only; any other factor (and any with float16, whose
    exponents end soon) gives float32, so that no more than 2^-24 of a number is lost.
    """
    if factor == 1:
        return lazy
    keeps = lazy.dtype == "F64" or (abs(math.frexp(factor)[0]) == 0.5 and lazy.dtype in ("BF16", "F32"))
    dtype = lazy.dtype if keeps else "F32"
    load = lazy.load

    def change() -> object:
        from loratools.storage.dtypes import to_torch

        return (load().double() * factor).to(to_torch(dtype))

    return LazyTensor(dtype, lazy.shape, change, file=lazy.file)  # type: ignore[arg-type]


def joined(parts: Sequence[LazyTensor], axis: int = 0) -> LazyTensor:
    """Put tensors one after the other along an axis, in the widest of their dtypes."""
    first = parts[0]
    dtype = first.dtype if {one.dtype for one in parts} == {first.dtype} else "F32"
    if "F64" in {one.dtype for one in parts}:
        dtype = "F64"
    total = sum(one.shape[axis] for one in parts)
    shape = (*first.shape[:axis], total, *first.shape[axis + 1 :])

    def load() -> object:
        import torch

        from loratools.storage.dtypes import to_torch

        return torch.cat([one.load().to(to_torch(dtype)) for one in parts], axis)

    return LazyTensor(dtype, shape, load, file=first.file)  # type: ignore[arg-type]


def stacked(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Put tensors of one shape on top of each other, along a new first axis."""
    return joined([reshaped(one, (1, *one.shape)) for one in parts])


def item(lazy: LazyTensor, index: int) -> LazyTensor:
    """Take one entry of the first axis, and the axis away."""
    return lazy.map(lambda tensor: tensor[index].contiguous(), lazy.shape[1:])
