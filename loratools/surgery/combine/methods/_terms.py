"""What a method of combining is given: terms of one module, and options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.errors import LoraToolsError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """One adapter's change of a module: weight · left · right, with the scaling in `left` (rows, r), both float64.

    `identity` tells it from the others wherever chance is used: digest of the adapter, and the module's name.
    """

    weight: float
    left: Tensor
    right: Tensor
    identity: str = ""


@dataclass(frozen=True, slots=True)
class Options:
    """What methods can be told; each takes some (its `OPTIONS`), and refuses the rest where it is not the default.

    `density`  share of elements that are kept, above 0 and at most 1
    `gamma`    share of the largest elements that `breadcrumbs` drops
    `epsilon`  how far `della` lets the chance of keeping an element lie from the density, to both sides
    `seed`     of every draw
    `like`     the library whose numbers are wanted where a method differs: `peft`
    """

    density: float | None = None
    gamma: float | None = None
    epsilon: float | None = None
    seed: int | None = None
    like: str | None = None

    def __post_init__(self) -> None:
        if self.density is not None and not 0 < self.density <= 1:
            raise LoraToolsError(f"density is a share of elements, above 0 and at most 1, not {self.density}")
        if self.gamma is not None and not 0 <= self.gamma < 1:
            raise LoraToolsError(f"gamma is a share of elements, at least 0 and below 1, not {self.gamma}")
        if self.seed is not None and not 0 <= self.seed < 2**53:
            raise LoraToolsError(f"a seed lies between 0 and 2^53 - 1, not {self.seed}")
