"""MISS: a small matrix laid side by side (kind `miss`), or block-affine transformations (kind `bat`)."""

from __future__ import annotations

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.dialects.peft.types import ModuleTensors, count, rank

PARTS = {"miss_block": "the matrix: (r, out) or (r, mini_r), of block-affine transformations (out/r, r, r)"}
FIELDS = {"r": rank(64), "mini_r": count(1)}
HARMLESS = {"miss_dropout": "training only"}


def update(one: ModuleTensors) -> Update:
    """Return the update of the kind that the matrix's sides tell."""
    kind = kinds.claim(one.parts)
    if kind is None:
        shapes = ", ".join(f"{name} {lazy.shape}" for name, lazy in one.parts.items())
        raise ValueError(f"{shapes}: expected a matrix, or one for each row of blocks")
    built: Update = kinds.get(kind).build(one.parts, 1.0, 1.0)
    return one.of_rank(built)
