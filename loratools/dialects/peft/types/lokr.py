"""LOKR: a Kronecker product, with PEFT's names, which are LyCORIS' (kind `lokr`), and its scaling, which is not.

PEFT scales by α/r also where both factors are stored whole.
"""

from __future__ import annotations

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.dialects.peft.types import PATTERN, RANK, SWITCH, ModuleTensors, number

PARTS = {
    "lokr_w1": "first factor, whole: (a, c)",
    "lokr_w1_a": "first factor's left factor: (a, r)",
    "lokr_w1_b": "first factor's right factor: (r, c)",
    "lokr_w2": "second factor, whole: (b, d, …)",
    "lokr_w2_a": "second factor's left factor: (b, r), with a core (r, b)",
    "lokr_w2_b": "second factor's right factor: (r, d·…), with a core (r, d)",
    "lokr_t2": "second factor's core: (r, r, kh, kw)",
}
FIELDS = {
    "r": RANK, "alpha": number(8), "rank_pattern": PATTERN, "alpha_pattern": PATTERN, "use_effective_conv2d": SWITCH,
    "decompose_both": SWITCH, "decompose_factor": number(-1),
}  # fmt: skip
HARMLESS = dict.fromkeys(("rank_dropout", "module_dropout", "rank_dropout_scale"), "training only")


def update(one: ModuleTensors) -> Update:
    """Return the update with s = α/r, r of the config, by PEFT's patterns."""
    kind = kinds.get("lokr")
    if not kind.claims(one.parts):
        raise ValueError(f"{', '.join(sorted(one.parts))} are no two factors of a Kronecker product")
    rank, alpha = one.by_pattern("r", "rank_pattern"), one.by_pattern("alpha", "alpha_pattern")
    built: Update = kind.build(one.parts, alpha / rank, alpha, layout={"scaled": True})
    if built.rank not in (0, rank):
        raise ValueError(f"its tensors have rank {built.rank}, the config says {rank}")
    return built
