"""Code a float by its place among the candidates that a prediction leaves. Pure NumPy, arrays in and bytes out.

A merge rounds W + ΔW to W'. From W' and ΔW the weight is known but for what that rounding destroyed: nothing, where W'
lies in a binade no higher than W's; else one of about 2^k candidates, k binades apart, all equally likely. So each
element is coded by the rank of W among the floats around the prediction P, nearest first, in k bits; where ranks do not
fit (ties, ends of binades), the rest follows in a list of exceptions. Both sides derive P and k from W' and the
adapter, so where k is 0 nothing at all is written.

    block = u8 form ‖ u32 number of exceptions ‖ u32 bytes of ranks ‖ u32 bytes of exceptions ‖ ranks ‖ exceptions

Of few exceptions each is written as its distance from the last and the rest of its rank, both as LEB128: deflating
them took as long as finding them, and saved nothing. More of them are deflated.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from loratools.errors import BadFile
from loratools.storage import dtypes
from loratools.storage.codecs.floats import narrow, widen

Array = np.ndarray[Any, np.dtype[Any]]

_HEAD = struct.Struct("<BIII")
SPARSE, DENSE, LISTED = range(3)
"""How exceptions are listed: by their places, for every element, or by their places as they are, not deflated."""

_FEW = 1024  # exceptions that are not deflated, at most
_EVERY = 16  # exceptions are listed by position while there are fewer than one in so many elements


def encode(W: Array, after: Array, prediction: Array, dtype: str, after_dtype: str) -> bytes:
    """Return what tells `W` from a prediction.

    `W` holds the bits of the base's elements in `dtype`, flat; `after` those of the merged ones in `after_dtype`;
    `prediction` is W' − ΔW as numbers, before it is rounded.
    """
    P = narrow(prediction, dtype)
    coarse, spread = _coarse(P, after, dtype, after_dtype)
    off = W != P
    off[coarse] = False
    stray = np.flatnonzero(off)
    at = np.concatenate([coarse, stray])
    rank = _rank(W[at], P[at], _above(prediction[at], P[at], dtype))
    ranks = _pack(rank[: len(coarse)], spread)
    rank[: len(coarse)] >>= spread
    exceptions = np.flatnonzero(rank)
    order = np.argsort(at[exceptions], kind="stable")
    return joined(ranks, at[exceptions][order], rank[exceptions][order], len(W))


def joined(ranks: bytes, at: Array, high: Array, count: int) -> bytes:
    """Return a block of packed `ranks` and of exceptions, `high` at places `at` in order, of `count` elements."""
    if len(at) * _EVERY >= count:
        every = np.zeros(count, high.dtype)
        every[at] = high
        return framed(DENSE, count, ranks, _planes(every))
    gaps = at.astype("<u4")
    gaps[1:] -= gaps[:-1].copy()
    if len(at) > _FEW:
        return framed(SPARSE, len(at), ranks, gaps.tobytes() + _planes(high))
    pairs = zip(gaps.tolist(), high.tolist(), strict=True)
    return framed(LISTED, len(at), ranks, bytes(byte for pair in pairs for number in pair for byte in _leb128(number)))


def framed(form: int, count: int, ranks: bytes, raw: bytes) -> bytes:
    """Return a block of packed `ranks` and of `count` exceptions, which are yet to be compressed where that is due."""
    packed = raw if form == LISTED or not count else _deflate(raw)
    return _HEAD.pack(form, count, len(ranks), len(packed)) + ranks + packed


def decode(block: memoryview, after: Array, prediction: Array, dtype: str, after_dtype: str) -> Array:
    """Return the bits of W that `encode` was given; raise `BadFile` where the block does not fit what it is about."""
    P = narrow(prediction, dtype)
    coarse, spread = _coarse(P, after, dtype, after_dtype)
    packed, positions, values = apart(block, spread, len(P), P.dtype)
    high = np.zeros(len(P), P.dtype)
    high[positions] = values
    high[coarse] = (high[coarse] << spread) | _unpack(packed, spread, P.dtype)
    at = np.flatnonzero(high)
    P[at] = _at_rank(high[at], P[at], _above(prediction[at], P[at], dtype))
    return P


def apart(block: memoryview, spread: Array, length: int, dtype: Any) -> tuple[memoryview, Array, Array]:
    """Return the packed ranks of a block, and its exceptions: places in order, and values of `dtype`.

    Raises `BadFile` where the block is not one of a tile of `length` elements with so many bits open.
    """
    form, count, ranks, raw = unframed(block, length, dtype.itemsize, -(-int(spread.sum(dtype=np.int64)) // 8))
    if form == DENSE:
        values = _unplanes(raw, dtype)
        positions: Array = np.flatnonzero(values)
        return ranks, positions, values[positions]
    if form == LISTED:
        pairs = np.array(_numbers(raw, 2 * count), np.uint32).reshape(count, 2)
        gaps, values = pairs[:, 0], pairs[:, 1].astype(dtype)
        if (values != pairs[:, 1]).any():
            raise BadFile("a block of the residual is damaged")
    else:
        gaps, values = np.frombuffer(raw[: 4 * count], "<u4"), _unplanes(raw[4 * count :], dtype)
    positions = gaps.cumsum(dtype=np.int64)
    if count and int(positions[-1]) >= length:
        raise BadFile("a block of the residual points beyond its tile")
    return ranks, positions, values


def unframed(
    block: memoryview, length: int, width: int, size: int | None = None
) -> tuple[int, int, memoryview, bytes | memoryview]:
    """Return the form of a block, its number of exceptions, its packed ranks and the exceptions, inflated where due.

    `length` are the elements of the tile, `width` the bytes of one, `size` those that the ranks must have. Raises
    `BadFile` where the block contradicts itself, or that.
    """
    if len(block) < _HEAD.size:
        raise BadFile("a block of the residual is truncated")
    form, count, ranks_size, packed_size = _HEAD.unpack_from(block)
    if len(block) != _HEAD.size + ranks_size + packed_size or count > length or form > LISTED:
        raise BadFile("a block of the residual contradicts itself")
    if size is not None and ranks_size != size:
        raise BadFile("a block of the residual was made for another merge: it has another number of candidates")
    packed = block[_HEAD.size + ranks_size :]
    raw = packed if form == LISTED else _inflate(packed, count * (width + (4 if form == SPARSE else 0)))
    if form == DENSE and count != length:
        raise BadFile("a block of the residual is of another size than its tile")
    return form, count, block[_HEAD.size : _HEAD.size + ranks_size], raw


def _coarse(P: Array, after: Array, dtype: str, after_dtype: str) -> tuple[Array, Array]:
    """Return where W' lies in a higher binade than the prediction, and by how many, as far as a mantissa goes."""
    bits, mantissa = dtypes.bits(dtype), dtypes.MANTISSA[dtype] - 1
    if dtype != after_dtype:  # only equal dtypes have comparable binades; a cast leaves exceptions
        return np.zeros(0, np.int64), np.zeros(0, P.dtype)
    exponent = P.dtype.type(((1 << (bits - 1)) - 1) & ~((1 << mantissa) - 1))
    coarse = np.flatnonzero((after & exponent) > (P & exponent))
    spread = ((after[coarse] & exponent) >> mantissa) - ((P[coarse] & exponent) >> mantissa)
    return coarse, np.minimum(spread, P.dtype.type(mantissa))


def _above(prediction: Array, P: Array, dtype: str) -> Array:
    """Tell where the prediction lies above its rounding: that side has the second nearest candidate."""
    return prediction > widen(P, dtype, prediction.dtype)


def _ordered(bits: Array) -> Array:
    """Return integers in the order of the floats, signed, one for each bit pattern."""
    signed = bits.view(np.dtype(f"<i{bits.itemsize}"))
    ordered: Array = signed ^ ((signed >> (8 * bits.itemsize - 1)) & np.iinfo(signed.dtype).max)
    return ordered


def _rank(W: Array, P: Array, above: Array) -> Array:
    """Return 0, 1, 2, … for W = P, the next float on the prediction's side, the next on the other, and so on."""
    with np.errstate(over="ignore"):
        steps = _ordered(W) - _ordered(P)
        np.negative(steps, out=steps, where=above)
        return ((steps << 1) ^ (steps >> (8 * W.itemsize - 1))).view(W.dtype)


def _at_rank(rank: Array, P: Array, above: Array) -> Array:
    """Return the float of a rank: the inverse of `_rank`."""
    with np.errstate(over="ignore"):
        steps = ((rank >> 1) ^ (~(rank & 1) + 1)).view(f"<i{P.itemsize}")
        np.negative(steps, out=steps, where=above)
        return _ordered((_ordered(P) + steps).view(P.dtype)).view(P.dtype)


def _pack(rank: Array, spread: Array) -> bytes:
    """Write the low `spread` bits of each rank, plane after plane."""
    top = int(spread.max()) if len(spread) else 0
    planes = [((rank[spread > bit] >> bit) & 1).astype(np.uint8) for bit in range(top)]
    return np.packbits(np.concatenate(planes)).tobytes() if planes else b""


def _unpack(data: memoryview, spread: Array, dtype: Any) -> Array:
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=int(spread.sum(dtype=np.int64)))
    rank = np.zeros(len(spread), dtype)
    start = 0
    for bit in range(int(spread.max()) if len(spread) else 0):
        inside = spread > bit
        count = int(inside.sum())
        rank[inside] |= bits[start : start + count].astype(dtype) << bit
        start += count
    return rank


def _planes(values: Array) -> bytes:
    """Return first all the lowest bytes, then all the next: high ones are nearly all zero."""
    little = values.astype(values.dtype.newbyteorder("<"), copy=False)
    return np.ascontiguousarray(little.view(np.uint8).reshape(-1, values.itemsize).T).tobytes()


def _unplanes(raw: bytes | memoryview, dtype: Any) -> Array:
    values: Array = np.ascontiguousarray(np.frombuffer(raw, np.uint8).reshape(dtype.itemsize, -1).T).view(dtype).ravel()
    return values


def _leb128(number: int) -> Iterator[int]:
    """Yield the bytes of a number: seven bits in each, the lowest first, the eighth set in all but the last."""
    while number > 0x7F:
        yield number & 0x7F | 0x80
        number >>= 7
    yield number


def _numbers(raw: bytes | memoryview, count: int) -> list[int]:
    """Return so many numbers of 32 bits at most, written as `_leb128` does; raise `BadFile` unless these are all."""
    numbers, number, shift = [], 0, 0
    for byte in raw:
        number |= (byte & 0x7F) << shift
        shift += 7
        if number >> 32 or shift > 35:
            raise BadFile("a block of the residual is damaged")
        if byte < 0x80:
            numbers.append(number)
            number, shift = 0, 0
    if len(numbers) != count or shift:
        raise BadFile("a block of the residual is damaged")
    return numbers


def _deflate(raw: bytes) -> bytes:
    """Return compressed bytes; few of them with a window of their size, for the usual one zlib clears 256 kB."""
    window = max(9, min(15, len(raw).bit_length()))
    deflater = zlib.compressobj(6, zlib.DEFLATED, window, min(8, window - 6))
    return deflater.compress(raw) + deflater.flush()


def _inflate(packed: memoryview, size: int) -> bytes:
    if not size:
        return b""
    try:
        inflater = zlib.decompressobj()
        raw = inflater.decompress(packed, size)
    except zlib.error:
        raise BadFile("a block of the residual is damaged") from None
    if len(raw) != size:
        raise BadFile("a block of the residual is truncated")
    return raw
