"""Prove a merge after the fact, by another path than the one that made it.

For seeded probes X the change that is there, X·(W' − W)ᵀ, is held against the change that should be, w·s·(X·Aᵀ)·Bᵀ, in
float64. With k independent standard normal probes the expectation of ‖X·Eᵀ‖² is k·‖E‖_F², so the residual estimates the
norm of the error E = W' − W − ΔW itself, to about 1/√(k·out). A correctly rounded merge has |E| ≤ 2^-p·|W'| in every
element, p the bits of the dtype's mantissa. As a change may be smaller than that, k unit vectors are probes as well:
they give whole columns of ΔW, so there every element of W' is known, and how much of ΔW must survive the rounding.

    probes   the vectors, and what a change is and should be along them
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loratools import dialects
from loratools.adapter.model import Adapter
from loratools.adapter.placement.image import named_for
from loratools.adapter.placement.layers import replicated
from loratools.adapter.placement.settle import settle
from loratools.engine.plan import Change, MergePlan
from loratools.parallel import Progress, workers
from loratools.storage import dtypes, files
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.header import TensorSpec
from loratools.surgery.merge.options import MergeOptions, Tied
from loratools.surgery.merge.plan import plan_merge
from loratools.surgery.verify import probes as probing

if TYPE_CHECKING:
    import torch


# On the bound: the estimate from k·out numbers scatters a little, and wide dtypes are no wider than their own sums.
_SLACK = {"BF16": 1.02, "F16": 1.02, "F32": 8.0, "F64": 8.0}
_TILE = 4 << 20


@dataclass(frozen=True, slots=True)
class TensorCheck:
    """What was found of one changed tensor.

    `error` = ‖W' − W − ΔW‖/‖ΔW'‖ with ΔW' = W' − W, the part of the change that the adapter does not explain;
    `error_of_weight` = ‖W' − W − ΔW‖/‖W'‖, to be held against `bound`; `applied` = ⟨ΔW', ΔW⟩/‖ΔW‖², which is 1 for a
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
    model: str | Path | Checkpoint,
    base: str | Path | Checkpoint,
    adapters: Sequence[str | Path | Adapter],
    *,
    weights: Sequence[float] | None = None,
    exact: bool = False,
    seed: int = 0,
    threads: int = 2,
    progress: Progress = lambda _: None,
) -> Verification:
    """Tell how far a model is from base + adapters: names, untouched bytes, and every changed tensor.

    `exact` recomputes each changed tensor densely in float64 and compares element by element, allowing what float32
    sums may cost: one unit in the last place in at most one element of 10,000 (1,000 for F16), and for F32 the error
    of such sums, 8·2^-24 of the largest terms. Otherwise that is done for 16 seeded columns, with one unit allowed in
    each element, as other tools may have rounded twice. Raises what planning a merge raises.
    """
    model = model if isinstance(model, Checkpoint) else Checkpoint.open(model)
    base = base if isinstance(base, Checkpoint) else Checkpoint.open(base)
    opened = [one if isinstance(one, Adapter) else dialects.open_adapter(one, base=base) for one in adapters]
    base = replicated(base, opened)
    weights = [1.0] * len(opened) if weights is None else list(weights)
    if not opened or len(weights) != len(opened):
        raise ValueError(f"{len(opened)} adapter(s) and {len(weights)} weight(s); each adapter takes one weight")
    tied: Tied = "untie" if model.specs.keys() - base.specs.keys() else "both"
    settled, _ = settle(base, [named_for(one, base) for one in opened], strict=False)
    plan = plan_merge(base, settled, weights, MergeOptions(tied=tied, check_base="off"))
    shared = {name: change for name, change in plan.changes.items() if name in model.specs}
    differing: list[str] = []
    checked: list[TensorCheck] = []
    with workers(threads) as pool:
        same = {
            name: pool.submit(_same, change.source, model.specs[name], progress)
            for name, change in shared.items()
            if not change.placements
        }
        found = {
            name: pool.submit(_check, plan, name, change, model.specs[name], exact, seed, progress)
            for name, change in shared.items()
            if change.placements
        }
        differing = sorted(name for name, future in same.items() if not future.result())
        checked = [found[name].result() for name in sorted(found)]
    missing = tuple(sorted(plan.changes.keys() - model.specs.keys()))
    extra = tuple(sorted(model.specs.keys() - plan.changes.keys()))
    ok = not (differing or missing or extra) and all(check.within for check in checked)
    worst = max((check.error_of_weight for check in checked), default=0.0)
    return Verification(
        ok, tuple(checked), len(same) - len(differing), tuple(differing), missing, extra, worst, exact, seed
    )


def _same(source: TensorSpec, found: TensorSpec, progress: Progress) -> bool:
    """Compare an untouched tensor byte by byte; where the dtype was changed, with the base rounded to it."""
    progress(found.nbytes)
    if source.shape != found.shape:
        return False
    if source.dtype == found.dtype:
        return all(bytes(a) == bytes(b) for a, b in zip(files.chunks(source), files.chunks(found), strict=True))
    import torch

    return torch.equal(files.read_tensor(source).to(dtypes.to_torch(found.dtype)), files.read_tensor(found))


def _check(
    plan: MergePlan, name: str, change: Change, found: TensorSpec, exact: bool, seed: int, progress: Progress
) -> TensorCheck:
    """Hold one changed tensor against its base and the adapters."""
    import torch

    bound = 2.0 ** -dtypes.MANTISSA.get(found.dtype, 0)
    if found.shape != change.source.shape or found.dtype not in dtypes.MANTISSA:
        return TensorCheck(name, float("inf"), float("inf"), bound, 0.0, False)
    probes = probing.draw(plan, name, change, exact, seed)
    norm, strays, tally = 0.0, 0, probing.Tally()
    for start, before, after in _tiles(probes[0].site.matrix, change.source, found):
        delta = after - before
        norm += float(after.square().sum())
        for probe in probes:
            if met := probe.site.overlap(start, start + len(delta)):
                inside = (met[0], slice(*probe.site.columns))
                if probe.site.transposed:
                    probe.Y += probe.X[:, met[1]] @ delta[inside]
                else:
                    probe.Y[:, met[1]] = probe.X @ delta[inside].T
                probing.compare(tally, probe, met[1], before[inside], after[inside], found.dtype, exact)
        for probe in probes:
            if met := probe.site.overlap(start, start + len(delta)):
                delta[met[0], slice(*probe.site.columns)] = 0
        strays += int(torch.count_nonzero(delta))
        progress(delta.numel() * found.nbytes // max(1, found.parameters))
    error = sum(float((probe.Y - probe.wanted).square().sum()) for probe in probes) / probing.PROBES
    there = sum(float(probe.Y.square().sum()) for probe in probes) / probing.PROBES
    expected = sum(float(probe.wanted.square().sum()) for probe in probes) / probing.PROBES
    cross = sum(float((probe.Y * probe.wanted).sum()) for probe in probes) / probing.PROBES
    of_weight = (error / norm) ** 0.5 if norm else 0.0
    applied = cross / expected if expected else 1.0
    within = of_weight <= bound * _SLACK[found.dtype] and tally.far == 0 and tally.survived
    if exact:
        within = tally.far == 0 and tally.wrong <= 1 + tally.compared * probing.TIES[found.dtype]
    return TensorCheck(
        name,
        (error / there) ** 0.5 if there else 0.0,
        of_weight,
        bound,
        applied,
        within and strays == 0,
        tally.wrong if exact else None,
    )


def _tiles(
    matrix: tuple[int, int], source: TensorSpec, found: TensorSpec
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield (first row, rows of the base, rows of the model), both in float64."""
    import torch

    rows, columns = matrix
    types = [dtypes.to_torch(spec.dtype) for spec in (source, found)]
    step = max(1, _TILE // (8 * columns))
    with files.descriptor(source.file) as one, files.descriptor(found.file) as other:
        for start in range(0, rows, step):
            count = (min(start + step, rows) - start) * columns
            pair = []
            for opened, spec, dtype in zip((one, other), (source, found), types, strict=True):
                raw = bytearray(count * dtype.itemsize)
                files.read_into(opened, memoryview(raw), spec.start + start * columns * dtype.itemsize)
                pair.append(torch.frombuffer(raw, dtype=dtype).double().view(-1, columns))
            yield start, pair[0], pair[1]
