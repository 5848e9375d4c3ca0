"""How alike two adapters are: angles between their ΔW, and between the subspaces that they use (LoRA paper, §7).

All in factor space: ⟨ΔW₁, ΔW₂⟩ = tr((B₁ᵀB₂)(A₂A₁ᵀ)), and singular vectors from QR and small cores. arXiv 2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from loratools import dialects
from loratools.adapter.kinds import Update
from loratools.adapter.low_rank import load, products
from loratools.adapter.model import Adapter
from loratools.adapter.naming.compact import natural
from loratools.adapter.naming.wrappers import normalized
from loratools.adapter.placement.codes import refuse_codes
from loratools.adapter.placement.resolve import Placement, resolve
from loratools.adapter.placement.tied import apply_policy
from loratools.adapter.placement.weight import base_matrix, by_module
from loratools.errors import IncompatibleAdapter
from loratools.linalg.factored import FactoredSVD, cosine, factored_svd, squared_norm
from loratools.linalg.similarity import amplification, subspace_similarity
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.sources import Location


@dataclass(frozen=True, slots=True)
class ModuleComparison:
    """Two updates of one weight; `shape` is that of ΔW as a matrix (rows, columns), `norms` are ‖ΔW₁‖ and ‖ΔW₂‖.

    `cosine` = ⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖‖ΔW₂‖). `input_similarity[i-1][j-1]` = φ(i, j) of §7.2 between the i and j leading
    right singular vectors of ΔW₁ and ΔW₂, `output_similarity` the same of the left ones; `chance` is what φ of random
    subspaces of the full ranks would be, for input and output. `amplification` = ‖ΔW‖/‖UᵀWV‖ of §7.3 for both, at
    their full ranks; None without a base, or for ΔW = 0.
    """

    module: str
    shape: tuple[int, int]
    ranks: tuple[int, int]
    norms: tuple[float, float]
    cosine: float
    input_similarity: tuple[tuple[float, ...], ...]
    output_similarity: tuple[tuple[float, ...], ...]
    chance: tuple[float, float]
    amplification: tuple[float | None, float | None]

    @property
    def input_overlap(self) -> float:
        """Return φ at full ranks, input side: the share of the smaller subspace that lies in the larger; 0 if none."""
        return self.input_similarity[-1][-1] if self.input_similarity else 0.0

    @property
    def output_overlap(self) -> float:
        """Return φ at full ranks, output side."""
        return self.output_similarity[-1][-1] if self.output_similarity else 0.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """All shared modules; `only` lists the modules of one adapter alone, first and second.

    `norms` and `cosine` are those of the whole adapters, with every module of each: what only one of them changes
    lowers the cosine. `distance` = ‖ΔW₁ − ΔW₂‖/‖ΔW₁‖.
    """

    modules: tuple[ModuleComparison, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    norms: tuple[float, float]
    cosine: float
    distance: float


def compare(
    first: Location | Adapter, second: Location | Adapter, base: Location | Checkpoint | None = None
) -> Comparison:
    """Tell how alike two adapters are: the angle between their changes, and the subspaces that they use.

    cos = ⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖·‖ΔW₂‖) for ΔW = s·B·A, in float64 from the factors. Modules are matched by name, past
    wrappers (`model.`, `base_model.`).

    Args:
        first: An adapter: a path, an `hf://` reference, or an open `Adapter`.
        second: Another, likewise.
        base: Their base model (a path, a reference, or an open `Checkpoint`), to measure amplification ‖ΔW‖/‖UᵀWV‖.
            Default: none, and no amplification.

    Returns:
        Norms, cosine and similarities of each shared module, those of the whole adapters, and the modules of one alone.

    Raises:
        IncompatibleAdapter: No module is shared, shapes differ, or an adapter does not fit the base.
        BadFile, UnsupportedAdapter: An input cannot be read.

    Example:
        >>> found = compare("adapter", "adapter")
        >>> round(found.cosine, 6), len(found.modules)
        (1.0, 4)
    """
    adapters = tuple(x if isinstance(x, Adapter) else dialects.open_adapter(x) for x in (first, second))
    parts = products(adapters[0]), products(adapters[1])
    by_name = {normalized(module): module for module in parts[1]}
    pairs = {module: by_name[normalized(module)] for module in parts[0] if normalized(module) in by_name}
    _check(parts, pairs)
    model = base if isinstance(base, Checkpoint) or base is None else Checkpoint.open(base)
    places = tuple(_places(adapter, model) if model else {} for adapter in adapters)
    modules = [
        _module(one, (parts[0][one], parts[1][other]), (places[0].get(one, []), places[1].get(other, [])), model)
        for one, other in sorted(pairs.items(), key=lambda pair: natural(pair[0]))
    ]
    inner = math.fsum(module.cosine * module.norms[0] * module.norms[1] for module in modules)
    only = (tuple(sorted(parts[0].keys() - pairs)), tuple(sorted(parts[1].keys() - set(pairs.values()))))
    squares = [
        math.fsum(module.norms[side] ** 2 for module in modules)
        + math.fsum(float(squared_norm(*load(parts[side][module]))) for module in only[side])
        for side in (0, 1)
    ]
    scale = math.sqrt(squares[0] * squares[1])
    distance2 = max(squares[0] - 2 * inner + squares[1], 0.0)
    return Comparison(
        tuple(modules), only, (math.sqrt(squares[0]), math.sqrt(squares[1])), inner / scale if scale else 0.0,
        math.sqrt(distance2 / squares[0]) if squares[0] else math.inf,
    )  # fmt: skip


def _module(
    name: str, sides: tuple[Update, Update], places: tuple[list[Placement], list[Placement]], model: Checkpoint | None
) -> ModuleComparison:
    (B1, A1), (B2, A2) = load(sides[0]), load(sides[1])
    svds = factored_svd(B1, A1), factored_svd(B2, A2)
    ranks = int(svds[0].rank()), int(svds[1].rank())
    norms = float(svds[0].S.square().sum().sqrt()), float(svds[1].S.square().sum().sqrt())
    inputs, outputs = (
        tuple(map(tuple, subspace_similarity(*bases).tolist())) if all(ranks) else ()
        for bases in (
            [svd.Vh[:rank] for svd, rank in zip(svds, ranks, strict=True)],
            [svd.U[:, :rank].mT for svd, rank in zip(svds, ranks, strict=True)],
        )
    )
    rows, columns = len(B1), A1.shape[1]
    return ModuleComparison(
        name, (rows, columns), ranks, norms, float(cosine(B1, A1, B2, A2)), inputs, outputs,
        (max(ranks) / columns, max(ranks) / rows),
        (_amplification(svds[0], places[0], model), _amplification(svds[1], places[1], model)),
    )  # fmt: skip


def _amplification(svd: FactoredSVD, places: list[Placement], model: Checkpoint | None) -> float | None:
    if model is None or not places or int(svd.rank()) == 0:
        return None
    return amplification(svd, base_matrix(model, places))


def _places(adapter: Adapter, model: Checkpoint) -> Mapping[str, list[Placement]]:
    """Return where each module lies in the base; a tied head lies on the embedding."""
    refuse_codes(adapter, model)
    adapter = apply_policy((adapter,), model.specs, model.config, "both").adapters[0]
    return by_module(resolve(adapter, {name: spec.shape for name, spec in model.specs.items()}, model.config))


def _check(parts: tuple[dict[str, Update], dict[str, Update]], pairs: Mapping[str, str]) -> None:
    if not pairs:
        examples = " and ".join(next(iter(sorted(side)), "nothing") for side in parts)
        raise IncompatibleAdapter(f"the two adapters change no module in common: the first of each are {examples}")
    problems = [
        f"{module}: {list(parts[0][module].shape)} in the first, {list(parts[1][other].shape)} in the second"
        for module, other in pairs.items()
        if parts[0][module].shape != parts[1][other].shape
    ]
    if problems:
        raise IncompatibleAdapter("the two adapters are not for models of one shape", problems)
