"""OSF: the base's small singular values replaced (kind `osf`)."""

from __future__ import annotations

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.dialects.peft.types import Field, ModuleTensors

PARTS = {
    "osf_svd_params.U_low": "left vectors: (out, m)", "osf_svd_params.S_low": "values: (m,)",
    "osf_svd_params.V_low": "right vectors: (m, in)",
}  # fmt: skip
FIELDS: dict[str, Field] = {}
HARMLESS = {
    **dict.fromkeys(("effective_rank", "rank_pattern"), "how many values are kept; the tensors say it"),
    "target_svd_config": "not used by PEFT",
}


def update(one: ModuleTensors) -> Update:
    """Return the update."""
    one.has(*PARTS)
    built: Update = kinds.get("osf").build(one.parts, 1.0, 1.0)
    return built
