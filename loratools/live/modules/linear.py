"""nn.Linear, and layers that compute like one, whatever their weight is stored as: y = W·x + b, W (out, in)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from loratools.adapter.parts import A, B
from loratools.live.modules._affine import AffineSite, has_own_forward


class LinearSite(AffineSite):
    """A linear layer whose weight is (out, in)."""

    def matrix(self) -> Tensor | None:
        return matrix(self)  # type: ignore[arg-type]

    def usual(self) -> Tensor | None:
        W = self.weight
        plain = type(W) in (nn.Parameter, Tensor) and W.is_floating_point() and not has_own_forward(self, nn.Linear)
        return W if plain else None


def claims(module: nn.Module) -> bool:
    """Tell whether a module is an nn.Linear or says, as quantized layers do, how many features go in and out."""
    if isinstance(module, nn.Linear):
        return True
    sides = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return all(isinstance(side, int) for side in sides) and not isinstance(module, nn.Bilinear | nn.Embedding)


def shape(module: Any) -> tuple[int, ...]:
    """Return (out, in)."""
    return int(module.out_features), int(module.in_features)


sides = shape


def matrix(module: nn.Module) -> Tensor | None:
    """Return the weight, or None where it is stored as codes."""
    try:
        W = module.weight  # a parameter, what stands for one, or what a parametrization makes of several
    except AttributeError:  # codes under another name
        return None
    return W if isinstance(W, Tensor) and W.is_floating_point() and tuple(W.shape) == shape(module) else None


SITE, KIND, NAMES, ZERO = LinearSite, "lora", (A, B), "B"
