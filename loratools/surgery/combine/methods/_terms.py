"""What a method of combining is given: terms of one module, and options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from loratools.options import Options

if TYPE_CHECKING:
    from torch import Tensor

Library = Literal["peft"]
"""Libraries whose numbers a method can give instead of the paper's."""


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
class MethodOptions:
    """What methods can be told; each takes some (its `OPTIONS`). Building one raises `InvalidOption` with all faults.

    `density`  share of elements that are kept, above 0 and at most 1
    `gamma`    share of the largest elements that `breadcrumbs` drops, from 0 to below 1; None: 0.01
    `epsilon`  how far `della` lets the chance of keeping an element lie from the density, to both sides
    `seed`     of every draw, a whole number from 0 on; None: 0
    `like`     the library whose numbers are wanted where a method differs from the paper: `peft`
    """

    density: float | None = None
    gamma: float | None = None
    epsilon: float | None = None
    seed: int | None = None
    like: Library | None = None

    def __post_init__(self) -> None:
        checked = Options()
        MethodOptions.check(self, checked)
        checked.done()

    def check(self, checked: Options) -> None:
        """Note every value that is out of its range."""
        if self.density is not None and not 0 < self.density <= 1:
            checked.problems.append(f"density is {self.density}; it is a share of elements, above 0 and at most 1")
        if self.gamma is not None and not 0 <= self.gamma < 1:
            checked.problems.append(f"gamma is {self.gamma}; it is a share of elements, at least 0 and below 1")
        if self.seed is not None and not 0 <= self.seed < 2**53:
            checked.problems.append(f"seed is {self.seed}; it lies between 0 and 2^53 - 1")
        if self.like is not None:
            checked.word("like", self.like, Library)
