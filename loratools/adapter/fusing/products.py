"""Fuse the updates of several projections into one, and take them apart again, without changing any ΔW.

    apart:    ΔW = s·[B₀; B₁; …]·A    gives    s·Bᵢ·A each, without the columns of Bᵢ that are zero and their rows of A
    together: sᵢ·Bᵢ·A of one A        gives    s·[B₀; B₁; …]·A
              sᵢ·Bᵢ·Aᵢ                gives    s·diag(B₀, B₁, …)·[A₀; A₁; …], of rank Σrᵢ

Both are exact, except that scalings which differ cost one rounding of B in float32. A DoRA magnitude has one number for
each row, and goes with its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loratools.adapter import factors, kinds
from loratools.adapter.kinds import Update
from loratools.adapter.parts import BIAS, MAGNITUDE, A, B
from loratools.storage.lazy import LazyTensor

_PARTS = frozenset({A, B, BIAS, MAGNITUDE})


def divisible(update: Update) -> bool:
    """Tell whether an update is a product B·A on a linear layer, with or without a magnitude or a bias."""
    parts = update.parts
    return update.kind in ("lora", "dora") and {A, B} <= parts.keys() <= _PARTS and len(parts[A].shape) == 2


def apart(update: Update, sizes: Sequence[int]) -> list[Update | None]:
    """Return the updates of consecutive blocks of output features; None for a block whose ΔW is zero.

    `sizes` are the output features of the blocks. Loads B, to leave out the columns that are zero in a block.
    Raises `ValueError` for an update that is not `divisible`, or where the sizes do not add up.
    """
    if not divisible(update):
        raise ValueError("no plain product")
    parts, kind = update.parts, kinds.get(update.kind)
    if sum(sizes) != parts[B].shape[0]:
        raise ValueError(f"{parts[B].shape[0]} output features, expected {' + '.join(map(str, sizes))}")
    used = parts[B].load() != 0
    updates: list[Update | None] = []
    start = 0
    for size in sizes:
        stop = start + size
        columns = used[start:stop].any(0).nonzero().flatten().tolist()
        if not columns and MAGNITUDE not in parts and BIAS not in parts:
            updates.append(None)
        else:
            columns = columns or [0]
            rows = factors.rows(parts[B], start, stop)
            some = {A: _columns(parts[A], 0, columns), B: _columns(rows, 1, columns)}
            some |= {part: factors.rows(parts[part], start, stop) for part in (BIAS, MAGNITUDE) if part in parts}
            updates.append(kind.build(some, update.scaling, update.scaling * len(columns)))
        start = stop
    if any(updates):
        return updates
    return [kind.build(_block(parts, sizes, i), update.scaling, update.alpha) for i in range(len(sizes))]


def together(blocks: Sequence[Update | None], sizes: Sequence[int]) -> Update:
    """Return one update of consecutive blocks, whose ΔW is zero where a block is None.

    `sizes` are the output features of the blocks. Raises `ValueError` for blocks that are not `divisible`, of different
    input features, or of which only some have a magnitude: what the others' would be, only the base tells.
    """
    present = [block for block in blocks if block is not None]
    if not all(map(divisible, present)) or len({block.parts[A].shape[1] for block in present}) != 1:
        raise ValueError("not all of them are plain products of one width")
    doras = [block is not None and MAGNITUDE in block.parts for block in blocks]
    if any(doras) and not all(doras):
        raise ValueError("only some of them have a magnitude")
    scaling, dtype = present[0].scaling or 1.0, present[0].parts[A].dtype
    scaled = [None if block is None else factors.scaled(block.parts[B], block.scaling / scaling) for block in blocks]
    if _one_factor(present):
        rank = present[0].rank
        rows = [lazy or factors.zeros((size, rank), dtype) for lazy, size in zip(scaled, sizes, strict=True)]
        parts = {A: present[0].parts[A], B: factors.joined(rows)}
    else:
        rank = sum(block.rank for block in present)
        parts = {A: factors.joined([block.parts[A] for block in present]), B: _diagonal(scaled, sizes, rank)}
    if any(BIAS in block.parts for block in present):
        parts[BIAS] = factors.joined([
            factors.scaled(block.parts[BIAS], block.scaling / scaling)
            if block is not None and BIAS in block.parts
            else factors.zeros((size,), dtype)
            for block, size in zip(blocks, sizes, strict=True)
        ])  # fmt: skip
    if all(doras):
        parts[MAGNITUDE] = factors.joined([block.parts[MAGNITUDE] for block in present])
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
            upper, lower = factors.rows(parts[part], 0, half), factors.rows(parts[part], half, 2 * half)
            parts[part] = factors.joined([lower, upper])
    built: Update = kinds.get(update.kind).build(parts, update.scaling, update.alpha)
    return built


def _block(parts: Mapping[str, LazyTensor], sizes: Sequence[int], i: int) -> dict[str, LazyTensor]:
    start = sum(sizes[:i])
    return {part: lazy if part == A else factors.rows(lazy, start, start + sizes[i]) for part, lazy in parts.items()}


def _columns(lazy: LazyTensor, axis: int, indices: Sequence[int]) -> LazyTensor:
    return lazy if len(indices) == lazy.shape[axis] else factors.selected(lazy, axis, indices)


def _one_factor(updates: Sequence[Update]) -> bool:
    """Tell whether all have the same A, number for number."""
    first = updates[0].parts[A]
    others = [update.parts[A] for update in updates[1:] if update.parts[A] is not first]
    if any((other.shape, other.dtype) != (first.shape, first.dtype) for other in others):
        return False
    return all(bool((other.load() == first.load()).all()) for other in others)


def _diagonal(blocks: Sequence[LazyTensor | None], sizes: Sequence[int], rank: int) -> LazyTensor:
    """Return diag(B₀, B₁, …), with rows of zeros for a block that is None."""
    dtype = next(lazy.dtype for lazy in blocks if lazy is not None)
    rows, column = [], 0
    for lazy, size in zip(blocks, sizes, strict=True):
        if lazy is None:
            rows.append(factors.zeros((size, rank), dtype))
        else:
            rows.append(factors.padded(lazy, 1, rank, start=column))
            column += lazy.shape[1]
    return factors.joined(rows)
