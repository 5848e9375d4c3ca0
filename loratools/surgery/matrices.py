"""The factors of updates, for analysis in factor space: s·left·right, whatever the kind calls them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from loratools.adapter.model import Adapter
from loratools.adapter.resolve import Placement
from loratools.adapter.updates import Update
from loratools.adapter.updates._product import LowRank
from loratools.adapter.updates.experts import Expert, ExpertsUpdate

if TYPE_CHECKING:
    import torch

    from loratools.storage.checkpoint import Checkpoint


def low_rank(update: Update) -> LowRank | None:
    """Return the low-rank part of an update, DoRA's without its magnitude; None for a kind that has none."""
    inner = getattr(update, "inner", update)
    return inner if isinstance(inner, LowRank) else None


def products(adapter: Adapter) -> dict[str, LowRank]:
    """Return module -> low-rank part, of modules that have one; a stack of experts has one for each, `module.7`."""
    found: dict[str, LowRank] = {}
    for module, update in adapter.updates.items():
        if isinstance(update, ExpertsUpdate):
            found |= {f"{module}.{e}": update.expert(e) for e in range(update.experts)}
        elif (part := low_rank(update)) is not None:
            found[module] = part
    return found


def load(part: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B (rows, r) with the scaling folded in, and A (r, columns), both float64: ΔW = B·A as a matrix."""
    left, right = part.matrices()
    return left.double() * part.scaling, right.double()


def base_matrix(
    checkpoint: Checkpoint, placements: Iterable[Placement], names: Mapping[str, str] | None = None
) -> torch.Tensor:
    """Return the weight under one update as that update's ΔW is laid out, in float64, (rows, columns).

    The placements are those of one module: several where the base stores its projections apart or fused. `names` maps
    the base's tensor names to those of this checkpoint, where they differ.
    """
    import torch

    placements = list(placements)
    rows = max(placement.site.part_rows.stop for placement in placements)
    W: torch.Tensor | None = None
    for placement in placements:
        site = placement.site
        name = names[site.tensor] if names else site.tensor
        block = checkpoint.read(name).view(site.matrix)[slice(*site.rows), slice(*site.columns)].double()
        block = block.T if site.transposed else block
        if W is None:
            W = torch.zeros(rows, block.shape[1], dtype=torch.float64)
        W[site.part_rows] = block
    assert W is not None
    return W


def by_module(placements: Iterable[Placement]) -> Mapping[str, list[Placement]]:
    """Group placements of weights by module, as `products` names them; those of biases are left out."""
    found: dict[str, list[Placement]] = {}
    for placement in placements:
        if low_rank(placement.update) is not None:
            number = f".{placement.update.number}" if isinstance(placement.update, Expert) else ""
            found.setdefault(placement.module + number, []).append(placement)
    return found
