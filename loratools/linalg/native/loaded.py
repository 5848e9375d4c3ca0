"""Compiled libraries whose functions take a structure and a width of vectors: those of delta.c and residual.c."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def load(path: Path, width: str, sizes: Mapping[str, type[ctypes.Structure]], calls: Sequence[str]) -> tuple[Any, int]:
    """Return a compiled library and the numbers of its widest vectors; None and 0 where it does not serve.

    Functions are named without their `loratools_`. The one called `width` says how many numbers a vector has, those in
    `sizes` how many bytes a structure, which must be as many as here: else the library is of another source. `calls`
    take a structure's address and a width, and return nothing, or a number of the size of an address.
    """
    try:
        library = ctypes.CDLL(str(path))
    except OSError:  # not compiled here
        return None, 0
    names = [width, *sizes, *calls]
    if not all(hasattr(library, f"loratools_{name}") for name in names):
        return None, 0
    for name in names:
        getattr(library, f"loratools_{name}").restype = ctypes.c_size_t
    if any(getattr(library, f"loratools_{name}")() != ctypes.sizeof(structure) for name, structure in sizes.items()):
        return None, 0
    for name in calls:
        getattr(library, f"loratools_{name}").argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return library, int(getattr(library, f"loratools_{width}")())


def widths(widest: int) -> list[int]:
    """Return the widths of vectors that serve where `widest` does, in float32 numbers; of 4 there is no other."""
    return [width for width in (16, 8, 4) if width <= widest and (width > 4 or widest == 4)]
