"""A model that was cast to FP8, all of it and without scales: W = q. Biases, norms and convolutions are FP8 too.

Image models come so, to be cast to 16 bit when they are used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from loratools.decisions import warned
from loratools.errors import counted
from loratools.storage.codecs import Encoding, Module
from loratools.storage.codecs._fp8 import Blocks, fitted
from loratools.storage.codecs._scales import by_quotient


def opened(module: Module) -> Encoding:
    """Return how an FP8 tensor of any shape is stored; raise `UnsupportedAdapter` where scales were to be expected."""
    module.need("weight")
    if "layers" not in module.statement and (stated := module.statement.get("quant_method")):
        raise module.refuse(f"config.json states {stated}, which stores scales, and there is none beside it")
    shape = module.specs["weight"].shape
    return fitted(module, "", [Blocks(rows := prod(shape[:-1]), shape[-1] if shape else 1, rows)], by_quotient)


def plain(statement: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """Return the statement as it is, and warn: what loads such a file takes all its weights for FP8."""
    warned(
        "%s in 16 bit among others in FP8 without scales: ComfyUI casts all weights of such a file to "
        "the dtype of most of them, the merged ones too; --quantized dequantize or requantize is better there",
        counted(len(modules), "weight is", "weights are"),
    )
    return dict(statement)
