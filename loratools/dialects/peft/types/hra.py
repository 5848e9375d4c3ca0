"""HRA: input features reflected (kind `hra`)."""

from __future__ import annotations

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.dialects.peft.types import RANK, SWITCH, ModuleTensors

PARTS = {"hra_u": "directions: (in·…, r)"}
FIELDS = {"r": RANK, "apply_GS": SWITCH}
HARMLESS: dict[str, str] = {}


def update(one: ModuleTensors) -> Update:
    """Return the update, with the directions made orthogonal where the config says so."""
    one.has(*PARTS)
    built: Update = kinds.get("hra").build(one.parts, 1.0, 1.0, layout={"orthogonal": one["apply_GS"]})
    return one.of_rank(built)
