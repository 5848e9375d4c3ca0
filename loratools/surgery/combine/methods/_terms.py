"""What a method of combining is given: terms of one module, options, and where it draws from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from loratools.options import Options

if TYPE_CHECKING:
    from torch import Tensor

Library = Literal["peft", "mergekit"]
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


Terms = Sequence[Term]
"""The changes of one module by all adapters."""


class Chance(Protocol):
    """Draws what is kept."""

    def keep(self, term: Term, tile: int, probability: Tensor) -> Tensor:
        """Return a mask that is True with the given probabilities; `tile` counts the tiles of rows of a matrix."""


@dataclass(frozen=True, slots=True)
class MethodOptions:
    """What methods can be told; each takes some (its `OPTIONS`). Building one raises `InvalidOption` with all faults.

    Each field is the parameter of `combine` of that name.
    """

    density: float | None = None
    gamma: float | None = None
    epsilon: float | None = None
    seed: int | None = None
    like: Library | None = None
    normalize: bool | None = None
    rescale: bool | None = None

    def __post_init__(self) -> None:
        checked = Options()
        MethodOptions.check(self, checked)
        checked.done()

    @property
    def share(self) -> float:
        """`density`, for the methods that need one."""
        assert self.density is not None  # else `problems` of the method said so
        return self.density

    def check(self, checked: Options) -> None:
        """Note every value that is out of its range."""
        share = "a share of elements"
        checked.real("density", self.density, lambda x: 0 < x <= 1, f"{share}, above 0 and at most 1")
        checked.real("gamma", self.gamma, lambda x: 0 <= x < 1, f"{share}, at least 0 and below 1")
        checked.real("epsilon", self.epsilon, lambda x: True, "a finite number")
        if self.seed is not None:
            checked.seed("seed", self.seed)
        if self.like is not None:
            checked.word("like", self.like, Library)
        for name, value in {"normalize": self.normalize, "rescale": self.rescale}.items():
            if value is not None:
                checked.flag(name, value)
                if self.like != "mergekit":
                    checked.problems.append(f"{name} is {value!r}, which is for what is like mergekit")
