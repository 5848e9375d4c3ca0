"""The hashes in a file's header: of its data alone, so that they stay the same when the header changes."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

from loratools.storage import save
from loratools.storage.lazy import LazyTensor

SHS = ("sshs_model_hash", "sshs_legacy_hash")
"""Those that sd-scripts writes."""
MODELSPEC = "modelspec.hash_sha256"
_LEGACY_START, _LEGACY_LENGTH = 0x100000, 0x10000


def hashes(tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str], names: Collection[str]) -> dict[str, str]:
    """Return the hashes of these `names` of a file of tensors; all its data are read, unless there are none.

    `sshs_model_hash` is the SHA-256 of the data section; ModelSpec's is the same with `0x` before it. The legacy hash
    is the first 8 digits of the SHA-256 of 64 KiB, from 1 MiB on, of a file whose header has only the `ss_` entries
    of `metadata` (sd-scripts, `precalculate_safetensors_hashes`).
    """
    if not names:
        return {}
    data = hashlib.sha256()
    for piece in save.pieces(tensors):
        data.update(piece)
    every = dict(zip(SHS, (data.hexdigest(), legacy_hash(tensors, metadata)), strict=True)) | {
        MODELSPEC: f"0x{data.hexdigest()}"
    }
    return {name: every[name] for name in sorted(names)}


def legacy_hash(tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> str:
    """Return `sshs_legacy_hash` of a file of tensors, of which no more than about a megabyte is read."""
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    at, stop = len(save.header(tensors, training)), _LEGACY_START + _LEGACY_LENGTH
    hashed = hashlib.sha256()
    for piece in save.pieces(tensors):
        if at >= stop:
            break
        first, last = max(_LEGACY_START - at, 0), stop - at
        if last > first:
            hashed.update(piece[first:last])
        at += len(piece)
    return hashed.hexdigest()[:8]
