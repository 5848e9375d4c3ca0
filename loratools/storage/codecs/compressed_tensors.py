"""compressed-tensors (llm-compressor): integers packed in words or as they are, FP4 and FP6 in blocks, FP8.

The format is that of the tensors; the group of `config_groups` that a module is of must agree with them.

    weight_packed I32            integers of 2 to 8 bits, offset by half their range:    W = (q - zero)·scale
    weight I8                    the same, a byte each, in two's complement
    weight_packed U8             FP4 with a global scale that divides (NVFP4), or FP4 and FP6 with powers of two (MX)
    weight F8                    FP8 by tensor, row or block
    weight BF16, F16, F32        not compressed yet (status `frozen`): the scales only simulate a quantization

Scales are by tensor, row, block, or group along the row; `weight_g_idx` has the group of each column (act-order).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loratools.storage import dtypes
from loratools.storage.codecs import Encoding, Module, Parts
from loratools.storage.codecs._blocks import blocks, by_product
from loratools.storage.codecs._fp8 import DTYPES, Fp8, fitted
from loratools.storage.codecs._fp8 import Blocks as Sides
from loratools.storage.codecs._integers import EPS, integers
from loratools.storage.codecs._levels import FP6
from loratools.storage.codecs._scales import POWERS, by_power, by_quotient
from loratools.storage.codecs._targets import group_of, listed
from loratools.storage.codecs.floats import Array, widen
from loratools.storage.codecs.state import is_block

_NAIVE = ("int-quantized", "naive-quantized", "float-quantized")


def opened(module: Module) -> Encoding:
    """Return how a module is stored; raise `UnsupportedAdapter` where config and tensors disagree."""
    transform = module.statement.get("transform_config")
    if isinstance(transform, Mapping) and transform.get("config_groups", transform):
        raise module.refuse("its weights are rotated (transform_config), so that nothing can be added to them")
    if "bitmask" in module.specs or "meta" in module.specs:
        raise module.refuse("it is sparse as well (marlin-24 or a bitmask), which loratools does not read")
    part = "weight_packed" if "weight_packed" in module.specs else "weight"
    module.need(part, "weight_scale")
    if len(module.specs[part].shape) < 2:
        raise module.refuse(f"its {part} is {list(module.specs[part].shape)}, and two sides were expected")
    arguments, form = group_of(module.statement, module.path) or ({}, None)
    dtype, scale = module.specs[part].dtype, module.specs["weight_scale"]
    if (part, dtype) in (("weight_packed", "I32"), ("weight", "I8")):
        _agree(module, arguments, "int", form, ("pack-quantized",) if part == "weight_packed" else _NAIVE)
        return integers(module, part, arguments)
    if part == "weight" and dtype in DTYPES:
        _agree(module, arguments, "float", form, (*_NAIVE, "mxfp8-quantized"), 8)
        return _fp8(module, arguments)
    if part == "weight" and dtype in dtypes.FLOATS:
        return Simulated(module, module.specs[part].shape, _SIMULATED, dtypes.bits(dtype))
    if dtype == "U8" and "weight_global_scale" in module.specs:
        _agree(module, arguments, "float", form, ("nvfp4-pack-quantized",), 4, 16)
        return blocks(module, part, whole="weight_global_scale", divides=True, rule=by_product, width=16, name="NVFP4")
    if dtype == "U8" and scale.shape and scale.shape[-1] * 32 * 6 == module.specs[part].shape[-1] * 8:
        _agree(module, arguments, "float", form, ("mxfp6-pack-quantized",), 6, 32)
        return blocks(module, part, levels=FP6, name="MXFP6")
    if dtype == "U8":
        _agree(module, arguments, "float", form, ("mxfp4-pack-quantized",), 4, 32)
        return blocks(module, part)
    raise module.refuse(f"format {form or 'unknown'} with {part} {dtype} is not read")


def plain(statement: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """Return the statement with these modules in `ignore`."""
    return {**statement, "ignore": listed(statement.get("ignore"), modules)}


def _agree(
    module: Module, arguments: Mapping[str, Any], kind: str, form: str | None, forms: Sequence[str],
    bits: int | None = None, width: int | None = None,
) -> None:  # fmt: skip
    """Raise `UnsupportedAdapter` where config.json says another type, format, bits or group than the tensors have."""
    stated = str(arguments.get("type") or kind).lower()
    wrong = stated != kind or (form is not None and form not in forms)
    wrong |= bits is not None and arguments.get("num_bits", bits) != bits
    wrong |= width is not None and (arguments.get("group_size") or width) != width
    if wrong:
        kinds = ", ".join(f"{part} {spec.dtype} {list(spec.shape)}" for part, spec in sorted(module.specs.items()))
        says = f"format {form}, type {stated}, {arguments.get('num_bits')} bits, group {arguments.get('group_size')}"
        raise module.refuse(f"config.json says {says}, and its tensors are {kinds}")


def _fp8(module: Module, arguments: Mapping[str, Any]) -> Fp8:
    """Return how FP8 codes are stored, with scales by what config.json says, or what fits where it says nothing."""
    weight, scale = module.specs["weight"], module.specs["weight_scale"]
    if "weight_zero_point" in module.specs and any(module.read("weight_zero_point").reshape(-1).view("u1") & 127):
        raise module.refuse("it has zero points, which are not read beside FP8")
    rows, columns = weight.shape[-2:]
    size, block = arguments.get("group_size"), arguments.get("block_structure")
    choices = {"tensor": Sides(rows, columns), "channel": Sides(1, columns)}
    if isinstance(size, int) and size > 0:
        choices["group"] = Sides(1, size)
    if is_block(block):
        choices["block"] = Sides(*block)
    if scale.dtype in POWERS:
        return fitted(module, "weight_scale", [Sides(1, 32)], by_power)
    strategy = arguments.get("strategy") or ("group" if "group" in choices else None)
    if strategy is not None and strategy not in choices:
        raise module.refuse(f"config.json says strategy {strategy}, without the sides of its groups")
    wanted = [choices[strategy]] if strategy else list(choices.values())
    eps = EPS.get(scale.dtype, 1.0)

    def rule(most: Array, largest: float) -> tuple[Array, Array | None]:
        return np.where(most == 0, np.float32(eps), by_quotient(most, largest)[0]), None

    return fitted(module, "weight_scale", wanted, rule)


_SIMULATED = "plain numbers whose quantization is only simulated (frozen): it goes, with its scales"


@dataclass(frozen=True, slots=True, eq=False)
class Simulated(Encoding):
    """Plain numbers, and scales by which a loader rounds them each time: what is not compressed yet.

    The numbers are shown as they are. Their scales would not fit others, and loading them again would round what is
    written, so that they go.
    """

    def decode(self, parts: Parts, first: int, out: Array) -> None:
        """Write the numbers."""
        stored = parts.joined("weight", first, first + len(out))
        dtype = self.module.specs["weight"].dtype
        out[:] = widen(stored, dtype, np.float32) if dtype == "BF16" else stored
