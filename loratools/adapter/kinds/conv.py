"""LoRA on a convolution: ΔW[o, i, k…] = s·Σ_q B[o, q]·A[q, i, k…], in PEFT's layout, for one to three kernel sides.

A is (r, in, k…), a convolution with the kernel of the layer; B is (out, r, 1…), one of kernel 1. Both seen as matrices,
first side × the rest, this is ΔW = s·B·A of a linear layer (PEFT's `_ConvNd.get_delta_weight`, kohya's `merge_to`).
With `lora_bias`, b' = b + s·c. Grouped convolutions are refused, as PEFT refuses to merge them: there B is
(out, r/groups, 1…).
"""

from __future__ import annotations

from dataclasses import dataclass

from loratools.adapter.kinds._product import TwoFactors


@dataclass(frozen=True, slots=True, eq=False)
class ConvUpdate(TwoFactors):
    """s·B·A for a convolution with a single group."""

    kind = "conv"
    sides = (3, 4, 5)
    expected = "(r, in, k…) and (out, r, 1…)"


claims, build = ConvUpdate.claims, ConvUpdate.build
