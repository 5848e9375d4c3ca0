"""VERA: vectors that scale random projections which all modules share (kind `vera`)."""

from __future__ import annotations

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.dialects.peft.types import Field, ModuleTensors, a_switch, count, rank

PARTS = {"vera_lambda_b": "scales of outputs: (out,)", "vera_lambda_d": "scales of ranks: (r,)"}
SHARED = {"vera_A": "projection of inputs: (r, most inputs)", "vera_B": "projection to outputs: (most outputs, r)"}
FIELDS = {
    "r": rank(256), "projection_prng_key": count(0), "save_projection": Field(a_switch, "a switch", True),
}  # fmt: skip
HARMLESS = {"vera_dropout": "training only", "d_initial": "how training was initialized"}


def update(one: ModuleTensors) -> Update:
    """Return the update, with the seed where the file has no projections."""
    one.has(*PARTS, *(SHARED if one.shared else ()))
    layout = {} if one.shared else {"seed": one["projection_prng_key"]}
    return one.of_rank(kinds.get("vera").build({**one.parts, **one.shared}, 1.0, 1.0, layout=layout))
