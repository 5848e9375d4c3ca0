"""GRALORA: low rank in blocks that exchange their ranks (kind `gralora`)."""

from __future__ import annotations

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.dialects.peft.types import ModuleTensors, count, number, rank

PARTS = {
    "gralora_A": "factors A of the blocks: (k, in/k, r)",
    "gralora_B": "factors B of the blocks: (k, r, out/k)",
    "gralora_A_general.weight": "factor A of the whole: (h, in)",
    "gralora_B_general.weight": "factor B of the whole: (out, h)",
}
FIELDS = {"r": rank(32), "hybrid_r": count(0), "alpha": number(64), "gralora_k": rank(2)}
HARMLESS = {"gralora_dropout": "training only"}


def update(one: ModuleTensors) -> Update:
    """Return the update with s = α/(r + h)."""
    one.has("gralora_A", "gralora_B", *(list(PARTS)[2:] if one["hybrid_r"] else ()))
    rank = one["r"] + one["hybrid_r"]
    built: Update = kinds.get("gralora").build(one.parts, one["alpha"] / rank, one["alpha"])
    if built.rank != rank:
        raise ValueError(f"its tensors have rank {built.rank}, the config says {one['r']} and {one['hybrid_r']}")
    return built
