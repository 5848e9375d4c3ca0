"""The types of ggml's tensors: number, elements of a block, bytes of a block; and which 16-bit file is which number.

The table is that of the `gguf` package (`GGML_QUANT_SIZES`), which a test holds it against; bases open without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, eq=False)
class Type:
    """One type: its name, its number in a file, and the elements and bytes of one block."""

    name: str
    number: int
    block: int
    nbytes: int

    def row(self, columns: int) -> int:
        """Return the bytes of a row; raise `ValueError` where it is not whole blocks."""
        if columns % self.block:
            raise ValueError(f"rows of {columns} numbers are not whole blocks of {self.block}, as {self.name} needs")
        return columns // self.block * self.nbytes


_ROWS = (
    ("F32", 0, 1, 4), ("F16", 1, 1, 2), ("Q4_0", 2, 32, 18), ("Q4_1", 3, 32, 20), ("Q5_0", 6, 32, 22),
    ("Q5_1", 7, 32, 24), ("Q8_0", 8, 32, 34), ("Q2_K", 10, 256, 84), ("Q3_K", 11, 256, 110), ("Q4_K", 12, 256, 144),
    ("Q5_K", 13, 256, 176), ("Q6_K", 14, 256, 210), ("IQ2_XXS", 16, 256, 66), ("IQ2_XS", 17, 256, 74),
    ("IQ3_XXS", 18, 256, 98), ("IQ1_S", 19, 256, 50), ("IQ4_NL", 20, 32, 18), ("IQ3_S", 21, 256, 110),
    ("IQ2_S", 22, 256, 82), ("IQ4_XS", 23, 256, 136), ("I8", 24, 1, 1), ("I16", 25, 1, 2), ("I32", 26, 1, 4),
    ("I64", 27, 1, 8), ("F64", 28, 1, 8), ("IQ1_M", 29, 256, 56), ("BF16", 30, 1, 2), ("TQ1_0", 34, 256, 54),
    ("TQ2_0", 35, 256, 66), ("MXFP4", 39, 32, 17), ("NVFP4", 40, 64, 36), ("Q1_0", 41, 128, 18),
)  # fmt: skip

TYPES: Mapping[str, Type] = {row[0]: Type(*row) for row in _ROWS}
"""Name -> type."""

BY_NUMBER: Mapping[int, Type] = {each.number: each for each in TYPES.values()}

NUMBERS = frozenset({"F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"})
"""Types each of whose elements is a number of its own."""

CODES = frozenset(TYPES) - NUMBERS
"""Quantized types."""

WRITTEN = frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"})
"""Quantized types that the `gguf` package makes; K- and IQ-quants are made by ggml alone."""

FILE_TYPES: Mapping[str, int] = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15,
    "Q5_K": 17, "Q6_K": 18, "BF16": 32,
}  # fmt: skip
"""Type of most numbers -> `general.file_type`; of the K-quants the medium mixes."""
