"""Pairs of products, many of one shape at once: QR and SVD of stacks in NumPy, without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loratools.adapter import low_rank
from loratools.adapter.kinds import Update
from loratools.linalg import angles, stacks
from loratools.linalg.stacks import Decomposition
from loratools.parallel import cores, each, one_blas_thread
from loratools.surgery.change import ModuleChange
from loratools.surgery.compare.comparison import ModuleComparison


def of_products(
    changes: tuple[Mapping[str, ModuleChange], Mapping[str, ModuleChange]], pairs: Mapping[str, str],
    threads: int | None,
) -> dict[str, tuple[ModuleComparison, float]]:  # fmt: skip
    """Return what is measured, and ⟨ΔW₁, ΔW₂⟩, of pairs of finite products, many of one shape at a time."""
    products: list[tuple[str, Update, Update]] = []
    for module, other in pairs.items():
        first, second = changes[0][module], changes[1][other]
        if first.product and second.product and first.base is second.base is None:
            products.append((module, first.product, second.product))
    if not products:
        return {}

    def worked(_: int, batch: Sequence[tuple[str, Update, Update]]) -> list[tuple[ModuleComparison, float]]:
        sides = []
        for side in (0, 1):
            left, right, scales = low_rank.stacked([products[side] for _, *products in batch])
            sides.append(stacks.side_by_side([(np.array(scales), left, right)]))
        (B1, A1), (B2, A2) = sides
        with np.errstate(invalid="ignore", over="ignore"):  # of products that are not finite, which are left out
            inner = ((B1.transpose(0, 2, 1) @ B2) * (A1 @ A2.transpose(0, 2, 1))).sum((1, 2)).tolist()
        svds = [stacks.decompose(B, A) for B, A in sides]
        norms = [np.sqrt(np.square(svd.sigma).sum(1)).tolist() for svd in svds]
        found: list[tuple[ModuleComparison, float]] = []
        alike: dict[tuple[int, int], list[int]] = {}
        for at, ranks in enumerate(zip(svds[0].ranks.tolist(), svds[1].ranks.tolist(), strict=True)):
            if 0 not in ranks and svds[0].finite[at] and svds[1].finite[at]:
                alike.setdefault(ranks, []).append(at)
        for ranks, which in alike.items():
            U, V = zip(*map(_directions, svds, sides, ranks, [which] * 2), strict=True)
            inputs, outputs = angles.similarities(*V).tolist(), angles.similarities(*U).tolist()
            turns = angles.principal(*V).tolist(), angles.principal(*U).tolist()
            rows, columns = U[0].shape[2], V[0].shape[2]
            for place, at in enumerate(which):
                module, scale = batch[at][0], norms[0][at] * norms[1][at]
                kinds = changes[0][module].kind, changes[1][pairs[module]].kind
                found.append((ModuleComparison(
                    module, kinds, (rows, columns), ranks, (norms[0][at], norms[1][at]),
                    max(-1.0, min(1.0, inner[at] / scale)), tuple(map(tuple, inputs[place])),
                    tuple(map(tuple, outputs[place])), tuple(turns[0][place]), tuple(turns[1][place]),
                    (max(ranks) / columns, max(ranks) / rows), (None, None),
                ), inner[at]))  # fmt: skip
        return found

    batches = stacks.batches(
        products, lambda item: (item[1].shape, item[1].rank, item[2].rank),
        lambda item: (item[1].rank + item[2].rank) * sum(changes[0][item[0]].shape),
    )  # fmt: skip
    with one_blas_thread():
        done = each(worked, dict(enumerate(batches)), min(8, threads or cores()))
    return {comparison.module: (comparison, inner) for batch in done.values() for comparison, inner in batch}


def _directions(svd: Decomposition, factors: tuple[Any, Any], rank: int, which: Sequence[int]) -> tuple[Any, Any]:
    """Return the leading left and right singular vectors of products `which`, as rows (m, rank, …)."""
    left, right = svd.balanced(*factors, rank, which)
    roots = np.sqrt(svd.sigma[list(which), :rank])
    left /= roots[:, None, :]
    right /= roots[:, :, None]
    return left.transpose(0, 2, 1), right
