"""Which of many adapters are the same, and which nearly: by their sketches, then by exact numbers for what these name.

Cosines of sketches are products of matrices, a block of adapters at a time. Every adapter is measured exactly against
few others only, so that time beyond these products grows with the number of adapters, however many are alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from loratools.adapter.gathered import canonically_named
from loratools.linalg.delta import Delta
from loratools.linalg.sketch import standard_error
from loratools.surgery.change import ModuleChange, alone
from loratools.surgery.find.sketches import Sketched, named, opened

NEIGHBOURS = 8
"""Others that an adapter is measured exactly against, at most: those whose sketches are nearest."""

_SURE = 6.0  # standard errors below the wanted cosine at which a sketch still names a pair
_AT_ONCE = 1 << 20  # products of sketches in memory, 4 MB of float32, however many adapters there are
_SAME = 1e-5  # of ‖ΔW‖: what float32 factors in another basis differ by, at most
_OPEN, _SMALL = 16, 1 << 25  # adapters that are kept open; bytes up to which their factors are kept too


@dataclass(frozen=True, slots=True)
class Near:
    """Two adapters whose changes point nearly the same way, by their places: exact cosine, and ‖ΔW₂‖/‖ΔW₁‖."""

    first: int
    second: int
    cosine: float
    ratio: float


class Products(Protocol):
    """Inner products of whole changes in float64, by their places: what the sketches only name is settled by these."""

    def norm2(self, i: int) -> float:
        """Return ‖ΔW‖²."""

    def inner(self, i: int, j: int) -> float:
        """Return ⟨ΔWᵢ, ΔWⱼ⟩."""


@dataclass(slots=True)
class Exact:
    """Inner products of whole changes in float64, of adapters that are opened again when they are asked for."""

    paths: Sequence[Path]
    _open: dict[int, dict[str, ModuleChange]] = field(default_factory=dict)
    _loaded: dict[int, dict[str, Delta]] = field(default_factory=dict)
    _norms2: dict[int, float] = field(default_factory=dict)

    def norm2(self, i: int) -> float:
        """Return ‖ΔW‖²."""
        if i not in self._norms2:
            self._norms2[i] = self.inner(i, i)
        return self._norms2[i]

    def inner(self, i: int, j: int) -> float:
        """Return ⟨ΔWᵢ, ΔWⱼ⟩ over the modules that both change; those of other shapes are of other models, and add 0."""
        first, second = self._changes(i), self._changes(j)
        shared = [module for module in first.keys() & second.keys() if first[module].shape == second[module].shape]
        return math.fsum(self._delta(i, module).inner(self._delta(j, module)) for module in sorted(shared))

    def _changes(self, i: int) -> dict[str, ModuleChange]:
        if i not in self._open:
            while len(self._open) >= _OPEN:
                oldest = next(iter(self._open))
                del self._open[oldest]
                self._loaded.pop(oldest, None)
            adapter = opened(self.paths[i])
            self._open[i] = {} if adapter is None else named(alone(canonically_named(adapter)))
        else:
            self._open[i] = self._open.pop(i)  # it is the newest now
        return self._open[i]

    def _delta(self, i: int, module: str) -> Delta:
        changes = self._open[i]
        if sum(change.parameters for change in changes.values()) * 8 > _SMALL:
            return changes[module].load()
        loaded = self._loaded.setdefault(i, {})
        if module not in loaded:
            loaded[module] = changes[module].load()
        return loaded[module]


def same(adapters: Sequence[Sketched], sketches: Tensor, exact: Products) -> list[tuple[int, float]]:
    """Return for each adapter the first one with the same change, itself where there is none, and how far that is off.

    Two changes are the same where ‖ΔW₁ − ΔW₂‖ is no more than rounding the factors once more would move them, √(ρ₁² +
    ρ₂²), or 1e-5 of ‖ΔW‖; it is given in parts of ‖ΔW‖. Where ΔW = 0 the same modules have to have it.
    """
    first = [(i, 0.0) for i in range(len(adapters))]
    by_key: dict[str, int] = {}
    heads: list[int] = []
    for i, each in enumerate(adapters):
        if (seen := by_key.setdefault(each.key, i)) != i:
            first[i] = (seen, 0.0)
        elif each.by_change:
            heads.append(i)
    sketches = sketches[heads].double()
    largest = max([*sketches.norm(dim=1).tolist(), 0.0]) or 1.0  # no square of a length of one overflows in float32
    sketches = (sketches / largest).float()
    norms2 = sketches.square().sum(1)
    slack = torch.tensor([adapters[i].rounding2 / largest**2 for i in heads], dtype=sketches.dtype)
    is_head = torch.ones(len(heads), dtype=torch.bool)
    for start, products in _blocks(sketches):
        stop = start + len(products)
        off2 = products.mul_(-2).add_(norms2[:stop]).add_(norms2[start:stop, None])
        # Twice what is allowed, and what float32 leaves of a difference of squares: the exact numbers decide.
        allowed2 = 4 * slack[start:stop] + 1e-5 * norms2[start:stop]
        close = (off2 - 4 * slack[:stop] <= allowed2[:, None]).tril(start - 1)
        for row in close.any(1).nonzero()[:, 0].tolist():
            k = start + row
            for other in _nearest(-off2[row, :k], is_head[:k] & close[row, :k]):
                i, j = heads[other], heads[k]
                if (distance := _distance(adapters, exact, i, j)) is not None:
                    first[j], is_head[k] = (i, distance), False
                    break
    return [(first[head][0], off) if head != i else (i, 0.0) for i, (head, off) in enumerate(first)]


def near(sketches: Tensor, chosen: Sequence[int], exact: Products, cosine: float) -> tuple[list[Near], int]:
    """Return the pairs of chosen adapters with at least this cosine, the most alike first, and how many were not asked.

    Of each adapter the `NEIGHBOURS` are measured whose sketches are nearest. The second number counts further pairs
    whose sketches are as near.
    """
    unit, lengths = _unit(sketches, chosen)
    chosen = [i for i, length in zip(chosen, lengths.tolist(), strict=True) if length > 0]
    unit = unit[lengths > 0]
    least = cosine - _SURE * standard_error(cosine)
    pairs: set[tuple[int, int]] = set()
    candidates = 0
    for start, products in _blocks(unit, whole=True):
        close = products >= least
        close.diagonal(start).fill_(False)
        candidates += int(close.sum())
        for row in close.any(1).nonzero()[:, 0].tolist():
            k = start + row
            pairs |= {(min(k, other), max(k, other)) for other in _nearest(products[row], close[row])}
    measured = []
    for k, other in sorted(pairs):
        i, j = chosen[k], chosen[other]
        scale = math.sqrt(exact.norm2(i) * exact.norm2(j))
        value = max(-1.0, min(1.0, exact.inner(i, j) / scale)) if scale else 0.0
        if value >= cosine:
            measured.append(Near(i, j, value, math.sqrt(exact.norm2(j) / exact.norm2(i))))
    return sorted(measured, key=lambda pair: (-pair.cosine, pair.first, pair.second)), candidates // 2 - len(pairs)


def cosines(sketches: Tensor, chosen: Sequence[int]) -> tuple[list[list[float]], list[float]]:
    """Return the cosine of every two sketches, 1 of one with itself and 0 where ΔW = 0; and the norms of all."""
    unit, norms = _unit(sketches.double(), chosen)
    table = [[1.0] * len(unit) for _ in unit]
    for start, products in _blocks(unit):
        for i, row in enumerate(products.clamp_(-1.0, 1.0).tolist(), start):
            table[i][:i] = row[:i]
            for j, value in enumerate(row[:i]):  # a product of matrices need not be symmetric to the last bit
                table[j][i] = value
    return table, norms.tolist()


def nearest(sketches: Tensor, chosen: Sequence[int], most: int) -> tuple[dict[tuple[int, int], float], list[float]]:
    """Return the cosine of each sketch and the `most` that are most alike, by two places in `chosen`; and the norms."""
    unit, norms = _unit(sketches, chosen)
    pairs: dict[tuple[int, int], float] = {}
    for start, products in _blocks(unit, whole=True):
        products.clamp_(-1.0, 1.0).diagonal(start).fill_(-math.inf)
        best = products.topk(min(most, len(unit) - 1))
        for i, (values, places) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True), start):
            for value, j in zip(values, places, strict=True):
                pairs[min(i, j), max(i, j)] = value
    return pairs, norms.double().tolist()


def _distance(adapters: Sequence[Sketched], exact: Products, i: int, j: int) -> float | None:
    """Return ‖ΔWᵢ − ΔWⱼ‖/‖ΔWᵢ‖ where the two are the same but for rounding, else None."""
    first, second = exact.norm2(i), exact.norm2(j)
    if first == 0 or second == 0:
        return 0.0 if first == second and adapters[i].layout == adapters[j].layout else None
    off2 = max(first - 2 * exact.inner(i, j) + second, 0.0)
    allowed2 = adapters[i].rounding2 + adapters[j].rounding2 + _SAME**2 * max(first, second)
    return math.sqrt(off2 / first) if off2 <= allowed2 else None


def _unit(sketches: Tensor, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the chosen sketches at length one, zeros where ΔW = 0, and their lengths, ‖ΔW‖ as sketches tell it."""
    rows = sketches[list(chosen)]
    lengths = rows.norm(dim=1, dtype=torch.float64)
    return (rows / lengths.masked_fill(lengths == 0, 1.0)[:, None]).to(rows.dtype), lengths


def _blocks(sketches: Tensor, whole: bool = False) -> Iterator[tuple[int, Tensor]]:
    """Yield some rows of sketches·sketchesᵀ at a time, with the number of the first, up to the diagonal or `whole`."""
    count = len(sketches)
    step = max(1, _AT_ONCE // max(count, 1))
    for start in range(0, count, step):
        stop = min(start + step, count)
        yield start, sketches[start:stop] @ sketches[: count if whole else stop].mT


def _nearest(likeness: Tensor, close: Tensor) -> list[int]:
    """Return the places of the largest values among the close ones, the largest first, `NEIGHBOURS` at most."""
    places = close.nonzero()[:, 0]
    best = likeness[places].sort(descending=True, stable=True).indices[:NEIGHBOURS]
    chosen: list[int] = places[best].tolist()
    return chosen
