"""The digest of what the tensors of an adapter mean: one edited scaling, layout or target tensor gives another.

    meaning = H("loratools.meaning.v1\\0" ‖ canonical JSON of {"extensions", "modules", "replacements"})

It covers each module's kind, rank, alpha, scaling, layout, base tensor and the names of its parts; each replacement's
base tensor; and what every extension that must be understood is configured with (`spec/v1/5-integrity.md`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loratools.format.canonical import canonical_object
from loratools.storage import digest

FIELDS = frozenset({"kind", "rank", "alpha", "scaling", "layout", "tensor"})
"""Fields of a module's entry that decide what its tensors mean."""


def of(document: Mapping[str, Any], parts: Mapping[str, Iterable[str]], algorithm: str = digest.DEFAULT) -> str:
    """Return the meaning of a manifest whose modules have these parts (module path -> names of its parts).

    Raises `ValueError` for what canonical JSON cannot hold.
    """
    extensions = {
        each["name"]: each.get("configuration", {})
        for each in document.get("extensions", [])
        if each.get("must_understand", True)
    }
    whole = {
        "extensions": extensions,
        "modules": {
            path: {**_covered(entry), "parts": sorted(parts.get(path, ()))}
            for path, entry in document.get("modules", {}).items()
        },
        "replacements": {path: _covered(entry) for path, entry in document.get("replacements", {}).items()},
    }
    hasher = digest.new(algorithm)
    hasher.update(b"loratools.meaning.v1\0" + canonical_object(whole).encode())
    return digest.finish(hasher, algorithm)


def _covered(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in entry.items() if field in FIELDS}
