"""The options of combine and resize, one frozen value that is valid once built; library and command line share it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.linalg.ranks.allocate import Ranks
from loratools.options import CheckBase, Options
from loratools.storage import dtypes
from loratools.surgery.combine import methods
from loratools.surgery.combine.methods._terms import MethodOptions

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class CombineOptions(MethodOptions):
    """Every option of a combination that is not an input. Building one raises `InvalidOption` with all that is wrong.

    Each field is the parameter of `combine` of that name. Without a `dtype` it is that of the factors that come in.
    """

    method: str = "linear"
    ranks: Ranks | int | None = None
    check_base: CheckBase = "strict"
    dtype: dtypes.FloatName | torch.dtype | None = None
    device: str | torch.device = "cpu"
    threads: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        checked = Options()
        MethodOptions.check(self, checked)
        checked.problems += methods.problems(self.method, self)
        checked.word("check_base", self.check_base, CheckBase)
        object.__setattr__(self, "dtype", checked.parsed("dtype", dtypes.parse_float, self.dtype))
        object.__setattr__(self, "ranks", checked.parsed("ranks", _ranks, self.ranks))
        object.__setattr__(self, "device", checked.device(self.device))
        checked.number("threads", self.threads, least=1, optional=True)
        checked.flag("force", self.force)
        checked.done()

    @property
    def rule(self) -> Ranks | None:
        """`ranks` as it is held."""
        return self.ranks if isinstance(self.ranks, Ranks) else None

    @property
    def computes_on(self) -> str:
        """`device` by its name."""
        return str(self.device)

    @property
    def stored(self) -> str:
        """`dtype` as it is held, once it is known."""
        return str(self.dtype)


def _ranks(ranks: Ranks | int) -> Ranks:
    chosen = Ranks.of(ranks)
    if chosen.noise:
        raise ValueError("noise is that of a fine-tune's dtype, which factors do not have")
    return chosen
