"""PVERA: VeRA whose ranks are distributions; what merges is their mean, the first half (kind `pvera`)."""

from __future__ import annotations

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.dialects.peft.types import Field, ModuleTensors, a_switch, count, rank

PARTS = {"pvera_lambda_b": "scales of outputs: (out,)", "pvera_lambda_d": "scales of means and variances: (2r,)"}
SHARED = {"pvera_A": "projection of inputs: (2r, most inputs)", "pvera_B": "projection to outputs: (most outputs, r)"}
FIELDS = {
    "r": rank(256), "projection_prng_key": count(0), "save_projection": Field(a_switch, "a switch", True),
}  # fmt: skip
HARMLESS = {
    "pvera_dropout": "training only",
    "d_initial": "how training was initialized",
    "generator_seed": "seeds what is sampled, and a merge takes the mean",
    "sample_at_inference": "a merge takes the mean, as PEFT's does",
}


def update(one: ModuleTensors) -> Update:
    """Return the update, with the seed where the file has no projections."""
    one.has(*PARTS, *(SHARED if one.shared else ()))
    layout = {} if one.shared else {"seed": one["projection_prng_key"]}
    return one.of_rank(kinds.get("pvera").build({**one.parts, **one.shared}, 1.0, 1.0, layout=layout))
