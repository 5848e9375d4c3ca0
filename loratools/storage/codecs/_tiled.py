"""FP8 and FP4 with the scales of their blocks in the order of cuBLAS' tiles, as ComfyUI has them: read only.

A tile has the scales of 128 rows and 4 blocks: 32 rows of 16, in which those of rows r, r + 32, r + 64 and r + 96 stand
side by side. Tiles follow each other row by row, and what the weight does not fill is padding.

    MXFP8   W = q · 2^(scale − 127), blocks of 32
    NVFP4   W = e2m1 · (scale · weight_scale_2), blocks of 16, the first of two numbers in the upper half of a byte
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np

from loratools.storage.codecs import Encoder, Encoding, Grid, Module, Parts
from loratools.storage.codecs.floats import Array
from loratools.storage.codecs.tables import E2M1, table

_ROWS, _BLOCKS = 128, 4


def mxfp8(module: Module) -> Encoding:
    """Return how an MXFP8 weight is stored; raise `UnsupportedAdapter` for scales that do not fit it."""
    weight = module.specs["weight"]
    if weight.dtype != "F8_E4M3" or len(weight.shape) != 2 or not prod(weight.shape) or weight.shape[1] % 32:
        raise module.refuse(f"its format is mxfp8, and its weight {weight.dtype} {list(weight.shape)}")
    _fit(module, weight.shape[0], weight.shape[1] // 32, ("F8_E8M0", "U8"))
    return Tiled(module, weight.shape, "MXFP8 E4M3, blocks of 1 × 32", 8, (1, 32))


def nvfp4(module: Module) -> Encoding:
    """Return how an NVFP4 weight is stored; raise `UnsupportedAdapter` for scales that do not fit it."""
    module.need("weight_scale_2")
    weight, number = module.specs["weight"], module.specs["weight_scale_2"]
    if weight.dtype != "U8" or len(weight.shape) != 2 or not prod(weight.shape) or weight.shape[1] % 8:
        raise module.refuse(f"its format is nvfp4, and its weight {weight.dtype} {list(weight.shape)}")
    if number.dtype != "F32" or number.parameters != 1:
        raise module.refuse(f"its weight_scale_2 is {number.dtype} {list(number.shape)}, and one number was expected")
    rows, columns = weight.shape[0], 2 * weight.shape[1]
    _fit(module, rows, columns // 16, ("F8_E4M3", "U8"))
    return Tiled(module, (rows, columns), "NVFP4, blocks of 16", 4, (1, 16))


def _fit(module: Module, rows: int, blocks: int, expected: tuple[str, ...]) -> None:
    spec = module.specs["weight_scale"]
    wanted = (-(-rows // _ROWS) * _ROWS, -(-blocks // _BLOCKS) * _BLOCKS)
    if spec.dtype not in expected or prod(spec.shape) != prod(wanted):
        found = f"{spec.dtype} {list(spec.shape)}"
        raise module.refuse(f"its weight_scale is {found}, and {expected[0]} {list(wanted)} was expected")


@dataclass(frozen=True, slots=True, eq=False)
class Tiled(Encoding):
    """FP8 or FP4 codes with scales in tiles."""

    def decode(self, parts: Parts, first: int, out: Array) -> None:
        """Write q · scale."""
        stored = parts.joined("weight", first, first + len(out))
        if self.bits == 8:
            np.take(table("F8_E4M3"), stored, out=out, mode="wrap")
        else:
            np.take(E2M1, stored >> 4, out=out[:, ::2])
            np.take(E2M1, stored & 15, out=out[:, 1::2])
        assert self.group is not None
        inner = out.reshape(len(out), -1, self.group[1])
        inner *= self._scales(parts)[first : first + len(out), :, None]

    def encoder(self, parts: Parts, grid: Grid, draw: Callable[[tuple[int, ...]], Array] | None = None) -> Encoder:
        """Raise `UnsupportedAdapter`."""
        raise self.module.refuse(
            f"{self.label} of ComfyUI is read, and not written", "Use --quantized dequantize or partial."
        )

    def _scales(self, parts: Parts) -> Array:
        """Return the scales by row and block."""
        assert self.group is not None
        rows, blocks = self.shape[0], self.shape[1] // self.group[1]
        tiles = parts.whole("weight_scale").reshape(-(-rows // _ROWS), -(-blocks // _BLOCKS), 32, 4, _BLOCKS)
        in_order = tiles.transpose(0, 3, 2, 1, 4).reshape(-(-rows // _ROWS) * _ROWS, -1)[:rows, :blocks]
        if self.bits == 8:
            return table("F8_E8M0")[in_order]
        scales: Array = table("F8_E4M3")[in_order] * parts.numbers("weight_scale_2").reshape(1, 1)
        return scales
