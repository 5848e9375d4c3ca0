"""Xet storage: reading back what the real hf-xet client stored in a `local://` folder.

The client never tells the Hub which xet hash a sha256 has, so the Hub reads it from the shards the client wrote.
A shard is a run of 48-byte records. A file's records are: its hash (32 bytes), flags and a count (u32 each, then
padding); `count` segments; when flagged, as many verification records; when flagged, one that begins with the sha256.
A hash is written in hex as four little-endian 64-bit words.
"""

import hashlib
import struct
import time
from pathlib import Path
from threading import Lock

from tests.hub.server.wire import HubError

_RECORD = 48
_HEADER = struct.Struct("<32sII")
_WITH_VERIFICATION, _WITH_METADATA = 1 << 31, 1 << 30
_SEGMENT = struct.Struct("<32sIIII")


def hash_hex(raw: bytes) -> str:
    """Return the hex form of a 32-byte xet hash."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


def files_in_shard(data: bytes) -> dict[str, tuple[str, int]]:
    """Return sha256 -> (xet hash, size) of every file a shard describes."""
    files: dict[str, tuple[str, int]] = {}
    at = _RECORD  # the shard's own header
    while at + _RECORD <= len(data):
        raw, flags, count = _HEADER.unpack_from(data, at)
        if raw == b"\xff" * 32:  # the bookend after the last file
            break
        at += _RECORD
        segments = [_SEGMENT.unpack_from(data, at + number * _RECORD) for number in range(count)]
        at += count * _RECORD * (2 if flags & _WITH_VERIFICATION else 1)
        if flags & _WITH_METADATA:
            files[hash_hex(data[at : at + 32])] = (hash_hex(raw), sum(segment[2] for segment in segments))
            at += _RECORD
    return files


class Cas:
    """The folder in which hf-xet's own local client keeps chunks and shards."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = f"local://{root.resolve()}"
        self._lock = Lock()
        root.mkdir(parents=True, exist_ok=True)

    def find(self, sha256: str) -> tuple[str, int] | None:
        """Return the xet hash and size of a stored file."""
        for shard in sorted(self.root.rglob("shards/*.mdb")):
            file = files_in_shard(shard.read_bytes()).get(sha256)
            if file:
                return file
        return None

    def materialise(self, sha256: str, target: Path) -> None:
        """Write a stored file's bytes to `target`, for clients that read it by plain HTTP."""
        import hf_xet  # type: ignore[import-untyped]  # only the xet tests need it

        file = self.find(sha256)
        if file is None:
            raise HubError(404, "NoSuchKey")
        with self._lock:
            if target.exists():
                return
            partial = target.with_name(f"{target.name}.partial")
            expiry = int(time.time()) + 3600
            session = hf_xet.XetSession()
            with session.new_file_download_group(
                endpoint=self.url, token="local", token_expiry_unix_secs=expiry
            ) as group:
                group.start_download_file(hf_xet.XetFileInfo(*file), str(partial))
            if hashlib.sha256(partial.read_bytes()).hexdigest() != sha256:
                raise HubError(500, f"xet storage gave other bytes for {sha256}")
            partial.replace(target)
