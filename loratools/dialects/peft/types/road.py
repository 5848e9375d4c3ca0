"""ROAD: output features rotated in pairs and scaled, those of the bias too (kind `road`)."""

from __future__ import annotations

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.dialects.peft.types import Field, ModuleTensors, one_of, rank

PARTS = {"road_theta": "angles: (out/2,), (out,) or (2·out,)", "road_alpha": "factors, of the same shape"}
FIELDS = {
    "variant": Field(one_of("road_1", "road_2", "road_4"), "road_1, road_2 or road_4", "road_1"),
    "group_size": rank(64),
}  # fmt: skip
HARMLESS: dict[str, str] = {}


def update(one: ModuleTensors) -> Update:
    """Return the update."""
    one.has(*PARTS)
    layout = {"variant": one["variant"], "group": one["group_size"]}
    built: Update = kinds.get("road").build(one.parts, 1.0, 1.0, layout=layout)
    return built
