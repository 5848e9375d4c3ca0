"""Judge the tensors of a model one by one: the untouched against the base's bytes, the changed against the adapters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from loratools.engine.plan import MergePlan
from loratools.parallel import Progress, no_progress
from loratools.storage import dtypes, files
from loratools.storage.header import TensorSpec
from loratools.surgery.verify import probes as probing
from loratools.surgery.verify.tiles import TILE, survey

if TYPE_CHECKING:
    from loratools.storage.codecs import Encoding

# On the bound: wide dtypes are no wider than their own sums.
_SLACK = {"BF16": 1.02, "F16": 1.02, "F32": 8.0, "F64": 8.0}
# The estimate of an error of rank k from PROBES·k numbers scatters; with this a right one of rank 1 is never beyond.
_SCATTER = 1.2
_HALF, _SURE = 0.5, 4.0
"""The part of a change under which `merge` refuses to make codes, and standard deviations of an estimate of it."""


@dataclass(frozen=True, slots=True)
class TensorCheck:
    """The errors of one changed tensor.

    `error` = ‖W' − W − ΔW‖/‖ΔW'‖ with ΔW' = W' − W, the part of the change that the adapter does not explain;
    `error_of_weight` = ‖W' − W − ΔW‖/‖W'‖, to be compared with `bound`; `applied` = ⟨ΔW', ΔW⟩/‖ΔW‖², which is 1 for a
    change that was applied once. With `exact`, `mismatched` counts the elements that are not W + ΔW in float64, rounded
    once. Of a weight that is stored as codes (`coded`) `expected2` is ‖ΔW‖², and `scatter2` the variance of the
    estimate of `applied`.
    """

    name: str
    error: float
    error_of_weight: float
    bound: float
    applied: float
    within: bool
    mismatched: int | None = None
    coded: bool = False
    expected2: float = 0.0
    scatter2: float = 0.0


def same(base: TensorSpec, merged: TensorSpec, coded: bool, progress: Progress) -> bool:
    """Compare an untouched tensor byte by byte; a float one of another dtype with the base's numbers, rounded to it.

    An infinity that the base has not is no rounding. What belongs to a quantization (`coded`) may not be cast at all.
    """
    if base.encoding and merged.encoding:  # what is stored, for two codes can stand for one number
        ours, theirs = (cast("Encoding", spec.encoding).module for spec in (base, merged))
        progress(merged.nbytes // 4)
        return ours.specs.keys() == theirs.specs.keys() and all(
            files.same_bytes(spec, theirs.specs[part]) for part, spec in ours.specs.items()
        )
    if base.shape != merged.shape or (base.dtype == merged.dtype and not base.encoding):
        progress(merged.nbytes)
        return files.same_bytes(base, merged)
    if coded or not {base.dtype, merged.dtype} <= set(dtypes.FLOATS):
        return False
    import torch

    for _, _, (W, actual) in files.row_tiles((base, merged), 1, TILE):
        infinite = torch.isinf(actual) & ~torch.isinf(W)
        equal = (W.to(actual.dtype) == actual) | (torch.isnan(W) & torch.isnan(actual))
        if bool(infinite.any()) or not bool(equal.all()):
            return False
        progress(actual.numel() * actual.element_size())
    return True


def check(plan: MergePlan, name: str, merged: TensorSpec, exact: bool, seed: int, progress: Progress) -> TensorCheck:
    """Compare one changed tensor with its base and the adapters."""
    source, bound = plan.changes[name].source, 2.0 ** -dtypes.MANTISSA.get(merged.dtype, 0)
    if merged.encoding:
        bound = _of_codes(merged)
    if merged.shape != source.shape or merged.dtype not in dtypes.MANTISSA:
        return TensorCheck(name, float("inf"), float("inf"), bound, 0.0, False)
    probes = probing.draw(plan, name, exact, seed)
    sums = survey(source, merged, probes, exact, progress)
    norm, strays, tally = sums.squares, sums.strays, sums.tally
    if merged.dtype == "F64" and not (exact or math.isfinite(norm)):  # whose squares no float64 holds: by elements
        return check(plan, name, merged, True, seed, no_progress)
    overlaps = zip(*(probe.overlaps() for probe in probes), strict=True)
    error, actual, expected, cross = (sum(parts) / probing.PROBES for parts in overlaps)
    of_weight = (error / norm) ** 0.5 if norm else 0.0
    rank = min(min(probe.site.shape) for probe in probes)
    slack = _SLACK[merged.dtype] * (1 + _SCATTER / (probing.PROBES * rank) ** 0.5)
    # Around zero the numbers of a dtype lie no closer than its smallest.
    around_zero = dtypes.smallest(merged.dtype) / 2 * (merged.parameters / norm) ** 0.5 if norm else 0.0
    if merged.encoding:
        # Codes that share a scale with changed ones may be others for that.
        strays, within = 0, of_weight <= bound and sums.strays2 <= bound**2 * sums.beside2
    elif exact:
        within = tally.far == 0 and tally.wrong <= 1 + tally.compared * probing.TIES[merged.dtype]
    else:
        within = of_weight <= bound * slack + around_zero and tally.far == 0 and tally.survived
    of_change, applied = (error / actual) ** 0.5 if actual else 0.0, cross / expected if expected else 1.0
    mismatched = tally.wrong if exact else None
    count = sum(len(probe.wanted) for probe in probes) * probing.PROBES
    scatter2 = error / (expected * count) if expected else 0.0
    return TensorCheck(
        name, of_change, of_weight, bound, applied, within and strays == 0, mismatched, bool(merged.encoding), expected,
        scatter2,
    )  # fmt: skip


def with_change(checks: Iterable[TensorCheck]) -> tuple[TensorCheck, ...]:
    """Return the checks; codes that hold less than half of the change, all together, are none of the merge's.

    The error that codes may have is larger than most changes, so that the base's own would pass without this.
    """
    checks = tuple(checks)
    coded = [check for check in checks if check.coded]
    total = sum(check.expected2 for check in coded)
    if not total:
        return checks
    applied = sum(check.applied * check.expected2 for check in coded) / total
    scatter = sum(check.scatter2 * check.expected2**2 for check in coded) ** 0.5 / total
    if applied + _SURE * scatter >= _HALF:
        return checks
    return tuple(replace(check, within=check.within and not check.coded) for check in checks)


def _of_codes(merged: TensorSpec) -> float:
    """Return how far codes may be from base + adapter, relative to it: no scheme of so many bits is worse.

    Codes made from the unquantized original differ from the base's by the errors of two quantizations.
    """
    return min(1.0, 1.5 * 2.0 ** (3 - cast("Encoding", merged.encoding).bits))


def unseen(changed: Iterable[TensorSpec], exact: bool) -> tuple[str, ...]:
    """Say for each dtype of the changed tensors, and for codes, which errors in them a verification cannot see."""
    changed = tuple(changed)
    widest = max((_of_codes(spec) for spec in changed if spec.encoding), default=0.0)
    plain = {spec.dtype for spec in changed if not spec.encoding}
    of_codes = (_UNSEEN_OF_CODES.format(bound=widest),) if widest else ()
    return of_codes + tuple(
        _UNSEEN[exact, probing.TIES[dtype] == 1].format(
            dtype=dtype,
            bound=_SLACK[dtype] * 2.0 ** -dtypes.MANTISSA[dtype],
            terms=probing.SUMS * 2.0 ** -dtypes.MANTISSA[dtype],
        )
        for dtype in sorted(plain & dtypes.MANTISSA.keys())
    )


_UNSEEN_OF_CODES = (
    "errors below {bound:.0%} of a changed tensor that is codes again, as rounding makes; that less than half of "
    "the change is in all of them is seen"
)
# (exact, whether the sums err by units) -> what is not seen. The tests measure these.
_UNSEEN = {
    (False, False): "errors below {bound:.1e} of a changed {dtype} tensor, outside of the columns compared: the last "
    "bit of up to a third of its elements, or a few elements by more; --exact sees them",
    (False, True): "errors below {bound:.1e} of a changed {dtype} tensor: the last three bits of its elements, or, "
    "outside of the columns compared, a few elements by more; --exact sees those",
    (True, False): "the last bit of {dtype} elements whose exact sum is as near to a tie as float32 can tell",
    (True, True): "errors in {dtype} elements below {terms:.1e} of the largest element of their rows and of the change",
}  # fmt: skip
