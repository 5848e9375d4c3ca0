"""PVeRA: VeRA of the mean, ΔW = diag(b)·B·diag(d_μ)·A_μ (arXiv 2512.07703), as PEFT merges it.

`pvera_lambda_d` (2r,) and `pvera_A` (2r, most inputs) have means in their first halves and logarithms of variances in
the others; `pvera_B` is (most outputs, r). Else it is kind `vera`, with a seed where a file has no A and B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from loratools.adapter.kinds.vera import VeraUpdate
from loratools.storage.lazy import LazyTensor

_SCALES = {"pvera_lambda_b", "pvera_lambda_d"}


@dataclass(frozen=True, slots=True, eq=False)
class PveraUpdate(VeraUpdate):
    """The scales, and the shared projections or their seed. Raises `ValueError` where sizes do not fit."""

    kind = "pvera"
    prefix: ClassVar[str] = "pvera"
    halves: ClassVar[int] = 2


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are the scales of PVeRA."""
    return parts.keys() in (_SCALES, _SCALES | {"pvera_A", "pvera_B"})


def build(
    parts: Mapping[str, LazyTensor], scaling: float, alpha: float, layout: Mapping[str, Any] | None = None
) -> PveraUpdate:
    """Return the update; it has no scaling. Raises `ValueError` where it has neither projections nor a seed."""
    update = PveraUpdate(dict(parts), layout=dict(layout or {}))
    if not update.saved and "seed" not in update.layout:
        raise ValueError("no shared projections, and no seed to draw them from")
    return update
