"""SUPERTUNING: the largest or smallest elements of a weight, and with "Supra" a product (kind `supertuning`)."""

from __future__ import annotations

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.adapter.kinds.supertuning import INDICES, VALUES, A, B
from loratools.dialects.peft.types import Field, ModuleTensors, a_rank, a_switch, number

PARTS = {
    VALUES: "what is added to elements: (n,)", INDICES: "their places: (n,)",
    A: "factor A: (r, in)", B: "factor B: (out, r)",
}  # fmt: skip
FIELDS = {
    "r": Field(a_rank, "a rank above zero"), "lora_alpha": number(0),
    "save_precomputed_indices": Field(a_switch, "a switch", True), "select_top": Field(a_switch, "a switch", True),
}  # fmt: skip
HARMLESS = {
    "lora_dropout": "training only", "sparsity": "how many elements there are; the file has a number for each",
}  # fmt: skip


def update(one: ModuleTensors) -> Update:
    """Return the update; the product has s = α/r, α = 2r where the config has none."""
    one.has(VALUES)
    rank = one["r"]
    if (rank is not None) != (A in one.parts):
        raise ValueError(f"the config says r = {rank}, and its tensors are {', '.join(sorted(one.parts))}")
    alpha = float(one["lora_alpha"] or 2 * rank) if rank else 1.0
    kind, layout = ("supertuning", {}) if INDICES in one.parts else ("supertuned", {"largest": one["select_top"]})
    built: Update = kinds.get(kind).build(one.parts, alpha / rank if rank else 1.0, alpha, layout=layout)
    return one.of_rank(built) if rank else built
