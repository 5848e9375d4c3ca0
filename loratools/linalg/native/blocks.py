"""`blocks.h`: the steps of a block Krylov iteration in C, one call each."""

from __future__ import annotations

import ctypes
from functools import cache
from threading import local
from typing import Any

import numpy as np

from loratools.linalg.native import delta, loaded

Array = np.ndarray[Any, np.dtype[Any]]

MOST_BLOCK = 64  # as in blocks.h
KEPT = 1 << 21
"""Numbers of float32 that a thread holds at most from one iteration to the next: fresh pages cost as much as a step."""

_OWN = local()


class _Step(ctypes.Structure):
    """The same fields, in the same order, as `Step` in blocks.h, where they are explained."""

    _fields_ = (
        ("D", ctypes.c_void_p),
        *((name, ctypes.c_size_t) for name in ("stride", "rows", "columns", "low", "turned", "wide")),
        *((name, ctypes.c_void_p) for name in ("V", "Y", "G", "S", "W", "back", "spare", "small", "room")),
        *((name, ctypes.c_size_t) for name in ("width", "block", "onward", "whole", "known", "state")),
    )


@cache
def _library() -> tuple[Any, int]:
    return loaded.load(delta.LIBRARY, "delta_width", {"step_size": _Step}, ["step"])


def available() -> bool:
    """Tell whether the C code was compiled at installation, and serves this processor."""
    return delta.available() and _library()[1] > 0


class Steps:
    """V (n, k) orthonormal, Y = D·V and G = YᵀY in float64, which grow by a block of columns at a time.

    Blocks of G two apart are zero but for rounding, and are taken as zeros, unless products are in bfloat16. The arrays
    are valid until this thread begins with another matrix.
    """

    def __init__(self, rows: Array, turned: bool, block: int, room: int) -> None:
        """Begin with a matrix D (m, n), m ≥ n, that is `rows`, or their transpose where `turned`.

        `rows` are float32, or the bits of bfloat16 as `delta.times` takes them, each contiguous. `block` is a multiple
        of 16, at most 64; there is `room` for so many columns before V and Y are copied.
        """
        n, m = sorted(rows.shape)
        if block % delta.LANES or not 0 < block <= MOST_BLOCK or ((rows.shape == (m, n)) == turned and m != n):
            raise ValueError(f"a matrix {rows.shape}, turned: {turned}, does not take steps of {block} columns")
        low = rows.dtype == np.uint16
        self.rows, self.block, self._shape = rows, block, (m, n)
        self._call = _Step(
            rows.ctypes.data, rows.strides[0] // rows.itemsize, *rows.shape, low, turned, block=block, whole=low
        )
        self._V: Array = np.empty((0, 0), np.float32)
        self._Y = self._back = self._G = self._V
        self._make(max(room, block))

    def _make(self, wide: int) -> None:
        """Make room for `wide` columns."""
        (m, n), b, call = self._shape, self.block, self._call
        k, held = call.width, (self._V, self._Y, self._back, self._G)
        products = (m + 1) * b + delta.TILE * delta.ASIDE * call.low
        room = max(products, 2 * delta.FEW * (wide + 2 * delta.LANES + b))
        parts = [2 * wide * wide, 2 * (wide + 6 * b) * b, room, n * wide, m * wide, n * b, m * b, m * b]
        starts = np.cumsum([0, *(-(-part // delta.LINE) * delta.LINE for part in parts)]).tolist()
        self._memory, first = _memory(starts[-1], fresh=k > 0)
        G, small, room_at, V, Y, W, back, spare = (
            self._memory[first + start : first + start + part] for start, part in zip(starts[:-1], parts, strict=True)
        )
        self._V, self._Y, self._back = V.reshape(n, wide), Y.reshape(m, wide), back
        self._G = G.view(np.float64).reshape(wide, wide)
        if k:
            self._V[:, :k], self._Y[:, :k], self._G[:k, :k] = held[0][:, :k], held[1][:, :k], held[3][:k, :k]
            back[:] = held[2]
        call.wide = wide
        call.V, call.Y, call.G, call.W = (array.ctypes.data for array in (V, Y, G, W))
        call.back, call.spare, call.small, call.room = (array.ctypes.data for array in (back, spare, small, room_at))

    @property
    def width(self) -> int:
        """Return k, the number of columns so far."""
        return int(self._call.width)

    @property
    def V(self) -> Array:
        """Return the columns so far (n, k)."""
        return self._V[:, : self.width]

    @property
    def Y(self) -> Array:
        """Return their products with D (m, k)."""
        return self._Y[:, : self.width]

    @property
    def G(self) -> Array:
        """Return YᵀY (k, k)."""
        return self._G[: self.width, : self.width]

    def step(self, S: Array | None = None, *, onward: bool = True, width: int | None = None) -> bool:
        """Add a block: at first of DᵀS, S (m, block) in float32, then of Dᵀ·(last block of Y).

        `onward` forms what the next step needs in the same pass over D. `width` is one of `delta.widths()`, by default
        the widest. False, and nothing added, where columns depend on each other.
        """
        if (S is None) == (self.width == 0):
            raise ValueError("an iteration begins with S, once")
        if S is not None and (S.shape != (self._shape[0], self.block) or S.dtype != np.float32):
            raise ValueError(f"S is {S.dtype} {S.shape}, and not float32 {self._shape[0], self.block}")
        if self.width + self.block > self._call.wide:
            self._make(self.width + 4 * self.block)
        S = None if S is None else np.ascontiguousarray(S)
        self._call.S, self._call.onward = None if S is None else S.ctypes.data, onward
        library, widest = _library()
        library.loratools_step(ctypes.byref(self._call), width or widest)
        return not self._call.state


def _memory(numbers: int, *, fresh: bool) -> tuple[Array, int]:
    """Return memory for so many float32, and where in it a line begins; this thread's unless it is `fresh`."""
    held: Array | None = None if fresh else getattr(_OWN, "memory", None)
    if held is None or len(held) < numbers + delta.LINE:
        held = np.empty(numbers + delta.LINE, np.float32)
        if numbers <= KEPT and not fresh:
            _OWN.memory = held
    return held, -(held.ctypes.data // 4) % delta.LINE
