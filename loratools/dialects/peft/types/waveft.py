"""WAVEFT: single coefficients of a wavelet transform, their places drawn from a seed (kind `waveft`)."""

from __future__ import annotations

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.dialects.peft.types import PATTERN, Field, ModuleTensors, a_switch, count, number

PARTS = {"waveft_spectrum": "coefficients: (n,)"}
FIELDS = {
    "n_frequency": count(2592), "n_frequency_pattern": PATTERN, "scaling": number(25.0), "random_loc_seed": count(777),
    "wavelet_family": Field(lambda value: isinstance(value, str), "a wavelet's name", "db1"),
    "use_idwt": Field(a_switch, "a switch", True),
}  # fmt: skip
HARMLESS = {"proportional_parameters": "how many coefficients a module has; the tensor says it"}


def update(one: ModuleTensors) -> Update:
    """Return the update; how many coefficients there are, the tensor says."""
    one.has(*PARTS)
    layout = {"seed": one["random_loc_seed"], "wavelet": one["wavelet_family"] if one["use_idwt"] else None}
    built: Update = kinds.get("waveft").build(one.parts, one["scaling"], one["scaling"], layout=layout)
    return built
