"""Where the files of an uncompressed tar archive lie: one walk over its headers, each believed as far as it is checked.

Python's `tarfile` reads what a header declares before it looks whether the archive has it, and hands the entries of a
global header to each of the files that follow; here both are bounded. Knows ustar, GNU and pax as archivers write them;
of what a file is named by hard or symbolic links, or holds only in parts (sparse), nothing is returned.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from loratools.errors import BadFile

Members = Mapping[str, tuple[int, int]]
"""Name in the archive -> the bytes of the archive that hold it."""

MAX_MEMBERS = 10_000
"""Headers of one archive; NeMo's hold five files."""

MAX_EXTENDED = 100_000
"""Bytes of a long name, or of a pax header."""

_BLOCK = 512
_FILES = (b"0", b"\0", b"7")
_GNU_NAME, _PAX = b"L", b"x"


def members(file: IO[bytes], path: Path) -> Members:
    """Return the files of an archive that is open at any place; `path` is its name in errors.

    Raises `BadFile` where a header is damaged, a file reaches beyond the archive, or there are too many.
    """
    size = os.fstat(file.fileno()).st_size
    spans: dict[str, tuple[int, int]] = {}
    at, long_name, pax = 0, "", dict[str, str]()
    for _ in range(MAX_MEMBERS + 1):
        file.seek(at)
        header = file.read(_BLOCK)
        if len(header) < _BLOCK or not header.strip(b"\0"):
            if not at:
                raise _damaged(path, "it has no header")
            return spans
        _check(header, path)
        kind, length = header[156:157], _number(header[124:136], path)
        if kind in _FILES and "size" in pax:
            length = _decimal(pax["size"], path)
        start = at + _BLOCK
        at = start + -(-length // _BLOCK) * _BLOCK
        if start + length > size:
            raise _damaged(path, f"a file of {length} bytes reaches beyond the archive of {size}")
        if kind in (_GNU_NAME, _PAX):
            if length > MAX_EXTENDED:
                raise _damaged(path, f"a name or an extended header of {length} bytes")
            raw = file.read(length)
            long_name, pax = (_text(raw), pax) if kind == _GNU_NAME else (long_name, _records(raw, path))
            continue
        if kind in _FILES and not any(key.startswith("GNU.sparse") for key in pax):
            name = pax.get("path") or long_name or _ustar_name(header)
            spans[name.removeprefix("./")] = (start, start + length)
        long_name, pax = "", {}
    raise BadFile(f"{path}: more than {MAX_MEMBERS} files in this archive")


def _damaged(path: Path, reason: str) -> BadFile:
    return BadFile(f"{path}: no tar archive, or a damaged one: {reason}")


def _check(header: bytes, path: Path) -> None:
    """Raise `BadFile` unless a header has the checksum that it states: the sum of its bytes, its own as blanks."""
    if _number(header[148:156], path) != sum(header) - sum(header[148:156]) + 8 * 32:
        raise _damaged(path, "a header has another checksum than it states")


def _number(field: bytes, path: Path) -> int:
    """Read a number: octal digits, or the bytes after a first one of 0x80 (GNU, for what octal digits cannot hold)."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:])
    digits = field.split(b"\0")[0].strip()
    if digits.strip(b"01234567"):
        raise _damaged(path, f"{field!r} is no number of a header")
    return int(digits or b"0", 8)


def _decimal(text: str, path: Path) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 20:
        raise _damaged(path, f"{text[:40]!r} is no size")
    return int(text)


def _text(raw: bytes) -> str:
    return raw.split(b"\0")[0].decode("utf-8", "replace")


def _ustar_name(header: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500])
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name


def _records(raw: bytes, path: Path) -> dict[str, str]:
    """Return the entries of a pax header: each `LENGTH KEY=VALUE`, its own length included, and a line end."""
    entries, at = {}, 0
    while at < len(raw) and raw[at : at + 1] != b"\0":
        length, _, _ = raw[at : at + 20].partition(b" ")
        count = int(length) if length.isdigit() else 0
        key, equals, value = raw[at + len(length) + 1 : at + count - 1].partition(b"=")
        if count < len(length) + 3 or at + count > len(raw) or not equals:
            raise _damaged(path, "an extended header that contradicts itself")
        entries[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        at += count
    return entries
