"""Scaled FP8 as ComfyUI had it until 2025: `scale_weight` beside each weight, `scaled_fp8` once for all: W = q · scale.

The scale is one number, for some writers (musubi-tuner) one for each row or each part of a row. Weights without a scale
are plain, in FP8 too. `scaled_fp8` says how the matrices are multiplied, nothing of the weights; `scale_input` belongs
to activations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from loratools.decisions import warned
from loratools.errors import counted
from loratools.storage.codecs import Encoding, Module
from loratools.storage.codecs._fp8 import Blocks, fitted
from loratools.storage.codecs._scales import by_inverse


def opened(module: Module) -> Encoding:
    """Return how the weight is stored; raise `UnsupportedAdapter` for scales that do not fit it."""
    module.need("weight", "scale_weight")
    shape, scales = module.specs["weight"].shape, module.specs["scale_weight"].shape
    if len(shape) < 2:
        return fitted(module, "scale_weight", [], by_inverse)
    rows, columns = prod(shape[:-1]), shape[-1]
    choices = [Blocks(rows, columns, rows), Blocks(1, columns)]
    if len(scales) in (2, 3) and scales[1] and columns % scales[1] == 0:
        choices.append(Blocks(1, columns // scales[1]))
    return fitted(module, "scale_weight", choices, by_inverse)


def plain(statement: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """Return the statement as it is: a weight without a scale is plain. Warn of the ComfyUI that does not know that."""
    warned(
        "%s in 16 bit among others in scaled FP8: ComfyUI reads them so since the end of 2025; an older one "
        "casts them to FP8 without a scale, for which --quantized dequantize or requantize is better",
        counted(len(modules), "weight is", "weights are"),
    )
    return dict(statement)
