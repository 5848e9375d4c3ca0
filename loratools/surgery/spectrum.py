"""The singular values of an adapter, module by module: how much of its rank it really uses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from loratools.adapter import low_rank
from loratools.adapter.kinds import Update
from loratools.adapter.naming.compact import natural
from loratools.errors import IncompatibleAdapter, InvalidOption
from loratools.options import Options
from loratools.parallel import cores, each, one_blas_thread
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.sources import Location, session
from loratools.surgery.change import ModuleChange, measurable
from loratools.surgery.inputs import AdapterSource, Patterns

if TYPE_CHECKING:
    from torch import Tensor

SHARES = (0.99, 0.999)
"""Shares of the energy for which the needed rank is given."""


@dataclass(frozen=True, slots=True)
class ModuleSpectrum:
    """The spectrum of one ΔW, with `shape` that of ΔW as a matrix, `parameters` the numbers that say it.

    `sigma` are its singular values (0 where they are only rounding), `norm` = ‖ΔW‖_F, `true_rank` how many are not 0.
    `stable_rank` = Σσ²/σ₁²; `effective_rank` = exp(−Σ pᵢ ln pᵢ) with pᵢ = σᵢ/Σσ (Roy & Vetterli 2007). `needed` is the
    least rank that keeps each of `SHARES` of Σσ²; all are 0 for ΔW = 0. `base_norm` = ‖W‖_F of the weight under it,
    None where it was not asked for.
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
    base_norm: float | None = None

    @property
    def relative(self) -> float | None:
        """Return ‖ΔW‖/‖W‖: infinite where the base is zero, None where ‖W‖ was not asked for."""
        if self.base_norm is None:
            return None
        return self.norm / self.base_norm if self.base_norm else math.inf


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

    def kept(self, rank: int) -> float:
        """Return which share of Σ‖ΔW‖² the best changes of a rank keep, Σσᵢ² with i ≤ rank in each module; 1 for 0."""
        kept = math.hypot(*(value for module in self.modules for value in module.sigma[:rank]))
        return (kept / self.norm) ** 2 if self.norm else 1.0

    def rows(self) -> list[dict[str, Any]]:
        """Return a plain dict for each module; `pandas.DataFrame(found.rows())` is a table of them.

        The keys are its fields, with `needed_0.99` and `needed_0.999` for `needed`; `shape` and `sigma` are lists.
        """
        return [
            {
                **{name: value for name, value in asdict(each).items() if name != "needed"},
                **{"shape": list(each.shape), "sigma": list(each.sigma)},
                **{f"needed_{share:g}": rank for share, rank in zip(SHARES, each.needed, strict=True)},
            }
            for each in self.modules
        ]  # fmt: skip


@session()
def spectrum(
    adapter: AdapterSource, dialect: str | None = None, base: Location | Checkpoint | None = None, *,
    relative: bool = False, include: Patterns = None, exclude: Patterns = None, alpha: float | None = None,
    model_type: str | None = None,
) -> AdapterSpectrum:  # fmt: skip
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
        include: Patterns of the modules that count: a name (`"q_proj"`), a glob (`"layers.*.mlp.*"`), or `"re:…"`.
            Default: all.
        exclude: Patterns of modules that are left out. Default: none.
        alpha: The alpha of training, for a file that does not record it. Default: the file's.
        model_type: What the base is (`"gpt2"`, …), where its config.json does not say it. Default: what that says.
        relative: Whether to read the weights that change, for ‖ΔW‖/‖W‖; this takes a base. Default: no.

    Returns:
        The spectrum of each module (σ in descending order), and what the ranks that they need come to in parameters.

    Raises:
        InvalidOption: `relative` cannot be, or there is no base for it.
        IncompatibleAdapter: The adapter does not fit the base.
        BadFile, UnsupportedAdapter, UnknownKind: The adapter cannot be read.

    Example:
        >>> found = spectrum("adapter")
        >>> found.modules[0].rank, len(found.modules[0].sigma)
        (4, 4)
    """
    Options().flag("relative", relative).done()
    if relative and base is None:
        raise InvalidOption("relative measures a change beside the weight that it changes, which takes a base")
    (changes,) = measurable(
        [adapter], base, dialect, alpha=alpha, include=include, exclude=exclude, model_type=model_type
    )
    ordered = sorted(changes.modules, key=natural)
    known = _of_products({module: changes.modules[module] for module in ordered})
    modules = [_of(module, changes.modules[module], known.get(module), relative) for module in ordered]
    sizes = [sum(module.shape) for module in modules]
    return AdapterSpectrum(
        tuple(modules), tuple(sorted(changes.left_out)), math.hypot(*(module.norm for module in modules)),
        sum(module.parameters for module in modules),
        tuple(sum(m.needed[i] * size for m, size in zip(modules, sizes, strict=True)) for i in range(len(SHARES))),
        tuple(max((module.needed[i] for module in modules), default=0) for i in range(len(SHARES))),
        changes.in_part, changes.left_out,
    )  # fmt: skip


def _of_products(changes: Mapping[str, ModuleChange]) -> dict[str, list[float]]:
    """Return module -> the singular values of each product that is finite, many of one shape and rank at a time."""
    from loratools.linalg import stacks

    def worked(_: int, batch: Sequence[tuple[str, Update]]) -> list[tuple[str, list[float]]]:
        read = [low_rank.arrays(product) for _, product in batch]
        left, right = (np.stack([factors[i] for factors in read]) for i in (0, 1))
        scales = np.array([scale for _, _, scale in read])
        values, finite = stacks.singular_values(*stacks.side_by_side([(scales, left, right)]))
        known = zip(batch, values.tolist(), finite.tolist(), strict=True)
        return [(module, sigma) for (module, _), sigma, is_finite in known if is_finite]

    import numpy as np

    products = [(module, change.product) for module, change in changes.items() if change.product is not None]
    if not products:
        return {}
    batches = stacks.batches(
        products, lambda item: (item[1].shape, item[1].rank), lambda item: item[1].rank * sum(changes[item[0]].shape)
    )
    with one_blas_thread():
        done = each(worked, dict(enumerate(batches)), min(8, cores()))
    return {module: sigma for batch in done.values() for module, sigma in batch}


def _of(module: str, change: ModuleChange, known: Sequence[float] | None, relative: bool) -> ModuleSpectrum:
    base_norm = _norm_of(change.base()) if relative and change.base else None
    kind, shape, rank, parameters = change.kind, change.shape, change.rank, change.parameters
    try:
        sigma: Sequence[float] = change.load().sigma().tolist() if known is None else known
    except ValueError as error:
        raise IncompatibleAdapter(f"{module}: {error}") from None
    if not any(sigma):
        none = (0,) * len(SHARES)
        return ModuleSpectrum(module, kind, shape, rank, parameters, 0, 0.0, 0.0, 0.0, none, tuple(sigma), base_norm)
    unit = [value / sigma[0] for value in sigma]  # of the largest: no square of one is beyond float64
    energy, lengths = math.fsum(value * value for value in unit), math.fsum(unit)
    shares = [value / lengths for value in unit if value > 0]
    return ModuleSpectrum(
        module, kind, shape, rank, parameters, len(shares), math.hypot(*sigma), energy,
        math.exp(-math.fsum(share * math.log(share) for share in shares)),
        tuple(_needed(unit, share * energy) for share in SHARES), tuple(sigma), base_norm,
    )  # fmt: skip


def _norm_of(W: Tensor) -> float:
    """Return ‖W‖_F in float64, of numbers whose squares that need not hold."""
    largest = float(W.abs().max()) if W.numel() else 0.0
    return largest * math.sqrt(float((W.double() / largest).square().sum())) if largest else 0.0


def _needed(sigma: Sequence[float], energy: float) -> int:
    captured = accumulate(value * value for value in sigma)
    return next((r for r, kept in enumerate(captured, 1) if kept >= energy * (1 - 1e-14)), len(sigma))
