"""LOHA: two low-rank matrices multiplied element by element, with PEFT's names, which are LyCORIS' (kind `loha`)."""

from __future__ import annotations

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.dialects.peft.types import PATTERN, RANK, SWITCH, ModuleTensors, number

PARTS = {
    "hada_w1_a": "first left factor: (out, r), with a core (r, out)",
    "hada_w1_b": "first right factor: (r, in·…), with a core (r, in)",
    "hada_w2_a": "second left factor",
    "hada_w2_b": "second right factor",
    "hada_t1": "first core: (r, r, kh, kw)",
    "hada_t2": "second core",
}
FIELDS = {
    "r": RANK, "alpha": number(8), "rank_pattern": PATTERN, "alpha_pattern": PATTERN, "use_effective_conv2d": SWITCH,
}  # fmt: skip
HARMLESS = dict.fromkeys(("rank_dropout", "module_dropout"), "training only")


def update(one: ModuleTensors) -> Update:
    """Return the update with s = α/r, r of the config, by PEFT's patterns."""
    one.has("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    rank, alpha = one.by_pattern("r", "rank_pattern"), one.by_pattern("alpha", "alpha_pattern")
    return one.of_rank(kinds.get("loha").build(one.parts, alpha / rank, alpha), "rank_pattern")
