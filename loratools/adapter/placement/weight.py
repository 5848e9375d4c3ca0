"""The weight of a module in a base model, as the one matrix that an update changes; placements by module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from loratools.adapter.placement.resolve import Placement
from loratools.adapter.site import Site

if TYPE_CHECKING:
    import torch

    from loratools.storage.checkpoint import Checkpoint


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
    first = placements[0].site
    W = torch.zeros(rows, first.shape[0 if first.transposed else 1], dtype=torch.float64)
    for placement in placements:
        site = placement.site
        name = names[site.tensor] if names else site.tensor
        block = checkpoint.read(name).view(site.matrix)[slice(*site.rows), slice(*site.columns)]
        W[site.part_rows] = (block.T if site.transposed else block).double()
    return W


def over_weights(checkpoint: Checkpoint, placements: list[Placement]) -> list[Placement]:
    """Return placements whose updates of biases can read the unchanged weights beside them."""
    weights = {(each.module, each.site.part): each.site for each in placements if not each.bias}

    def reading(site: Site) -> Callable[[], torch.Tensor]:
        def read() -> torch.Tensor:
            block = checkpoint.read(site.tensor).view(site.matrix)[slice(*site.rows), slice(*site.columns)]
            return block.T if site.transposed else block

        return read

    return [
        replace(each, update=each.update.over(reading(weights[each.module, each.site.part]))) if each.bias else each
        for each in placements
    ]


def by_module(placements: Iterable[Placement]) -> Mapping[str, list[Placement]]:
    """Group placements of weights by the path of what they change; those of biases are left out."""
    from loratools.adapter.low_rank import low_rank

    grouped: dict[str, list[Placement]] = {}
    for placement in placements:
        if low_rank(placement.update) is not None and not placement.bias:
            grouped.setdefault(placement.update.path(placement.module), []).append(placement)
    return grouped
