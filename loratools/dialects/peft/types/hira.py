"""HIRA: a low-rank matrix multiplied with the weight element by element (kind `hira`)."""

from __future__ import annotations

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.dialects.peft.types import PATTERN, ModuleTensors, rank

PARTS = {
    "hira_A": "factor A: (r, in, …)",
    "hira_B": "factor B: (out, r, 1…)",
    "hira_embedding_A": "factor A of an embedding: (r, vocabulary)",
    "hira_embedding_B": "factor B of an embedding: (dimension, r)",
}
FIELDS = {"r": rank(32), "rank_pattern": PATTERN}
HARMLESS = {"hira_dropout": "training only"}


def update(one: ModuleTensors) -> Update:
    """Return the update; PEFT 0.21 gives every module the rank r, whatever `rank_pattern` says, and neither counts."""
    of_embedding = any("embedding" in part for part in one.parts)
    one.has(*(part for part in PARTS if ("embedding" in part) == of_embedding))
    built: Update = kinds.get("hira").build(one.parts, 1.0, 1.0)
    return built
