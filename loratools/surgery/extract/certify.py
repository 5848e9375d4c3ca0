"""Certify any adapter against a fine-tune after the fact: the table that `extract` gives, for adapters of others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loratools import dialects
from loratools.adapter.low_rank import load
from loratools.adapter.model import Adapter
from loratools.adapter.naming.selection import Selection
from loratools.adapter.placement.image import named_for
from loratools.adapter.placement.resolve import Placement, resolve
from loratools.adapter.placement.tied import apply_policy
from loratools.adapter.placement.weight import base_matrix, by_module
from loratools.adapter.placement.whole import resolve_replacements
from loratools.errors import IncompatibleAdapter
from loratools.parallel import Progress, workers
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.header import TensorSpec
from loratools.surgery.extract.certificate import Layer, Total, layer, total
from loratools.surgery.extract.pairs import pair
from loratools.surgery.extract.read import read_delta, rounding_energy

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Certification:
    """A certificate for each factored module, and what else differs between base and fine-tune.

    `optimal` has for each layer the error of the best factors of its rank. `whole` are changed tensors that the adapter
    replaces, `uncovered` those that it does not touch, with their ‖ΔW‖; `uncovered_energy` is their share of all ‖ΔW‖².
    `skipped` are modules whose update is no product, such as DoRA's.
    """

    layers: tuple[Layer, ...]
    optimal: tuple[float, ...]
    total: Total
    whole: tuple[str, ...]
    uncovered: tuple[tuple[str, float], ...]
    uncovered_energy: float
    skipped: tuple[str, ...]


def certify(
    tuned: str | Path | Checkpoint,
    base: str | Path | Checkpoint,
    adapter: str | Path | Adapter,
    *,
    seed: int = 0,
    threads: int = 2,
    progress: Progress = lambda _: None,
) -> Certification:
    """Measure how much of a fine-tune an adapter of any origin holds, layer by layer.

    error = ‖W' − W − s·B·A‖_F/‖W' − W‖_F in float64, beside the error of a truncated SVD of the same rank. Raises
    `IncompatibleAdapter` where adapter, base and fine-tune do not belong together.
    """
    from loratools.linalg.svd.truncated import full_float32

    tuned = tuned if isinstance(tuned, Checkpoint) else Checkpoint.open(tuned)
    base = base if isinstance(base, Checkpoint) else Checkpoint.open(base)
    opened = adapter if isinstance(adapter, Adapter) else dialects.open_adapter(adapter, base=base)
    opened = named_for(opened, base)
    factors = apply_policy((replace(opened, replacements={}),), base.specs, base.config, "both").adapters[0]
    shapes = {name: spec.shape for name, spec in base.specs.items()}
    modules = by_module(resolve(factors, shapes, base.config))
    modules = {module: here for module, here in modules.items() if here[0].update.additive}
    counterparts = {one.base: one.name for one in pair(base, tuned, Selection()).pairs if one.base}
    lost = sorted({p.site.tensor for here in modules.values() for p in here} - counterparts.keys())
    if not modules or lost:
        raise IncompatibleAdapter(f"{tuned.path}: the fine-tune lacks what the adapter changes", lost[:20])
    covered = {p.site.tensor for here in modules.values() for p in here}
    replaced = set(resolve_replacements(opened, shapes))
    with workers(threads) as pool, full_float32():
        jobs = [
            pool.submit(_layer, module, here, base, tuned, counterparts, seed, progress)
            for module, here in modules.items()
        ]
        rest = {
            name: pool.submit(_norm2, base, name, tuned, counterparts[name], progress)
            for name in sorted(counterparts.keys() - covered)
            if base.specs[name].shape == tuned.specs[counterparts[name]].shape
        }
        layers = [job.result() for job in jobs]
        norms = {name: job.result() for name, job in rest.items()}
    changed = {name: norm2 for name, norm2 in norms.items() if norm2 > 0}
    uncovered = {name: norm2 for name, norm2 in changed.items() if name not in replaced}
    energy = sum(changed.values()) + sum(one.delta_norm**2 for one, _ in layers)
    return Certification(
        tuple(one for one, _ in layers),
        tuple(best for _, best in layers),
        total(one for one, _ in layers),
        tuple(sorted(changed.keys() & replaced)),
        tuple((name, norm2**0.5) for name, norm2 in sorted(uncovered.items())),
        sum(uncovered.values()) / energy if energy else 0.0,
        tuple(sorted(factors.updates.keys() - {p.module for here in modules.values() for p in here})),
    )


def _layer(
    module: str, here: list[Placement], base: Checkpoint, tuned: Checkpoint, counterparts: dict[str, str], seed: int,
    progress: Progress,
) -> tuple[Layer, float]:  # fmt: skip
    import torch

    from loratools.linalg.svd.truncated import residual2, truncated_svd

    torch.set_num_threads(1)  # OpenMP keeps this number for each thread
    update = here[0].update
    W = base_matrix(base, here)
    base_norm2 = float(W.square().sum())
    D: torch.Tensor = base_matrix(tuned, here, counterparts).sub_(W).float()
    progress(sum(base.specs[p.site.tensor].nbytes + tuned.specs[counterparts[p.site.tensor]].nbytes for p in here))
    B, A = load(update)
    error2 = residual2(D, B, A)
    parameters = update.rank * sum(D.shape)
    best = truncated_svd(D, min(update.rank, *D.shape), seed=seed)
    if best.norm2 == 0:
        empty = Layer(module, update.kind, update.shape, update.rank, parameters, base_norm2**0.5, *(0.0,) * 7)
        return empty, 0.0
    made = layer(
        module, update.kind, update.shape, update.rank, parameters, base_norm2=base_norm2, norm2=best.norm2,
        error2=error2, excess2=error2 - best.error2 + best.excess_estimate,
        bound2=error2 - best.error2 + best.excess_bound,
        noise2=sum(_noise2(tuned.specs[counterparts[p.site.tensor]], p) for p in here), sigma1=float(best.S[0]),
    )  # fmt: skip
    return made, best.relative_error


def _noise2(spec: TensorSpec, placement: Placement) -> float:
    rows, columns = placement.site.shape
    return rounding_energy(spec) * rows * columns / spec.parameters


def _norm2(base: Checkpoint, name: str, tuned: Checkpoint, other: str, progress: Progress) -> float:
    return read_delta(base.specs[name], tuned.specs[other], progress, keep=False).norm2
