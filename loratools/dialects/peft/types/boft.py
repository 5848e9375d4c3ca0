"""BOFT: butterfly products of rotations of inputs, and scales of outputs (kind `boft`)."""

from __future__ import annotations

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.dialects.peft.types import ModuleTensors, count

PARTS = {"boft_R": "blocks: (factors, n, b, b)", "boft_s": "scales of outputs: (out, 1)"}
FIELDS = {"boft_block_size": count(4), "boft_block_num": count(0), "boft_n_butterfly_factor": count(1)}
HARMLESS = {"boft_dropout": "training only"}


def update(one: ModuleTensors) -> Update:
    """Return the update; sizes come from the tensors, as where PEFT trained with its CUDA kernel or without."""
    one.has(*PARTS)
    if (factors := one.parts["boft_R"].shape[0]) != one["boft_n_butterfly_factor"]:
        raise ValueError(f"boft_R has {factors} factors, the config says {one['boft_n_butterfly_factor']}")
    built: Update = kinds.get("boft").build(one.parts, 1.0, 1.0)
    return built
