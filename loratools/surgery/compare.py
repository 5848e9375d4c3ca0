"""How alike two adapters are: angles between their ΔW, and between the subspaces that they use (LoRA paper, §7).

Products stay in factor space: ⟨ΔW₁, ΔW₂⟩ = tr((B₁ᵀB₂)(A₂A₁ᵀ)), and singular vectors from QR and small cores. Changes
that are none (`change.py`) are matrices, of which the leading directions count. arXiv 2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratools.adapter.naming.compact import natural
from loratools.adapter.naming.wrappers import normalized
from loratools.errors import IncompatibleAdapter
from loratools.linalg.factored import FactoredSVD
from loratools.linalg.similarity import amplification, principal_angles
from loratools.options import Options
from loratools.parallel import cores, each
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.sources import Location, session
from loratools.surgery.change import Changes, ModuleChange, measurable
from loratools.surgery.inputs import AdapterSource, Patterns
from loratools.surgery.paper import Beside, beside, grid

_LEADING = 64  # directions of a change whose update has no rank
_SMALL = 1 << 22  # numbers of a matrix that a core has done before more of them would have shared it


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


@session()
def compare(
    first: AdapterSource, second: AdapterSource, base: Location | Checkpoint | None = None, *,
    paper: bool = False, seed: int = 0, include: Patterns = None, exclude: Patterns = None,
    dialect: str | None = None, alpha: float | None = None, model_type: str | None = None,
    threads: int | None = None,
) -> Comparison:  # fmt: skip
    """Tell how alike two adapters are: the angle between their changes, and the subspaces that they use.

    cos = ⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖·‖ΔW₂‖) in float64, for ΔW = s·B·A from the factors. Modules are matched by name, past
    wrappers (`model.`, `base_model.`). What a change of DoRA, (IA)³, OFT or GLoRA is, or of a tensor trained whole,
    depends on the weight under it: with `base` it is W' − W; without, DoRA is measured without its magnitude, others
    are left out, and a warning says so.

    Args:
        first: An adapter: a path, an `hf://` reference, an open `Adapter`, or one held in memory.
        second: Another, likewise.
        base: Their base model (a path, a reference, or an open `Checkpoint`), for changes that depend on it and to
            measure amplification ‖ΔW‖/‖UᵀWV‖. Default: none, and neither.
        paper: Whether to measure what §7 of the LoRA paper shows beside: φ between the A factors alone, φ of two random
            Gaussian matrices, and with `base` the columns of Table 7. Default: no.
        include: Patterns of the modules that are compared: a name (`"q_proj"`), a glob (`"layers.*.mlp.*"`), or
            `"re:…"`. Default: all.
        exclude: Patterns of modules that are left out. Default: none.
        dialect: The dialect to read paths as, one of `list_dialects()`. Default: what is found in each file.
        alpha: The alpha of training, for files that do not record it; it wins over one that they record. Default: the
            file's.
        model_type: What the base is (`"gpt2"`, …), where its config.json does not say it. Default: what that says.
        threads: Threads to work with. Default: one per core.
        seed: A whole number that draws what is random there. Default: 0.

    Returns:
        Norms, cosine and similarities of each shared module, those of the whole adapters, and the modules of one alone.

    Raises:
        InvalidOption: An option cannot be.
        IncompatibleAdapter: No module is shared, shapes differ, or an adapter does not fit the base.
        BadFile, UnsupportedAdapter: An input cannot be read.

    Example:
        >>> found = compare("adapter", "adapter")
        >>> round(found.cosine, 6), len(found.modules)
        (1.0, 4)
    """
    Options().flag("paper", paper).number("seed", seed, least=0).done()
    Options().threads(threads).done()
    sides = measurable(
        [first, second], base, dialect, alpha=alpha, include=include, exclude=exclude, model_type=model_type
    )
    changes = sides[0].modules, sides[1].modules
    by_name = {normalized(module): module for module in changes[1]}
    pairs = {module: by_name[normalized(module)] for module in changes[0] if normalized(module) in by_name}
    _check(sides, pairs)

    def work(module: str, other: str) -> tuple[ModuleComparison, float]:
        try:
            return _module(module, (changes[0][module], changes[1][other]), seed if paper else None)
        except ValueError as error:
            raise IncompatibleAdapter(f"{module}: {error}") from None

    # Threads of torch wait for each other over small matrices; large ones are taken one by one, with all its threads.
    small = all(math.prod(changes[0][module].shape) <= _SMALL for module in pairs)
    measured = each(
        work, dict(sorted(pairs.items(), key=lambda pair: natural(pair[0]))), (threads or cores()) if small else 1,
        torch_threads=1 if small else threads,
    )  # fmt: skip
    modules, inner = zip(*measured.values(), strict=True)
    only = (tuple(sorted(changes[0].keys() - pairs)), tuple(sorted(changes[1].keys() - set(pairs.values()))))
    squares = [
        math.fsum(module.norms[side] ** 2 for module in modules)
        + math.fsum(changes[side][module].load().norm2() for module in only[side])
        for side in (0, 1)
    ]
    scale, total = math.sqrt(squares[0] * squares[1]), math.fsum(inner)
    distance2 = max(squares[0] - 2 * total + squares[1], 0.0)
    return Comparison(
        modules, only, (math.sqrt(squares[0]), math.sqrt(squares[1])), total / scale if scale else 0.0,
        math.sqrt(distance2 / squares[0]) if squares[0] else math.inf,
        (sides[0].in_part, sides[1].in_part), (sides[0].left_out, sides[1].left_out),
    )  # fmt: skip


def _module(name: str, changes: tuple[ModuleChange, ModuleChange], seed: int | None) -> tuple[ModuleComparison, float]:
    """Return what is measured of one module, and ⟨ΔW₁, ΔW₂⟩; with a seed also what the paper shows beside."""
    deltas = changes[0].load(), changes[1].load()
    measured = [delta.leading(change.rank or _LEADING) for delta, change in zip(deltas, changes, strict=True)]
    (first, first_norm), (second, second_norm) = measured
    ranks = int(first.rank()), int(second.rank())
    inner, scale = deltas[0].inner(deltas[1]), first_norm * second_norm
    inputs = first.Vh[: ranks[0]], second.Vh[: ranks[1]]
    outputs = first.U[:, : ranks[0]].mT, second.U[:, : ranks[1]].mT
    rows, columns = deltas[0].shape
    comparison = ModuleComparison(
        name, (changes[0].kind, changes[1].kind), (rows, columns), ranks, (first_norm, second_norm),
        max(-1.0, min(1.0, inner / scale)) if scale else 0.0,
        grid(*inputs), grid(*outputs),
        tuple(principal_angles(*inputs).tolist()), tuple(principal_angles(*outputs).tolist()),
        (max(ranks) / columns, max(ranks) / rows),
        (_amplification(*measured[0], changes[0]), _amplification(*measured[1], changes[1])),
        None if seed is None else beside(name, changes, measured, seed),
    )  # fmt: skip
    return comparison, inner


def _amplification(svd: FactoredSVD, norm: float, change: ModuleChange) -> float | None:
    rank = int(svd.rank())
    return None if change.base is None or not rank else amplification(svd, change.base(), rank, norm)


def _check(sides: Sequence[Changes], pairs: Mapping[str, str]) -> None:
    first, second = (side.modules for side in sides)
    if not pairs:
        examples = " and ".join(next(iter(sorted(side)), "nothing") for side in (first, second))
        raise IncompatibleAdapter(
            f"the two adapters change no module in common: the first of each are {examples}",
            [f"{module}: left out {reason}" for side in sides for module, reason in side.left_out.items()][:20],
        )
    problems = [
        f"{module}: {list(first[module].shape)} in the first, {list(second[other].shape)} in the second"
        for module, other in pairs.items()
        if first[module].shape != second[other].shape
    ]
    if problems:
        raise IncompatibleAdapter("the two adapters are not for models of one shape", problems)
