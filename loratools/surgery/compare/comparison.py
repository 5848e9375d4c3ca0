"""What a comparison finds: of each module, and of two adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loratools.surgery.paper import Beside


@dataclass(frozen=True, slots=True)
class ModuleComparison:
    """Two changes of one weight; `shape` is that of ΔW as a matrix (rows, columns), `norms` are ‖ΔW₁‖ and ‖ΔW₂‖.

    `cosine` = ⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖‖ΔW₂‖). `ranks` are the numbers of singular vectors that are compared: all of a product;
    of another change as many as its update has rank, or 64. `input_similarity[i-1][j-1]` = φ(i, j) of §7.2 between the
    i and j leading right singular vectors of ΔW₁ and ΔW₂, `output_similarity` the same of the left ones; `chance` is
    what φ of random subspaces of these ranks would be, for input and output. `input_angles` and `output_angles` are the
    principal angles between the subspaces of these ranks, in radians, ascending. `amplification` = ‖ΔW‖/‖UᵀWV‖ of §7.3
    for both, at their ranks; None without a base, or for ΔW = 0. `paper` is what §7 shows beside, where it was asked
    for.
    """

    module: str
    kinds: tuple[str, str]
    shape: tuple[int, int]
    ranks: tuple[int, int]
    norms: tuple[float, float]
    cosine: float
    input_similarity: tuple[tuple[float, ...], ...]
    output_similarity: tuple[tuple[float, ...], ...]
    input_angles: tuple[float, ...]
    output_angles: tuple[float, ...]
    chance: tuple[float, float]
    amplification: tuple[float | None, float | None]
    paper: Beside | None = None

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
    lowers the cosine. `distance` = ‖ΔW₁ − ΔW₂‖/‖ΔW₁‖. Of each adapter, `in_part` says of which modules a part alone is
    measured and why, `left_out` which are not measured at all: what they do depends on the base model.
    """

    modules: tuple[ModuleComparison, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    norms: tuple[float, float]
    cosine: float
    distance: float
    in_part: tuple[Mapping[str, str], Mapping[str, str]]
    left_out: tuple[Mapping[str, str], Mapping[str, str]]

    def rows(self) -> list[dict[str, Any]]:
        """Return a plain dict of numbers for each shared module; `pandas.DataFrame(found.rows())` is a table of them.

        What both adapters have ends in `_1` and `_2`.
        """
        return [
            {
                "module": each.module, **_both("kind", each.kinds), "out": each.shape[0], "in": each.shape[1],
                **_both("rank", each.ranks), **_both("norm", each.norms), "cosine": each.cosine,
                "input_overlap": each.input_overlap, "input_chance": each.chance[0],
                "output_overlap": each.output_overlap, "output_chance": each.chance[1],
                **_both("amplification", each.amplification),
            }
            for each in self.modules
        ]  # fmt: skip


def _both(name: str, values: tuple[Any, Any]) -> dict[str, Any]:
    return {f"{name}_1": values[0], f"{name}_2": values[1]}
