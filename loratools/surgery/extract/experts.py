"""Factor a stack of experts, W (E, out, in): one expert at a time, one rank for all, as PEFT's layout asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.parallel import Progress
from loratools.storage.header import TensorSpec
from loratools.surgery.extract.factor import Factored, decompose, noise_edge, stored2
from loratools.surgery.extract.options import ExtractOptions
from loratools.surgery.extract.pairs import Pair
from loratools.surgery.extract.read import read_delta
from loratools.surgery.extract.spool import Spool

if TYPE_CHECKING:
    import torch

    from loratools.linalg.ranks.rules import RankRule
    from loratools.linalg.svd.truncated import TruncatedSVD


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """A factored stack with the sums of squares over its experts; see `deltas.Delta`."""

    factored: Factored
    base_norm2: float
    norm2: float
    noise2: float


def factor_stack(
    pair: Pair, base: TensorSpec, tuned: TensorSpec, shapes: Sequence[tuple[int, int]], options: ExtractOptions,
    spool: Spool, progress: Progress, rule: RankRule | None = None,
) -> Stack:  # fmt: skip
    """Return the truncated SVD of each expert's ΔW at the largest rank that any of them calls for.

    On disk the factors are B (E·out, r) and A (r, E·in). An expert that did not change, or whose ΔW has a lower rank,
    gets zeros.
    """
    import torch

    from loratools.linalg.ranks.rules import Fixed

    count, sums = tuned.shape[0], [0.0, 0.0, 0.0]
    shown: list[TruncatedSVD | None] = []
    for turn in (0, 1):
        most = max((svd.rank for svd in shown if svd), default=0)
        for e in range(count):
            if turn and (shown[e] is None or shown[e].rank == most):  # type: ignore[union-attr]
                continue
            old, new = expert(base, e), expert(tuned, e)
            delta = read_delta(old, new, progress if not turn else lambda _: None, keep=True)
            D = None if delta.D is None else delta.D.T if pair.transposed else delta.D
            chosen = rule or options.rank_choice.first(shapes, noise_edge(new) if options.rank_choice.noise else 0.0)
            svd = None if D is None else decompose(D, Fixed(most) if turn else chosen, options)
            if turn:
                shown[e] = svd
                continue
            shown.append(svd)
            sums = [a + b for a, b in zip(sums, (delta.base_norm2, delta.norm2, delta.noise2), strict=True)]
    svds = [svd for svd in shown if svd]
    sides = tuned.shape[:0:-1] if pair.transposed else tuned.shape[1:]
    B, A, sigma2 = _stacked(shown, sides, torch.float64 if "F64" in (base.dtype, tuned.dtype) else torch.float32)
    last = rule or chosen
    complete = len(sigma2) == min(sides) or (isinstance(last, Fixed) and len(sigma2) < last.r)
    factored = Factored(
        spool.add(B, A), tuple(value**0.5 for value in sigma2), complete, sum(svd.error2 for svd in svds),
        sum(stored2(svd, options.stored) for svd in svds), sum(svd.excess_estimate for svd in svds),
        sum(svd.excess_bound for svd in svds), count,
    )  # fmt: skip
    return Stack(factored, *sums)


def expert(spec: TensorSpec, number: int) -> TensorSpec:
    """Return where one expert of a stack lies."""
    size = spec.nbytes // spec.shape[0]
    return TensorSpec(
        spec.dtype, spec.shape[1:], spec.file, spec.start + number * size, spec.start + (number + 1) * size
    )


def _stacked(
    shown: Sequence[TruncatedSVD | None], sides: tuple[int, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """Return B (E·out, r), A (r, E·in), and the energy of each direction summed over the experts."""
    import torch

    rank, (out, inner) = max(svd.rank for svd in shown if svd), sides
    B = torch.zeros(len(shown), out, rank, dtype=dtype)
    A = torch.zeros(rank, len(shown), inner, dtype=dtype)
    sigma2 = torch.zeros(rank, dtype=torch.float64)
    for e, svd in enumerate(shown):
        if svd is not None:
            B[e, :, : svd.rank], A[: svd.rank, e] = svd.factors()
            sigma2[: svd.rank] += svd.S.square()
    return B.view(-1, rank), A.view(rank, -1), sigma2.tolist()
