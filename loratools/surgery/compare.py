"""How alike two adapters are: angles between their ΔW, and between the subspaces that they use (LoRA paper, §7).

All in factor space: ⟨ΔW₁, ΔW₂⟩ = tr((B₁ᵀB₂)(A₂A₁ᵀ)), and singular vectors from QR and small cores. arXiv 2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loratools import dialects
from loratools.adapter.kinds import Update
from loratools.adapter.low_rank import load, products
from loratools.adapter.model import Adapter
from loratools.adapter.naming.compact import natural
from loratools.adapter.naming.wrappers import normalized
from loratools.adapter.placement.resolve import Placement, resolve
from loratools.adapter.placement.tied import apply_policy
from loratools.adapter.placement.weight import base_matrix, by_module
from loratools.errors import IncompatibleAdapter
from loratools.storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    from loratools.linalg.factored import FactoredSVD


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
    first: str | Path | Adapter, second: str | Path | Adapter, base: str | Path | Checkpoint | None = None
) -> Comparison:
    """Compare two adapters module by module and in total; with a base model, also amplification factors.

    Modules are matched by name, past wrappers (`model.`, `base_model.`). Raises `IncompatibleAdapter` when no module
    is shared, when shapes differ, and when an adapter does not fit the base.
    """
    one, other = (x if isinstance(x, Adapter) else dialects.open_adapter(x) for x in (first, second))
    parts = products(one), products(other)
    named = {normalized(module): module for module in parts[1]}
    pairs = {module: named[normalized(module)] for module in parts[0] if normalized(module) in named}
    _check(parts, pairs)
    model = Checkpoint.open(base) if isinstance(base, str | Path) else base
    places = (_places(one, model), _places(other, model)) if model else ({}, {})
    found, squares = [], [0.0, 0.0]
    inner = 0.0
    for module in sorted(pairs, key=natural):
        sides = (parts[0][module], parts[1][pairs[module]])
        compared = _module(module, sides, (places[0].get(module, []), places[1].get(pairs[module], [])), model)
        found.append(compared)
        inner += compared.cosine * compared.norms[0] * compared.norms[1]
    only = (tuple(sorted(parts[0].keys() - pairs)), tuple(sorted(parts[1].keys() - set(pairs.values()))))
    for side in (0, 1):
        squares[side] = math.fsum(compared.norms[side] ** 2 for compared in found)
        squares[side] += math.fsum(_norm2(parts[side][module]) for module in only[side])
    scale = math.sqrt(squares[0] * squares[1])
    distance2 = max(squares[0] - 2 * inner + squares[1], 0.0)
    return Comparison(
        tuple(found), only, (math.sqrt(squares[0]), math.sqrt(squares[1])), inner / scale if scale else 0.0,
        math.sqrt(distance2 / squares[0]) if squares[0] else math.inf,
    )  # fmt: skip


def _module(
    name: str, sides: tuple[Update, Update], places: tuple[list[Placement], list[Placement]], model: Checkpoint | None
) -> ModuleComparison:
    from loratools.linalg.factored import cosine, factored_svd
    from loratools.linalg.similarity import subspace_similarity

    (B1, A1), (B2, A2) = load(sides[0]), load(sides[1])
    one, other = factored_svd(B1, A1), factored_svd(B2, A2)
    ranks = int(one.rank()), int(other.rank())
    inputs = subspace_similarity(one.Vh[: ranks[0]], other.Vh[: ranks[1]]) if all(ranks) else None
    outputs = subspace_similarity(one.U[:, : ranks[0]].mT, other.U[:, : ranks[1]].mT) if all(ranks) else None
    rows, columns = len(B1), A1.shape[1]
    return ModuleComparison(
        name, (rows, columns), ranks, (float(one.S.square().sum().sqrt()), float(other.S.square().sum().sqrt())),
        float(cosine(B1, A1, B2, A2)),
        tuple(map(tuple, inputs.tolist())) if inputs is not None else (),
        tuple(map(tuple, outputs.tolist())) if outputs is not None else (),
        (max(ranks) / columns, max(ranks) / rows),
        (_amplification(one, places[0], model), _amplification(other, places[1], model)),
    )  # fmt: skip


def _amplification(svd: FactoredSVD, places: list[Placement], model: Checkpoint | None) -> float | None:
    from loratools.linalg.similarity import amplification

    if model is None or not places or int(svd.rank()) == 0:
        return None
    return amplification(svd, base_matrix(model, places))


def _places(adapter: Adapter, model: Checkpoint) -> Mapping[str, list[Placement]]:
    """Return where each module lies in the base; a tied head lies on the embedding."""
    adapter = apply_policy((adapter,), model.specs, model.config, "both").adapters[0]
    return by_module(resolve(adapter, {name: spec.shape for name, spec in model.specs.items()}, model.config))


def _norm2(part: Update) -> float:
    from loratools.linalg.factored import squared_norm

    return float(squared_norm(*load(part)))


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
