"""Changes of factors that are not loaded yet: turned, cut, selected, padded, scaled, joined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratools.storage.lazy import LazyTensor

if TYPE_CHECKING:
    import torch


def turned(lazy: LazyTensor) -> LazyTensor:
    """Swap the last two axes."""
    *front, rows, columns = lazy.shape
    return lazy.map(lambda tensor: tensor.transpose(-1, -2).contiguous(), (*front, columns, rows))


def rows(lazy: LazyTensor, start: int, stop: int) -> LazyTensor:
    """Take rows [start, stop) of the first axis."""
    return lazy.map(lambda tensor: tensor[start:stop].contiguous(), (stop - start, *lazy.shape[1:]))


def padded(lazy: LazyTensor, axis: int, size: int, *, start: int = 0) -> LazyTensor:
    """Put zeros before `start` and after the tensor along an axis, `size` in all.

    The rank axis of A and of B can grow so without changing B·A.
    """
    length = lazy.shape[axis]
    if length == size:
        return lazy
    shape = _with(lazy.shape, axis, size)

    def change(tensor: torch.Tensor) -> torch.Tensor:
        grown = tensor.new_zeros(shape)
        grown.narrow(axis, start, length).copy_(tensor)
        return grown

    return lazy.map(change, shape)


def selected(lazy: LazyTensor, axis: int, indices: Sequence[int]) -> LazyTensor:
    """Take entries of an axis, in this order."""
    shape = _with(lazy.shape, axis, len(indices))

    def change(tensor: torch.Tensor) -> torch.Tensor:
        import torch

        return tensor.index_select(axis, torch.tensor(indices)).contiguous()

    return lazy.map(change, shape)


def zeros(shape: tuple[int, ...], dtype: str) -> LazyTensor:
    """Stand for zeros; `dtype` is a name of safetensors."""

    def load() -> torch.Tensor:
        import torch

        from loratools.storage.dtypes import to_torch

        return torch.zeros(shape, dtype=to_torch(dtype))

    return LazyTensor(dtype, shape, load)


def scaled(lazy: LazyTensor, factor: float) -> LazyTensor:
    """Multiply by a factor, in float64, and round once.

    A power of two keeps the dtype, for it changes exponents only. Any other factor gives float32, so that no more than
    2^-24 of a number is lost; so does every factor of a float16 tensor, whose exponents end soon.
    """
    if factor == 1:
        return lazy
    keeps = lazy.dtype == "F64" or (abs(math.frexp(factor)[0]) == 0.5 and lazy.dtype in ("BF16", "F32"))
    dtype = lazy.dtype if keeps else "F32"
    load = lazy.load

    def change() -> torch.Tensor:
        from loratools.storage.dtypes import to_torch

        return (load().double() * factor).to(to_torch(dtype))

    return LazyTensor(dtype, lazy.shape, change, file=lazy.file)


def joined(parts: Sequence[LazyTensor], axis: int = 0) -> LazyTensor:
    """Put tensors one after the other along an axis, in their common dtype, else in float32 or float64."""
    first = parts[0]
    dtypes = {part.dtype for part in parts}
    dtype = "F64" if "F64" in dtypes else first.dtype if dtypes == {first.dtype} else "F32"
    shape = _with(first.shape, axis, sum(part.shape[axis] for part in parts))

    def load() -> torch.Tensor:
        import torch

        from loratools.storage.dtypes import to_torch

        return torch.cat([part.load().to(to_torch(dtype)) for part in parts], axis)

    return LazyTensor(dtype, shape, load, file=first.file)


def stacked(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Put tensors of one shape on top of each other, along a new first axis."""
    return joined([part.reshaped((1, *part.shape)) for part in parts])


def item(lazy: LazyTensor, index: int) -> LazyTensor:
    """Take one entry of the first axis, and the axis away."""
    return lazy.map(lambda tensor: tensor[index].contiguous(), lazy.shape[1:])


def _with(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])
