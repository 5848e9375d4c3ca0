"""How alike two adapters are: angles between their ΔW, and between the subspaces that they use (LoRA paper, §7).

Products stay in factor space: ⟨ΔW₁, ΔW₂⟩ = tr((B₁ᵀB₂)(A₂A₁ᵀ)), and singular vectors from QR and small cores. Changes
that are none (`change.py`) are matrices, of which the leading directions count. arXiv 2106.09685.

    comparison   what is found, of each module and of two adapters
    products     pairs of products, many of one shape at once
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loratools.adapter.naming.compact import natural
from loratools.adapter.naming.wrappers import normalized
from loratools.errors import IncompatibleAdapter
from loratools.linalg.stacks import NO_SQUARES, squares_fit
from loratools.options import Options
from loratools.parallel import cores, each
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.sources import Location, session
from loratools.surgery.change import Changes, ModuleChange, measurable
from loratools.surgery.compare.comparison import Comparison, ModuleComparison
from loratools.surgery.compare.products import of_products
from loratools.surgery.inputs import AdapterSource, Patterns

if TYPE_CHECKING:  # torch is for pairs that are no two products
    from loratools.linalg.factored import FactoredSVD

__all__ = ["Comparison", "ModuleComparison", "compare"]

_LEADING = 64  # directions of a change whose update has no rank
_SMALL = 1 << 22  # numbers of a matrix that a core has done before more of them would have shared it


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
    known = {} if paper else of_products(changes, pairs, threads)
    rest = {module: other for module, other in pairs.items() if module not in known}
    small = all(math.prod(changes[0][module].shape) <= _SMALL for module in rest)
    if rest:
        known |= each(work, rest, (threads or cores()) if small else 1, torch_threads=1 if small else threads)
    modules, inner = zip(*(known[module] for module in sorted(pairs, key=natural)), strict=True)
    only = (tuple(sorted(changes[0].keys() - pairs)), tuple(sorted(changes[1].keys() - set(pairs.values()))))
    squares = [
        math.fsum(module.norms[side] ** 2 for module in modules)
        + math.fsum(changes[side][module].load().norm2() for module in only[side])
        for side in (0, 1)
    ]
    scale, total = math.sqrt(squares[0]) * math.sqrt(squares[1]), math.fsum(inner)
    distance2 = max(squares[0] - 2 * total + squares[1], 0.0)
    return Comparison(
        modules, only, (math.sqrt(squares[0]), math.sqrt(squares[1])), total / scale if scale else 0.0,
        math.sqrt(distance2 / squares[0]) if squares[0] else math.inf,
        (sides[0].in_part, sides[1].in_part), (sides[0].left_out, sides[1].left_out),
    )  # fmt: skip


def _module(name: str, changes: tuple[ModuleChange, ModuleChange], seed: int | None) -> tuple[ModuleComparison, float]:
    """Return what is measured of one module, and ⟨ΔW₁, ΔW₂⟩; with a seed also what the paper shows beside.

    Raises `ValueError` where float64 does not hold the squares.
    """
    from loratools.linalg.similarity import principal_angles
    from loratools.surgery.paper import beside, grid

    deltas = changes[0].load(), changes[1].load()
    measured = [delta.leading(change.rank or _LEADING) for delta, change in zip(deltas, changes, strict=True)]
    (first, first_norm), (second, second_norm) = measured
    if not all(squares_fit(norm, delta.terms2()) for (_, norm), delta in zip(measured, deltas, strict=True)):
        raise ValueError(NO_SQUARES)
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
    from loratools.linalg.similarity import amplification

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
