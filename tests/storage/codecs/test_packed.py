"""Small codes without gaps, in both directions, against NumPy's own unpacking of bits."""

from __future__ import annotations

import numpy as np

from loratools.storage.codecs._packed import pack, unpack


def test_packing_is_what_numpy_unpacks() -> None:
    rng = np.random.default_rng(3)
    for bits in range(1, 9):
        for count in (1, 31, 32, 33, 96, 100):
            codes = rng.integers(0, 1 << bits, (5, count), dtype=np.uint8)
            stored = pack(codes, bits, 4 * -(-count * bits // 32))
            flat = np.unpackbits(stored, axis=1, bitorder="little")[:, : count * bits].reshape(5, count, bits)
            assert np.array_equal((flat << np.arange(bits, dtype=np.uint8)).sum(-1), codes)
            assert np.array_equal(unpack(stored.view(np.uint32), bits, count), codes)
