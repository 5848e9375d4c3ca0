"""Numbers become 8-bit codes of bitsandbytes again, by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from loratools.storage.codecs import Grid, Module, Parts
from loratools.storage.codecs._levels import Draw
from loratools.storage.codecs._scales import read_back, stored
from loratools.storage.codecs.floats import Array


@dataclass(eq=False)
class Int8Encoder:
    """Makes 8-bit codes again, by row; `scales` are the SCB, new on the own grid where a number is beyond it."""

    module: Module
    parts: Parts
    scales: Array  # (rows,)
    grid: Grid
    draw: Draw | None
    codes: Array = field(init=False)
    made: bool = field(init=False, default=False)

    needs_pass = False

    def __post_init__(self) -> None:
        self.codes = self.parts.rows("weight", 0, None).copy()

    def observe(self, first: int, W: Array) -> None:
        """Nothing: a row's scale is known with the row."""

    def encode(self, first: int, W: Array) -> Array:
        """Choose the code nearest to each number, and return what the codes stand for."""
        rows = slice(first, first + len(W))
        old = self.codes[rows]
        dtype = self.module.specs["SCB"].dtype
        if self.grid == "own":
            tops = np.abs(W).max(axis=1)
            beyond = np.isfinite(tops) & (tops > self.scales[rows] * np.float32(1 if self.draw else 127.5 / 127))
            self.scales[rows] = np.where(beyond, read_back(tops, dtype), self.scales[rows])
            self.made |= bool(beyond.any())
        if self.grid == "fresh":
            half = W.astype(np.float16).astype(np.float32)  # the library quantizes the weight in float16
            W = np.where(np.isfinite(half), half, W)
            self.scales[rows] = read_back(np.abs(W).max(axis=1), dtype)
        scales = self.scales[rows][:, None]
        wanted = W * reciprocal(scales, 127)
        exact = np.floor(wanted + self.draw(W.shape)) if self.draw is not None else np.rint(wanted)
        new = np.clip(exact, -127, 127).astype(np.int8)
        if self.grid == "own":
            new = np.where((int8_values(old, scales) == W) | (scales == 0), old, new)
        self.codes[rows] = new
        return int8_values(new, scales)

    def finish(self) -> Mapping[str, Array]:
        """Return the codes, and the scales where they are new."""
        changed = {"weight": self.codes}
        if self.grid == "own" and not self.made:
            return changed
        spec = self.module.specs["SCB"]
        return changed | {"SCB": stored(self.scales, spec.dtype).reshape(spec.shape)}


def int8_values(codes: Array, scales: Array) -> Array:
    """Return q · SCB / 127, multiplied in the library's order."""
    values: Array = codes * scales
    values *= np.float32(1 / 127)
    return values


def reciprocal(scales: Array, one: int = 1) -> Array:
    """Return 1 / scale, or `one` / scale, and 0 for a scale of 0."""
    return np.divide(one, scales, out=np.zeros_like(scales), where=scales != 0)
