"""Prove a merge after the fact, by another path than the one that made it.

For seeded probes X the change that is there, X·(W' − W)ᵀ, is compared with the change that should be, w·s·(X·Aᵀ)·Bᵀ, in
float64. With k independent standard normal probes the expectation of ‖X·Eᵀ‖² is k·‖E‖_F², so the residual estimates the
norm of the error E = W' − W − ΔW itself, to about 1/√(k·out). A correctly rounded merge has |E| ≤ 2^-p·|W'| in every
element, p the bits of the dtype's mantissa. As a change may be smaller than that, k unit vectors are probes as well:
they give whole columns of ΔW, so there every element of W' is known, and how much of ΔW must survive the rounding.

    probes   the vectors, and what a change is and should be along them
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loratools.adapter.placement.layers import replicated
from loratools.adapter.placement.settle import settle
from loratools.decisions import decided
from loratools.engine.plan import MergePlan
from loratools.options import Options, Tied
from loratools.parallel import Progress, cores, no_progress, workers
from loratools.storage import dtypes, files
from loratools.storage.codecs import schemes
from loratools.storage.header import TensorSpec
from loratools.surgery.inputs import AdapterSource, ModelSource, open_adapters, open_model, under_names_of
from loratools.surgery.merge.options import MergeOptions
from loratools.surgery.merge.plan import plan_merge
from loratools.surgery.verify import probes as probing

# On the bound: the estimate from k·out numbers scatters a little, and wide dtypes are no wider than their own sums.
_SLACK = {"BF16": 1.02, "F16": 1.02, "F32": 8.0, "F64": 8.0}
_TILE = 1 << 20


@dataclass(frozen=True, slots=True)
class TensorCheck:
    """The errors of one changed tensor.

    `error` = ‖W' − W − ΔW‖/‖ΔW'‖ with ΔW' = W' − W, the part of the change that the adapter does not explain;
    `error_of_weight` = ‖W' − W − ΔW‖/‖W'‖, to be compared with `bound`; `applied` = ⟨ΔW', ΔW⟩/‖ΔW‖², which is 1 for a
    change that was applied once. With `exact`, `mismatched` counts the elements that are not W + ΔW in float64, rounded
    once.
    """

    name: str
    error: float
    error_of_weight: float
    bound: float
    applied: float
    within: bool
    mismatched: int | None = None


@dataclass(frozen=True, slots=True)
class Verification:
    """The whole account: `ok` only if every tensor of both models is explained.

    Of the tensors that no adapter changes `identical` counts those that are the base's byte by byte, and `cast` those
    that are the base's in another float dtype, each number rounded once and none lost to infinity.
    """

    ok: bool
    checked: tuple[TensorCheck, ...]
    identical: int
    differing: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    error: float
    exact: bool
    seed: int
    cast: int = 0


def verify(
    model: ModelSource,
    base: ModelSource,
    adapters: AdapterSource | Sequence[AdapterSource],
    *,
    weights: float | Sequence[float] | None = None,
    exact: bool = False,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Tell how far a model is from base + adapters: names, untouched bytes, and every changed tensor.

    Args:
        model: The merged model: a path, an `hf://` reference, or an open `Checkpoint`.
        base: The base model, likewise.
        adapters: The adapters of the merge, one or several, in its order.
        weights: The weights of the merge, a number for each adapter; one number for one adapter. Default: 1 for each.
        exact: Whether to recompute each changed tensor in float64 and compare every element with it, rounded once.
            Float32 sums may put one element of 10,000 (1,000 for F16) one unit in the last place off, and err in F32
            by 8·2^-24 of the largest terms. Default: no, 16 random columns are compared so, with one unit allowed in
            each element, as other tools may have rounded twice, and 16 random probes estimate the error of the rest.
        seed: A whole number that draws the probes. Default: 0.
        threads: Threads to work with. Default: one per core, at most 8.
        progress: Called with the bytes read since the last call, from any thread. Default: nobody is told.

    Returns:
        The account: `ok` only if every tensor of both models is explained.

    Raises:
        InvalidOption: A number, or the count of weights, is wrong.
        IncompatibleAdapter, BadFile, UnsupportedAdapter: What planning a merge raises.

    Example:
        >>> verify("merged", "base", "adapter").ok
        True
    """
    Options().flag("exact", exact).number("seed", seed).threads(threads).done()
    progress = progress or no_progress
    model, base = open_model(model), open_model(base)
    model.tell_unread()
    base.tell_unread()
    inputs = open_adapters(adapters, base, weights)
    base = replicated(base, [each.adapter for each in inputs])
    tied: Tied = "untie" if model.specs.keys() - base.specs.keys() else "both"
    inputs, _ = settle(base, under_names_of(base, inputs), strict=False)
    plan = plan_merge(base, inputs, MergeOptions(tied=tied, check_base="off"))
    shared = {name: change for name, change in plan.changes.items() if name in model.specs}
    untouched = [name for name, change in shared.items() if not change.placements]
    touched = sorted(shared.keys() - untouched)
    how = "every element" if exact else f"{probing.PROBES} columns and {probing.PROBES} random probes of seed {seed}"
    decided("%d tensors change: %s of each are compared; %d are byte for byte", len(touched), how, len(untouched))
    with workers(threads or min(8, cores())) as pool:
        codes = schemes.find(base.specs, base.config).tensors
        same = [
            pool.submit(_same, shared[name].source, model.specs[name], name in codes, progress) for name in untouched
        ]
        checks = [pool.submit(_check, plan, name, model.specs[name], exact, seed, progress) for name in touched]
        differing = tuple(sorted(name for name, future in zip(untouched, same, strict=True) if not future.result()))
        checked = tuple(future.result() for future in checks)
    missing = tuple(sorted(plan.changes.keys() - model.specs.keys()))
    extra = tuple(sorted(model.specs.keys() - plan.changes.keys()))
    ok = not (differing or missing or extra) and all(check.within for check in checked)
    worst = max((check.error_of_weight for check in checked), default=0.0)
    cast = sum(shared[name].source.dtype != model.specs[name].dtype for name in set(untouched).difference(differing))
    identical = len(untouched) - len(differing) - cast
    return Verification(ok, checked, identical, differing, missing, extra, worst, exact, seed, cast)


def _same(base: TensorSpec, merged: TensorSpec, coded: bool, progress: Progress) -> bool:
    """Compare an untouched tensor byte by byte; a float one of another dtype with the base's numbers, rounded to it.

    An infinity that the base has not is no rounding. What belongs to a quantization (`coded`) may not be cast at all.
    """
    if base.shape != merged.shape or base.dtype == merged.dtype:
        progress(merged.nbytes)
        return files.same_bytes(base, merged)
    if coded or not {base.dtype, merged.dtype} <= set(dtypes.FLOATS):
        return False
    import torch

    for _, _, (W, actual) in files.row_tiles((base, merged), 1, _TILE):
        infinite = torch.isinf(actual) & ~torch.isinf(W)
        equal = (W.to(actual.dtype) == actual) | (torch.isnan(W) & torch.isnan(actual))
        if bool(infinite.any()) or not bool(equal.all()):
            return False
        progress(actual.numel() * actual.element_size())
    return True


def _check(plan: MergePlan, name: str, merged: TensorSpec, exact: bool, seed: int, progress: Progress) -> TensorCheck:
    """Compare one changed tensor with its base and the adapters."""
    import torch

    source, bound = plan.changes[name].source, 2.0 ** -dtypes.MANTISSA.get(merged.dtype, 0)
    if merged.shape != source.shape or merged.dtype not in dtypes.MANTISSA:
        return TensorCheck(name, float("inf"), float("inf"), bound, 0.0, False)
    probes = probing.draw(plan, name, exact, seed)
    norm, strays, tally = 0.0, 0, probing.Tally()
    for start, _, rows in files.row_tiles((source, merged), probes[0].site.matrix[1], _TILE):
        before, after = (stored.double() for stored in rows)
        delta = after - before
        norm += float(after.square().sum())
        overlaps = [(probe, probe.site.overlap(start, start + len(delta))) for probe in probes]
        places = [(probe, rows[0], rows[1], slice(*probe.site.columns)) for probe, rows in overlaps if rows]
        for probe, in_tile, in_site, columns in places:
            probe.take(delta[in_tile, columns], in_site)
            old, new = before[in_tile, columns], after[in_tile, columns]
            probing.compare(tally, probe, in_site, old, new, merged.dtype, exact)
        for _, in_tile, _, columns in places:
            delta[in_tile, columns] = 0
        strays += int(torch.count_nonzero(delta))
        progress(delta.numel() * merged.nbytes // max(1, merged.parameters))

    def mean(of: Callable[[probing.Probe], torch.Tensor]) -> float:
        return sum(float(of(probe).sum()) for probe in probes) / probing.PROBES

    error, actual = mean(lambda probe: (probe.Y - probe.wanted).square()), mean(lambda probe: probe.Y.square())
    expected, cross = mean(lambda probe: probe.wanted.square()), mean(lambda probe: probe.Y * probe.wanted)
    of_weight = (error / norm) ** 0.5 if norm else 0.0
    if exact:
        within = tally.far == 0 and tally.wrong <= 1 + tally.compared * probing.TIES[merged.dtype]
    else:
        within = of_weight <= bound * _SLACK[merged.dtype] and tally.far == 0 and tally.survived
    of_change, applied = (error / actual) ** 0.5 if actual else 0.0, cross / expected if expected else 1.0
    mismatched = tally.wrong if exact else None
    return TensorCheck(name, of_change, of_weight, bound, applied, within and strays == 0, mismatched)
