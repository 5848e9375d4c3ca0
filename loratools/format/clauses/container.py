"""Chapter 7, the file as a container: which clause a damaged safetensors file breaks (S-01 to S-06)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loratools.errors import BadFile
from loratools.format.clauses import natural
from loratools.storage import dtypes
from loratools.storage.header import MAX_HEADER, nbytes
from loratools.storage.sources import open_file
from loratools.storage.strict_json import parse_json_object

_FIELDS = {"dtype", "shape", "data_offsets"}


def clause_of(path: Path) -> str:
    """Return the clause that a file breaks which `storage.header.read_header` has refused.

    The header reader says what is wrong in a sentence; this says only under which number, in the reader's order.
    """
    with open_file(path) as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        rest = path.stat().st_size - 8
        if len(prefix) < 8 or length > rest or length > MAX_HEADER:
            return "S-01"
        raw = file.read(length)
    try:
        document = parse_json_object(raw, path)
    except BadFile:
        return "S-02"
    metadata = document.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        return "S-06"
    if not all(_formed(entry) for entry in document.values()):
        return "S-03"
    if any(nbytes(e["dtype"], e["shape"]) != e["data_offsets"][1] - e["data_offsets"][0] for e in document.values()):
        return "S-05"
    return "S-04"


def _formed(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and entry.keys() == _FIELDS
        and isinstance(entry["dtype"], str)
        and dtypes.is_known(entry["dtype"])
        and all(isinstance(entry[key], list) and all(map(natural, entry[key])) for key in ("shape", "data_offsets"))
        and len(entry["data_offsets"]) == 2
    )
