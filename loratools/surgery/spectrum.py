"""The singular values of an adapter, module by module, in factor space: how much of its rank it really uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from loratools import dialects
from loratools.adapter.low_rank import load, products
from loratools.adapter.model import Adapter
from loratools.adapter.naming.compact import natural
from loratools.linalg.factored import singular_values
from loratools.storage.sources import Location

SHARES = (0.99, 0.999)
"""Shares of the energy for which the needed rank is given."""


@dataclass(frozen=True, slots=True)
class ModuleSpectrum:
    """The spectrum of one ΔW = s·B·A, with `shape` that of ΔW as a matrix.

    `sigma` are its singular values (0 where they are only rounding), `norm` = ‖ΔW‖_F, `true_rank` how many are not 0.
    `stable_rank` = Σσ²/σ₁²; `effective_rank` = exp(−Σ pᵢ ln pᵢ) with pᵢ = σᵢ/Σσ (Roy & Vetterli 2007). `needed` is the
    least rank that keeps each of `SHARES` of Σσ²; all are 0 for ΔW = 0.
    """

    module: str
    kind: str
    shape: tuple[int, int]
    rank: int
    true_rank: int
    norm: float
    stable_rank: float
    effective_rank: float
    needed: tuple[int, ...]
    sigma: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class AdapterSpectrum:
    """All modules, and what the ranks that they need come to in parameters; `skipped` have no factors."""

    modules: tuple[ModuleSpectrum, ...]
    skipped: tuple[str, ...]
    norm: float
    parameters: int
    needed_parameters: tuple[int, ...]
    uniform_rank: tuple[int, ...]


def spectrum(adapter: Location | Adapter, dialect: str | None = None) -> AdapterSpectrum:
    """Return the singular values of every ΔW = s·B·A, and the rank that they need.

    From a QR of each factor and an r × r core in float64; no dense ΔW is built. A module of DoRA is that of its
    product, without the magnitudes.

    Args:
        adapter: A path, an `hf://` reference, or an open `Adapter`.
        dialect: The layout that a path is to be read in, one of `list_dialects()`. Default: what is found in the file.

    Returns:
        The spectrum of each module (σ in descending order), and what the ranks that they need come to in parameters.

    Raises:
        BadFile, UnsupportedAdapter, UnknownKind: The adapter cannot be read.

    Example:
        >>> found = spectrum("adapter")
        >>> found.modules[0].rank, len(found.modules[0].sigma)
        (4, 4)
    """
    opened = adapter if isinstance(adapter, Adapter) else dialects.open_adapter(adapter, dialect=dialect)
    modules = []
    for module, part in sorted(products(opened).items(), key=lambda item: natural(item[0])):
        B, A = load(part)
        modules.append(_of(module, part.kind, (len(B), A.shape[1]), part.rank, singular_values(B, A).tolist()))
    skipped = tuple(sorted(opened.updates.keys() - {module.module for module in modules}))
    sizes = [sum(module.shape) for module in modules]
    return AdapterSpectrum(
        tuple(modules), skipped, math.sqrt(math.fsum(module.norm**2 for module in modules)),
        sum(module.rank * size for module, size in zip(modules, sizes, strict=True)),
        tuple(sum(m.needed[i] * size for m, size in zip(modules, sizes, strict=True)) for i in range(len(SHARES))),
        tuple(max((module.needed[i] for module in modules), default=0) for i in range(len(SHARES))),
    )  # fmt: skip


def _of(module: str, kind: str, shape: tuple[int, int], rank: int, sigma: Sequence[float]) -> ModuleSpectrum:
    energy, lengths = math.fsum(value * value for value in sigma), math.fsum(sigma)
    if energy == 0:
        return ModuleSpectrum(module, kind, shape, rank, 0, 0.0, 0.0, 0.0, (0,) * len(SHARES), tuple(sigma))
    shares = [value / lengths for value in sigma if value > 0]
    return ModuleSpectrum(
        module, kind, shape, rank, len(shares), math.sqrt(energy), energy / sigma[0] ** 2,
        math.exp(-math.fsum(share * math.log(share) for share in shares)),
        tuple(_needed(sigma, share * energy) for share in SHARES), tuple(sigma),
    )  # fmt: skip


def _needed(sigma: Sequence[float], energy: float) -> int:
    captured = accumulate(value * value for value in sigma)
    return next((r for r, kept in enumerate(captured, 1) if kept >= energy * (1 - 1e-14)), len(sigma))
