"""C3A: circulant blocks (kind `c3a`)."""

from __future__ import annotations

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.dialects.peft.types import PATTERN, ModuleTensors, count

PARTS = {"c3a_kernel": "kernels: (out/b, in/b, b)"}
FIELDS = {"block_size": count(256), "block_size_pattern": PATTERN}
HARMLESS: dict[str, str] = {}


def update(one: ModuleTensors) -> Update:
    """Return the update; how large a block is, the tensor says."""
    one.has(*PARTS)
    built: Update = kinds.get("c3a").build(one.parts, 1.0, 1.0)
    return built
