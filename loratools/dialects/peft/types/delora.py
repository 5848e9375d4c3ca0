"""DELORA: a product whose ranks have a length of their own (kind `delora`)."""

from __future__ import annotations

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.dialects.peft.types import PATTERN, RANK, ModuleTensors

PARTS = {
    "delora_A": "factor A: (r, in)", "delora_B": "factor B: (out, r)", "delora_lambda": "the length: (1,)",
    "delora_w_norm": "norms of the base's columns: (in,)",
}  # fmt: skip
FIELDS = {"r": RANK, "rank_pattern": PATTERN}
HARMLESS = {
    **dict.fromkeys(("delora_lambda", "lambda_pattern"), "how training was initialized"),
    "module_dropout": "training only",
}


def update(one: ModuleTensors) -> Update:
    """Return the update."""
    one.has(*PARTS)
    built: Update = kinds.get("delora").build(one.parts, 1.0, 1.0)
    return one.of_rank(built, "rank_pattern")
