"""OFT: rotations of blocks of inputs, as PEFT has them since 0.15 (kind `oft_input`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.dialects.peft.types import SWITCH, Field, ModuleTensors, a_switch, count, number

PARTS = {
    "oft_R.weight": "upper triangles of skew matrices: (blocks, b(b − 1)/2)",
    "oft_embedding_R.weight": "the same of an embedding, whose rows turn the other way",
}
FIELDS = {
    "r": count(0), "oft_block_size": count(32), "coft": SWITCH, "eps": number(6e-5), "block_share": SWITCH,
    "use_cayley_neumann": Field(a_switch, "a switch", True), "num_cayley_neumann_terms": count(5),
}  # fmt: skip
HARMLESS = {"module_dropout": "training only"}


def notes(fields: Mapping[str, Any]) -> Iterator[str]:
    """Yield that PEFT before 0.18, which wrote no version, computed the series in another way, as PEFT says too."""
    if fields.get("use_cayley_neumann") and "peft_version" not in fields:
        yield (
            "trained with PEFT before 0.18, whose Cayley-Neumann series was slightly another; it is applied as PEFT "
            "applies it since"
        )


def update(one: ModuleTensors) -> Update:
    """Return the update; sizes come from the tensor, since PEFT adjusts those of the config to each module."""
    if len(one.parts) != 1:
        raise ValueError(f"expected one of {', '.join(PARTS)}; found {', '.join(sorted(one.parts))}")
    layout = {
        **({"terms": one["num_cayley_neumann_terms"]} if one["use_cayley_neumann"] else {}),
        **({"eps": one["eps"]} if one["coft"] else {}),
        **({"share": True} if one["block_share"] else {}),
    }
    built: Update = kinds.get("oft_input").build(one.parts, 1.0, 1.0, layout=layout)
    return built
