"""Digests of tensors and the three tiers of a base hash, independent of sharding, file order and header text.

    tensor = H("loratools.tensor.v1\\0" ‖ name of dtype ‖ "\\0" ‖ u64 rank ‖ u64 each side ‖ data)
    schema = H("loratools.schema.v1\\0" ‖ for each name, sorted: name ‖ "\\0" ‖ dtype, rank and sides as above)
    root   = H("loratools.model.v1\\0"  ‖ for each name, sorted: name ‖ "\\0" ‖ 32 bytes of its tensor digest)

Names are UTF-8, sorted by their bytes; numbers are little-endian; data are the raw C-order bytes as stored. H is
BLAKE3 (256 bits) or SHA-256, and a digest is written `blake3:<64 hex digits>`. The specification: `spec/v1`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, Literal, Protocol, TypeVar, get_args

from loratools.errors import BadFile
from loratools.parallel import cores, side_by_side

Algorithm = Literal["blake3", "sha256"]

DEFAULT: Algorithm = "blake3"
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)

_DIGITS = "[0-9a-f]{64}"


class Hasher(Protocol):
    """A hash object of hashlib or blake3."""

    def update(self, data: Any, /) -> Any: ...
    def digest(self) -> bytes: ...
    def hexdigest(self) -> str: ...
    def copy(self) -> Hasher: ...


class _Stored(Protocol):
    """A tensor whose bytes are somewhere: `TensorSpec` and `LazyTensor`."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...


Stored = TypeVar("Stored", bound=_Stored)
Read = Callable[[Mapping[str, Stored]], Iterator[tuple[str, Iterable[Any]]]]
"""Yields names of tensors and their data, each in pieces that are valid until the next is asked for."""

_SHARE = 16 << 20  # bytes to hash that are worth a thread


def new(algorithm: str = DEFAULT) -> Hasher:
    """Return a fresh hasher of a registered algorithm; raise `BadFile` for any other."""
    return _maker(algorithm)()


@cache
def _maker(algorithm: str) -> Callable[[], Hasher]:
    if algorithm == "blake3":
        from blake3 import blake3

        return blake3
    if algorithm == "sha256":
        from hashlib import sha256

        return sha256
    raise BadFile(f"unknown digest algorithm {algorithm!r}; registered are {', '.join(ALGORITHMS)}")


@lru_cache(maxsize=1024)  # several clauses ask about the same one
def algorithm_of(digest: str) -> str:
    """Return the algorithm of a written digest, `blake3:…`; raise `BadFile` unless it is well formed."""
    algorithm, _, digits = digest.partition(":")
    if algorithm not in ALGORITHMS or not re.fullmatch(_DIGITS, digits):
        raise BadFile(f"{digest!r} is not a digest; expected blake3: or sha256: and 64 lower-case hex digits")
    return algorithm


def start_tensor(dtype: str, shape: Iterable[int], algorithm: str = DEFAULT) -> Hasher:
    """Return a hasher that has taken in a tensor's dtype and shape; its data come next."""
    return _begun(dtype, tuple(shape), algorithm).copy()


@lru_cache(maxsize=1024)  # the layers of a model have the same shapes
def _begun(dtype: str, shape: tuple[int, ...], algorithm: str) -> Hasher:
    hasher = new(algorithm)
    hasher.update(b"loratools.tensor.v1\0" + _signature(dtype, shape))
    return hasher


def finish(hasher: Hasher, algorithm: str = DEFAULT) -> str:
    """Return the written form of a digest, `algorithm:hex`."""
    return f"{algorithm}:{hasher.hexdigest()}"


def tensor(dtype: str, shape: Iterable[int], chunks: Iterable[Any], algorithm: str = DEFAULT) -> str:
    """Return the digest of one tensor whose data come in `chunks` of bytes."""
    hasher = start_tensor(dtype, shape, algorithm)
    for chunk in chunks:
        hasher.update(chunk)
    return finish(hasher, algorithm)


def schema(tensors: Mapping[str, tuple[str, tuple[int, ...]]], algorithm: str = DEFAULT) -> str:
    """Return the `schema` tier of a base hash from names, dtypes and shapes alone."""
    return _over_names(b"loratools.schema.v1\0", tensors, lambda name: _signature(*tensors[name]), algorithm)


def root_of_all(
    tensors: Mapping[str, Stored], read: Read[Stored], algorithm: str = DEFAULT, *, threads: int | None = None
) -> str:
    """Return the `root` over tensors, of which `read` yields names and data in pieces.

    Many bytes are shared out among `threads`, by default one per core; each reads in the order of `tensors`.
    """
    total = sum(tensor.nbytes for tensor in tensors.values())
    shares = _shares(tensors, total, min(threads or cores(), total // _SHARE))

    def work(names: Sequence[str]) -> dict[str, bytes]:
        raw = {}
        for name, chunks in read({name: tensors[name] for name in names}):
            hasher = start_tensor(tensors[name].dtype, tensors[name].shape, algorithm)
            for chunk in chunks:
                hasher.update(chunk)
            raw[name] = hasher.digest()
        return raw

    raw: dict[str, bytes] = {}
    for part in side_by_side(work, shares):
        raw |= part
    return root_of_raw(raw, algorithm)


def _shares(tensors: Mapping[str, Stored], total: int, count: int) -> list[list[str]]:
    """Return the names in so many parts of about equal size, at least one, each of tensors that follow each other."""
    parts: list[list[str]] = [[]]
    done = 0
    for name, tensor in tensors.items():
        if len(parts) < count and parts[-1] and done * count >= total * len(parts):
            parts.append([])
        parts[-1].append(name)
        done += tensor.nbytes
    return parts


def root_of_raw(raw: Mapping[str, bytes], algorithm: str = DEFAULT) -> str:
    """Return the `root` over tensors from the 32 bytes of the digest of each."""
    return _over_names(b"loratools.model.v1\0", raw, raw.__getitem__, algorithm)


def root(digests: Mapping[str, str], algorithm: str = DEFAULT) -> str:
    """Return the `root` tier of a base hash from the digests of all its tensors.

    Raises `BadFile` if one of them is of another algorithm.
    """

    def raw(name: str) -> bytes:
        if algorithm_of(digests[name]) != algorithm:
            raise BadFile(f"the digest of tensor {name!r} is not {algorithm}, as the root over it is")
        return bytes.fromhex(digests[name].partition(":")[2])

    return _over_names(b"loratools.model.v1\0", digests, raw, algorithm)


def _over_names(domain: bytes, names: Iterable[str], part: Callable[[str], bytes], algorithm: str) -> str:
    hasher = new(algorithm)
    hasher.update(domain)
    pieces: list[bytes] = []
    for encoded, name in sorted([(name.encode(), name) for name in names]):
        if "\0" in name:  # it ends a name, so two different models could have one digest
            raise BadFile(f"the tensor name {name!r} holds a NUL character, which no model needs and no digest allows")
        pieces += encoded, b"\0", part(name)
    hasher.update(b"".join(pieces))
    return finish(hasher, algorithm)


@lru_cache(maxsize=1024)  # the layers of a model have the same shapes
def _signature(dtype: str, shape: tuple[int, ...]) -> bytes:
    return dtype.encode() + b"\0" + b"".join(n.to_bytes(8, "little") for n in (len(shape), *shape))
