"""PSOFT: a rotation between the base's largest singular vectors (kind `psoft`)."""

from __future__ import annotations

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.dialects.peft.types import SWITCH, Field, ModuleTensors, a_switch, count, number, one_of, rank

PARTS = {
    "psoft_R.weight": "triangle of a skew matrix: (r·(r − 1)/2,), or a matrix: (r, r)",
    "psoft_R.vector_b": "scales of rows: (r,)", "psoft_R.vector_a": "scales of columns: (r,)",
}  # fmt: skip
FIELDS = {
    "r": rank(32), "psoft_alpha": number(32),
    "ab_svd_init": Field(one_of("psoft_init", "pissa_init"), "psoft_init or pissa_init", "psoft_init"),
    "psoft_svd": Field(one_of("full", "lowrank"), "full or lowrank", "full"),
    "psoft_svd_lowrank_niter": count(10), "random_seed": count(0), "psoft_orth": Field(a_switch, "a switch", True),
    "use_cayley_neumann": SWITCH, "num_cayley_neumann_terms": rank(5), "cayley_neumann_eps": number(0),
    "psoft_mag_a": Field(a_switch, "a switch", True), "psoft_mag_b": Field(a_switch, "a switch", True),
}  # fmt: skip
HARMLESS = {
    "psoft_dropout": "training only",
}


def update(one: ModuleTensors) -> Update:
    """Return the update; PEFT divides the singular values by the scaling and multiplies by it again."""
    scales = [f"psoft_R.vector_{side}" for side in "ab" if one[f"psoft_mag_{side}"]]
    one.has("psoft_R.weight", *(scales if one["psoft_orth"] else ()))
    series = one["use_cayley_neumann"] and one["psoft_orth"]
    if (len(one.parts["psoft_R.weight"].shape) == 1) != one["psoft_orth"]:
        raise ValueError(f"psoft_R.weight has shape {one.parts['psoft_R.weight'].shape}, and the config says otherwise")
    layout = {
        "init": one["ab_svd_init"], "svd": one["psoft_svd"], "niter": one["psoft_svd_lowrank_niter"],
        "seed": one["random_seed"], "terms": one["num_cayley_neumann_terms"] if series else None,
        "longest": one["cayley_neumann_eps"] or None if series else None, "rank": one["r"],
    }  # fmt: skip
    built: Update = kinds.get("psoft").build(one.parts, 1.0, one["psoft_alpha"], layout=layout)
    return built
