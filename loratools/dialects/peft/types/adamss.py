"""ADAMSS: the rows of a weight in groups, and a product for each (kind `adamss`)."""

from __future__ import annotations

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.dialects.peft.types import ModuleTensors, count, rank

PARTS = {
    "adamss_newB": "right singular vectors: (r, in)", "adamss_A.{n}": "factor A of a group: (q, r)",
    "adamss_B.{n}": "factor B of a group: (rows of the group, q)",
}  # fmt: skip
FIELDS = {"r": rank(100), "random_seed": count(0)}
HARMLESS = {
    **dict.fromkeys(("num_subspaces", "subspace_rank", "use_dynamic_rank", "svd_threshold"), "the tensors say it"),
    **dict.fromkeys(
        ("use_asa", "asa_target_subspaces", "init_warmup", "final_warmup", "mask_interval", "asa_importance_beta",
         "asa_uncertainty_beta", "asa_schedule_exponent"), "training only",
    ),
}  # fmt: skip


def update(one: ModuleTensors) -> Update:
    """Return the update; its rank is at most the shorter side of the weight."""
    one.has("adamss_newB")
    built: Update = kinds.get("adamss").build(one.parts, 1.0, 1.0, layout={"seed": one["random_seed"]})
    if built.rank > one["r"]:
        raise ValueError(f"its tensors have rank {built.rank}, the config says {one['r']}")
    return built
