"""LoRA on a linear layer: W' = W + s·B·A (Hu et al. 2021, arXiv 2106.09685), in PEFT's layout.

A is (r, in), B is (out, r). The scaling s is α/r, or α/√r for rank-stabilized LoRA (arXiv 2312.03732); who reads a file
works it out once and hands it over as a number. With PEFT's `lora_bias`, B has a bias c (out,), and b' = b + s·c.

PEFT's layer for `nn.MultiheadAttention` is of this kind too: there W is `in_proj_weight`, (3·out, in).
"""

from __future__ import annotations

from dataclasses import dataclass

from loratools.adapter.kinds._product import TwoFactors


@dataclass(frozen=True, slots=True, eq=False)
class LoraUpdate(TwoFactors):
    """s·B·A for a linear layer."""

    kind = "lora"


claims, build = LoraUpdate.claims, LoraUpdate.build
