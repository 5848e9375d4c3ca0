"""FP8 with scales that multiply: by tensor, by row, or by block, as transformers, fbgemm and ComfyUI store it.

W = q · scale, the scale being that of the element's block: `weight_scale_inv` of transformers' FineGrainedFP8
(DeepSeek, Qwen3-FP8; "inv" or not, it multiplies), `weight_scale` elsewhere. The sides of a block are config.json's
(`weight_block_size`), 128 × 128 where it says nothing; blocks at the edges may be ragged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loratools.storage.codecs import Encoding, Module, Parts
from loratools.storage.codecs.floats import Array
from loratools.storage.codecs.tables import table

_SCALES = ("weight_scale_inv", "weight_scale")
_LARGEST = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}


def opened(module: Module) -> Encoding:
    """Return how an FP8 weight is stored; raise `UnsupportedAdapter` for scales that do not fit it."""
    module.need("weight")
    weight = module.specs["weight"]
    part = next((part for part in _SCALES if part in module.specs), None)
    if part is None:
        raise module.refuse("it has no scale beside it")
    if weight.dtype not in ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ") or len(weight.shape) < 2:
        raise module.refuse(f"its weight is {weight.dtype} {list(weight.shape)}, and FP8 of two sides was expected")
    scale, sides = module.specs[part], weight.shape[-2:]
    block = _block(scale.shape, weight.shape, module.statement.get("weight_block_size"))
    if block is None:
        raise module.refuse(f"its scales {list(scale.shape)} do not fit the weight {list(weight.shape)}")
    by = {sides: "one scale a tensor", (1, sides[1]): "one scale a row"}.get(block, "blocks of {} × {}".format(*block))
    label = f"FP8 {weight.dtype.removeprefix('F8_')}, {by}"
    return Fp8(module, weight.shape, label, 8, block, min(block[0], sides[0]), part)


def plain(statement: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """Return the statement with these modules in `modules_to_not_convert`."""
    return {**statement, "modules_to_not_convert": [*(statement.get("modules_to_not_convert") or ()), *modules]}


def _block(scales: tuple[int, ...], shape: tuple[int, ...], stated: Any) -> tuple[int, int] | None:
    """Return the sides of the block that shares a scale; None where the scales do not fit."""
    rows, columns = shape[-2:]
    stacked = shape[:-2]
    if len(scales) > len(stacked) and scales[: len(stacked)] == stacked:
        scales = scales[len(stacked) :]
    elif stacked:
        return None
    if scales in ((), (1,), (1, 1)):
        return rows, columns
    if scales in ((rows,), (rows, 1)):
        return 1, columns
    if len(scales) != 2:
        return None
    sides = tuple(stated) if isinstance(stated, list | tuple) and len(stated) == 2 else (128, 128)
    if not all(isinstance(side, int) and side > 0 for side in sides):
        return None
    return sides if scales == (-(-rows // sides[0]), -(-columns // sides[1])) else None


@dataclass(frozen=True, slots=True, eq=False)
class Fp8(Encoding):
    """FP8 codes, and scales in the part `scale`."""

    scale: str = ""

    def decode(self, parts: Parts, first: int, out: Array) -> None:
        """Write q · scale."""
        weight = self.module.specs["weight"]
        rows = self.shape[-2]
        done = 0
        while done < len(out):  # one matrix of a stack after another
            matrix, row = divmod(first + done, rows)
            count = min(len(out) - done, rows - row)
            q = self._codes(parts, matrix, row, row + count)
            target = out[done : done + count]
            np.take(table(weight.dtype), q, out=target)
            target *= self._scales(parts, matrix, row, row + count)
            done += count

    def _codes(self, parts: Parts, matrix: int, start: int, stop: int) -> Array:
        if len(self.shape) == 2:
            return parts.rows("weight", start, stop)
        return parts.rows("weight", matrix, matrix + 1).reshape(self.shape[-2:])[start:stop]

    def _scales(self, parts: Parts, matrix: int, start: int, stop: int) -> Array:
        """Return the scale of every element of these rows, as it broadcasts over them."""
        assert self.group is not None
        height, width = self.group
        grid = parts.numbers(self.scale).reshape(-1, -(-self.shape[-2] // height), -(-self.shape[-1] // width))[matrix]
        by_row = grid[np.arange(start, stop) // height]
        return by_row if by_row.shape[1] == 1 else np.repeat(by_row, width, axis=1)[:, : self.shape[-1]]
