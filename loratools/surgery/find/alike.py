"""Which of many adapters are the same, and which nearly: by their sketches, then by exact numbers for what these name.

Cosines of sketches are products of matrices, a block of adapters at a time. Every adapter is measured exactly against
few others only, so that time beyond these products grows with the number of adapters, however many are alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
_BLOCK = 512
_SAME = 1e-5  # of ‖ΔW‖: what float32 factors in another basis differ by, at most
_OPEN, _SMALL = 16, 1 << 25  # adapters that are kept open; bytes up to which their factors are kept too


@dataclass(frozen=True, slots=True)
class Near:
    """Two adapters whose changes point nearly the same way, by their places: exact cosine, and ‖ΔW₂‖/‖ΔW₁‖."""

    first: int
    second: int
    cosine: float
    ratio: float


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


def same(adapters: Sequence[Sketched], exact: Exact) -> list[tuple[int, float]]:
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
        elif each.sketch is not None:
            heads.append(i)
    sketches = _stacked(adapters, heads)
    norms2 = sketches.square().sum(1)
    slack = torch.tensor([adapters[i].rounding2 for i in heads], dtype=sketches.dtype)
    is_head = torch.ones(len(heads), dtype=torch.bool)
    for k, products in _rows(sketches):
        off2 = norms2[:k] + norms2[k] - 2 * products[:k]
        # Twice what is allowed, and what float32 leaves of a difference of squares: the exact numbers decide.
        allowed2 = 4 * (slack[:k] + slack[k]) + 1e-5 * norms2[k]
        for other in _nearest(-off2, is_head[:k] & (off2 <= allowed2)):
            i, j = heads[other], heads[k]
            if (distance := _distance(adapters, exact, i, j)) is not None:
                first[j], is_head[k] = (i, distance), False
                break
    return [(first[head][0], off) if head != i else (i, 0.0) for i, (head, off) in enumerate(first)]


def near(adapters: Sequence[Sketched], chosen: Sequence[int], exact: Exact, cosine: float) -> tuple[list[Near], int]:
    """Return the pairs of chosen adapters with at least this cosine, the most alike first, and how many were not asked.

    Of each adapter the `NEIGHBOURS` are measured whose sketches are nearest. The second number counts further pairs
    whose sketches are as near.
    """
    sketches = _stacked(adapters, chosen)
    lengths = sketches.norm(dim=1, keepdim=True)
    chosen = [i for i, length in zip(chosen, lengths[:, 0].tolist(), strict=True) if length > 0]
    sketches = sketches[lengths[:, 0] > 0] / lengths[lengths[:, 0] > 0]
    least = cosine - _SURE * standard_error(cosine)
    pairs: set[tuple[int, int]] = set()
    candidates = 0
    for k, products in _rows(sketches):
        close = products >= least
        close[k] = False
        candidates += int(close.sum())
        pairs |= {(min(k, other), max(k, other)) for other in _nearest(products, close)}
    measured = []
    for k, other in sorted(pairs):
        i, j = chosen[k], chosen[other]
        scale = math.sqrt(exact.norm2(i) * exact.norm2(j))
        value = max(-1.0, min(1.0, exact.inner(i, j) / scale)) if scale else 0.0
        if value >= cosine:
            measured.append(Near(i, j, value, math.sqrt(exact.norm2(j) / exact.norm2(i))))
    return sorted(measured, key=lambda pair: (-pair.cosine, pair.first, pair.second)), candidates // 2 - len(pairs)


def cosines(adapters: Sequence[Sketched], chosen: Sequence[int]) -> tuple[list[list[float]], list[float]]:
    """Return the cosine of every two sketches, 1 of one with itself and 0 where ΔW = 0; and the norms of all."""
    sketches = _stacked(adapters, chosen).double()
    norms = sketches.norm(dim=1)
    unit = sketches / norms.masked_fill(norms == 0, 1.0)[:, None]
    upper = (unit @ unit.mT).clamp(-1.0, 1.0).triu(1)
    table = (upper + upper.mT).fill_diagonal_(1.0)  # a product of matrices need not be symmetric to the last bit
    rounded: list[list[float]] = table.tolist()
    return rounded, norms.tolist()


def _distance(adapters: Sequence[Sketched], exact: Exact, i: int, j: int) -> float | None:
    """Return ‖ΔWᵢ − ΔWⱼ‖/‖ΔWᵢ‖ where the two are the same but for rounding, else None."""
    first, second = exact.norm2(i), exact.norm2(j)
    if first == 0 or second == 0:
        return 0.0 if first == second and adapters[i].layout == adapters[j].layout else None
    off2 = max(first - 2 * exact.inner(i, j) + second, 0.0)
    allowed2 = adapters[i].rounding2 + adapters[j].rounding2 + _SAME**2 * max(first, second)
    return math.sqrt(off2 / first) if off2 <= allowed2 else None


def _stacked(adapters: Sequence[Sketched], chosen: Sequence[int]) -> Tensor:
    sketches = [sketch for i in chosen if (sketch := adapters[i].sketch) is not None]
    return torch.stack(sketches) if sketches else torch.zeros(0, 1)


def _rows(sketches: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield each row of sketches·sketchesᵀ with its number, made a block at a time."""
    for start in range(0, len(sketches), _BLOCK):
        block = sketches[start : start + _BLOCK] @ sketches.mT
        yield from enumerate(block, start)


def _nearest(likeness: Tensor, close: Tensor) -> list[int]:
    """Return the places of the largest values among the close ones, the largest first, `NEIGHBOURS` at most."""
    places = close.nonzero()[:, 0]
    best = likeness[places].sort(descending=True, stable=True).indices[:NEIGHBOURS]
    chosen: list[int] = places[best].tolist()
    return chosen
