"""Seeded damage to files: what disks, networks and attackers do to them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

Chance = random.Random

NUMBERS: list[Any] = [
    0, 1, 2, 3, 4, 8, 64, 255, 256, 4096, 2**31, 2**32, 2**53 + 1, 2**62, 2**63, 2**64 - 1, 2**64, 10**30, -1, -8,
    1.0, 0.5,
]  # fmt: skip
JUNK: list[Any] = [None, True, False, "", "0", "F32", [], [0], [[]], {}, {"a": 1}, "x" * 300, "\x00", "..", *NUMBERS]
DTYPES = ["F32", "F16", "BF16", "F64", "I8", "U8", "I64", "BOOL", "F4", "F6_E2M3", "F8_E4M3", "C64", "f32", "X", ""]


def cut(data: bytes, chance: Chance) -> bytes:
    """End somewhere."""
    return data[: chance.randrange(len(data))]


def flip(data: bytes, chance: Chance) -> bytes:
    """Flip one to four bits."""
    damaged = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def move(data: bytes, chance: Chance) -> bytes:
    """Take out, double or put in some bytes."""
    at, count = chance.randrange(len(data)), chance.randint(1, 12)
    piece = data[at : at + count]
    return data[:at] + chance.choice([b"", piece * 2, bytes(count), b" " * count, b"\xff" * count]) + data[at + count :]


def grow(data: bytes, chance: Chance) -> bytes:
    """Go on after the end."""
    return data + chance.choice([b"\0", b" ", data[-16:], bytes(1000)])


def _split(data: bytes) -> tuple[bytes, bytes]:
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length], data[8 + length :]


def _join(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def length(data: bytes, chance: Chance) -> bytes:
    """Claim another length of the header: a little off, or giant."""
    right = int.from_bytes(data[:8], "little")
    claims = [right + chance.randint(-9, 9), right * 2, len(data), len(data) - 8, 0, 1, 2**31, 2**63, 2**64 - 1, 10**8]
    return max(0, min(chance.choice(claims), 2**64 - 1)).to_bytes(8, "little") + data[8:]


def header_bytes(data: bytes, chance: Chance) -> bytes:
    """Damage the text of the header and claim its new length, so that only its contents are wrong."""
    header, rest = _split(data)
    return _join(chance.choice([flip, move, cut])(header, chance), rest)


def header_text(data: bytes, chance: Chance) -> bytes:
    """Change one number, or one token, of the text."""
    header, rest = _split(data)
    places = [i for i, byte in enumerate(header) if byte in b'0123456789{}[]:,"']
    at = chance.choice(places)
    tokens = [
        b"-0",
        b"1e1",
        b"NaN",
        b"00",
        b"9" * 30,
        b"null",
        b"{",
        b"]",
        b'"',
        b",",
        b"\\ud800",
        b"\\u0000",
        b"\xc0\x80",
    ]
    return _join(header[:at] + chance.choice(tokens) + header[at + 1 :], rest)


def header_entries(data: bytes, chance: Chance) -> bytes:
    """Change one thing in one entry: swap names, move offsets, change dtype or shape, add or drop a field."""
    header, rest = _split(data)
    document = json.loads(header)
    names = [name for name in document if name != "__metadata__"]
    chosen, other = chance.choice(names), chance.choice(names)
    entry: dict[str, Any] = document[chosen]

    def set_number(field: str) -> None:
        if entry[field]:
            entry[field][chance.randrange(len(entry[field]))] = chance.choice([*NUMBERS, *entry[field]])

    def shift() -> None:
        by = chance.choice([-8, -4, -1, 1, 4, 8, 10**6])
        entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]

    changes: list[Callable[[], object]] = [
        lambda: document.update({chosen: document[other], other: entry}),
        lambda: document.update({chosen: document[other]}),
        lambda: set_number("shape"),
        lambda: set_number("data_offsets"),
        lambda: entry["shape"].append(chance.choice([0, 1, 2, 2**63])),
        entry["shape"].reverse,
        shift,
        lambda: entry.update(dtype=chance.choice(DTYPES)),
        lambda: entry.pop(chance.choice(sorted(entry))),
        lambda: entry.update({chance.choice(["dtype", "shape", "data_offsets", "more"]): chance.choice(JUNK)}),
        lambda: document.pop(chosen),
        lambda: document.update({chance.choice(["", "x", "\x00", "__metadata__", chosen + "\x00"]): entry}),
        lambda: document.update({chance.choice(names): chance.choice(JUNK)}),
        lambda: document.update(__metadata__=chance.choice([*JUNK, {"format": 1}, {"format": "pt"}])),
    ]
    chance.choice(changes)()
    return _join(json.dumps(document, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass"), rest)


def header_twice(data: bytes, chance: Chance) -> bytes:
    """Name one tensor, or one field, twice."""
    header, rest = _split(data)
    document = json.loads(header)
    name = chance.choice(sorted(document))
    twin = json.dumps({name: document[chance.choice(sorted(document))]}).encode()
    if chance.random() < 0.3:
        twin = twin.replace(b'"dtype"', b'"dtype":"U8","dtype"', 1)
    return _join(b"{" + twin[1:-1] + b"," + header[1:], rest)


def header_deep(data: bytes, chance: Chance) -> bytes:
    """Nest a value deeply."""
    header, rest = _split(data)
    depth = chance.choice([10, 100, 127, 128, 1000, 50_000])
    value = chance.choice([b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth])
    return _join(b'{"deep":' + value + b"," + header[1:], rest)


SAFETENSORS = [
    cut, flip, move, grow, length, header_bytes, header_bytes, header_text, header_text, header_entries, header_entries,
    header_entries, header_twice, header_deep,
]  # fmt: skip
ANY = [cut, flip, move, grow]


def json_value(document: Any, chance: Chance) -> Any:
    """Change, drop or add one value somewhere in a JSON document."""
    changed = json.loads(json.dumps(document))
    place = changed
    while True:
        keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        key = chance.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and chance.random() < 0.6:
            place = place[key]
            continue
        if chance.random() < 0.2:
            del place[key]
        else:
            place[key] = chance.choice([*JUNK, 1e308, -3, "(a+)+$", "[", "lora_only", ["*"], {"(x|x)*y": 3}])
        break
    return changed
