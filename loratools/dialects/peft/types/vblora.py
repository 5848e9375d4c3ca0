"""VBLORA: factors tiled with mixtures of vectors from a bank that all modules share (kind `vblora`)."""

from __future__ import annotations

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.dialects.peft.types import SWITCH, ModuleTensors, rank

PARTS = {
    f"vblora_logits_{side}{part}": what
    for side in "AB"
    for part, what in (
        ("", "logits over the bank"), ("_topk_indices", "those chosen"), ("_topk_weights", "all weights but the last"),
    )
}  # fmt: skip
SHARED = {"vblora_vector_bank": "the vectors: (h, b)"}
FIELDS = {
    "r": rank(4), "num_vectors": rank(256), "vector_length": rank(256), "topk": rank(2),
    "save_only_topk_weights": SWITCH,
}  # fmt: skip
HARMLESS = {
    "vblora_dropout": "training only",
    **dict.fromkeys(("init_vector_bank_bound", "init_logits_std"), "how training was initialized"),
}


def update(one: ModuleTensors) -> Update:
    """Return the update, from logits or from what was chosen by them."""
    one.has(*SHARED)
    for side in ("vblora_logits_A", "vblora_logits_B"):
        if side not in one.parts:
            one.has(f"{side}_topk_indices", f"{side}_topk_weights")
    built = kinds.get("vblora").build({**one.parts, **one.shared}, 1.0, 1.0, layout={"topk": one["topk"]})
    return one.of_rank(built)
