"""transformers' Conv1D, the linear layer of GPT-2: y = x·V + b, V (in, out) = Wᵀ."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from loratools.adapter.parts import A, B
from loratools.live.modules._affine import AffineSite


class Conv1DSite(AffineSite):
    """A linear layer whose weight is (in, out)."""

    turned = True

    def matrix(self) -> Tensor | None:
        return matrix(self)

    def usual(self) -> Tensor | None:
        plain = type(self.weight) in (nn.Parameter, Tensor) and type(self).base.__name__ == "Conv1D"
        return matrix(self) if plain else None


def claims(module: nn.Module) -> bool:
    """Tell whether a module is transformers' Conv1D, or derives from it; transformers is not imported for it."""
    own: Any = type(module)
    return _derives(own)


@lru_cache(maxsize=256)
def _derives(own: type) -> bool:
    return any(f"{kind.__module__}.{kind.__name__}" == "transformers.pytorch_utils.Conv1D" for kind in own.__mro__)


def shape(module: Any) -> tuple[int, ...]:
    """Return (out, in)."""
    rows, columns = module.weight.shape
    return int(columns), int(rows)


sides = shape


def matrix(module: Any) -> Tensor | None:
    """Return the transposed weight, or None where it is stored as codes."""
    W: Tensor = module.weight
    return W.T if W.is_floating_point() else None


SITE, KIND, NAMES, ZERO = Conv1DSite, "lora", (A, B), "B"
