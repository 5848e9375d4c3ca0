"""SUPERTUNING: the largest or smallest elements of a weight, and with "Supra" a product (kind `supertuning`)."""

from __future__ import annotations

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.dialects.peft.types import Field, ModuleTensors, a_rank, a_switch, number

PARTS = {
    "supertuning_values": "what is added to elements: (n,)", "supertuning_indices": "their places: (n,)",
    "supertuning_lora_A.weight": "factor A: (r, in)", "supertuning_lora_B.weight": "factor B: (out, r)",
}  # fmt: skip
FIELDS = {
    "r": Field(a_rank, "a rank above zero"), "lora_alpha": number(0),
    "save_precomputed_indices": Field(a_switch, "a switch", True),
}  # fmt: skip
REFUSED = {
    "save_precomputed_indices": (
        lambda value: value is False,
        "which elements it changes is not in the file; save it again with save_precomputed_indices=True",
    )
}
HARMLESS = {
    "lora_dropout": "training only", **dict.fromkeys(("sparsity", "select_top"), "which elements; the file has them"),
}  # fmt: skip


def update(one: ModuleTensors) -> Update:
    """Return the update; the product has s = α/r, α = 2r where the config has none."""
    one.has("supertuning_values", "supertuning_indices")
    rank = one["r"]
    if (rank is not None) != ("supertuning_lora_A.weight" in one.parts):
        raise ValueError(f"the config says r = {rank}, and its tensors are {', '.join(sorted(one.parts))}")
    alpha = float(one["lora_alpha"] or 2 * rank) if rank else 1.0
    built: Update = kinds.get("supertuning").build(one.parts, alpha / rank if rank else 1.0, alpha)
    return one.of_rank(built) if rank else built
