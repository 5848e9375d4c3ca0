"""HQQ: integers of 1 to 8 bits packed down the rows of a grouped matrix, W = (q - zero)·scale; read only.

The weight is seen as a matrix of groups: a row is a group (axis 1, [n, group_size]), or a column is (axis 0,
[group_size, n]). Its rows lie in as many slots as codes fit a word, one slot after the other, the first in the highest
bits: of 4 bits, row r and row r + n/2 share a byte. 3 bits lie ten in an int32, the rows filled up to a multiple of
ten. All that describes them is tensors of their own: `shape`, `group_size`, `axis`, `nbits`, `packing`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from loratools.decisions import warned
from loratools.storage import dtypes
from loratools.storage.codecs import Encoding, Module, Parts
from loratools.storage.codecs.floats import Array
from loratools.storage.codecs.state import listed
from loratools.storage.codecs.tables import numbers

_LONGEST = 64

# name of a packing -> bytes of a word, bits between slots, slots, and by how many bits the first slot is shifted
_PACKINGS = {
    "8bit_u8": (1, 8, 1, 0), "4bit_u8": (1, 4, 2, 4), "3bit_32": (4, 3, 10, 27), "2bit_u8": (1, 2, 4, 6),
    "1bit_u8": (1, 1, 8, 7),
}  # fmt: skip
_USUAL = {8: "8bit_u8", 6: "8bit_u8", 5: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}


def opened(module: Module) -> Encoding:
    """Return how a weight of HQQ is stored; raise `UnsupportedAdapter` where what describes it does not fit it."""
    module.need("W_q", "scale", "zero", "shape", "nbits")
    if _number(module, "quant_scale", 0) or _number(module, "quant_zero", 0):
        raise module.refuse("its scales or zero points are quantized themselves")
    shape = tuple(int(side) for side in _integers(module, "shape"))
    if len(shape) != 2 or min(shape) < 1:
        raise module.refuse(f"its shape says {list(shape)}")
    bits, axis = _number(module, "nbits", 0), int(_number(module, "axis", 0))
    if axis not in (0, 1):
        raise module.refuse(f"its axis says {axis}")
    group = int(_number(module, "group_size", shape[axis]))
    name = _text(module, "packing") or _USUAL.get(round(bits)) or ""
    packing = next((each for each in _PACKINGS if each == name), None)
    width = 2 if bits == _TERNARY else int(bits)
    if packing is None or not 1 <= width <= _PACKINGS[packing][1]:
        raise module.refuse(f"it says {bits:g} bits in the packing {name!r}")
    total = prod(shape)
    if group < 1 or total % group:
        raise module.refuse(f"its group_size {group} does not divide the {total} numbers of {list(shape)}")
    word, _, slots, _ = _PACKINGS[packing]
    rows, columns = (total // group, group) if axis == 1 else (group, total // group)
    held = module.specs["W_q"].nbytes
    if held != -(-rows // slots) * columns * word or (rows % slots and word == 1):
        raise module.refuse(f"its W_q has {held} bytes, and {list(shape)} in groups of {group} were expected")
    for part in ("scale", "zero"):
        spec = module.specs[part]
        if spec.parameters not in (1, total // group) or spec.dtype not in dtypes.FLOATS:
            raise module.refuse(f"its {part} is {spec.dtype} {list(spec.shape)}, and it has {total // group} groups")
    label = f"HQQ, {bits:.3g} bits, groups of {group} along axis {axis}"
    sides = (1, group) if axis == 1 else (max(1, shape[0] * group // total), 1)
    return Hqq(module, shape, label, width, sides, 1, packing, axis, group)


def plain(statement: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """Return the statement with these modules in `skip_modules`."""
    warned(
        "the modules that are 16 bit now stand in `skip_modules` of config.json by their paths; transformers tells "
        "layers of HQQ by tags that all blocks share, and may not load a model of which a part is quantized"
    )
    return {**statement, "skip_modules": listed(statement, "skip_modules", modules)}


_TERNARY = float(np.float32(1.58))


def _integers(module: Module, part: str) -> Array:
    spec = module.specs[part]
    if spec.dtype not in ("I64", "I32", "U8", "F32") or spec.parameters > _LONGEST:
        raise module.refuse(f"its {part} is {spec.dtype} {list(spec.shape)}, and a few numbers were expected")
    return module.read(part).reshape(-1)


def _number(module: Module, part: str, usual: float) -> float:
    """Return the number that a part is, `usual` where there is no such part."""
    if part not in module.specs:
        return usual
    found = _integers(module, part)
    if len(found) != 1 or not np.isfinite(found[0]):
        raise module.refuse(f"its {part} is {found[:4].tolist()}, and one number was expected")
    return float(found[0])


def _text(module: Module, part: str) -> str:
    if part not in module.specs:
        return ""
    return "".join(chr(int(n)) if 32 <= n < 127 else "?" for n in _integers(module, part))


@dataclass(frozen=True, slots=True, eq=False)
class Hqq(Encoding):
    """Codes in a `packing`, in groups of `size` along `axis` of the grouped matrix."""

    packing: str = "4bit_u8"
    axis: int = 0
    size: int = 64

    def decode(self, parts: Parts, first: int, out: Array) -> None:
        """Write (q - zero)·scale."""
        start, stop = first * self.columns, first * self.columns + out.size
        flat = out.reshape(-1) if out.flags.c_contiguous else np.empty(out.size, np.float32)
        self._codes(parts, start, stop, flat)
        groups = prod(self.shape) // self.size
        for part, operation in (("zero", np.subtract), ("scale", np.multiply)):
            of_groups = numbers(parts.whole(part).reshape(-1), self.module.specs[part].dtype)
            if len(of_groups) == 1:
                operation(flat, of_groups, out=flat)
            elif self.axis == 1:
                left, right = start // self.size, -(-stop // self.size)
                spread = np.repeat(of_groups[left:right], self.size)
                operation(flat, spread[start - left * self.size : stop - left * self.size], out=flat)
            else:
                operation(flat, of_groups[np.arange(start, stop) % groups], out=flat)
        if not out.flags.c_contiguous:
            out[...] = flat.reshape(out.shape)

    def _codes(self, parts: Parts, start: int, stop: int, out: Array) -> None:
        """Write the codes [`start`, `stop`) of the grouped matrix, row after row; a slot is so many of its rows."""
        word, bits, _, high = _PACKINGS[self.packing]
        slot = self.module.specs["W_q"].nbytes // word
        done = start
        while done < stop:
            number, place = divmod(done, slot)
            count = min(stop - done, slot - place)
            raw = parts.raw("W_q", place * word, (place + count) * word).view("<u4" if word == 4 else np.uint8)
            out[done - start : done - start + count] = (raw >> (high - bits * number)) & ((1 << bits) - 1)
            done += count
