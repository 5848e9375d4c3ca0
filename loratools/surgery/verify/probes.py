"""Probes of a changed tensor: what the adapters should have done to it, worked out factor by factor in float64.

Standard normal ones measure the whole error; unit vectors give whole columns of the change, and so every element of the
result there, to be compared one by one. Products of factors that are bytes of files are worked out in NumPy, for to
import torch takes longer than to read a model of a billion parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from loratools.adapter.kinds import Factors, Underlying
from loratools.adapter.placement.resolve import Placement
from loratools.adapter.site import Site
from loratools.engine.plan import MergePlan
from loratools.storage import dtypes, files
from loratools.storage.header import TensorSpec
from loratools.storage.lazy import LazyTensor

if TYPE_CHECKING:
    import numpy as np
    import torch

    Array = np.ndarray[Any, np.dtype[Any]]

_Group = list[tuple[int, Placement]]

PROBES = 16
# Of small tensors more columns are compared, up to so many elements: few cannot tell what survives of a change.
_ELEMENTS, _COLUMNS = 1 << 16, 256
_BLOCK = 1 << 18  # elements of a change that are worked out, and kept, at once

# Share of the elements that an exact check lets be one unit off, each where a float32 sum can come to the other side of
# a tie. In float32 and float64 the sums themselves err by units, so there only the size of the error counts.
TIES = {"BF16": 1e-4, "F16": 1e-3, "F32": 1.0, "F64": 1.0}
# Units of float32 (float64 for F64) by which the sums of a merge err, of the largest terms.
SUMS = 8


@dataclass(slots=True)
class Probe:
    """Sums over one site while its tensor is read tile by tile.

    X (inputs, 16) are the random probes, Y (outputs, 16) the products of the change that is there, and `wanted` those
    of the one that should be. Of the input features `known`, uint32, the whole change is there: `change(rows)` gives
    it as the base stores it, (rows of the site, known), or where the site is transposed (rows of `known`, outputs).
    `reach` is the largest element that the change of a single adapter has: the rounding error of its sums does not
    cancel.
    """

    site: Site
    X: Array
    Y: Array
    wanted: Array
    known: Array
    change: Callable[[slice], Array]
    reach: float

    def take(self, before: Array, after: Array, dtypes: tuple[str, str], rows: slice) -> tuple[float, int]:
        """Add X·(W' − W)ᵀ of some rows of the site, given as bits; return ‖W'‖² and how many elements differ."""
        from loratools.surgery.verify.formulas import measure

        if self.site.transposed:
            return measure(before, after, dtypes, self.X[rows], self.Y, across=True)
        return measure(before, after, dtypes, self.X, self.Y[rows])

    def overlaps(self) -> tuple[float, float, float, float]:
        """Return ‖Y − wanted‖², ‖Y‖², ‖wanted‖² and ⟨Y, wanted⟩; what is not finite gives NaN or infinity."""
        import numpy as np

        with np.errstate(invalid="ignore", over="ignore"):
            E = self.Y - self.wanted
            pairs = (E, E), (self.Y, self.Y), (self.wanted, self.wanted), (self.Y, self.wanted)
            error, actual, expected, cross = (float(np.einsum("op,op", *pair)) for pair in pairs)
        return error, actual, expected, cross


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
    import numpy as np

    groups: dict[Site, _Group] = {}
    source, placements = plan.changes[name].source, plan.changes[name].placements
    sites = [placement.site for _, placement in placements]
    for number, placement in placements:
        for site in placement.site.cut(sites):  # a fused projection and a part of it share rows
            groups.setdefault(site, []).append((number, replace(placement, site=site)))
    random = np.random.default_rng(int.from_bytes(blake2b(f"{seed} {name}".encode(), digest_size=16).digest()))
    probes = []
    for site, group in groups.items():
        out, inputs = site.shape[::-1] if site.transposed else site.shape
        X = np.ascontiguousarray(random.standard_normal((PROBES, inputs)).T)
        columns = inputs if exact else min(max(PROBES, _ELEMENTS // out), _COLUMNS, inputs)
        known = np.sort(random.permutation(inputs)[:columns]).astype(np.uint32)
        work = _by_products if all(_is_stored(placement) for _, placement in group) else _by_projection
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is seen where it lands
            wanted, change, reach = work(plan, group, source, X, known)
        probes.append(Probe(site, X, np.zeros((out, PROBES)), wanted, known, change, reach))
    return probes


_Wanted = tuple["Array", Callable[[slice], "Array"], float]
"""ΔW·X of all updates, rows of ΔW where it is known, and the reach, as `Probe` has them."""


def _is_stored(placement: Placement) -> bool:
    """Tell whether an update is s·left·right of factors that are bytes of files."""
    factors = placement.update.factored() if placement.update.additive else None
    return factors is not None and factors.magnitude is None and all(map(_is_read, (factors.left, factors.right)))


def _is_read(lazy: LazyTensor) -> bool:
    return lazy.spec is not None and lazy.spec.encoding is None and lazy.dtype in dtypes.MANTISSA


def _read(lazy: LazyTensor) -> Array:
    """Return a stored factor in float64."""
    import numpy as np

    from loratools.storage.codecs.floats import unsigned, widen

    assert lazy.spec is not None
    bits = np.frombuffer(files.read_bytes(lazy.spec), unsigned(lazy.dtype)).reshape(lazy.shape)
    return widen(bits, lazy.dtype, np.float64)


def _by_products(plan: MergePlan, group: _Group, source: TensorSpec, X: Array, known: Array) -> _Wanted:
    """Work out w·s·left·(right·X) of stored factors, and rows of the change when they are asked for."""
    import numpy as np

    site, parts = group[0][1].site, []
    wanted = np.zeros((site.shape[1 if site.transposed else 0], PROBES))
    for number, placement in group:
        factors: Factors | None = placement.update.factored()
        assert factors is not None
        left = _read(factors.left)[site.part_rows] * (plan.weights[number] * factors.scale)
        right = _read(factors.right)
        wanted += left @ (right @ X)
        there = right[:, known]
        parts.append((there.T, left.T) if site.transposed else (left, there))
    rows, columns = np.concatenate([rows for rows, _ in parts], 1), np.concatenate([columns for _, columns in parts])
    if len(parts) == 1 and len(rows) * columns.shape[1] <= _BLOCK:
        whole: Array = rows @ columns
        return wanted, lambda some: whole[some], _largest(whole)
    step = max(1, _BLOCK // max(1, columns.shape[1]))
    reach = 0.0
    for some, across in parts:
        blocks = (some[first : first + step] @ across for first in range(0, len(some), step))
        reach += float(np.max([_largest(block) for block in blocks]))
    return wanted, lambda some: rows[some] @ columns, reach


def _largest(matrix: Array) -> float:
    """Return the largest magnitude in a matrix; NaN where there is one."""
    import numpy as np

    return float(np.maximum(matrix.max(), -matrix.min()))


def _by_projection(plan: MergePlan, group: _Group, source: TensorSpec, X: Array, known: Array) -> _Wanted:
    """Work out the change by what each kind has for its proof, `Update.project`."""
    import numpy as np
    import torch

    units = torch.zeros(len(known), len(X), dtype=torch.float64)
    units[torch.arange(len(known)), torch.from_numpy(known.astype(np.int64))] = 1
    change = _projected(plan, group, units, source)
    parts = [_projected(plan, [each], units, source) for each in group] if len(group) > 1 else [change]
    reach = sum(float(part.abs().max()) for part in parts)
    wanted = _projected(plan, group, torch.from_numpy(np.ascontiguousarray(X.T)), source).numpy().T
    stored = (change if group[0][1].site.transposed else change.T).contiguous().numpy()
    return wanted, lambda rows: stored[rows], reach


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
    tally: Tally, probe: Probe, rows: slice, before: Array, after: Array, stored: tuple[str, str], once: bool, *,
    picked: bool = False,
) -> None:  # fmt: skip
    """Compare the known elements in these rows of the site with `before + change`, rounded; all are bits as `stored`.

    One unit in the last place is allowed: of the result or of the change. Where all was rounded only `once`, a number
    of a short dtype may be its neighbour only if the exact sum lies between the two as nearly as float32 can tell.
    `picked` says that the bits are those of the known columns alone.
    """
    from loratools.surgery.verify import formulas

    dtype = stored[1]
    if probe.site.transposed:
        first, last = (int(place) for place in probe.known.searchsorted([rows.start, rows.stop]))
        change, places = probe.change(slice(first, last)), {"rows": probe.known[first:last] - rows.start}
    else:
        change, places = probe.change(rows), {} if picked else {"columns": probe.known}
    width, ties = 2.0 ** -dtypes.MANTISSA[dtype], TIES[dtype] < 1
    if once and ties:
        rule = formulas.Rule(True, probe.reach, SUMS * 2.0**-24)
    else:
        terms = 0.0 if ties else SUMS * width
        rule = formulas.Rule(False, probe.reach, 2 * width, not once, dtypes.smallest(dtype), terms)
    found = formulas.compare(before, after, stored, change, rule, **places)
    tally.compared += change.size
    tally.wrong += found.wrong
    tally.far += found.far
    tally.actual += found.actual
    tally.expected += found.expected
    tally.total += found.total
