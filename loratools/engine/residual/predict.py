"""From merged numbers back: the prediction W' − ΔW (or W'/g − ΔW), the same to the last bit on every machine.

What tells W from its prediction is kept in a residual, so whoever reads it must come to the very same prediction. A
matrix product in floating point depends on the machine, for sums are made in another order. Here both factors are first
rounded to fixed point, each row of left and column of right to as many bits as let every product and every sum of them
be exact in float64; then no order matters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loratools.adapter.kinds import Factors
from loratools.adapter.kinds.dora import gains, magnitudes, squares
from loratools.adapter.placement.resolve import Placement
from loratools.adapter.site import Site
from loratools.engine.load import is_stored, read_factor
from loratools.linalg.native.steps import fix

Array = np.ndarray[Any, np.dtype[Any]]

_EXACT = 52  # bits of a float64 sum that leave nothing to round

Rows = Callable[[int, int], Array]
"""Rows [start, stop) of the base's matrix in float64."""


@dataclass(eq=False)
class Step:
    """One change of a tensor that can be taken back: W ← g∘(W + left·right), or without g.

    `left` (rows, k) and `right` (k, columns) are in fixed point; `gains` is g in float32, for each row of the
    rectangle, or for each column where `across`.
    """

    site: Site
    left: Array
    right: Array
    across: bool = False
    gains: Array | None = None

    @property
    def features(self) -> int:
        """Return how many numbers g has."""
        return self.site.shape[1 if self.across else 0]

    def delta(self, rows: slice) -> Array:
        """Return rows of left·right in float64, exactly."""
        product: Array = self.left[rows] @ self.right
        return product

    def take_back(self, W: Array, start: int) -> None:
        """Turn a tile of changed rows, from `start` on, into what they were before, in place."""
        met = self.site.overlap(start, start + len(W))
        if met is None:
            return
        region = W[met[0], slice(*self.site.columns)]
        if self.gains is not None:
            region /= self.gains if self.across else self.gains[met[1], None]
        region -= self.delta(met[1]).astype(W.dtype, copy=False)


def is_predictable(placements: Sequence[Placement]) -> bool:
    """Tell whether the changes of a tensor can all be taken back: those that are products, rescaled (DoRA) or not."""
    return all(placement.update.factored() for placement in placements)


def steps(placements: Sequence[tuple[Placement, float]]) -> list[Step]:
    """Return the steps of one tensor, in the order in which they were made.

    `placements` are pairs of a placement, which `is_predictable`, and the weight of its adapter. Products on one site
    become one step if no DoRA is among them. The factors g of DoRA are not known yet: see `measure`.
    """
    changes = [(placement.site, _factors(placement), weight) for placement, weight in placements]
    additive = all(factors.magnitude is None for _, factors, _ in changes)
    groups: dict[Site | int, list[tuple[Site, Factors, float]]] = {}
    for number, change in enumerate(changes):
        groups.setdefault(change[0] if additive else number, []).append(change)
    return [_step(group) for group in groups.values()]


def measure(placements: Sequence[tuple[Placement, float]], made: Sequence[Step], base: Rows, height: int) -> None:
    """Work out g of every DoRA step from the unchanged base, `height` rows at a time.

    Only here may a sum depend on the machine, so g is the kind's own: the residual keeps it, and nobody has to find
    the same bits again. Where it is 0 or no float32, 1 takes its place.
    """
    if all(step.gains is None for step in made):
        return
    import torch

    for (placement, _), step in zip(placements, made, strict=False):
        if step.gains is None:
            continue
        site = step.site
        norms2 = torch.zeros(step.features, dtype=torch.float64)
        for start in range(0, site.matrix[0], height):
            stop = min(start + height, site.matrix[0])
            if met := site.overlap(start, stop):
                changed = torch.from_numpy(base(start, stop)[met[0], slice(*site.columns)] + step.delta(met[1]))
                if step.across:
                    norms2 += squares(changed, 0)
                else:
                    norms2[met[1]] = squares(changed, 1)
        m, _ = magnitudes(_factors(placement), site)
        with np.errstate(over="ignore"):
            g = gains(site, m, norms2).numpy().astype(np.float32)
        step.gains = np.where(np.isfinite(g) & (g != 0), g, np.float32(1))


def _factors(placement: Placement) -> Factors:
    factors = placement.update.factored()
    assert factors is not None  # else `is_predictable` said no
    return factors


def _matrices(site: Site, factors: Factors, weight: float) -> tuple[Array, Array]:
    """Return (left, right) in float64 as they lie on a site, with weight and scaling in left."""
    if is_stored(factors):
        left, right = (read_factor(lazy).astype(np.float64) for lazy in (factors.left, factors.right))
    else:
        left, right = (factor.double().numpy() for factor in factors.load())
    left = left[site.part_rows] * (weight * factors.scale)
    return (right.T, left.T) if site.transposed else (left, right)


def _step(changes: Sequence[tuple[Site, Factors, float]]) -> Step:
    """Return one step for the sum of products on one site, or for a single change."""
    site, factors, _ = changes[0]
    lefts, rights = zip(*(_matrices(*change) for change in changes), strict=True)
    left, right = (lefts[0], rights[0]) if len(lefts) == 1 else (np.concatenate(lefts, axis=1), np.concatenate(rights))
    bits = (_EXACT - int(np.ceil(np.log2(max(2, len(right)))))) // 2
    step = Step(site, _fixed(left, bits, 1), _fixed(right, bits, 0))
    if factors.magnitude is not None:
        step.across = factors.by_column != site.transposed
        step.gains = np.ones(step.features, np.float32)
    return step


def _fixed(factor: Array, bits: int, axis: int) -> Array:
    """Return each row (`axis` 1) or column rounded to multiples of 2^-bits of the power of two above its largest."""
    fixed: Array = np.array(factor, np.float64, order="C")
    if fix(fixed, bits, axis):
        return fixed
    _, exponent = np.frexp(np.maximum(factor.max(axis=axis, keepdims=True), -factor.min(axis=axis, keepdims=True)))
    shift = bits - exponent
    # 2^shift need be no float64, each half of it is; these products are exact, and np.ldexp takes far longer.
    for half in (shift // 2, shift - shift // 2):
        fixed *= np.ldexp(1.0, half)
    np.rint(fixed, out=fixed)
    for half in (shift // 2, shift - shift // 2):
        fixed *= np.ldexp(1.0, -half)
    return fixed
