"""Codes of groups made again, on the stored scales or on those that fit; `_groups` says how such weights are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from loratools.storage.codecs import Encoder, Grid, Parts
from loratools.storage.codecs._groups import Fit, Groups, Stored
from loratools.storage.codecs._levels import Draw, reach
from loratools.storage.codecs.floats import Array

_NONE = np.empty((0, 0), np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Grouped(Groups):
    """Codes in groups that can be made again."""

    def encoder(self, parts: Parts, grid: Grid, draw: Draw | None = None) -> Encoder:
        """Return what makes codes again; see `Encoding.encoder`."""
        return _Encoder(self, parts, grid, draw)


class _Encoder:
    """Makes codes of rows, on the stored scales or on those that fit.

    On the own grid a group keeps its scale and zero point, unless one of its changed numbers would round to beyond the
    outermost levels: clipped, a large change would be lost. Such a group gets those that fit it, within the number of
    the whole tensor, which stays; where these reach no farther, its numbers are clipped.
    """

    def __init__(self, encoding: Groups, parts: Parts, grid: Grid, draw: Draw | None) -> None:
        self._fresh = grid == "fresh"
        self._encoding = encoding if self._fresh else replace(encoding, passes=False)
        self._parts, self._draw = parts, draw
        self._packed: Array | None = None
        self._fit: Fit | None = None
        self._zeros: Array | None = None
        self._sides = (-(-encoding.rows // encoding.height), encoding.groups)
        shape = self._sides if self.needs_pass else (0, 0)
        self._lows, self._highs = np.full(shape, np.inf, np.float32), np.full(shape, -np.inf, np.float32)
        self._changed = np.zeros(shape, bool)
        self._limits = reach(encoding.levels, at_random=draw is not None)
        self._room = np.float32(0 if draw is None else 1 / max(encoding.levels.most - encoding.levels.least - 1, 1))

    @property
    def needs_pass(self) -> bool:
        """Whether a group has more rows than a tile may have, or something is of the whole tensor."""
        return self._encoding.passes or self._encoding.together < self._encoding.height

    def observe(self, first: int, W: Array) -> None:
        """Take in the extremes of groups, and on the own grid which of them change."""
        encoding = self._encoding
        span, (lows, highs) = self._span(first, W), encoding.extremes(W, first)
        np.minimum(self._lows[span], lows, out=self._lows[span])
        np.maximum(self._highs[span], highs, out=self._highs[span])
        if not self._fresh:
            before = np.empty_like(W)
            encoding.decode(self._parts, first, before)
            self._changed[span] |= self._has(before != W, first)

    def encode(self, first: int, W: Array) -> Array:
        """Make codes of rows, and return what they stand for."""
        encoding, before = self._encoding, np.empty(W.shape, np.float32)
        old = encoding.stored(self._parts, first, len(W))
        encoding.numbers(old, before)
        same = before == W  # two codes may stand for 0, and rounding at random may leave what is exact
        new, x = self._fitted(first, W, old, same) if self._fresh else self._widened(first, W, old, same)
        codes = np.where(same, old.codes, encoding.levels.codes(x, self._draw))
        packed = encoding.packed(codes)
        if self._packed is None:
            self._packed = np.empty((encoding.rows, packed.shape[1]), np.uint8)
        self._packed[first : first + len(W)] = packed
        if new.zeros is not None:
            if self._zeros is None:
                self._zeros = np.empty(self._sides, np.float32)
            self._zeros[self._span(first, W)] = new.zeros[encoding.of_rows(first, len(W))[0]]
        encoding.numbers(replace(new, codes=codes), before)
        return before

    def finish(self) -> Mapping[str, Array]:
        """Return the codes, and the scales and zero points where some are new."""
        fit = None if self._fit is None else replace(self._fit, zeros=self._zeros)
        return self._encoding.parts_of(_NONE.astype(np.uint8) if self._packed is None else self._packed, fit)

    def _fitted(self, first: int, W: Array, old: Stored, same: Array) -> tuple[Stored, Array]:
        """Return scales that fit, and the places of W by them; `same` becomes False where they are not the old ones."""
        encoding = self._encoding
        largest = float(max(self._highs.max(initial=0), -self._lows.min(initial=0))) if self.needs_pass else 0.0
        fit = encoding.fit(self._parts, first, *self._extremes(first, W), W, largest)
        if self._fit is None:
            kept = np.zeros((self._sides[0], *fit.kept.shape[1:]), fit.kept.dtype)
            self._fit = Fit(_NONE, kept, number=fit.number)
        self._fit.kept[self._span(first, W)] = fit.kept
        of_row = encoding.of_rows(first, len(W))[1]
        new = replace(old, scales=fit.scales[of_row], zeros=None if fit.zeros is None else fit.zeros[of_row])
        moved = new.scales != old.scales
        if new.zeros is not None and old.zeros is not None:
            moved |= new.zeros != old.zeros
        same &= ~self._spread(moved, W)
        return new, self._places(W, new, fit, of_row)

    def _widened(self, first: int, W: Array, old: Stored, same: Array) -> tuple[Stored, Array]:
        """Return scales, new for groups beyond the levels, and the places of W; `same` becomes False in those."""
        encoding, (least, most) = self._encoding, self._limits
        x = encoding.places(W, old)
        if not self.needs_pass and x.min() >= least and x.max() <= most and old.scales.all():
            return old, x
        span, (edges, of_row) = self._span(first, W), encoding.of_rows(first, len(W))
        lows, highs = self._extremes(first, W)
        own = Stored(old.codes[:0], old.scales[edges], None if old.zeros is None else old.zeros[edges])
        excess = self._excess(lows, highs, own)
        needed = (excess > 0) & (self._changed[span] if self.needs_pass else self._has(~same, first))
        if not needed.any():
            return old, x
        with np.errstate(over="ignore", invalid="ignore"):
            room = np.maximum(-lows, highs) * self._room  # at random none may lie beyond, also by a rounded zero point
            fit = encoding.fit(self._parts, first, lows - room, highs + room, W, 0.0)
            nearer = self._excess(lows, highs, replace(own, scales=fit.scales, zeros=fit.zeros)) < excess
        if not (needed := needed & nearer & np.isfinite(fit.scales)).any():
            return old, x
        if self._fit is None:
            self._fit = Fit(_NONE, encoding.kept(self._parts).copy())
        self._fit.kept[span][needed] = fit.kept[needed]
        new = replace(old, scales=np.where(needed, fit.scales, own.scales)[of_row])
        if own.zeros is not None and fit.zeros is not None:
            new = replace(new, zeros=np.where(needed, fit.zeros, own.zeros)[of_row])
        moved = self._spread(needed[of_row], W)
        same &= ~moved
        return new, np.where(moved, self._places(W, new, fit, of_row), x)

    def _places(self, W: Array, new: Stored, fit: Fit, of_row: Array) -> Array:
        """Return the places of W by new scales, or as the library has them."""
        if fit.by is None or fit.W is None or self._draw:
            return self._encoding.places(W, new)
        return self._encoding.places(fit.W, replace(new, scales=fit.by[of_row]))

    def _excess(self, lows: Array, highs: Array, of_groups: Stored) -> Array:
        """Return how far the numbers of each group lie beyond what its scale expresses; by the scale 0, infinitely."""
        least, most = self._limits
        each = replace(self._encoding, shape=lows.shape, height=1, width=1, columns_of=None)  # a column for each group
        x = np.stack([each.places(edge, of_groups) for edge in (lows, highs)])
        excess = np.maximum(least - x, x - most).max(axis=0).clip(0) * np.abs(of_groups.scales)
        return np.where(of_groups.scales == 0, np.float32(np.inf), excess)

    def _extremes(self, first: int, W: Array) -> tuple[Array, Array]:
        if not self.needs_pass:
            return self._encoding.extremes(W, first)
        return self._lows[self._span(first, W)], self._highs[self._span(first, W)]

    def _has(self, values: Array, first: int) -> Any:
        """Tell for each group whether something in it is True."""
        return self._encoding.extremes(values.astype(np.float32), first)[1] > 0

    def _spread(self, of_groups: Array, W: Array) -> Any:
        """Return for each number what is True of its group, (n, groups)."""
        spread = np.zeros(W.shape, np.float32)
        self._encoding.apply(np.add, spread, of_groups.astype(np.float32))
        return spread != 0

    def _span(self, first: int, W: Array) -> slice:
        """Return the groups of rows that these rows are of."""
        height = self._encoding.height
        return slice(first // height, -(-(first + len(W)) // height))
