"""PEANUT: a small network that makes the difference out of the weight (kind `peanut`)."""

from __future__ import annotations

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.dialects.peft.types import Field, ModuleTensors, count, number, rank

PARTS = {
    "peanut_A.weight": "what the network takes in: (r, out)", "peanut_B.weight": "what it gives: (out, r)",
    "peanut_encoders.{n}.weight": "its first half: (r, r)", "peanut_decoders.{n}.weight": "its second half: (r, r)",
}  # fmt: skip
FIELDS = {
    "r": rank(32), "depth": count(0), "scaling": number(1.0),
    "act_fn": Field(lambda value: isinstance(value, str), "a function's name", "relu"),
}  # fmt: skip
HARMLESS: dict[str, str] = {}


def update(one: ModuleTensors) -> Update:
    """Return the update."""
    one.has("peanut_A.weight", "peanut_B.weight")
    layout = {"activation": one["act_fn"]}
    built: Update = kinds.get("peanut").build(one.parts, one["scaling"], one["scaling"], layout=layout)
    if len(one.parts) != 2 + 2 * one["depth"]:
        raise ValueError(f"its network has {len(one.parts) - 2} inner matrices, the config says depth {one['depth']}")
    return one.of_rank(built)
