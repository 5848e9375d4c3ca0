"""LoRA on a linear layer: W' = W + s·B·A (Hu et al. 2021, arXiv 2106.09685), in PEFT's layout.

A is (r, in), B is (out, r). The scaling s is α/r, or α/√r for rank-stabilized LoRA (arXiv 2312.03732); who reads a file
works it out once and hands it over as a number. With PEFT's `lora_bias`, B has a bias c (out,), and b' = b + s·c.

PEFT's layer for `nn.MultiheadAttention` is of this kind too: there W is `in_proj_weight`, (3·out, in).
"""

from __future__ import annotations

from math import prod

from loratools.adapter.kinds import Update
from loratools.adapter.kinds._product import TwoFactors


class LoraUpdate(TwoFactors):
    """s·B·A for a linear layer."""

    __slots__ = ()  # nor fields of its own: it is a dataclass as it stands

    kind = "lora"

    def fitted(self, shape: tuple[int, ...]) -> Update:
        """Return the update of a convolution's weight of this shape, whose kernel flat factors do not tell."""
        if len(shape) < 3 or (self.shape[0], self.shape[1]) != (shape[0], prod(shape[1:])):
            return self
        pointwise = (1,) * (len(shape) - 2)
        A, B = self.A.reshaped((self.rank, *shape[1:])), self.B.reshaped((shape[0], self.rank, *pointwise))
        from loratools.adapter.kinds.conv import ConvUpdate

        return ConvUpdate(A, B, self.scaling, self.alpha, self.bias)


claims, build = LoraUpdate.claims, LoraUpdate.build
