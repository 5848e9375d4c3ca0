"""BF16, F16 and F32 in NumPy, which has no BF16: there the bits stand for the numbers, as unsigned integers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

SERVED = frozenset({"BF16", "F16", "F32"})
INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
"""The bits of infinity: those of every finite number, without the sign, are less as integers, those of NaN greater."""

SCRATCH = "scratch"
"""The buffer of whatever one step alone needs: the less memory a tile touches, the more of it is in the cache."""


def numpy_dtype(dtype: str) -> Any:
    """Return the NumPy dtype that holds a stored one; BF16 as its bits."""
    import numpy as np

    return {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}[dtype]


def exactly(values: Array, dtype: str) -> Array:
    """Return stored values as numbers; BF16 from its bits."""
    import numpy as np

    return (values.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else values


class Buffers:
    """The memory of one worker thread, reused from tensor to tensor."""

    def __init__(self) -> None:
        self._held: dict[str, Any] = {}

    def of(self, name: str, elements: int, dtype: Any) -> Array:
        """Return an array of so many elements under a name; what it held is lost."""
        import numpy as np

        nbytes = elements * np.dtype(dtype).itemsize
        held = self._held.get(name)
        if held is None or len(held) < nbytes:
            self._held[name] = held = np.empty(nbytes, np.uint8)
        view: Array = held[:nbytes].view(dtype)
        return view


def widened(stored: Array, dtype: str, buffers: Buffers) -> Array:
    """Return a tile in float32, in memory of its own."""
    import numpy as np

    W = buffers.of("work", stored.size, np.float32).reshape(stored.shape)
    if dtype == "BF16":
        bits = W.view(np.uint32)
        bits[...] = stored  # a cast and a shift, each at full width, are faster than a shift that casts
        np.left_shift(bits, 16, out=bits)
    else:
        W[...] = stored
    return W


def rounded(W: Array, dtype: str, buffers: Buffers) -> Array:
    """Return a finite float32 tile rounded to nearest even; BF16 as its bits."""
    import numpy as np

    out = buffers.of("out", W.size, numpy_dtype(dtype)).reshape(W.shape)
    if dtype != "BF16":
        out[...] = W
        return out
    bits, odd = W.view(np.uint32), buffers.of(SCRATCH, W.size, np.uint32).reshape(W.shape)
    np.right_shift(bits, 16, out=odd)
    np.bitwise_and(odd, 1, out=odd)
    np.add(odd, 0x7FFF, out=odd)
    np.add(odd, bits, out=odd)
    np.right_shift(odd, 16, out=odd)
    np.copyto(out, odd, casting="unsafe")
    return out


def magnitudes(values: Array, buffers: Buffers) -> Array:
    """Return the bits of numbers without their sign, which are ordered as the magnitudes are."""
    import numpy as np

    bits: Array = values.view({2: np.uint16, 4: np.uint32}[values.dtype.itemsize])
    found = buffers.of(SCRATCH, bits.size, bits.dtype).reshape(bits.shape)
    return np.bitwise_and(bits, np.iinfo(bits.dtype).max >> 1, out=found)


def bytes_of(values: Array) -> memoryview:
    """Return the memory of a contiguous array, shared, not copied."""
    shared: Any = values
    return memoryview(shared).cast("B")


_FORMATS = {"BF16": (16, 7), "F16": (16, 10), "F32": (32, 23), "F64": (64, 52)}
"""Bits of a float and of its stored mantissa."""


def unsigned(dtype: str) -> Any:
    """Return the NumPy dtype of the bits of a float dtype (safetensors name)."""
    import numpy as np

    return np.dtype(f"<u{_FORMATS[dtype][0] // 8}")


def widen(bits: Array, dtype: str, work: Any) -> Array:
    """Return bits as numbers in `work`, float32 or float64, in memory of their own."""
    import numpy as np

    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(work, copy=False)
    return bits.view(f"<f{bits.itemsize}").astype(work)


def narrow(values: Array, dtype: str) -> Array:
    """Return numbers rounded to nearest even, as bits; what is float64 goes to BF16 by way of float32."""
    import numpy as np

    if dtype != "BF16":
        with np.errstate(over="ignore"):
            return values.astype(f"<f{_FORMATS[dtype][0] // 8}").view(unsigned(dtype))
    bits = values.astype(np.float32, copy=False).view(np.uint32)
    odd = (bits >> 16) & 1
    odd += bits
    odd += 0x7FFF
    odd >>= 16
    return odd.astype(np.uint16)
