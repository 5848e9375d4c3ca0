"""Pictures as data URIs: which they are, and without what cameras and programs write into them.

A picture that a program made holds the prompt it was made of, and that of a camera where it was taken.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from pathlib import Path

from loratools.errors import BadFile
from loratools.storage.sources import open_file

MOST = 2_000_000
"""Bytes of a thumbnail; every program that lists adapters reads it with the header."""

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_PNG_TEXTS = {b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"tIME"}
_JPEG_NEEDED = {0xE0, 0xE2, 0xEE}  # JFIF, the colour profile, Adobe's transform
_WEBP_TEXTS = {b"EXIF", b"XMP "}


def data_uri(path: Path) -> str:
    """Return a picture as a data URI, without what it says of its making; raise `BadFile` for what is none."""
    with open_file(path) as file:
        picture = file.read(MOST + 1)
    if len(picture) > MOST:
        raise BadFile(
            f"{path}: a thumbnail of more than {MOST} bytes; every program that lists adapters reads it",
            hint="Make it smaller: 256 x 256 pixels are usual.",
        )
    kind = kind_of(picture)
    if kind is None:
        raise BadFile(f"{path}: expected a picture as PNG, JPEG or WebP; it begins with {picture[:8]!r}")
    try:
        bare = without_texts(picture)
    except (ValueError, IndexError):
        raise BadFile(f"{path}: a damaged picture") from None
    return f"data:image/{kind};base64,{base64.b64encode(bare).decode()}"


def bare_uri(uri: str) -> str:
    """Return a data URI of a picture without what it says of its making; unchanged where it is no such picture."""
    head, _, data = uri.partition(";base64,")
    try:
        picture = base64.b64decode(data, validate=True)
        bare = without_texts(picture)
    except (ValueError, IndexError):
        return uri
    return uri if bare == picture else f"{head};base64,{base64.b64encode(bare).decode()}"


def kind_of(picture: bytes) -> str | None:
    """Return `png`, `jpeg` or `webp` by the first bytes of a picture; None for anything else."""
    if picture.startswith(_PNG):
        return "png"
    if picture.startswith(_JPEG):
        return "jpeg"
    return "webp" if picture[:4] == b"RIFF" and picture[8:12] == b"WEBP" else None


def without_texts(picture: bytes) -> bytes:
    """Return a picture without texts, times and places; raise `ValueError` or `IndexError` where it is damaged."""
    kind = kind_of(picture)
    return _WITHOUT[kind](picture) if kind else picture


def _png(picture: bytes) -> bytes:
    parts, at = [picture[:8]], 8
    while at < len(picture):
        length, name = int.from_bytes(picture[at : at + 4], "big"), picture[at + 4 : at + 8]
        if at + 12 + length > len(picture):
            raise ValueError("truncated")
        if name not in _PNG_TEXTS:
            parts.append(picture[at : at + 12 + length])
        at += 12 + length
        if name == b"IEND":  # what follows is no part of the picture
            break
    return b"".join(parts)


def _jpeg(picture: bytes) -> bytes:
    parts, at = [picture[:2]], 2
    while True:
        if picture[at] != 0xFF:
            raise ValueError("no marker")
        mark = picture[at + 1]
        if mark == 0xDA:  # the scan: from here on there is only picture
            return b"".join([*parts, picture[at:]])
        length = 2 + int.from_bytes(picture[at + 2 : at + 4], "big")
        if length < 4 or at + length > len(picture):
            raise ValueError("truncated")
        if not (0xE0 <= mark <= 0xEF or mark == 0xFE) or mark in _JPEG_NEEDED:
            parts.append(picture[at : at + length])
        at += length


def _webp(picture: bytes) -> bytes:
    parts, at = [], 12
    while at + 8 <= len(picture):
        name, length = picture[at : at + 4], int.from_bytes(picture[at + 4 : at + 8], "little")
        if at + 8 + length > len(picture):
            raise ValueError("truncated")
        chunk = picture[at : at + 8 + length + length % 2]
        if name == b"VP8X":  # its flags say that such chunks follow
            chunk = chunk[:8] + bytes([chunk[8] & ~0x0C]) + chunk[9:]
        if name not in _WEBP_TEXTS:
            parts.append(chunk)
        at += 8 + length + length % 2
    body = b"WEBP" + b"".join(parts)
    return b"RIFF" + len(body).to_bytes(4, "little") + body


_WITHOUT: Mapping[str, Callable[[bytes], bytes]] = {"png": _png, "jpeg": _jpeg, "webp": _webp}
