"""SHIRA: single elements of a weight (kind `shira`)."""

from __future__ import annotations

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.dialects.peft.types import Field, ModuleTensors

PARTS = {"shira_weight": "what is added to elements: (n,)", "shira_indices": "their rows and columns: (2, n)"}
FIELDS: dict[str, Field] = {}
HARMLESS = {
    "r": "how many elements were chosen", **dict.fromkeys(("mask_type", "random_seed"), "which; the file has them"),
}  # fmt: skip


def update(one: ModuleTensors) -> Update:
    """Return the update."""
    one.has(*PARTS)
    built: Update = kinds.get("shira").build(one.parts, 1.0, 1.0)
    return built
