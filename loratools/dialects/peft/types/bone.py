"""BONE: what PEFT before 0.18 called MISS, with other names for the same (kinds `miss` and `bat`)."""

from __future__ import annotations

from loratools.dialects.peft.types import miss, rank

PARTS = {"bone_block": "the matrix: (r, out), of block-affine transformations (out/r, r, r)"}
FIELDS = {"r": rank(64)}
HARMLESS: dict[str, str] = {}
update = miss.update
