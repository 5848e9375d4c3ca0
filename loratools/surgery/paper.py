"""What §7 of the LoRA paper shows beside the similarity of two changes: that of A alone, of chance, and Table 7.

§7.2 takes the singular vectors of A (footnote 7), where `compare` takes those of ΔW = B·A: the same subspace at full
rank, in another order. Its control are two random Gaussian matrices. Table 7 puts ‖UᵀWV‖ with the directions of ΔW
beside that with W's own leading ones and with random ones. arXiv 2106.09685.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from loratools.linalg.delta import Dense
from loratools.linalg.factored import FactoredSVD
from loratools.linalg.similarity import projected, random_directions, subspace_similarity
from loratools.surgery.change import ModuleChange

Grid = tuple[tuple[float, ...], ...]
"""φ(i, j) at [i-1][j-1]."""


@dataclass(frozen=True, slots=True)
class Projection:
    """A row of Table 7 for one change at its rank r: how strong W is in r directions.

    `of_update`, `of_weight` and `of_random` are ‖UᵀWV‖_F with the r leading singular vectors of ΔW, of W, and of a
    random matrix; `weight_norm` = ‖W‖_F, `update_norm` = ‖ΔW‖_F, and `amplification` = ‖ΔW‖_F / `of_update`.
    """

    rank: int
    weight_norm: float
    update_norm: float
    of_update: float
    of_weight: float
    of_random: float
    amplification: float


@dataclass(frozen=True, slots=True)
class Beside:
    """What the paper shows of one module beside the similarities of ΔW.

    `factor_similarity` is φ between the right singular vectors of A₁ and A₂ alone, () where a change has no factor A;
    `control` is φ between those of two random Gaussian matrices of the same ranks and columns. `projections` are the
    rows of Table 7 of both adapters, None without a base, or for ΔW = 0.
    """

    factor_similarity: Grid
    control: Grid
    projections: tuple[Projection | None, Projection | None]


def beside(
    module: str, changes: tuple[ModuleChange, ModuleChange], measured: list[tuple[FactoredSVD, float]], seed: int
) -> Beside:
    """Measure one module; `measured` has leading directions and ‖ΔW‖ of each change, `seed` draws what is random.

    Every module has a draw of its own, so that medians over layers are those of as many controls.
    """
    seed = seed_of(seed, module)
    ranks = [int(svd.rank()) for svd, _ in measured]
    columns = changes[0].shape[1]
    first, second = (_directions(change) for change in changes)
    projections: list[Projection | None] = [None, None]
    base = next((change.base for change, rank in zip(changes, ranks, strict=True) if rank), None)
    if base is not None:
        W = base()  # one weight under both
        own, weight_norm = Dense(W).leading(max(ranks))
        for side, ((svd, norm), rank) in enumerate(zip(measured, ranks, strict=True)):
            if rank:
                projections[side] = _projection(W, svd, norm, own, weight_norm, rank, seed)
    return Beside(
        () if first is None or second is None else grid(first, second),
        control(ranks[0], ranks[1], columns, seed), (projections[0], projections[1]),
    )  # fmt: skip


def grid(one: Tensor, other: Tensor) -> Grid:
    """Return φ(i, j) between orthonormal rows, () where one of the subspaces is empty."""
    return tuple(map(tuple, subspace_similarity(one, other).tolist())) if len(one) and len(other) else ()


def seed_of(seed: int, module: str) -> int:
    """Return the seed of what is drawn for one module."""
    return int.from_bytes(sha256(f"{seed}|{module}".encode()).digest()[:7], "big")


def control(first: int, second: int, columns: int, seed: int) -> Grid:
    """Return φ(i, j) between the right singular vectors of two random Gaussian matrices of these ranks."""
    if not first or not second:
        return ()
    return grid(*(random_directions(rank, columns, seed, draw) for draw, rank in enumerate((first, second))))


def _directions(change: ModuleChange) -> Tensor | None:
    """Return the right singular vectors of A as rows, those of singular values at the rounding left out."""
    if change.factor is None:
        return None
    A = change.factor()
    _, S, Vh = torch.linalg.svd(A, full_matrices=False)
    floor = torch.finfo(torch.float64).eps * max(A.shape) * float(S[0])
    directions: Tensor = Vh[: int(S.gt(floor).sum())]
    return directions


def _projection(
    W: Tensor, svd: FactoredSVD, norm: float, own: FactoredSVD, weight_norm: float, rank: int, seed: int
) -> Projection:
    rows, columns = W.shape
    U, V = (random_directions(rank, size, seed, draw) for draw, size in ((2, rows), (3, columns)))
    of_update = projected(W, svd.U[:, :rank], svd.Vh[:rank].mT)
    return Projection(
        rank, weight_norm, norm, of_update, float(torch.linalg.vector_norm(own.S[:rank])), projected(W, U.mT, V.mT),
        norm / of_update if of_update else math.inf,
    )  # fmt: skip
