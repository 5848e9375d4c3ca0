"""TRAINABLE_TOKENS: rows of an embedding that were trained by themselves (kind `tokens`)."""

from __future__ import annotations

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.adapter.kinds.tokens import ROWS_PART
from loratools.dialects.peft.fields import indices
from loratools.dialects.peft.types import Field, ModuleTensors

PARTS = {"trainable_tokens_delta": "the rows: (n, dimension)"}
TIED = True  # PEFT saves the rows of a tied head too, which the config does not target
RENAMED = {ROWS_PART: "trainable_tokens_delta"}
FIELDS = {"token_indices": Field(indices, "token indices", [])}
HARMLESS: dict[str, str] = {}


def update(one: ModuleTensors) -> Update:
    """Return the update of the rows that the config lists."""
    built: Update = kinds.get("tokens").build(
        {ROWS_PART: one.parts["trainable_tokens_delta"]}, 1.0, 1.0, layout={"rows": one["token_indices"]}
    )
    return built
