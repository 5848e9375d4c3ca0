"""GLORA: sums and products with the weight and the bias, five paths of three sorts (kind `glora_sums`)."""

from __future__ import annotations

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.dialects.peft.types import Field, ModuleTensors, rank

PARTS = {
    f"glora_{path}.{part}": what
    for path in "ABCDE"
    for part, what in (("Xd", "left factor"), ("Xu", "right factor"), ("X", "vector or number"), ("zeros", "nothing"))
}


def _word(value: object) -> bool:
    return isinstance(value, str)


FIELDS = {
    "r": rank(8), "config_A_B": Field(_word, "a word", "lora"), "config_C": Field(_word, "a word", "lora"),
    "config_D_E": Field(_word, "a word", "constant"),
}  # fmt: skip
HARMLESS: dict[str, str] = {}


def update(one: ModuleTensors) -> Update:
    """Return the update; its tensors tell what each path is."""
    built: Update = kinds.get("glora_sums").build(one.parts, 1.0, 1.0)
    return one.of_rank(built) if built.rank else built
