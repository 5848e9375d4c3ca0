"""Several projections in one weight, and apart again, without changing any ΔW.

    apart:    ΔW = s·[B₀; B₁; …]·A    gives    s·Bᵢ·A each, without the columns of Bᵢ that are zero and their rows of A
    together: sᵢ·Bᵢ·A of one A        gives    s·[B₀; B₁; …]·A
              sᵢ·Bᵢ·Aᵢ                gives    s·diag(B₀, B₁, …)·[A₀; A₁; …], of rank Σrᵢ

Both are exact; only scalings that differ cost one rounding of B in float32. A DoRA magnitude is one number for each row
and goes with its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loratools.adapter import factors, kinds
from loratools.adapter.kinds import Update
from loratools.adapter.parts import BIAS, MAGNITUDE, A, B
from loratools.storage.lazy import LazyTensor

_PARTS = frozenset({A, B, BIAS, MAGNITUDE})


def divisible(update: Update) -> bool:
    """Tell whether an update is a plain product of a linear layer, with or without a magnitude or a bias."""
    parts = update.parts
    return update.kind in ("lora", "dora") and {A, B} <= parts.keys() <= _PARTS and len(parts[A].shape) == 2


def apart(update: Update, sizes: Sequence[int]) -> list[Update | None]:
    """Return the updates of consecutive blocks of output features; None for a block that is not changed at all.

    Loads B to see which of its columns are zero. Raises `ValueError` for what is no plain product, or where the sizes
    do not add up.
    """
    if not divisible(update):
        raise ValueError("no plain product")
    parts, kind = update.parts, kinds.get(update.kind)
    if sum(sizes) != parts[B].shape[0]:
        raise ValueError(f"{parts[B].shape[0]} output features, expected {' + '.join(map(str, sizes))}")
    used = parts[B].load() != 0
    found: list[Update | None] = []
    start = 0
    for size in sizes:
        stop = start + size
        columns = used[start:stop].any(0).nonzero().flatten().tolist()
        if not columns and MAGNITUDE not in parts and BIAS not in parts:
            found.append(None)
        else:
            columns = columns or [0]
            some = {A: _taken(parts[A], 0, columns), B: _taken(factors.rows(parts[B], start, stop), 1, columns)}
            some |= {part: factors.rows(parts[part], start, stop) for part in (BIAS, MAGNITUDE) if part in parts}
            found.append(kind.build(some, update.scaling, update.scaling * len(columns)))
        start = stop
    return found if any(found) else [kind.build(_block(parts, sizes, i), update.scaling, update.alpha)
                                     for i in range(len(sizes))]  # fmt: skip


def together(blocks: Sequence[Update | None], sizes: Sequence[int]) -> Update:
    """Return one update of the consecutive blocks, zero where there is none.

    Raises `ValueError` for a magnitude that not all of them have, for without the base none can be made up.
    """
    given = [one for one in blocks if one is not None]
    if not all(divisible(one) for one in given) or {one.parts[A].shape[1] for one in given} != {given[0].shape[1]}:
        raise ValueError("not all of them are plain products of one width")
    doras = [one is not None and MAGNITUDE in one.parts for one in blocks]
    if any(doras) and not all(doras):
        raise ValueError("only some of them have a magnitude")
    scaling = given[0].scaling or 1.0
    scaled = [None if one is None else factors.scaled(one.parts[B], one.scaling / scaling) for one in blocks]
    if _one_factor(given):
        rank = given[0].rank
        factor = given[0].parts[A]
        rows = [_zeros(lazy, size, rank, factor) for lazy, size in zip(scaled, sizes, strict=True)]
        parts = {A: factor, B: factors.joined(rows)}
    else:
        rank = sum(one.rank for one in given)
        parts = {A: factors.joined([one.parts[A] for one in given]), B: _diagonal(scaled, sizes, rank)}
    if any(BIAS in one.parts for one in given):
        parts[BIAS] = factors.joined([
            factors.scaled(one.parts[BIAS], one.scaling / scaling)
            if one is not None and BIAS in one.parts
            else _empty((size,), given[0].parts[A])
            for one, size in zip(blocks, sizes, strict=True)
        ])  # fmt: skip
    if all(doras):
        parts[MAGNITUDE] = factors.joined([one.parts[MAGNITUDE] for one in given])
    built: Update = kinds.get("dora" if all(doras) else "lora").build(parts, scaling, scaling * rank)
    return built


def swapped(update: Update) -> Update:
    """Return the update with the two halves of its output features swapped (scale and shift, shift and scale)."""
    if not divisible(update):
        raise ValueError("no plain product, whose rows could be swapped")
    half = update.parts[B].shape[0] // 2
    parts = dict(update.parts)
    for part in (B, BIAS, MAGNITUDE):
        if part in parts:
            parts[part] = factors.joined([
                factors.rows(parts[part], half, 2 * half), factors.rows(parts[part], 0, half),
            ])  # fmt: skip
    built: Update = kinds.get(update.kind).build(parts, update.scaling, update.alpha)
    return built


def _block(parts: Mapping[str, LazyTensor], sizes: Sequence[int], i: int) -> dict[str, LazyTensor]:
    start = sum(sizes[:i])
    return {part: lazy if part == A else factors.rows(lazy, start, start + sizes[i]) for part, lazy in parts.items()}


def _taken(lazy: LazyTensor, axis: int, wanted: list[int]) -> LazyTensor:
    if len(wanted) == lazy.shape[axis]:
        return lazy
    shape = (*lazy.shape[:axis], len(wanted), *lazy.shape[axis + 1 :])

    def change(tensor: object) -> object:
        import torch

        assert isinstance(tensor, torch.Tensor)
        return tensor.index_select(axis, torch.tensor(wanted)).contiguous()

    return lazy.map(change, shape)  # type: ignore[arg-type]


def _one_factor(given: Sequence[Update]) -> bool:
    """Tell whether all have the same A, number for number."""
    first = given[0].parts[A]
    others = [one.parts[A] for one in given[1:] if one.parts[A] is not first]
    if any((one.shape, one.dtype) != (first.shape, first.dtype) for one in others):
        return False
    return all(bool((one.load() == first.load()).all()) for one in others)


def _empty(shape: tuple[int, ...], like: LazyTensor) -> LazyTensor:
    def load() -> object:
        import torch

        from loratools.storage.dtypes import to_torch

        return torch.zeros(shape, dtype=to_torch(like.dtype))

    return LazyTensor(like.dtype, shape, load)  # type: ignore[arg-type]


def _zeros(lazy: LazyTensor | None, size: int, rank: int, like: LazyTensor) -> LazyTensor:
    return _empty((size, rank), like) if lazy is None else lazy


def _diagonal(blocks: Sequence[LazyTensor | None], sizes: Sequence[int], rank: int) -> LazyTensor:
    """Return diag(B₀, B₁, …), with rows of zeros for a block that is None."""
    given = [lazy for lazy in blocks if lazy is not None]
    rows, column = [], 0
    for lazy, size in zip(blocks, sizes, strict=True):
        if lazy is None:
            rows.append(_empty((size, rank), given[0]))
            continue
        rows.append(_placed(lazy, column, rank))
        column += lazy.shape[1]
    return factors.joined(rows)


def _placed(lazy: LazyTensor, column: int, rank: int) -> LazyTensor:
    """Return a block with columns of zeros before and after it."""
    shape = (lazy.shape[0], rank)

    def change(tensor: object) -> object:
        import torch

        assert isinstance(tensor, torch.Tensor)
        grown = tensor.new_zeros(shape)
        grown[:, column : column + tensor.shape[1]] = tensor
        return grown

    return lazy.map(change, shape)  # type: ignore[arg-type]
