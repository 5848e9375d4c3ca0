"""PVeRA: VeRA of the mean, ΔW = diag(b)·B·diag(d_μ)·A_μ (arXiv 2512.07703), as PEFT merges it.

`pvera_lambda_d` (2r,) and `pvera_A` (2r, most inputs) have means in their first halves and logarithms of variances in
the others; `pvera_B` is (most outputs, r). Else it is kind `vera`, with a seed where a file has no A and B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from loratools.adapter.kinds.vera import VeraUpdate


@dataclass(frozen=True, slots=True, eq=False)
class PveraUpdate(VeraUpdate):
    """The scales, and the shared projections or their seed. Raises `ValueError` where sizes do not fit."""

    kind = "pvera"
    prefix: ClassVar[str] = "pvera"
    halves: ClassVar[int] = 2


claims, build = PveraUpdate.claims, PveraUpdate.build
