"""DEFT: a projection of the outputs taken out and another put in (kind `deft`)."""

from __future__ import annotations

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.dialects.peft.types import RANK, SWITCH, Field, ModuleTensors, number, one_of

PARTS = {"deft_P": "projection: (out, r)", "deft_R": "what is put in: (r, in); none with para"}
FIELDS = {
    "r": RANK, "alpha": number(0), "decomposition_method": Field(one_of("relu", "qr"), "relu or qr", "relu"),
    "para": SWITCH,
}  # fmt: skip
HARMLESS = {"init_scale": "how training was initialized", "deft_dropout": "training only"}


def update(one: ModuleTensors) -> Update:
    """Return the update with s = α/r, or 1 without an alpha; r is at most the number of outputs."""
    one.has(*(["deft_P"] if one["para"] else PARTS))
    if one["para"] and "deft_R" in one.parts:
        raise ValueError("it has deft_R, and the config says para")
    rank = one.parts["deft_P"].shape[-1]
    if rank != min(one["r"], one.parts["deft_P"].shape[0]):
        raise ValueError(f"its tensors have rank {rank}, the config says {one['r']}")
    scaling = one["alpha"] / rank if one["alpha"] else 1.0
    layout = {"method": one["decomposition_method"]}
    built: Update = kinds.get("deft").build(one.parts, scaling, one["alpha"] or float(rank), layout=layout)
    return built
