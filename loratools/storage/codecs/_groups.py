"""Weights whose codes lie row by row, a scale for each group of them: W = (level(code) - zero)·scale.

A group is `height` rows by `width` columns. What a scheme adds is where codes, scales and zero points lie
(`Groups.stored`), and how scales that fit new numbers are made and stored (`Groups.fit`, `Groups.parts_of`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np

from loratools.linalg.native import codes as native
from loratools.storage.codecs import Encoding, Parts
from loratools.storage.codecs._levels import INT4, Levels
from loratools.storage.codecs._packed import unpack
from loratools.storage.codecs.floats import Array


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """Rows as they are stored: `codes` uint8 (n, columns), `scales` and `zeros` float32 (n, groups)."""

    codes: Array
    scales: Array
    zeros: Array | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """Rows as they are stored, code beside code from each row's first byte: `octets` uint8 (n, bytes), of `bits` each.

    `scales` and `zeros` are float32 (n, groups).
    """

    octets: Array
    bits: int
    scales: Array
    zeros: Array | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """Scales that fit numbers: `scales` and `zeros` as decoding uses them, float32 (row groups, groups).

    `kept` are the scales in the form in which they are stored; `number` is that of the whole tensor, where there is one
    and it is new. A library may round to the nearest other numbers than it is given, `W`, by other scales than it
    stores, `by`, (n, groups).
    """

    scales: Array
    kept: Array
    zeros: Array | None = None
    number: Array | None = None
    W: Array | None = None
    by: Array | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Groups(Encoding):
    """Codes of `levels` in groups of `height` × `width`; `columns_of` has the group of each column where it is no run.

    `codes_part` is the part that holds the codes, `scale_part` the one of the scales; `passes` says that new scales
    depend on the whole tensor.
    """

    scale_part: ClassVar[str] = "weight_scale"

    levels: Levels = INT4
    height: int = 1
    width: int = 1
    codes_part: str = "weight_packed"
    columns_of: Array | None = None
    passes: bool = False

    @property
    def rows(self) -> int:
        """All sides but the last, joined."""
        return prod(self.shape[:-1])

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return -(-self.columns // self.width)

    def stored(self, parts: Parts, first: int, count: int) -> Stored:
        """Return so many rows from `first` on."""
        rows = self.packed_rows(parts, first, count)
        if rows is None:
            raise NotImplementedError(f"{type(self).__name__} has neither stored nor packed_rows")
        return Stored(unpack(rows.octets, rows.bits, self.columns).copy(), rows.scales, rows.zeros)

    def packed_rows(self, parts: Parts, first: int, count: int) -> Packed | None:
        """Return so many rows from `first` on before they are unpacked, in memory that the next call may overwrite.

        None, the default, where codes are not simply one beside the other: then the scheme has its own `stored`.
        """
        return None

    @abstractmethod
    def fit(self, parts: Parts, first: int, lows: Array, highs: Array, W: Array, largest: float) -> Fit:
        """Return scales for groups of these extremes, (row groups, groups).

        W are their numbers, rows (n, columns) from `first` on; `largest` is the largest magnitude of all tiles where
        `passes`, else 0.
        """

    def kept(self, parts: Parts) -> Array:
        """Return all scales as they are stored, in the form of `Fit.kept`."""
        return parts.whole(self.scale_part).reshape(-1, self.groups)

    def new_scales(self, fit: Fit | None) -> dict[str, Array]:
        """Return the part of the scales as it is stored, where they are new; else nothing."""
        return {} if fit is None else {self.scale_part: fit.kept.reshape(self.module.specs[self.scale_part].shape)}

    @abstractmethod
    def packed(self, codes: Array) -> Array:
        """Return rows of codes as rows of bytes."""

    @abstractmethod
    def parts_of(self, packed: Array, fit: Fit | None) -> Mapping[str, Array]:
        """Return the stored parts of all rows of codes, and of all scales and zero points where those are new."""

    def decode(self, parts: Parts, first: int, out: Array) -> None:
        """Write (level - zero)·scale."""
        rows = self.packed_rows(parts, first, len(out))
        if rows is None:
            self.numbers(self.stored(parts, first, len(out)), out)
        elif not self._decode_packed(rows, out):
            self.numbers(Stored(unpack(rows.octets, rows.bits, self.columns), rows.scales, rows.zeros), out)

    def _decode_packed(self, rows: Packed, out: Array) -> bool:
        """Write what rows stand for in C, and return True; False where it is not made for them."""
        if rows.bits not in (4, 8) or len(self.levels.table) != 1 << rows.bits or self.columns_of is not None:
            return False
        form = "low first" if rows.bits == 4 else self.byte_form
        width = self.width if rows.scales.shape[1] > 1 else None
        return native.decode(
            rows.octets, form, self.levels.table, out, scales=rows.scales, zeros=rows.zeros, width=width
        )

    @property
    def byte_form(self) -> str:
        """The form of codes of a byte, as `linalg.native.codes` names it."""
        return "I8" if self.levels.table[255] == -1 else "bytes"

    def numbers(self, stored: Stored, out: Array) -> None:
        """Write what rows stand for."""
        np.take(self.levels.table, stored.codes, out=out, mode="clip")
        if stored.zeros is not None:
            self.apply(np.subtract, out, stored.zeros)
        self.apply(np.multiply, out, stored.scales)

    def places(self, W: Array, stored: Stored) -> Array:
        """Return where numbers lie among the levels, (n, columns): the inverse of `numbers`, unrounded."""
        x = W.copy()
        self.apply(np.divide, x, np.where(stored.scales == 0, np.float32(1), stored.scales))
        if stored.zeros is not None:
            self.apply(np.add, x, stored.zeros)
        return x

    def apply(self, operation: np.ufunc, values: Array, of_groups: Array) -> None:
        """Change values, (n, columns), in place by a number for each group of their columns, (n, groups)."""
        n, groups = of_groups.shape
        if self.columns_of is not None:
            operation(values, of_groups[:, self.columns_of], out=values)
        elif groups == 1:
            operation(values, of_groups, out=values)
        elif groups * self.width == values.shape[1] and values.flags.c_contiguous:
            blocks = values.reshape(n, groups, self.width)
            operation(blocks, of_groups[:, :, None], out=blocks)
        else:
            operation(values, np.repeat(of_groups, self.width, axis=1)[:, : values.shape[1]], out=values)

    def extremes(self, W: Array, first: int) -> tuple[Array, Array]:
        """Return the least and the largest number of each group of these rows, (row groups, groups)."""
        if self.columns_of is not None:
            order = np.argsort(self.columns_of, kind="stable")
            present, starts = np.unique(self.columns_of[order], return_index=True)
            W = W[:, order]
        else:
            starts = np.arange(0, self.columns, self.width)
            present = np.arange(self.groups)
        lows, highs = np.minimum.reduceat(W, starts, axis=1), np.maximum.reduceat(W, starts, axis=1)
        if self.height > 1:
            edges, _ = self.of_rows(first, len(W))
            lows, highs = np.minimum.reduceat(lows, edges, axis=0), np.maximum.reduceat(highs, edges, axis=0)
        if len(present) < self.groups:  # some have no columns
            every = np.zeros((2, len(lows), self.groups), np.float32)
            every[:, :, present] = lows, highs
            lows, highs = every
        return lows, highs

    def of_rows(self, first: int, count: int) -> tuple[Array, Array]:
        """Return the first of these rows in each group of rows, and the group of each row; both are counted from 0."""
        of_row = (first + np.arange(count)) // self.height - first // self.height
        return np.flatnonzero(np.diff(of_row, prepend=-1)), of_row
