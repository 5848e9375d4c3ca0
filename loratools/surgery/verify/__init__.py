"""Prove a merge after the fact, by another path than the one that made it.

For seeded probes X the change that is there, X·(W' − W)ᵀ, is compared with the change that should be, w·s·(X·Aᵀ)·Bᵀ, in
float64. With k independent standard normal probes the expectation of ‖X·Eᵀ‖² is k·‖E‖_F², so the residual estimates the
norm of the error E = W' − W − ΔW itself, to about 1/√(k·out). A correctly rounded merge has |E| ≤ 2^-p·|W'| in every
element, p the bits of the dtype's mantissa. As a change may be smaller than that, k unit vectors are probes as well:
they give whole columns of ΔW, so there every element of W' is known, and how much of ΔW must survive the rounding.

    probes   the vectors, and what a change is and should be along them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loratools.adapter.placement.layers import replicated
from loratools.adapter.placement.settle import settle
from loratools.decisions import decided
from loratools.engine.plan import Change, MergePlan
from loratools.options import Options, Tied
from loratools.parallel import Progress, cores, no_progress, workers
from loratools.storage import dtypes, files
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
    """The whole account: `ok` only if every tensor of both models is explained."""

    ok: bool
    checked: tuple[TensorCheck, ...]
    identical: int
    differing: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    error: float
    exact: bool
    seed: int


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
    options = Options()
    options.flag("exact", exact)
    options.number("seed", seed)
    options.number("threads", threads, least=1, optional=True)
    options.done()
    progress = progress or no_progress
    model, base = open_model(model), open_model(base)
    inputs = open_adapters(adapters, base, weights)
    base = replicated(base, [each.adapter for each in inputs])
    tied: Tied = "untie" if model.specs.keys() - base.specs.keys() else "both"
    inputs, _ = settle(base, under_names_of(base, inputs), strict=False)
    plan = plan_merge(base, inputs, MergeOptions(tied=tied, check_base="off"))
    shared = {name: change for name, change in plan.changes.items() if name in model.specs}
    count = sum(bool(change.placements) for change in shared.values())
    how = "every element" if exact else f"{probing.PROBES} columns and {probing.PROBES} random probes of seed {seed}"
    decided("%d tensors change: %s of each are compared; %d are byte for byte", count, how, len(shared) - count)
    with workers(threads or min(8, cores())) as pool:
        compared = {
            name: pool.submit(_same, change.source, model.specs[name], progress)
            for name, change in shared.items()
            if not change.placements
        }
        measured = {
            name: pool.submit(_check, plan, name, change, model.specs[name], exact, seed, progress)
            for name, change in shared.items()
            if change.placements
        }
        differing = sorted(name for name, future in compared.items() if not future.result())
        checked = [measured[name].result() for name in sorted(measured)]
    missing = tuple(sorted(plan.changes.keys() - model.specs.keys()))
    extra = tuple(sorted(model.specs.keys() - plan.changes.keys()))
    ok = not (differing or missing or extra) and all(check.within for check in checked)
    worst = max((check.error_of_weight for check in checked), default=0.0)
    return Verification(
        ok, tuple(checked), len(compared) - len(differing), tuple(differing), missing, extra, worst, exact, seed
    )


def _same(base: TensorSpec, merged: TensorSpec, progress: Progress) -> bool:
    """Compare an untouched tensor byte by byte; where the dtype was changed, with the base rounded to it."""
    progress(merged.nbytes)
    if base.shape != merged.shape or base.dtype == merged.dtype:
        return files.same_bytes(base, merged)
    import torch

    return torch.equal(files.read_tensor(base).to(dtypes.to_torch(merged.dtype)), files.read_tensor(merged))


def _check(
    plan: MergePlan, name: str, change: Change, merged: TensorSpec, exact: bool, seed: int, progress: Progress
) -> TensorCheck:
    """Compare one changed tensor with its base and the adapters."""
    import torch

    bound = 2.0 ** -dtypes.MANTISSA.get(merged.dtype, 0)
    if merged.shape != change.source.shape or merged.dtype not in dtypes.MANTISSA:
        return TensorCheck(name, float("inf"), float("inf"), bound, 0.0, False)
    probes = probing.draw(plan, name, change, exact, seed)
    norm, strays, tally = 0.0, 0, probing.Tally()
    columns = probes[0].site.matrix[1]
    for start, _, rows in files.row_tiles((change.source, merged), columns, _TILE):
        before, after = (stored.double() for stored in rows)
        delta = after - before
        norm += float(after.square().sum())
        for probe in probes:
            if overlap := probe.site.overlap(start, start + len(delta)):
                inside = (overlap[0], slice(*probe.site.columns))
                if probe.site.transposed:
                    probe.Y += probe.X[:, overlap[1]] @ delta[inside]
                else:
                    probe.Y[:, overlap[1]] = probe.X @ delta[inside].T
                probing.compare(tally, probe, overlap[1], before[inside], after[inside], merged.dtype, exact)
        for probe in probes:
            if overlap := probe.site.overlap(start, start + len(delta)):
                delta[overlap[0], slice(*probe.site.columns)] = 0
        strays += int(torch.count_nonzero(delta))
        progress(delta.numel() * merged.nbytes // max(1, merged.parameters))
    error = sum(float((probe.Y - probe.wanted).square().sum()) for probe in probes) / probing.PROBES
    actual = sum(float(probe.Y.square().sum()) for probe in probes) / probing.PROBES
    expected = sum(float(probe.wanted.square().sum()) for probe in probes) / probing.PROBES
    cross = sum(float((probe.Y * probe.wanted).sum()) for probe in probes) / probing.PROBES
    of_weight = (error / norm) ** 0.5 if norm else 0.0
    applied = cross / expected if expected else 1.0
    within = of_weight <= bound * _SLACK[merged.dtype] and tally.far == 0 and tally.survived
    if exact:
        within = tally.far == 0 and tally.wrong <= 1 + tally.compared * probing.TIES[merged.dtype]
    return TensorCheck(
        name,
        (error / actual) ** 0.5 if actual else 0.0,
        of_weight,
        bound,
        applied,
        within and strays == 0,
        tally.wrong if exact else None,
    )
