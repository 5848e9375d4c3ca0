"""Probes of a changed tensor: what the adapters should have done to it, worked out factor by factor in float64.

Standard normal ones measure the whole error; unit vectors give whole columns of the change, and so every element of the
result there, to be compared one by one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from hashlib import blake2b
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
# Of small tensors more columns are compared, up to so many elements: few cannot tell what survives of a change.
_ELEMENTS, _COLUMNS = 1 << 16, 256

# Share of the elements that an exact check lets be one unit off, each where a float32 sum can come to the other side of
# a tie. In float32 and float64 the sums themselves err by units, so there only the size of the error counts.
TIES = {"BF16": 1e-4, "F16": 1e-3, "F32": 1.0, "F64": 1.0}
# Units of float32 (float64 for F64) by which the sums of a merge err, of the largest terms.
SUMS = 8


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
        """Whether about as much of the change is there as correct rounding leaves of it; two ties tell nothing."""
        allowed = 0.05 * max(abs(self.expected), 0.05 * self.total)
        return self.wrong <= 2 or abs(self.actual - self.expected) <= allowed


def draw(plan: MergePlan, name: str, exact: bool, seed: int) -> list[Probe]:
    """Draw the probes of each site of a tensor and work out what the adapters should have done to them.

    Seed and name together decide the probes, so no two tensors share them.
    """
    import numpy
    import torch

    groups: dict[Site, _Group] = {}
    source, placements = plan.changes[name].source, plan.changes[name].placements
    sites = [placement.site for _, placement in placements]
    for number, placement in placements:
        for site in placement.site.cut(sites):  # a fused projection and a part of it share rows
            groups.setdefault(site, []).append((number, replace(placement, site=site)))
    # torch's generator takes 32 bits of a seed; numpy's takes all.
    random = numpy.random.default_rng(int.from_bytes(blake2b(f"{seed} {name}".encode(), digest_size=16).digest()))
    probes = []
    for site, group in groups.items():
        out, inputs = site.shape[::-1] if site.transposed else site.shape
        X = torch.from_numpy(random.standard_normal((PROBES, inputs)))
        columns = inputs if exact else min(max(PROBES, _ELEMENTS // out), _COLUMNS, inputs)
        known = torch.from_numpy(random.permutation(inputs)[:columns]).sort().values
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

    One unit in the last place is allowed: of the result or of the change. Where all was rounded only `once`, a number
    of a short dtype may be its neighbour only if the exact sum lies between the two as nearly as float32 can tell.
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
    exact, width = before + change, 2.0 ** -dtypes.MANTISSA[dtype]
    rounded = exact.to(dtypes.to_torch(dtype)).double()
    off = (rounded - after).abs()
    if once and TIES[dtype] < 1:
        allowed = SUMS * 2.0**-24 * (before.abs() + probe.reach)
        right = (off == 0) | ((exact - (rounded + after) / 2).abs() <= allowed)
    else:
        largest = torch.maximum(rounded.abs(), after.abs())
        unit = (largest if once else torch.maximum(largest, change.abs())) * 2 * width
        least = SUMS * width * (float(before.abs().max()) + probe.reach) if TIES[dtype] == 1 else 0.0
        right = (off <= unit.clamp_(min=max(least, dtypes.smallest(dtype)))) & torch.isfinite(off)
    tally.compared += off.numel()
    tally.wrong += int(torch.count_nonzero(off))
    tally.far += right.numel() - int(torch.count_nonzero(right))  # NaN is far from every number
    tally.actual += float(((after - before) * change).sum())
    tally.expected += float(((rounded - before) * change).sum())
    tally.total += float(change.square().sum())
