"""AWQ in its GEMM layout: 4 bit codes with a scale and a zero point for each group of columns, stored transposed.

W[n, k] = (q[k, n] − z[g, n]) · scales[g, n], g = k // group_size. `qweight` (in, out / 8) and `qzeros`
(groups, out / 8) hold eight rows of the weight in a word, in the order 0, 2, 4, 6, 1, 3, 5, 7; zero points are stored
as they are. AWQ moves a part of the weights into the norms before them: W is that of the model in another basis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loratools.storage.codecs import Encoding, Module, Parts
from loratools.storage.codecs._groups import Fit, Stored
from loratools.storage.codecs._levels import INT4
from loratools.storage.codecs._packed import pack, unpack, words_of
from loratools.storage.codecs._scales import stored as as_stored
from loratools.storage.codecs._transposed import Transposed, check_parts
from loratools.storage.codecs.floats import Array
from loratools.storage.codecs.state import listed
from loratools.storage.codecs.tables import numbers

_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""The nibble of a word that holds row 0, 1, 2, … of its eight."""
_ROWS = (0, 2, 4, 6, 1, 3, 5, 7)
"""The row of its eight that nibble 0, 1, 2, … of a word holds."""


def opened(module: Module) -> Encoding:
    """Return how an AWQ weight is stored; raise `UnsupportedAdapter` for another layout than GEMM, or other bits."""
    check_parts(module)
    statement, specs = module.statement, module.specs
    _check_layout(module)
    qweight, qzeros, scales = (specs[part] for part in ("qweight", "qzeros", "scales"))
    shapes = f"qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)}, scales {list(scales.shape)}"
    if {qweight.dtype, qzeros.dtype} - {"I32", "U32"} or scales.dtype not in ("F16", "BF16", "F32"):
        raise module.refuse(f"its parts are {qweight.dtype}, {qzeros.dtype} and {scales.dtype}, no words and floats")
    if not all(len(spec.shape) == 2 for spec in (qweight, qzeros, scales)):
        raise module.refuse(f"its parts have not the sides of a matrix: {shapes}")
    (columns, _), (groups, rows) = qweight.shape, scales.shape
    if (
        qweight.shape[1] * 8 != rows
        or qzeros.shape != (groups, rows // 8)
        or not groups
        or not columns
        or columns % groups
    ):
        raise module.refuse(f"its parts do not fit each other in 4 bits: {shapes}")
    size, stated = columns // groups, statement.get("group_size", statement.get("q_group_size"))
    whole = groups == 1 and stated in (-1, 0)
    if isinstance(stated, int) and stated != size and not whole and not statement.get("extra_config"):
        raise module.refuse(f"config.json says groups of {stated}, its tensors have {size}: {shapes}")
    label = "AWQ 4 bit, " + ("one group a row" if groups == 1 else f"groups of {size}")
    return Awq(module, (rows, columns), label, 4, (1, size), levels=INT4, width=size, codes_part="qweight")


def plain(statement: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """Return the statement with these modules in `modules_to_not_convert`."""
    return {**statement, "modules_to_not_convert": listed(statement, "modules_to_not_convert", modules)}


def _check_layout(module: Module) -> None:
    """Raise `UnsupportedAdapter` for gemv, gemv_fast, llm-awq and any other layout than GEMM, and for other bits."""
    statement = module.statement
    keys = ("version", "format", "checkpoint_format")
    layouts = {str(statement[key]).lower() for key in keys if statement.get(key)}
    layouts |= {"llm-awq"} & {str(statement.get("backend")).lower()}
    if other := layouts - {"gemm"}:
        raise module.refuse(f"its layout is {', '.join(sorted(other))}, of which only gemm is read")
    bits = statement.get("bits", statement.get("w_bit", 4))
    if bits != 4 and not statement.get("extra_config"):
        raise module.refuse(f"it has {bits} bits, and the layout is known for 4")


@dataclass(frozen=True, slots=True, eq=False)
class Awq(Transposed):
    """Nibbles of eight rows in a word."""

    def stored(self, parts: Parts, first: int, count: int) -> Stored:
        """Return so many rows from `first` on, which are columns of what is stored."""
        zeros = _unpacked(parts.whole("qzeros"), first, count).astype(np.float32) + np.float32(self.levels.least)
        codes = _unpacked(parts.whole("qweight"), first, count)
        return Stored(codes, self.scales(parts, first, count), zeros)

    def fit(self, parts: Parts, first: int, lows: Array, highs: Array, W: Array, largest: float) -> Fit:
        """Return (max − min) / 15, at least 1e-5 / 15, and the zero point −min / scale, as autoawq does.

        autoawq moves weights into norms and clips before that, by activations; none of it is done here.
        """
        step = np.maximum(highs - lows, np.float32(1e-5)) / np.float32(15)
        zeros = np.clip(-np.rint(lows / step), 0, 15) + self.levels.least
        dtype = self.module.specs["scales"].dtype
        kept = as_stored(step, dtype)
        return Fit(numbers(kept, dtype), kept, zeros.astype(np.float32))

    def packed(self, codes: Array) -> Array:
        """Return rows of codes as rows of bytes, two in each, until all rows are there."""
        return pack(codes, 4, -(-self.columns // 2))

    def parts_of(self, packed: Array, fit: Fit | None) -> Mapping[str, Array]:
        """Return codes, scales and zero points transposed, as they are stored."""
        specs = self.module.specs
        words = _packed(unpack(packed, 4, self.columns).T).view(words_of(specs["qweight"].dtype))
        parts = {"qweight": words, **self.new_scales(fit)}
        if fit is not None and fit.zeros is not None:
            codes = (fit.zeros.T - np.float32(self.levels.least)).astype(np.uint8)
            parts["qzeros"] = _packed(codes).view(words_of(specs["qzeros"].dtype))
        return parts


def _unpacked(stored: Array, first: int, count: int) -> Array:
    """Return some rows of a weight, uint8 (count, n), of words that lie transposed, (n, rows / 8)."""
    start, stop = first // 8, -(-(first + count) // 8)
    octets = np.ascontiguousarray(stored[:, start:stop].T).view(np.uint8).reshape(stop - start, len(stored), 4)
    codes = np.empty((stop - start, 8, len(stored)), np.uint8)
    for row, nibble in enumerate(_ORDER):
        np.right_shift(octets[..., nibble // 2], np.uint8(nibble % 2 * 4), out=codes[:, row])
    codes &= np.uint8(15)
    return codes.reshape(-1, len(stored))[first - 8 * start :][:count]


def _packed(codes: Array) -> Array:
    """Return transposed codes, uint8 (n, rows), as bytes of words, (n, rows / 2)."""
    nibbles = codes.reshape(len(codes), -1, 8)[..., _ROWS]
    return pack(nibbles.reshape(len(codes), -1), 4, codes.shape[1] // 2)
