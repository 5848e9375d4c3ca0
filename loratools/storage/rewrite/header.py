"""Headers with other metadata, and copies of a file's data behind them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loratools.errors import BadFile
from loratools.storage import files
from loratools.storage.atomic import system
from loratools.storage.header import MAX_HEADER, Header, encode_header
from loratools.storage.resolvers import is_far
from loratools.storage.rewrite.apply import BLOCK

LARGE = 1 << 26
"""Bytes from which on a file's data stay where they are: less is copied within the time that a disk takes to sync."""


@dataclass(frozen=True, slots=True)
class NewHeader:
    """A header to be put before the data of a safetensors file: its bytes, with the length before them."""

    encoded: bytes

    @classmethod
    def of(cls, path: Path, header: Header, metadata: Mapping[str, str]) -> NewHeader:
        """Return the header of a file with other metadata; its tensors are named, and lie, as before.

        That of a large file takes the room of the old one, or whole blocks more, filled up with spaces: data can stay
        where they are, or be shared with a copy. Raises `BadFile` where it becomes longer than any reader takes.
        """
        tensors = ((name, spec.dtype, spec.shape, spec.nbytes) for name, spec in header.tensors.items())
        encoded = encode_header(tensors, metadata)
        start, size = data_start(path), path.stat().st_size
        if size >= LARGE:
            more = max(0, -(-(len(encoded) - start) // BLOCK)) * BLOCK
            text = encoded[8:].ljust(start + more - 8)
            encoded = len(text).to_bytes(8, "little") + text
        if len(encoded) - 8 > MAX_HEADER:
            raise BadFile(
                f"{path}: the header becomes {len(encoded) - 8} bytes long; safetensors allows {MAX_HEADER}",
                hint="Choose a smaller thumbnail, or take entries out with --unset.",
            )
        return cls(encoded)


def data_start(path: Path) -> int:
    """Return the offset of the first byte of data in a safetensors file."""
    with files.descriptor(path) as source:
        length = bytearray(8)
        files.read_into(source, memoryview(length), 0, path)
    return 8 + int.from_bytes(length, "little")


def write_copy(source: Path, header: NewHeader, target: Path) -> None:
    """Write a new file of a header and the data of another one, which the kernel copies, or shares where it can."""
    start, size = data_start(source), source.stat().st_size
    with files.descriptor(source) as old, files.descriptor(target, os.O_RDWR | os.O_CREAT | os.O_EXCL) as new:
        files.write_from(new, memoryview(header.encoded), 0)
        offset = len(header.encoded)
        if start % BLOCK == offset % BLOCK and size - start > BLOCK:
            # From a whole block on a file system that shares blocks does so.
            head = -start % BLOCK
            files.copy_range(old, start, start + head, new, offset, source)
            start, offset = start + head, offset + head
            if not is_far(source) and system.shares(old, start, new, offset):
                return
        system.make_room(new, offset + size - start)  # which halves what a local disk's file system takes for the copy
        files.copy_range(old, start, size, new, offset, source)
