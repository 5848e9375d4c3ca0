"""BF16, F16 and F32 in NumPy, which has no BF16: there the bits stand for the numbers, as unsigned integers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from loratools.storage import dtypes
from loratools.storage.dtypes import INFINITY

Array = np.ndarray[Any, np.dtype[Any]]

_EXPONENTS = {"F64": ("<u8", 0x7FF << 52)} | {name: (f"<u{2 + 2 * (name == 'F32')}", n) for name, n in INFINITY.items()}


def is_finite(pieces: Iterable[memoryview], dtype: str) -> bool:
    """Tell whether no number of a stored tensor is NaN or infinite; True for dtypes other than BF16, F16, F32, F64."""
    if dtype not in _EXPONENTS:
        return True
    words, exponent = _EXPONENTS[dtype]
    return all(bool(((np.frombuffer(piece, words) & exponent) != exponent).all()) for piece in pieces)


def numpy_dtype(dtype: str) -> Any:
    """Return the NumPy dtype that holds a stored one; BF16 as its bits."""
    return {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}[dtype]


def exactly(values: Array, dtype: str) -> Array:
    """Return stored values as numbers; BF16 from its bits."""
    return (values.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else values


class Buffers:
    """The memory of one worker thread, reused from tensor to tensor."""

    def __init__(self) -> None:
        self._held: dict[str, Any] = {}

    def of(self, name: str, elements: int, dtype: Any) -> Array:
        """Return an array of so many elements under a name; what it held is lost."""
        nbytes = elements * np.dtype(dtype).itemsize
        held = self._held.get(name)
        if held is None or len(held) < nbytes:
            self._held[name] = held = np.empty(nbytes, np.uint8)
        view: Array = held[:nbytes].view(dtype)
        return view


def largest(values: Array, buffers: Buffers) -> int:
    """Return the bits of the largest magnitude of a tile, which are ordered as the magnitudes are; NaN is the largest.

    `values` is 2-dimensional and contiguous, BF16 as its bits.
    """
    bits: Array = values.view({2: np.uint16, 4: np.uint32}[values.dtype.itemsize])
    scratch = buffers.of("magnitudes", bits.size, bits.dtype).reshape(bits.shape)
    return int(np.bitwise_and(bits, np.iinfo(bits.dtype).max >> 1, out=scratch).max())


def bytes_of(values: Array) -> memoryview:
    """Return the memory of a contiguous array, shared, not copied."""
    shared: Any = values
    return memoryview(shared).cast("B")


def unsigned(dtype: str) -> Any:
    """Return the NumPy dtype of the bits of a float dtype (safetensors name)."""
    return np.dtype(f"<u{dtypes.bits(dtype) // 8}")


def widen(bits: Array, dtype: str, work: Any) -> Array:
    """Return bits as numbers in `work`, float32 or float64, in memory of their own."""
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(work, copy=False)
    return bits.view(f"<f{bits.itemsize}").astype(work)


def numbers(bits: Array, dtype: str) -> Array:
    """Return bits as the numbers that they are: those of F32 and F64 in the same memory, others as float32."""
    return bits.view(f"<f{bits.itemsize}") if dtype in ("F32", "F64") else widen(bits, dtype, np.float32)


def narrow(values: Array, dtype: str) -> Array:
    """Return numbers rounded to nearest even, as bits; what is float64 goes to BF16 by way of float32."""
    if dtype != "BF16":
        with np.errstate(over="ignore"):
            return values.astype(f"<f{dtypes.bits(dtype) // 8}").view(unsigned(dtype))
    bits = values.astype(np.float32, copy=False).view(np.uint32)
    odd = (bits >> 16) & 1
    odd += bits
    odd += 0x7FFF
    odd >>= 16
    return odd.astype(np.uint16)
