"""Integers without zero points as modelopt stores them: W = q·scale, scale = max|w| / largest integer.

eights   8 bits, a byte each, with a scale for each row
fours    4 bits, two rows in a byte, with a scale for each group of columns
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from loratools.errors import UnsupportedAdapter
from loratools.storage import dtypes
from loratools.storage.codecs import Encoding, Module, Parts
from loratools.storage.codecs._grouped import Grouped
from loratools.storage.codecs._groups import Fit, Packed, Stored
from loratools.storage.codecs._levels import INT4, Whole
from loratools.storage.codecs._scales import read_back
from loratools.storage.codecs._scales import stored as as_stored
from loratools.storage.codecs.floats import Array
from loratools.storage.codecs.tables import numbers


def eights(module: Module) -> Encoding:
    """Return how 8-bit integers are stored; raise `UnsupportedAdapter` for scales that are not one a row."""
    weight, scale = module.specs["weight"], module.specs["weight_scale"]
    if scale.dtype not in dtypes.FLOATS or scale.shape not in (weight.shape[:-1], (*weight.shape[:-1], 1)):
        raise _unfit(module)
    columns = weight.shape[-1]
    label = "8-bit integers, one scale a row"
    return Rows(module, weight.shape, label, 8, (1, columns), 1, Whole(8, bytes=True), 1, columns, "weight")


def fours(module: Module) -> Encoding:
    """Return how 4-bit integers are stored, row 2i in the low bits of a byte and row 2i + 1 in the high bits."""
    weight, scale = module.specs["weight"], module.specs["weight_scale"]
    *stack, pairs, columns = weight.shape
    shape = (*stack, 2 * pairs, columns)
    groups = scale.shape[-1] if scale.shape else 0
    if scale.dtype not in dtypes.FLOATS or scale.shape[:-1] != shape[:-1] or not groups or columns % groups:
        raise _unfit(module)
    width = columns // groups
    stated = module.statement.get("group_size")
    if isinstance(stated, int) and stated not in (0, width):
        raise module.refuse(f"config.json says groups of {stated}, and its scales are of {width}")
    label = f"4-bit integers, groups of {width}, two rows a byte"
    return Pairs(module, shape, label, 4, (1, width), 2, INT4, 1, width, "weight")


def _unfit(module: Module) -> UnsupportedAdapter:
    weight, scale = module.specs["weight"], module.specs["weight_scale"]
    return module.refuse(
        f"its weight {list(weight.shape)} and weight_scale {scale.dtype} {list(scale.shape)} do not fit"
    )


@dataclass(frozen=True, slots=True, eq=False)
class Symmetric(Grouped):
    """Integers whose scales are those of their largest magnitudes."""

    def fit(self, parts: Parts, first: int, lows: Array, highs: Array, W: Array, largest: float) -> Fit:
        """Return max|w| / largest integer, 1 for zeros."""
        dtype = self.module.specs["weight_scale"].dtype
        scales = np.maximum(-lows, highs) / np.float32(self.levels.most)
        scales = np.where(scales == 0, np.float32(1), scales)
        return Fit(read_back(scales, dtype), as_stored(scales, dtype))


@dataclass(frozen=True, slots=True, eq=False)
class Rows(Symmetric):
    """Bytes in two's complement with a scale for each row."""

    def packed_rows(self, parts: Parts, first: int, count: int) -> Packed:
        """Return codes and scales of rows."""
        codes = parts.joined("weight", first, first + count, lent=True).view(np.uint8)
        return Packed(codes, 8, parts.constants("weight_scale").reshape(-1, 1)[first : first + count])

    def packed(self, codes: Array) -> Array:
        """Return rows of codes, which are bytes."""
        return codes

    def parts_of(self, packed: Array, fit: Fit | None) -> Mapping[str, Array]:
        """Return codes, and scales where they are new."""
        return {"weight": packed.view(np.int8).reshape(self.module.specs["weight"].shape), **self.new_scales(fit)}


@dataclass(frozen=True, slots=True, eq=False)
class Pairs(Symmetric):
    """4-bit integers in two's complement, two rows a byte."""

    def stored(self, parts: Parts, first: int, count: int) -> Stored:
        """Return codes and scales of rows."""
        start, stop = first // 2, (first + count + 1) // 2
        packed = parts.joined("weight", start, stop)
        codes = np.empty((stop - start, 2, self.columns), np.uint8)
        np.bitwise_and(packed, 15, out=codes[:, 0])
        np.right_shift(packed, 4, out=codes[:, 1])
        codes ^= 8  # counted from the least
        rows = codes.reshape(-1, self.columns)[first - 2 * start :][:count]
        scales = parts.joined("weight_scale", first, first + count)
        return Stored(rows, numbers(scales, self.module.specs["weight_scale"].dtype))

    def packed(self, codes: Array) -> Array:
        """Return rows of codes, each in a byte of its own yet."""
        return codes ^ np.uint8(8)

    def parts_of(self, packed: Array, fit: Fit | None) -> Mapping[str, Array]:
        """Return codes, two rows a byte, and scales where they are new."""
        joined = packed[::2] | packed[1::2] << 4
        return {"weight": joined.reshape(self.module.specs["weight"].shape), **self.new_scales(fit)}
