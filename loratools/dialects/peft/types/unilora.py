"""UNILORA: factors whose numbers are picked out of a few that all modules share (kind `unilora`)."""

from __future__ import annotations

from collections.abc import Mapping

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.dialects.peft.types import Field, ModuleTensors, a_switch, count, rank

PARTS = {
    "unilora_indices_A": "which number stands where in A: (r, in)", "unilora_scales_A": "their scales: (r, in)",
    "unilora_indices_B": "which number stands where in B: (out, r)", "unilora_scales_B": "their scales: (out, r)",
}  # fmt: skip
SHARED = {"unilora_theta_d": "the numbers: (d,)"}
FIELDS = {
    "r": rank(4), "theta_d_length": rank(256), "proj_seed": count(42),
    "save_indices": Field(a_switch, "a switch", False),
}  # fmt: skip
HARMLESS = {"unilora_dropout": "training only", "init_theta_d_bound": "how training was initialized"}
_WHY = "which of its numbers stands where is not in the file, and PEFT draws it for all modules in turn"


def update(one: ModuleTensors) -> Update:
    """Return the update of a module whose indices are in the file."""
    one.has(*PARTS, *SHARED)
    built: Update = kinds.get("unilora").build({**one.parts, **one.shared}, 1.0, 1.0)
    return one.of_rank(built)


def updates(one: ModuleTensors) -> Mapping[str, Update]:
    """Return the updates of all modules where the file has no indices, by their order in the model's code."""
    one.has(*SHARED)
    r, order = one["r"], one.order(_WHY)
    sizes = {module: r * (out + inner) for module, (out, inner) in order.shapes.items()}
    result: dict[str, Update] = {}
    first, count = 0, sum(sizes.values())
    for module, shape in order.shapes.items():
        layout = {
            "seed": one["proj_seed"], "count": count, "first": first, "rank": r, "shape": list(shape),
            "dtype": order.dtype,
        }  # fmt: skip
        result[module] = kinds.get("unilora").build(one.shared, 1.0, 1.0, layout=layout)
        first += sizes[module]
    return result
