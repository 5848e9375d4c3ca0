"""The options of an extraction, one frozen value that is valid once built; library and command line share it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.linalg.ranks.allocate import Ranks
from loratools.options import Arithmetic, Options
from loratools.storage import dtypes

if TYPE_CHECKING:
    import torch

ROUNDED = "bfloat16, the last float32"
"""What a record says where the processor multiplied in bfloat16."""


@dataclass(frozen=True, slots=True)
class ExtractOptions:
    """Every option of an extraction that is not an input. Building one raises `InvalidOption` with all that is wrong.

    Each field is the parameter of `extract` of that name.
    """

    ranks: Ranks | int
    dtype: dtypes.FloatName | torch.dtype = "F32"
    seed: int = 0
    tolerance: float = 6e-4
    tight: bool = False
    arithmetic: Arithmetic = "auto"
    device: str | torch.device = "cpu"
    threads: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        checked = Options()
        object.__setattr__(self, "ranks", checked.parsed("ranks", Ranks.of, self.ranks))
        object.__setattr__(self, "dtype", checked.parsed("dtype", dtypes.parse_float, self.dtype))
        checked.seed("seed", self.seed)
        checked.real("tolerance", self.tolerance, lambda x: 0 < x < 1, "a share, above 0 and below 1")
        checked.flag("tight", self.tight)
        checked.word("arithmetic", self.arithmetic, Arithmetic)
        object.__setattr__(self, "device", checked.device(self.device))
        checked.number("threads", self.threads, least=1, optional=True)
        checked.flag("force", self.force)
        checked.done()

    @property
    def rank_choice(self) -> Ranks:
        """`ranks` as it is held."""
        return Ranks.of(self.ranks)

    @property
    def computes_on(self) -> str:
        """`device` by its name."""
        return str(self.device)

    @property
    def rounds(self) -> bool:
        """Whether products in bfloat16 may find directions: on the processor, and not where bounds are to be tight."""
        return self.arithmetic == "auto" and not self.tight and self.computes_on == "cpu"

    @property
    def stored(self) -> str:
        """`dtype` as it is held."""
        return str(self.dtype)
