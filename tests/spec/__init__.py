"""The specification: its vectors, its text, its second reader."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SPEC = Path(__file__).parents[2] / "spec" / "v1"
VECTORS = SPEC / "vectors"

sys.path.insert(0, str(SPEC))  # the second reader is a script with two modules beside it, and no package


def cases(area: str) -> list[str]:
    """Return the names of the vectors of an area, sorted."""
    marks = {"valid": "expected.json", "invalid": "why.json", "hash": "expected.json"}
    return sorted(str(mark.parent.relative_to(VECTORS / area)) for mark in (VECTORS / area).rglob(marks[area]))


def adapter_of(area: str, name: str) -> Path:
    """Return the adapter of a vector: its folder, or its file."""
    folder = VECTORS / area / name / "adapter"
    return folder if folder.is_dir() else folder.with_suffix(".safetensors")


def base_of(area: str, name: str) -> Path | None:
    """Return the base model that comes with a vector."""
    folder = VECTORS / area / name / "base"
    return folder if folder.is_dir() else None


def note(area: str, name: str) -> dict[str, Any]:
    """Return what a vector says about itself."""
    file = "why.json" if area == "invalid" else "expected.json"
    loaded: dict[str, Any] = json.loads((VECTORS / area / name / file).read_text())
    return loaded
