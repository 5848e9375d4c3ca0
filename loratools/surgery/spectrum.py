"""The singular values of an adapter, module by module: how much of its rank it really uses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from loratools.adapter.naming.compact import natural
from loratools.errors import IncompatibleAdapter
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.sources import Location, session
from loratools.surgery.change import ModuleChange, measurable
from loratools.surgery.inputs import AdapterSource

SHARES = (0.99, 0.999)
"""Shares of the energy for which the needed rank is given."""


@dataclass(frozen=True, slots=True)
class ModuleSpectrum:
    """The spectrum of one ΔW, with `shape` that of ΔW as a matrix, `parameters` the numbers that say it.

    `sigma` are its singular values (0 where they are only rounding), `norm` = ‖ΔW‖_F, `true_rank` how many are not 0.
    `stable_rank` = Σσ²/σ₁²; `effective_rank` = exp(−Σ pᵢ ln pᵢ) with pᵢ = σᵢ/Σσ (Roy & Vetterli 2007). `needed` is the
    least rank that keeps each of `SHARES` of Σσ²; all are 0 for ΔW = 0.
    """

    module: str
    kind: str
    shape: tuple[int, int]
    rank: int
    parameters: int
    true_rank: int
    norm: float
    stable_rank: float
    effective_rank: float
    needed: tuple[int, ...]
    sigma: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class AdapterSpectrum:
    """All modules, and what the ranks that they need come to in parameters.

    `in_part` says of which modules a part alone is measured and why, `left_out` which are not measured at all: what
    they do depends on the base model. `skipped` are the names of those.
    """

    modules: tuple[ModuleSpectrum, ...]
    skipped: tuple[str, ...]
    norm: float
    parameters: int
    needed_parameters: tuple[int, ...]
    uniform_rank: tuple[int, ...]
    in_part: Mapping[str, str]
    left_out: Mapping[str, str]


@session()
def spectrum(
    adapter: AdapterSource, dialect: str | None = None, base: Location | Checkpoint | None = None
) -> AdapterSpectrum:
    """Return the singular values of every ΔW, and the rank that they need.

    Of ΔW = s·B·A from a QR of each factor and an r × r core in float64; no dense ΔW is built. What a change of DoRA,
    (IA)³, OFT or GLoRA is, or of a tensor trained whole, depends on the weight under it: with `base` it is W' − W, a
    dense matrix, whose values take time in the cube of its side. Without, DoRA is measured without its magnitude,
    others are left out, and a warning says so.

    Args:
        adapter: A path, an `hf://` reference, an open `Adapter`, or one held in memory.
        dialect: The layout that a path is to be read in, one of `list_dialects()`. Default: what is found in the file.
        base: The base model (a path, a reference, or an open `Checkpoint`), for changes that depend on it. Default:
            none.

    Returns:
        The spectrum of each module (σ in descending order), and what the ranks that they need come to in parameters.

    Raises:
        IncompatibleAdapter: The adapter does not fit the base.
        BadFile, UnsupportedAdapter, UnknownKind: The adapter cannot be read.

    Example:
        >>> found = spectrum("adapter")
        >>> found.modules[0].rank, len(found.modules[0].sigma)
        (4, 4)
    """
    (changes,) = measurable([adapter], base, dialect)
    modules = [_of(module, changes.modules[module]) for module in sorted(changes.modules, key=natural)]
    sizes = [sum(module.shape) for module in modules]
    return AdapterSpectrum(
        tuple(modules), tuple(sorted(changes.left_out)), math.sqrt(math.fsum(module.norm**2 for module in modules)),
        sum(module.parameters for module in modules),
        tuple(sum(m.needed[i] * size for m, size in zip(modules, sizes, strict=True)) for i in range(len(SHARES))),
        tuple(max((module.needed[i] for module in modules), default=0) for i in range(len(SHARES))),
        changes.in_part, changes.left_out,
    )  # fmt: skip


def _of(module: str, change: ModuleChange) -> ModuleSpectrum:
    kind, shape, rank, parameters = change.kind, change.shape, change.rank, change.parameters
    try:
        sigma: Sequence[float] = change.load().sigma().tolist()
    except ValueError as error:
        raise IncompatibleAdapter(f"{module}: {error}") from None
    energy, lengths = math.fsum(value * value for value in sigma), math.fsum(sigma)
    if energy == 0:
        none = (0,) * len(SHARES)
        return ModuleSpectrum(module, kind, shape, rank, parameters, 0, 0.0, 0.0, 0.0, none, tuple(sigma))
    shares = [value / lengths for value in sigma if value > 0]
    return ModuleSpectrum(
        module, kind, shape, rank, parameters, len(shares), math.sqrt(energy), energy / sigma[0] ** 2,
        math.exp(-math.fsum(share * math.log(share) for share in shares)),
        tuple(_needed(sigma, share * energy) for share in SHARES), tuple(sigma),
    )  # fmt: skip


def _needed(sigma: Sequence[float], energy: float) -> int:
    captured = accumulate(value * value for value in sigma)
    return next((r for r, kept in enumerate(captured, 1) if kept >= energy * (1 - 1e-14)), len(sigma))
