"""FP4 and FP6 row by row, in blocks with 8-bit scales: W = level(code)·scale, times or over a scale of all.

    NVFP4   blocks of 16, scales E4M3, and one number of the tensor: compressed-tensors' divides, modelopt's multiplies
    MXFP4, MXFP6   blocks of 32, scales that are powers of two

The number of the tensor is shared by projections that inference fuses (q, k, v; gate and up), each of which lies here
alone: of those it stays as it is, and new numbers that are too large for it are cut off. Others get a new one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from loratools.storage.codecs import Encoding, Module, Parts
from loratools.storage.codecs._grouped import Grouped
from loratools.storage.codecs._groups import Fit, Packed
from loratools.storage.codecs._levels import FP4, Floats
from loratools.storage.codecs._packed import pack
from loratools.storage.codecs._powers import exponents
from loratools.storage.codecs._scales import rounded, stored
from loratools.storage.codecs.floats import Array
from loratools.storage.codecs.tables import table

FUSED = frozenset({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "w1", "w3", "query", "key", "value"})
"""Last parts of the paths of projections that inference fuses with others."""

_FULL = 448.0 * 6.0


Rule = Callable[[Array, Array], Array]
"""Makes the scales, before they are E4M3, of the largest magnitudes of blocks and the number of the tensor."""


def by_division(most: Array, number: Array) -> Array:
    """Return most / (6·number), 1 for a block of zeros, at least 2^-9: modelopt's rule."""
    scales = most / (np.float32(6) * number)
    return np.clip(np.where(scales == 0, np.float32(1), scales), np.float32(2**-9), np.float32(448))


def by_product(most: Array, number: Array) -> Array:
    """Return most / 6 · number, 1/8 where that is 0 in E4M3: compressed-tensors' rule."""
    scales = np.clip(number * (most / np.float32(6)), 0, np.float32(448))
    return np.where(scales <= 2.0**-10, np.float32(0.125), scales)  # the least number is 2^-9


def blocks(
    module: Module, part: str, *, whole: str = "", divides: bool = False, rule: Rule = by_division,
    levels: Floats = FP4, width: int = 32, name: str = "MXFP4", keep: bool = False,
) -> Encoding:  # fmt: skip
    """Return how codes in `part`, with scales in `weight_scale` and one of the tensor in `whole`, are stored.

    `divides` says that the number of the tensor divides, `keep` that it stays as it is; `rule` makes new scales.

    Raises `UnsupportedAdapter` for parts that do not fit each other.
    """
    module.need(part, "weight_scale", *([whole] if whole else []))
    codes, scales = module.specs[part], module.specs["weight_scale"]
    bits = 4 if len(levels.table) == 16 else 6
    wanted = ("F8_E4M3",) if whole else ("U8", "F8_E8M0")
    columns = codes.shape[-1] * 8 // bits if len(codes.shape) > 1 else 0
    if codes.dtype != "U8" or scales.dtype not in wanted or not columns or not prod(codes.shape):
        raise module.refuse(f"its {part} is {codes.dtype} {list(codes.shape)}, its weight_scale {scales.dtype}")
    if scales.shape != (*codes.shape[:-1], columns // width) or columns % width:
        raise module.refuse(f"its {part} {list(codes.shape)} and weight_scale {list(scales.shape)} do not fit")
    if whole:
        spec = module.specs[whole]
        if spec.dtype not in ("F32", "BF16", "F16") or spec.parameters not in (1, prod(codes.shape[:-2])):
            raise module.refuse(f"its {whole} is {spec.dtype} {list(spec.shape)}, and one number was expected")
    if module.specs.keys() & {"weight_zero_point"}:
        raise module.refuse("it has zero points, which no library writes for it")
    fresh_whole = bool(whole) and not keep and module.path.rpartition(".")[2] not in FUSED and len(codes.shape) == 2
    label = f"{name}, blocks of {width}"
    return Blocks(
        module, (*codes.shape[:-1], columns), label, bits, (1, width), 1, levels, 1, width, part, None, fresh_whole,
        whole=whole, divides=divides, rule=rule,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Blocks(Grouped):
    """Blocks of codes with scales of 8 bits; the part `whole` has the number of the tensor, "" where there is none."""

    whole: str = ""
    divides: bool = False
    rule: Rule = by_division

    def packed_rows(self, parts: Parts, first: int, count: int) -> Packed:
        """Return codes and scales of rows."""
        packed = parts.joined(self.codes_part, first, first + count, lent=True)
        scales = table(self._dtype)[parts.joined("weight_scale", first, first + count)]
        if self.whole:
            scales = self._times(scales, self._stored_number(parts, first, count))
        return Packed(packed, self.bits, scales)

    @property
    def _dtype(self) -> str:
        return "F8_E4M3" if self.whole else "F8_E8M0"

    def _times(self, scales: Array, number: Array) -> Array:
        product: Array = scales / number if self.divides else scales * number
        return product

    def fit(self, parts: Parts, first: int, lows: Array, highs: Array, W: Array, largest: float) -> Fit:
        """Return the power of two that errs less, or max|w| / 6 in units of the number of the tensor, in E4M3."""
        if not self.whole:
            powers = exponents(W.reshape(len(W), self.groups, self.width), self.levels)
            return Fit(table("F8_E8M0")[powers], powers)
        number = self._number(largest) if self.passes else self._stored_number(parts, first, len(W))
        most = np.maximum(-lows, highs)
        scales = self.rule(most, number)
        codes = rounded(scales, "F8_E4M3")
        new = number.reshape(-1)[:1] if self.passes else None
        return Fit(self._times(table("F8_E4M3")[codes], number), codes, None, new)

    def _stored_number(self, parts: Parts, first: int, count: int) -> Array:
        """Return the number of the tensor, or of a stack that of the matrix of each row, (1 or rows, 1)."""
        number = parts.numbers(self.whole).reshape(-1, 1)
        return number if len(number) == 1 else number[(first + np.arange(count)) // self.shape[-2]]

    def _number(self, largest: float) -> Array:
        """Return the number by which numbers up to the largest fit; 1 where all are zero."""
        if not largest:
            return np.ones((1, 1), np.float32)
        full, most = np.float32(_FULL), np.float32(largest)
        inverse = np.float32(1) / most * full  # torch divides a number so, in two roundings
        return np.array([[inverse if self.divides else most / full]], np.float32)

    def packed(self, codes: Array) -> Array:
        """Return rows of codes as rows of bytes."""
        return pack(codes, self.bits, self.columns * self.bits // 8)

    def parts_of(self, packed: Array, fit: Fit | None) -> Mapping[str, Array]:
        """Return codes, and scales where they are new, as they are stored."""
        specs = self.module.specs
        made = {self.codes_part: packed.reshape(specs[self.codes_part].shape), **self.new_scales(fit)}
        if fit is not None and fit.number is not None:
            made[self.whole] = stored(fit.number, specs[self.whole].dtype).reshape(specs[self.whole].shape)
        return made
