"""Small codes packed without gaps: code i of a row has the bits from i·bits on, counted from each row's first byte.

Words of 32 bits, little-endian, are nothing but four bytes here, so that one rule covers nibbles in bytes, 4 bits in
words, and codes of 3, 5, 6 or 7 bits that lie across two words.
"""

from __future__ import annotations

import numpy as np

from loratools.storage.codecs.floats import Array


def words(count: int, bits: int, width: int = 32) -> int:
    """Return how many words of `width` bits hold so many codes."""
    return -(-count * bits // width)


def words_of(dtype: str) -> str:
    """Return the NumPy dtype of words by their name in a header, as I32."""
    return f"<{'i' if dtype[0] == 'I' else 'u'}{int(dtype[1:]) // 8}"


def unpack(stored: Array, bits: int, count: int) -> Array:
    """Return the first `count` codes of each row, unsigned, as uint8 (n, count); `stored` is (n, words) of any ints."""
    octets = np.ascontiguousarray(stored).view(np.uint8).reshape(len(stored), -1)
    if bits == 8:
        return octets[:, :count]
    mask = np.uint8((1 << bits) - 1)
    if 8 % bits == 0:
        each = 8 // bits
        codes = np.empty((*octets.shape, each), np.uint8)
        for i in range(each):
            np.right_shift(octets, np.uint8(i * bits), out=codes[..., i])
        codes &= mask
        return codes.reshape(len(octets), -1)[:, :count]
    eights = -(-count // 8)  # eight codes are as many bytes as one has bits
    whole = octets
    if octets.shape[1] < eights * bits:
        whole = np.zeros((len(octets), eights * bits), np.uint8)
        whole[:, : octets.shape[1]] = octets
    split = whole[:, : eights * bits].reshape(len(octets), eights, bits)
    joined = split[..., 0].astype(np.uint64)
    for i in range(1, bits):
        joined |= split[..., i].astype(np.uint64) << np.uint64(8 * i)
    codes = np.empty((len(octets), eights, 8), np.uint8)
    for i in range(8):
        codes[..., i] = (joined >> np.uint64(i * bits)).astype(np.uint8) & mask
    return codes.reshape(len(octets), -1)[:, :count]


def pack(codes: Array, bits: int, nbytes: int) -> Array:
    """Return codes, uint8 (n, count), as rows of so many bytes, uint8 (n, nbytes), padded with zeros."""
    eights = max(-(-codes.shape[1] // 8), -(-nbytes // bits))
    padded = np.zeros((len(codes), eights * 8), np.uint8)
    padded[:, : codes.shape[1]] = codes
    each = padded.reshape(len(codes), eights, 8)
    joined = each[..., 0].astype("<u8")
    for i in range(1, 8):
        joined |= each[..., i].astype("<u8") << np.uint64(i * bits)
    octets = joined[..., None].view(np.uint8)[..., :bits].reshape(len(codes), -1)
    return np.ascontiguousarray(octets[:, :nbytes])
