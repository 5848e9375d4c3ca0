"""Digests by value: a tensor as it is stored, and a weight that is stored as codes as the 16-bit numbers it stands for.

The numbers are those that `dequantize` writes: the scheme's formula in float32, rounded once to the dtype that the
model computes in. So the digest of codes is that of the plain tensor in the dequantized model.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratools.storage import digest, files
from loratools.storage.digest import Hasher
from loratools.storage.header import TensorSpec


def start(spec: TensorSpec, algorithm: str = digest.DEFAULT) -> Hasher:
    """Return a hasher that has taken in dtype and shape of a tensor as numbers; `plain` bytes come next."""
    return digest.start_tensor(spec.plain_dtype, spec.shape, algorithm)


def plain(spec: TensorSpec, raw: memoryview) -> memoryview:
    """Return bytes of a tensor as it reads, as they are where it is stored as numbers: float32 of codes in 16 bit."""
    if spec.encoding is None:
        return raw
    import numpy as np

    from loratools.storage.codecs.floats import bytes_of, narrow

    return bytes_of(narrow(np.frombuffer(raw, "<f4"), spec.plain_dtype))


def pieces(spec: TensorSpec) -> Iterator[memoryview]:
    """Yield a tensor as `files.chunks` does; of codes whole rows, which are decoded once."""
    if spec.encoding is None or not spec.nbytes:
        yield from files.chunks(spec)
        return
    row = 4 * max(1, spec.shape[-1] if spec.shape else 1)
    yield from files.chunks(spec, max(1, files.CHUNK // row) * row)
