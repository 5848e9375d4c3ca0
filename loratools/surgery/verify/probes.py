"""Probes of a changed tensor: what the adapters should have done to it, worked out factor by factor in float64.

Standard normal ones measure the whole error; unit vectors give whole columns of the change, and so every element of the
result there, to be compared one by one.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING

from loratools.adapter.kinds import Underlying
from loratools.adapter.placement.resolve import Placement
from loratools.adapter.site import Site
from loratools.engine.plan import MergePlan
from loratools.storage import dtypes, files
from loratools.storage.header import TensorSpec

if TYPE_CHECKING:
    import torch

_Group = list[tuple[int, Placement]]

PROBES = 16

# Share of the elements that an exact check lets be one unit off: where float32 sums come to the other side of a tie.
# In float32 and float64 the sums themselves err by units, so there only the size of the error counts.
TIES = {"BF16": 1e-4, "F16": 1e-3, "F32": 1.0, "F64": 1.0}


@dataclass(slots=True)
class Probe:
    """Sums over one site while its tensor is read tile by tile.

    Of the input features `known` the whole change is there, oriented as the base stores it; `reach` is the largest
    element that the change of a single adapter has: the rounding error of its sums does not cancel.
    """

    site: Site
    X: torch.Tensor
    Y: torch.Tensor
    wanted: torch.Tensor
    known: torch.Tensor
    change: torch.Tensor
    reach: float

    def take(self, delta: torch.Tensor, rows: slice) -> None:
        """Add X·(W' − W)ᵀ of some rows of the site."""
        if self.site.transposed:
            self.Y += self.X[:, rows] @ delta
        else:
            self.Y[:, rows] = self.X @ delta.T


@dataclass(slots=True)
class Tally:
    """Elements compared, not the expected ones, off by more than allowed; ⟨W' − W, ΔW⟩, actual and expected."""

    compared: int = 0
    wrong: int = 0
    far: int = 0
    actual: float = 0.0
    expected: float = 0.0
    total: float = 0.0

    @property
    def survived(self) -> bool:
        """Whether about as much of the change is there as correct rounding leaves of it."""
        return abs(self.actual - self.expected) <= 0.05 * max(abs(self.expected), 0.05 * self.total)


def draw(plan: MergePlan, name: str, exact: bool, seed: int) -> list[Probe]:
    """Draw the probes of each site of a tensor and work out what the adapters should have done to them."""
    import torch

    groups: dict[Site, _Group] = {}
    source, placements = plan.changes[name].source, plan.changes[name].placements
    sites = [placement.site for _, placement in placements]
    for number, placement in placements:
        for site in placement.site.cut(sites):  # a fused projection and a part of it share rows
            groups.setdefault(site, []).append((number, replace(placement, site=site)))
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
    probes = []
    for site, group in groups.items():
        out, inputs = site.shape[::-1] if site.transposed else site.shape
        X = torch.randn(PROBES, inputs, generator=generator, dtype=torch.float64)
        known = torch.arange(inputs) if exact else torch.randperm(inputs, generator=generator)[:PROBES].sort().values
        units = torch.zeros(len(known), inputs, dtype=torch.float64)
        units[torch.arange(len(known)), known] = 1
        change = _projected(plan, group, units, source)
        parts = [_projected(plan, [each], units, source) for each in group] if len(group) > 1 else [change]
        reach = sum(float(part.abs().max()) for part in parts)
        Y, wanted = torch.zeros(PROBES, out, dtype=torch.float64), _projected(plan, group, X, source)
        probes.append(Probe(site, X, Y, wanted, known, change if site.transposed else change.T, reach))
    return probes


def _projected(plan: MergePlan, group: _Group, X: torch.Tensor, source: TensorSpec) -> torch.Tensor:
    """Return X·(W' − W)ᵀ of all updates in their order, for the rows of W that land on the site."""
    site = group[0][1].site

    @cache
    def base() -> torch.Tensor:
        W = files.read_tensor(source).double().view(site.matrix)[slice(*site.rows), slice(*site.columns)]
        return W.T if site.transposed else W

    def untouched(X: torch.Tensor) -> torch.Tensor:
        # Sums do not depend on W, so there it need not be loaded: it is taken for zero, before and after.
        if all(placement.update.additive for _, placement in group):
            return X.new_zeros(len(X), site.shape[1 if site.transposed else 0])
        return X @ base().T

    before, state = untouched(X), untouched
    for i, placement in group:
        under = Underlying(site, base, state)
        state = partial(placement.update.project, weight=plan.weights[i], under=under)
    return state(X) - before


def compare(
    tally: Tally, probe: Probe, rows: slice, before: torch.Tensor, after: torch.Tensor, dtype: str, once: bool
) -> None:
    """Compare the known elements in these rows of the site with `before + change`, rounded to `dtype`.

    One unit in the last place is allowed: of the result, or, unless all was rounded only `once`, of the change.
    """
    import torch

    if probe.site.transposed:
        inside = (probe.known >= rows.start) & (probe.known < rows.stop)
        picked = probe.known[inside] - rows.start
        before, after, change = before[picked], after[picked], probe.change[inside]
    else:
        before, after, change = before[:, probe.known], after[:, probe.known], probe.change[rows]
    if not change.numel():
        return
    rounded = (before + change).to(dtypes.to_torch(dtype)).double()
    largest = torch.maximum(rounded.abs(), after.abs())
    largest = largest if once else torch.maximum(largest, change.abs())
    unit = largest * 2.0 ** (1 - dtypes.MANTISSA[dtype])
    if TIES[dtype] == 1:
        unit.clamp_(min=8 * 2.0 ** -dtypes.MANTISSA[dtype] * (float(before.abs().max()) + probe.reach))
    off = (rounded - after).abs()
    tally.compared += off.numel()
    tally.wrong += int(torch.count_nonzero(off))
    tally.far += int(torch.count_nonzero(off > unit))
    tally.actual += float(((after - before) * change).sum())
    tally.expected += float(((rounded - before) * change).sum())
    tally.total += float(change.square().sum())
