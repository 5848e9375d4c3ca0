"""nn.Conv1d, nn.Conv2d and nn.Conv3d: A is a convolution like the module's with r outputs, B one of kernel 1."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loratools.adapter.parts import A, B
from loratools.errors import IncompatibleAdapter
from loratools.live.product import row_norms
from loratools.live.site import Piece, Site, added

_TYPES: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvSite(Site):
    """A convolution with adapters."""

    weight: Any
    bias: Any
    training: bool

    def changed(self, pieces: list[tuple[Piece, float]], x: Tensor, *args: Any, **settings: Any) -> Any:
        y = self.plain_forward(x, *args, **settings)
        sides = self.weight.dim() - 2
        for piece, weight in pieces:
            scale, dropped = piece.scaling * weight, F.dropout(x, piece.dropout, self.training)
            delta = self.product(dropped, piece.A, piece.B) * scale
            if piece.A0 is not None and piece.B0 is not None:
                delta = delta - self.product(dropped, piece.A0, piece.B0) * scale
            if piece.magnitude is not None:
                with torch.no_grad():
                    norms = row_norms(self.weight.flatten(1), piece.B.flatten(1), piece.A.flatten(1), scale)
                g = (piece.magnitude.flatten() / norms.to(piece.magnitude.dtype)).to(y.dtype).view(-1, *(1,) * sides)
                bias = 0 if self.bias is None else self.bias.view(-1, *(1,) * sides)
                straight = y - bias if dropped is x else self._conv_forward(dropped, self.weight, None)
                delta = (g - 1) * straight + g * delta
            if piece.bias is not None:
                delta = delta + scale * piece.bias.view(-1, *(1,) * sides).to(delta.dtype)
            y = added(y, delta, None)
        return y

    def product(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Return B·A·x; the class pads and strides as for its own weight."""
        convolve = _CONVOLVE[self.weight.dim() - 2]
        return convolve(self._conv_forward(x, A.to(x.dtype), None), B.to(x.dtype))

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = super()._conv_forward(x, weight, bias)  # type: ignore[misc]
        return out


def claims(module: Any) -> bool:
    """Tell whether a module is a convolution; raise for one of several groups, which no product B·A changes."""
    if not isinstance(module, _TYPES):
        return False
    if module.groups != 1:
        raise IncompatibleAdapter(f"a convolution with {module.groups} groups cannot have a low-rank change")
    return True


def shape(module: Any) -> tuple[int, ...]:
    """Return (out, in, k…)."""
    return tuple(module.weight.shape)


sides = shape


def matrix(module: Any) -> Tensor | None:
    """Return the weight with all sides but the first in one."""
    W: Tensor = module.weight
    return W.flatten(1)


SITE, KIND, NAMES, ZERO = ConvSite, "conv", (A, B), "B"
