"""What lies under a manifest: strict JSON, its canonical text, safetensors, BLAKE3 and the tiers of a base hash.

Part of the independent reader (`reader.py`). BLAKE3 in Python does some 0.3 MB/s: enough for test vectors.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

BITS = dict.fromkeys(["BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"], 8)
BITS |= dict.fromkeys(["F16", "BF16", "I16", "U16"], 16) | dict.fromkeys(["F32", "I32", "U32"], 32)
BITS |= dict.fromkeys(["C64", "F64", "I64", "U64"], 64) | {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}

Tensors = dict[str, tuple[str, list[int], bytes]]  # name -> dtype, shape, data


class Refused(Exception):
    """A clause that the file breaks, and how."""


def need(condition: object, clause: str, reason: str) -> None:
    if not condition:
        raise Refused(f"[{clause}] {reason}")


# ---- the container: chapter 7 -------------------------------------------------------------------------------------


def parse(text: bytes | str) -> Any:
    """Parse I-JSON: no duplicate names, no NaN, no lone surrogates."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name occurs twice in an object")
        return dict(pairs)

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a JSON number")

    source = text.decode() if isinstance(text, bytes) else text
    document = json.loads(source, object_pairs_hook=unique, parse_constant=constant)
    json.dumps(document, ensure_ascii=False).encode()
    return document


def natural(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < 2**53


def number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def load(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    fits = len(raw) >= 8 and length <= min(len(raw) - 8, 100_000_000)
    need(fits, "S-01", "the header is longer than the file, or than the limit")
    try:
        header = parse(raw[8 : 8 + length])
        need(isinstance(header, dict) and raw[8:9] == b"{", "S-02", "the header is not a JSON object")
    except (ValueError, RecursionError) as error:
        raise Refused(f"[S-02] {error}") from None
    metadata = header.pop("__metadata__", None) or {}
    strings = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    need(strings, "S-06", "__metadata__ must map strings to strings")
    tensors: Tensors = {}
    for name, entry in header.items():
        formed = isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}
        need(formed and text(entry["dtype"]) and entry["dtype"] in BITS, "S-03", f"{name}: no dtype, or an unknown one")
        lists = (entry["shape"], entry["data_offsets"])
        formed = all(isinstance(one, list) and all(map(natural, one)) for one in lists) and len(lists[1]) == 2
        need(formed, "S-03", f"{name}: shape and data_offsets must be lists of natural numbers")
        start, stop = entry["data_offsets"]
        size = math.prod(entry["shape"]) * BITS[entry["dtype"]]
        need(size == 8 * (stop - start), "S-05", f"{name}: dtype and shape take {size} bits, not what the offsets say")
        tensors[name] = entry["dtype"], entry["shape"], raw[8 + length :][start:stop]
    ends = sorted(tuple(entry["data_offsets"]) for entry in header.values())
    tiled = [stop for _, stop in [(0, 0), *ends]] == [start for start, _ in ends] + [len(raw) - 8 - length]
    need(tiled, "S-04", "the data do not fill the file without holes and overlaps")
    return tensors, metadata


# ---- canonical JSON: RFC 8785 -------------------------------------------------------------------------------------


def canonical(value: Any, most: float = 2**53) -> str:
    """Return the text of RFC 8785; a whole number that it writes in digits alone must be below `most` (I-JSON)."""
    if isinstance(value, dict):
        names = sorted(value, key=lambda name: name.encode("utf-16-be"))
        return "{" + ",".join(canonical(name) + ":" + canonical(value[name], most) for name in names) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(canonical(part, most) for part in value) + "]"
    need(type(value) is not float or math.isfinite(value), "M-02", "a number is too large for binary64")
    if type(value) is int or (type(value) is float and abs(value) < 1e21 and value == int(value)):
        need(abs(value) < most, "M-02", f"{value} is beyond 2^53 - 1")
        return str(int(value)) if abs(value) < 2**53 else format(Decimal(repr(value)), "f")
    if type(value) is not float:
        return json.dumps(value, ensure_ascii=False)
    if 1e-6 <= abs(value) < 1e21:
        return format(Decimal(repr(value)), "f")
    mantissa, _, exponent = repr(value).partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent):+d}"


def depth(value: Any) -> int:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if children is None else 1 + max(map(depth, children), default=0)


# ---- digests: chapter 5 -------------------------------------------------------------------------------------------

_IV = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
_ORDER = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
_COLUMNS = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
_DIAGONALS = ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))
_CHUNK_START, _CHUNK_END, _PARENT, _ROOT = 1, 2, 4, 8


def _compress(cv: tuple[int, ...], block: bytes, counter: int, flags: int) -> tuple[int, ...]:
    m = list(struct.unpack("<16I", block.ljust(64, b"\0")))
    v = [*cv, *_IV[:4], counter & 0xFFFFFFFF, counter >> 32, len(block), flags]
    for _ in range(7):
        for i, (a, b, c, d) in enumerate(_COLUMNS + _DIAGONALS):
            for word, first, second in ((m[2 * i], 16, 12), (m[2 * i + 1], 8, 7)):
                v[a] = (v[a] + v[b] + word) & 0xFFFFFFFF
                v[d] ^= v[a]
                v[d] = (v[d] >> first | v[d] << (32 - first)) & 0xFFFFFFFF
                v[c] = (v[c] + v[d]) & 0xFFFFFFFF
                v[b] ^= v[c]
                v[b] = (v[b] >> second | v[b] << (32 - second)) & 0xFFFFFFFF
        m = [m[i] for i in _ORDER]
    return tuple(v[i] ^ v[i + 8] for i in range(8))


def blake3(data: bytes, chunk: int = 0, root: int = _ROOT) -> bytes:
    """Return the 32-byte BLAKE3 of data; `chunk` and `root` place a subtree inside a larger input."""
    if len(data) > 1024:
        left = 1 << ((len(data) - 1) // 1024).bit_length() - 1  # chunks on the left: a power of two, as many as fit
        parts = blake3(data[: left * 1024], chunk, 0) + blake3(data[left * 1024 :], chunk + left, 0)
        return struct.pack("<8I", *_compress(_IV, parts, 0, _PARENT | root))
    blocks = [data[i : i + 64] for i in range(0, len(data), 64)] or [b""]
    cv: tuple[int, ...] = _IV
    for i, block in enumerate(blocks):
        last = i == len(blocks) - 1
        cv = _compress(cv, block, chunk, (_CHUNK_START if i == 0 else 0) | ((_CHUNK_END | root) if last else 0))
    return struct.pack("<8I", *cv)


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


HASHES: dict[str, Callable[[bytes], bytes]] = {"blake3": blake3, "sha256": sha256}


def signature(dtype: str, shape: list[int]) -> bytes:
    return dtype.encode() + b"\0" + struct.pack(f"<{len(shape) + 1}Q", len(shape), *shape)


def tiers(tensors: Tensors, algorithm: str) -> dict[str, Any]:
    """Return the three tiers of a base hash: schema, tensors, root."""
    hash_, names = HASHES[algorithm], sorted(tensors, key=str.encode)
    digests = {n: hash_(b"loratools.tensor.v1\0" + signature(*tensors[n][:2]) + tensors[n][2]) for n in names}
    schema = b"".join(n.encode() + b"\0" + signature(*tensors[n][:2]) for n in names)
    root = b"".join(n.encode() + b"\0" + digests[n] for n in names)
    return {
        "schema": f"{algorithm}:{hash_(b'loratools.schema.v1' + bytes(1) + schema).hex()}",
        "tensors": {n: f"{algorithm}:{digests[n].hex()}" for n in names},
        "root": f"{algorithm}:{hash_(b'loratools.model.v1' + bytes(1) + root).hex()}",
    }


def meaning(m: dict[str, Any], parts: dict[str, Any], algorithm: str) -> str:
    """Return the digest of what the tensors mean; `parts` maps the path of a module to the names of its parts."""

    def covered(entry: dict[str, Any]) -> dict[str, Any]:
        fields = ("kind", "rank", "alpha", "scaling", "layout", "tensor")
        return {field: entry[field] for field in fields if field in entry}

    extensions = [each for each in m.get("extensions", []) if each.get("must_understand", True)]
    whole = {
        "extensions": {each["name"]: each.get("configuration", {}) for each in extensions},
        "modules": {path: covered(entry) | {"parts": sorted(parts[path])} for path, entry in m["modules"].items()},
        "replacements": {path: covered(entry) for path, entry in m.get("replacements", {}).items()},
    }
    return f"{algorithm}:{HASHES[algorithm](b'loratools.meaning.v1' + bytes(1) + canonical(whole).encode()).hex()}"


def digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"(blake3|sha256):[0-9a-f]{64}", value) is not None


def checkpoint(path: Path) -> Tensors:
    """Return all tensors of a base: one file, or every safetensors file of a folder."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return {name: tensor for file in files for name, tensor in load(file)[0].items()}
