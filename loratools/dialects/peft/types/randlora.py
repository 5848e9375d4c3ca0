"""RANDLORA: scaled sums of random bases that all modules share (kind `randlora`)."""

from __future__ import annotations

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.decisions import warned
from loratools.dialects.peft.types import SWITCH, Field, ModuleTensors, a_switch, count, number, rank

SHARED = {"randlora_A": "the small bases: (r, 1, m)", "randlora_B": "the large bases: (M, N, r)"}
PARTS = {
    "randlora_lambda": "scales of ranks: (r, n)", "randlora_gamma": "scales of features: (n, m)",
    **dict.fromkeys(SHARED, "the shared one, once more"),
}  # fmt: skip
FIELDS = {
    "r": rank(32), "randlora_alpha": number(640), "projection_prng_key": count(0), "sparse": SWITCH,
    "very_sparse": SWITCH, "save_projection": Field(a_switch, "a switch", True),
}  # fmt: skip
HARMLESS = {"randlora_dropout": "training only"}


def update(one: ModuleTensors) -> Update:
    """Return the update with s = α/r, and the seed where the file has no bases."""
    one.has("randlora_lambda", "randlora_gamma")
    bases = {part: one.shared.get(part, one.parts.get(part)) for part in SHARED}
    scales = {part: lazy for part, lazy in one.parts.items() if part not in SHARED}
    saved = {part: lazy for part, lazy in bases.items() if lazy is not None}
    sparse = "very_sparse" if one["very_sparse"] else "sparse" if one["sparse"] else ""
    if not saved and not sparse:
        warned("RandLoRA's bases are not in the file; they are drawn in bfloat16, as PEFT does where a machine has it")
    layout = {} if saved else {"seed": one["projection_prng_key"], "sparse": sparse}
    alpha = one["randlora_alpha"]
    return one.of_rank(kinds.get("randlora").build({**scales, **saved}, alpha / one["r"], alpha, layout=layout))
