"""Give an adapter other ranks: to a rank, an energy, a ratio, or a budget, with the least error there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loratools.linalg.ranks.allocate import Ranks
from loratools.surgery.combine import Combination, Source, combine


def resize(adapter: Source, output: str | Path, ranks: Ranks, **options: Any) -> Combination:
    """Write an adapter with the nearest change to s·B·A at the ranks that `ranks` chooses (Eckart-Young).

    A rank above a module's true rank gives the true rank, and the same change. The scaling is 1 in the result.
    `options` are `dtype`, `threads`, `force` and `progress` of `combine`, which also lists what is raised.
    """
    return combine([adapter], output, ranks=ranks, operation="resize", **options)
