"""Certify any adapter against a fine-tune after the fact: the table that `extract` gives, for adapters of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

from loratools import dialects
from loratools.adapter.low_rank import load
from loratools.adapter.naming.selection import Selection
from loratools.adapter.placement.image import named_for
from loratools.adapter.placement.resolve import Placement, resolve
from loratools.adapter.placement.tied import onto_stored
from loratools.adapter.placement.weight import base_matrix, by_module
from loratools.adapter.placement.whole import resolve_replacements
from loratools.errors import BadFile, IncompatibleAdapter
from loratools.linalg.precision import full_float32
from loratools.linalg.svd.truncated import residual2, truncated_svd
from loratools.options import Options
from loratools.parallel import Progress, cores, no_progress, workers
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import logical
from loratools.storage.header import TensorSpec
from loratools.surgery.extract.layers import Layer, Total, layer, total
from loratools.surgery.extract.pairs import pair
from loratools.surgery.extract.read import read_delta, rounding_energy
from loratools.surgery.inputs import (
    AdapterSource,
    ModelSource,
    check_model_type,
    kept,
    patterns_of,
    read_as,
    typed_model,
)


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

    def rows(self) -> list[dict[str, Any]]:
        """Return a plain dict for each factored layer; `pandas.DataFrame(found.rows())` is a table of them.

        The keys are the fields of its certificate, `change` = ‖ΔW‖/‖W‖, and `optimal`, the error of the best factors.
        """
        return [
            {**asdict(layer), "shape": list(layer.shape), "change": layer.change, "optimal": optimal}
            for layer, optimal in zip(self.layers, self.optimal, strict=True)
        ]


def certify(
    tuned: ModelSource,
    base: ModelSource,
    adapter: AdapterSource,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    dialect: str | None = None,
    alpha: float | None = None,
    model_type: str | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Certification:
    """Measure how much of a fine-tune an adapter of any origin holds, layer by layer.

    error = ‖W' − W − s·B·A‖_F/‖W' − W‖_F in float64, beside the error of a truncated SVD of the same rank.

    Args:
        tuned: The fine-tune: a folder, a safetensors file, an index, an `hf://` reference, or an open `Checkpoint`.
        base: The base model, likewise.
        adapter: A path, an `hf://` reference, or an open `Adapter`; modules whose change is no product are skipped.
        include: Patterns of the modules that count: a name (`"q_proj"`), a glob (`"layers.*.mlp.*"`), or `"re:…"`.
            Default: all.
        exclude: Patterns of modules that are left out. Default: none.
        dialect: The dialect to read paths as, one of `list_dialects()`. Default: what is found in each file.
        alpha: The alpha that the adapters were trained with, for files that do not record it; it wins over one that
            they record. Default: the file's.
        model_type: What the base is (`"gpt2"`, …), where its config.json does not say it. Default: what that says.
        seed: A whole number that chooses the random sketches of the SVDs. Default: 0.
        threads: Threads to work with. Default: one per core, at most 8.
        progress: Called with the bytes read since the last call, from any thread. Default: nobody is told.

    Returns:
        A certificate for each layer and in total, what the best factors would miss, and which other tensors changed.

    Raises:
        InvalidOption: A number is wrong.
        IncompatibleAdapter: Adapter, base and fine-tune do not belong together.
        BadFile, UnsupportedAdapter: An input cannot be read.

    Example:
        >>> found = certify("merged", "base", "adapter")
        >>> found.total.captured > 0.99, found.uncovered
        (True, ())
    """
    checked = Options()
    checked.number("seed", seed, least=0)
    checked.number("threads", threads, least=1, optional=True)
    checked.done()
    check_model_type(model_type)
    patterns_of(include, exclude)
    (adapter,) = read_as(adapter, dialect, alpha)
    tuned, base = logical(typed_model(tuned, model_type)), logical(typed_model(base, model_type))
    opened = kept(dialects.open_adapter(adapter, base=base), include, exclude)
    opened = named_for(opened, base)
    factors = onto_stored(replace(opened, replacements={}), base.specs, base.config)
    shapes = {name: spec.shape for name, spec in base.specs.items()}
    placed = by_module(resolve(factors, shapes, base.config))
    modules = {module: sites for module, sites in placed.items() if sites[0].update.additive}
    counterparts = {match.base: match.name for match in pair(base, tuned, Selection()).pairs if match.base}
    covered = {place.site.tensor for sites in modules.values() for place in sites}
    lost = sorted(covered - counterparts.keys())
    if not modules or lost:
        raise IncompatibleAdapter(f"{tuned.path}: the fine-tune lacks what the adapter changes", lost[:20])
    replaced = set(resolve_replacements(opened, shapes, base.config))
    work = _Work(base, tuned, counterparts, seed, progress or no_progress)
    with workers(threads or min(8, cores()), torch_threads=1) as pool, full_float32():
        jobs = [pool.submit(work.layer, module, sites) for module, sites in modules.items()]
        rest = {
            name: pool.submit(work.norm2, name)
            for name in sorted(counterparts.keys() - covered)
            if base.specs[name].shape == tuned.specs[counterparts[name]].shape
        }
        layers, optimal = zip(*(job.result() for job in jobs), strict=True)
        norms = {name: job.result() for name, job in rest.items()}
    changed = {name: norm2 for name, norm2 in norms.items() if norm2 > 0}
    uncovered = {name: norm2 for name, norm2 in changed.items() if name not in replaced}
    energy = sum(changed.values()) + sum(layer.delta_norm**2 for layer in layers)
    measured = {place.module for sites in modules.values() for place in sites}
    return Certification(
        layers, optimal, total(layers), tuple(sorted(changed.keys() & replaced)),
        tuple((name, norm2**0.5) for name, norm2 in sorted(uncovered.items())),
        sum(uncovered.values()) / energy if energy else 0.0, tuple(sorted(factors.updates.keys() - measured)),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """Both models, and base tensor -> the fine-tune's name of it."""

    base: Checkpoint
    tuned: Checkpoint
    counterparts: Mapping[str, str]
    seed: int
    progress: Progress

    def layer(self, module: str, sites: Sequence[Placement]) -> tuple[Layer, float]:
        """Return the certificate of one module, and the relative error of the best factors of its rank."""
        update = sites[0].update
        W = base_matrix(self.base, sites)
        base_norm2 = float(W.square().sum())
        D = base_matrix(self.tuned, sites, self.counterparts).sub_(W)
        tuned = [self.tuned.specs[self.counterparts[place.site.tensor]] for place in sites]
        self.progress(sum(self.base.specs[p.site.tensor].nbytes + s.nbytes for p, s in zip(sites, tuned, strict=True)))
        B, A = load(update)
        error2 = residual2(D, B, A)
        known = (module, update.kind, update.shape, update.rank, update.rank * sum(D.shape))
        stored = {self.base.specs[place.site.tensor].dtype for place in sites} | {spec.dtype for spec in tuned}
        try:
            best = truncated_svd(D if "F64" in stored else D.float(), min(update.rank, *D.shape), seed=self.seed)
        except ValueError as error:
            raise BadFile(f"{module}: {error}") from None
        if best.norm2 == 0:
            return Layer(*known, base_norm2**0.5, *(0.0,) * 7), 0.0
        certificate = layer(
            *known, base_norm2=base_norm2, norm2=best.norm2, error2=error2,
            excess2=error2 - best.error2 + best.excess_estimate, bound2=error2 - best.error2 + best.excess_bound,
            noise2=sum(_noise2(spec, place) for spec, place in zip(tuned, sites, strict=True)),
            sigma1=float(best.S[0]),
        )  # fmt: skip
        return certificate, best.relative_error

    def norm2(self, name: str) -> float:
        """Return ‖W' − W‖_F² of a tensor that the adapter does not change."""
        tuned = self.tuned.specs[self.counterparts[name]]
        return read_delta(self.base.specs[name], tuned, self.progress, keep=False, hashed=False).norm2


def _noise2(spec: TensorSpec, placement: Placement) -> float:
    return rounding_energy(spec) * prod(placement.site.shape) / spec.parameters
