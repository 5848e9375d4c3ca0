"""Share one budget of parameters among the layers of a model, so that the energy captured is the largest possible."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence

from loratools.linalg.ranks.rules import bounded, check_bounds


def water_filling(
    spectra: Sequence[Sequence[float]], shapes: Sequence[tuple[int, int]], parameters: int, *,
    minimum: int = 1, maximum: int | None = None, multiple_of: int = 1,
) -> tuple[int, ...]:  # fmt: skip
    """Return one rank for each layer, maximising Σ_l Σ_{i≤r_l} σ²_{l,i} with Σ_l r_l·(m_l + n_l) ≤ `parameters`.

    `spectra[l]` is descending, `shapes[l]` is (m, n). Ranks grow in steps of `multiple_of`, the step with the most
    energy per parameter first; energies fall along a spectrum, so this greedy order is water-filling with one threshold
    on σ²/(m + n), and optimal for the parameters it spends. Once the best step no longer fits, smaller ones that do are
    taken. A rank never exceeds the number of nonzero singular values, even where that is no multiple; a layer whose
    spectrum is zero gets 0, and any layer may when `minimum` is 0. Raises ValueError for lists of unequal length,
    spectra that are not descending and finite, impossible bounds, and a budget that the minimum ranks already exceed.
    """
    check_bounds(minimum, maximum, multiple_of)
    _check_lists(spectra, shapes)
    most = [_most(spectrum, maximum) for spectrum in spectra]
    ranks = [min(limit, bounded(minimum, minimum, maximum, multiple_of) if minimum else 0) for limit in most]
    left = parameters - sum(rank * (m + n) for rank, (m, n) in zip(ranks, shapes, strict=True))
    if left < 0:
        raise ValueError(
            f"a budget of {parameters} parameters is too small: rank {minimum} in each of {len(spectra)} layers takes "
            f"{parameters - left}; raise the budget or lower the minimum rank"
        )

    def step(layer: int) -> tuple[float, int, int]:
        # Up to the next multiple; energy per parameter, negated for a heap that yields its smallest.
        start = ranks[layer]
        stop = min(most[layer], (start // multiple_of + 1) * multiple_of)
        energy = math.fsum(sigma * sigma for sigma in spectra[layer][start:stop])
        cost = (stop - start) * sum(shapes[layer])
        return -energy / cost, layer, stop

    steps = [step(layer) for layer, limit in enumerate(most) if ranks[layer] < limit]
    heapq.heapify(steps)
    while steps:
        _, layer, stop = heapq.heappop(steps)
        cost = (stop - ranks[layer]) * sum(shapes[layer])
        if cost <= left:
            left -= cost
            ranks[layer] = stop
            if stop < most[layer]:
                heapq.heappush(steps, step(layer))
    return tuple(ranks)


def uniform(
    spectra: Sequence[Sequence[float]], shapes: Sequence[tuple[int, int]], parameters: int, *, multiple_of: int = 1
) -> tuple[int, ...]:
    """Return the largest one rank r, a multiple of `multiple_of`, with Σ_l min(r, rank_l)·(m_l + n_l) ≤ `parameters`.

    Layers with fewer nonzero singular values get as many as they have. Raises ValueError when not even the first
    multiple fits, and for lists of unequal length or broken spectra.
    """
    check_bounds(1, None, multiple_of)
    _check_lists(spectra, shapes)
    most = [_most(spectrum, None) for spectrum in spectra]

    def ranks(rank: int) -> tuple[int, ...]:
        return tuple(min(rank, limit) for limit in most)

    def cost(rank: int) -> int:
        return sum(r * (m + n) for r, (m, n) in zip(ranks(rank), shapes, strict=True))

    if cost(multiple_of) > parameters:
        raise ValueError(
            f"a budget of {parameters} parameters is too small for rank {multiple_of} in {len(spectra)} layers, which "
            f"takes {cost(multiple_of)}; raise the budget"
        )
    best = multiple_of
    while best < max(most, default=0) and cost(best + multiple_of) <= parameters:
        best += multiple_of
    return ranks(best)


def _most(spectrum: Sequence[float], maximum: int | None) -> int:
    nonzero = sum(sigma > 0 for sigma in spectrum)
    return nonzero if maximum is None else min(nonzero, maximum)


def _check_lists(spectra: Sequence[Sequence[float]], shapes: Sequence[tuple[int, int]]) -> None:
    if len(spectra) != len(shapes):
        counts = f"{len(spectra)} spectra and {len(shapes)} shapes"
        raise ValueError(f"one shape for each spectrum is needed: there are {counts}")
    for layer, spectrum in enumerate(spectra):
        falls = all(a >= b for a, b in itertools.pairwise(spectrum))
        if not falls or not all(0 <= sigma < math.inf for sigma in spectrum):
            raise ValueError(f"layer {layer}: singular values must be finite, not negative and in descending order")
