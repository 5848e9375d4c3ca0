"""Integers with scales, and perhaps zero points: W = (q - zero)·scale, as compressed-tensors stores them.

The parts are `weight_packed` I32, offset by half the range, or `weight` I8 in two's complement; `weight_scale`;
`weight_zero_point`, packed along the rows or a byte each; `weight_g_idx`, the group of each column (act-order).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import numpy as np

from loratools.storage import dtypes
from loratools.storage.codecs import Encoding, Module, Parts
from loratools.storage.codecs._grouped import Grouped
from loratools.storage.codecs._groups import Fit, Packed
from loratools.storage.codecs._levels import Whole
from loratools.storage.codecs._packed import pack, unpack
from loratools.storage.codecs._scales import stored as as_stored
from loratools.storage.codecs.floats import Array
from loratools.storage.codecs.state import is_block
from loratools.storage.codecs.tables import numbers

EPS = {"BF16": 2.0**-7, "F16": 2.0**-10, "F32": 2.0**-23, "F64": 2.0**-52}
"""What the library has for the scale of zeros, by the dtype of scales."""


def integers(module: Module, part: str, arguments: Mapping[str, Any]) -> Encoding:
    """Return how integers in `part` are stored, of which config.json says these arguments.

    Raises `UnsupportedAdapter` where config and tensors disagree.
    """
    shape = _shape(module, part)
    bits = _bits(module, part, shape[-1], arguments.get("num_bits"))
    scale = module.specs["weight_scale"]
    if scale.dtype not in dtypes.FLOATS:
        raise module.refuse(f"its weight_scale is {scale.dtype}, and a float dtype was expected")
    height, width = _group(module, shape, arguments)
    order = _order(module, shape[-1], -(-shape[-1] // width), arguments)
    zero = _zero(module, shape, bits, arguments)
    by = {(prod(shape[:-1]), shape[-1]): "one scale a tensor", (1, shape[-1]): "one scale a row"}.get((height, width))
    by = by or (f"groups of {width}" if height == 1 else f"blocks of {height} × {width}")
    words = [
        f"{bits}-bit integers",
        by,
        *(["zero points"] if zero else []),
        *(["act-order"] if order is not None else []),
    ]
    together = height if height < prod(shape[:-1]) else 1
    levels = Whole(bits) if part == "weight_packed" else Whole(bits, bytes=True)
    return Integers(
        module, shape, ", ".join(words), bits, (height, width), together, levels, height, width, part, order, zero=zero
    )


def _shape(module: Module, part: str) -> tuple[int, ...]:
    """Return the shape of the weight: `weight_shape` where the codes are packed, which must hold as many."""
    stored = module.specs[part].shape
    if part == "weight":
        return stored
    module.need("weight_shape")
    spec = module.specs["weight_shape"]
    if spec.dtype not in ("I32", "I64") or spec.shape not in ((2,), (3,)):
        raise module.refuse(f"its weight_shape is {spec.dtype} {list(spec.shape)}, and 2 or 3 integers were expected")
    shape = tuple(int(side) for side in module.read("weight_shape"))
    if len(shape) != len(stored) or shape[:-1] != stored[:-1] or shape[-1] < 1:
        raise module.refuse(f"its {part} {list(stored)} does not hold a weight of weight_shape {list(shape)}")
    return shape


def _bits(module: Module, part: str, columns: int, stated: Any) -> int:
    """Return the bits of a code, which config.json and the words of a row must agree on."""
    words = module.specs[part].shape[-1]
    fits = [bits for bits in range(1, 9) if part == "weight" or -(-columns * bits // 32) == words]
    if stated is None and len(fits) == 1:
        return fits[0]
    if stated is None and part == "weight":
        return 8
    if not isinstance(stated, int) or stated not in fits:
        raise module.refuse(
            f"config.json says {stated} bits, and {words} words hold {columns} codes of a row otherwise"
        )
    return stated


def _group(module: Module, shape: tuple[int, ...], arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Return rows and columns that share a scale, which config.json and the shape of the scales must agree on."""
    scales, strategy = module.specs["weight_scale"].shape, arguments.get("strategy")
    rows, columns = prod(shape[:-1]), shape[-1]
    size, block = arguments.get("group_size"), arguments.get("block_structure")
    if strategy == "block":
        if is_block(block) and len(shape) == 2 and scales == (-(-rows // block[0]), -(-columns // block[1])):
            return min(block[0], rows), block[1]
    elif strategy in (None, "group", "tensor_group") and scales[:-1] == shape[:-1] and len(scales) == len(shape):
        groups = scales[-1]
        width = size if isinstance(size, int) and size > 0 else -(-columns // max(1, groups))
        if groups and -(-columns // width) == groups:
            return 1, width
    elif strategy in (None, "channel") and scales in ((*shape[:-1], 1), shape[:-1]):
        return 1, columns
    if strategy in (None, "tensor") and scales in ((), (1,), (1, 1)):
        return rows, columns
    raise module.refuse(
        f"config.json says strategy {strategy}, group {block or size}, and the scales {list(scales)} do not fit that "
        f"and a weight {list(shape)}"
    )


def _order(module: Module, columns: int, groups: int, arguments: Mapping[str, Any]) -> Array | None:
    """Return the group of each column where it is not the next in turn; -1 in old files means that it is."""
    spec = module.specs.get("weight_g_idx")
    if spec is None:
        if arguments.get("actorder") in ("group", "dynamic", True):
            raise module.refuse(f"config.json says actorder {arguments['actorder']}, and weight_g_idx is missing")
        return None
    if spec.dtype not in ("I32", "I64") or spec.shape != (columns,):
        raise module.refuse(
            f"its weight_g_idx is {spec.dtype} {list(spec.shape)}, and {columns} integers were expected"
        )
    order = module.read("weight_g_idx").astype(np.int64)
    if (order == -1).any():
        return None
    if order.min(initial=0) < 0 or order.max(initial=0) >= groups:
        raise module.refuse(f"its weight_g_idx names groups from {order.min()} to {order.max()}, and it has {groups}")
    return order


def _zero(module: Module, shape: tuple[int, ...], bits: int, arguments: Mapping[str, Any]) -> str:
    """Return how zero points are stored: "" for none, "packed" along the rows, "plain" a byte each."""
    spec, scales = module.specs.get("weight_zero_point"), module.specs["weight_scale"].shape
    symmetric = arguments.get("symmetric")
    if spec is None:
        if symmetric is False:
            raise module.refuse("config.json says that it is asymmetric, and weight_zero_point is missing")
        return ""
    rows = -(-shape[-2] * bits // 32)
    if spec.dtype == "I32" and symmetric is not True and spec.shape == (*shape[:-2], rows, *scales[len(shape) - 1 :]):
        return "packed"
    if spec.dtype in ("I8", "U8", *dtypes.FLOATS) and spec.shape == scales:
        return "plain"
    raise module.refuse(
        f"its weight_zero_point {spec.dtype} {list(spec.shape)} does not fit the scales {list(scales)} and {bits} bits"
    )


@dataclass(frozen=True, slots=True, eq=False)
class Integers(Grouped):
    """Integers with scales, and zero points in `zero_part` as `zero` says."""

    zero_part: ClassVar[str] = "weight_zero_point"

    zero: str = ""

    def packed_rows(self, parts: Parts, first: int, count: int) -> Packed:
        """Return codes, scales and zero points of rows."""
        stored = parts.joined(self.codes_part, first, first + count, lent=True)
        bits = self.bits if self.codes_part == "weight_packed" else 8
        groups = self._of_groups(parts, self.scale_part, first, count)
        return Packed(stored.view(np.uint8), bits, groups, self._zeros(parts, first, count))

    def _of_groups(self, parts: Parts, part: str, first: int, count: int) -> Array:
        """Return a number for each row and group."""
        spec, start, stop = self.module.specs[part], first // self.height, (first + count - 1) // self.height + 1
        if len(spec.shape) == len(self.shape):
            of_groups = _widened(parts.joined(part, start, stop), spec.dtype)
        else:
            of_groups = _widened(parts.whole(part), spec.dtype).reshape(-1, self.groups)[start:stop]
        return of_groups if self.height == 1 else of_groups[self.of_rows(first, count)[1]]

    def _zeros(self, parts: Parts, first: int, count: int) -> Array | None:
        if not self.zero:
            return None
        if self.zero == "plain":
            return self._of_groups(parts, self.zero_part, first, count)
        rows, zeros = self.shape[-2], []
        packed = parts.whole(self.zero_part).reshape(-1, -(-rows * self.bits // 32), self.groups)
        for matrix in range(first // rows, (first + count - 1) // rows + 1):
            start, stop = max(first - matrix * rows, 0), min(first + count - matrix * rows, rows)
            begin = start * self.bits // 32 // self.bits * self.bits  # words at which a code begins
            words = packed[matrix, begin : -(-stop * self.bits // 32)].T
            start -= (skipped := begin * 32 // self.bits)
            zeros.append(unpack(words, self.bits, stop - skipped)[:, start:].T)
        return np.concatenate(zeros).astype(np.float32) + np.float32(self.levels.least)

    def fit(self, parts: Parts, first: int, lows: Array, highs: Array, W: Array, largest: float) -> Fit:
        """Return 2·max|w| / (2^b - 1), or (max - min) / (2^b - 1) with zero points, in the dtype of the scales."""
        lows, highs = np.minimum(lows, 0), np.maximum(highs, 0)
        dtype = self.module.specs["weight_scale"].dtype
        steps = np.float32(2**self.bits - 1)
        span = highs - lows if self.zero else np.maximum(-lows, highs) * np.float32(2)
        kept = as_stored(span / steps, dtype)
        scales = numbers(kept, dtype)
        kept = np.where(scales == 0, as_stored(np.array([EPS[dtype]], np.float32), dtype), kept)
        if not self.zero:
            return Fit(numbers(kept, dtype), kept)
        least, most = -(2.0 ** (self.bits - 1)), 2.0 ** (self.bits - 1) - 1
        with np.errstate(divide="ignore", invalid="ignore"):
            zeros = np.nan_to_num(np.float32(least) - lows / scales)  # 0 where all numbers are 0, as the library has it
        if self.module.specs["weight_zero_point"].dtype == "U8":
            least = 0
        return Fit(numbers(kept, dtype), kept, np.rint(np.clip(zeros, least, most)))

    def packed(self, codes: Array) -> Array:
        """Return rows of codes as rows of bytes."""
        width = self.module.specs[self.codes_part].shape[-1]
        return pack(codes, self.bits, 4 * width) if self.codes_part == "weight_packed" else codes

    def parts_of(self, packed: Array, fit: Fit | None) -> Mapping[str, Array]:
        """Return codes, scales and zero points as they are stored."""
        spec = self.module.specs[self.codes_part]
        codes = packed.view("<i4" if spec.dtype == "I32" else "<i1").reshape(spec.shape)
        made = {self.codes_part: codes, **self.new_scales(fit)}
        if fit is not None and fit.zeros is not None:
            spec = self.module.specs[self.zero_part]
            made[self.zero_part] = self._stored_zeros(fit.zeros, spec.dtype).reshape(spec.shape)
        return made

    def _stored_zeros(self, zeros: Array, dtype: str) -> Array:
        if self.zero == "plain":
            whole = {"I8": np.int8, "U8": np.uint8}.get(dtype)
            return zeros.astype(whole) if whole else as_stored(zeros, dtype)
        codes = (zeros - np.float32(self.levels.least)).astype(np.uint8).reshape(-1, self.shape[-2], self.groups)
        nbytes = 4 * -(-self.shape[-2] * self.bits // 32)
        along = codes.transpose(0, 2, 1).reshape(-1, self.shape[-2])
        words = pack(np.ascontiguousarray(along), self.bits, nbytes).view("<i4").reshape(len(codes), self.groups, -1)
        return words.transpose(0, 2, 1)


def _widened(stored: Array, dtype: str) -> Array:
    """Return stored floats or small integers in float32."""
    return stored.astype(np.float32) if dtype in ("I8", "U8") else numbers(stored, dtype)
