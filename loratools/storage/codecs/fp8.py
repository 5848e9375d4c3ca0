"""FP8 with scales that multiply, as transformers and fbgemm store it: by tensor, by row, or by block.

W = q · scale, the scale being that of the element's block: `weight_scale_inv` of transformers' FineGrainedFP8
(DeepSeek, Qwen3-FP8; "inv" or not, it multiplies), `weight_scale` elsewhere. The sides of a block are config.json's
(`weight_block_size`), 128 × 128 where it says nothing; blocks at the edges may be ragged. MXFP8 has scales that are
powers of two, one byte for 32 numbers of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loratools.errors import UnsupportedAdapter
from loratools.storage.codecs import Encoding, Module
from loratools.storage.codecs._fp8 import Blocks, fitted, of_stacks
from loratools.storage.codecs._scales import POWERS, by_factor, by_power, by_quotient
from loratools.storage.codecs.state import is_block, listed

_SCALES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
"""The names of the scales: transformers, fbgemm, DeepSeek-V4, Mistral."""

_METHODS = (None, "fp8", "fbgemm_fp8", "mxfp8")
_OTHERS = ("gptq", "awq", "bitsandbytes", "hqq")
"""Methods that store no FP8: config.json names another model's."""

_EXPERTS = ".experts."
_LISTS = ("modules_to_not_convert", "ignored_layers")


def opened(module: Module) -> Encoding:
    """Return how an FP8 weight is stored; raise `UnsupportedAdapter` for scales that do not fit it."""
    module.need("weight")
    if (method := module.statement.get("quant_method")) in _OTHERS:
        raise module.refuse(f"config.json says {method!r}", "Set quant_method in config.json to what the tensors are.")
    scale = next((part for part in _SCALES if part in module.specs), None)
    if scale is None:
        raise module.refuse("it has no scale beside it")
    powers = module.specs[scale].dtype in POWERS or module.statement.get("scale_fmt") == "ue8m0"
    rule = by_power if powers else by_quotient if scale == "weight_scale" else by_factor
    choices = _choices(module, module.specs["weight"].shape, module.specs[scale].dtype in POWERS)
    return fitted(module, scale, choices, rule)


def plain(statement: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """Return the statement with these modules in `modules_to_not_convert`, or in its alias if it has that.

    Experts are one module in transformers, and one in vLLM: their layer's name stands for all of them. Raises
    `UnsupportedAdapter` for the statement of a method that has its list elsewhere.
    """
    if (method := statement.get("quant_method")) not in _METHODS:
        raise UnsupportedAdapter(
            f"config.json states {method}, and where that lists plain modules is not known here",
            hint="Use --quantized dequantize or requantize.",
        )
    paths = dict.fromkeys(
        before + experts[:-1] for before, experts, _ in (path.partition(_EXPERTS) for path in modules)
    )
    lists = [key for key in _LISTS if statement.get(key)] or _LISTS[:1]
    return {**statement, **{key: listed(statement, key, paths) for key in lists}}


def _choices(module: Module, shape: tuple[int, ...], powers: bool) -> list[Blocks]:
    """Return the blocks that may share a scale, those that a library would take first first."""
    if len(shape) < 2:
        return [Blocks(1, 1)]
    rows, columns = shape[-2:]
    by_tensor, by_row = Blocks(rows, columns), Blocks(1, columns)
    if module.statement.get("quant_method") == "fbgemm_fp8":  # its stacks are (experts, in, out)
        return [by_row] if len(shape) == 2 else [Blocks(rows, 1)]
    stated = module.statement.get("weight_block_size")
    if stated is not None and not is_block(stated):
        raise module.refuse(f"config.json's weight_block_size is {stated}, and two sides were expected")
    sides = tuple(stated) if stated else (1, 32) if powers else (128, 128)
    blocks = [Blocks(*sides), by_tensor, by_row] if stated else [by_tensor, by_row, Blocks(*sides)]
    return of_stacks(blocks, shape)
