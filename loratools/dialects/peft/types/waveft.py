"""WAVEFT: single coefficients of a wavelet transform, their places drawn from a seed (kind `waveft`)."""

from __future__ import annotations

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.dialects.peft.types import PATTERN, SWITCH, Field, ModuleTensors, a_switch, count, number

PARTS = {"waveft_spectrum": "coefficients: (n,)"}
FIELDS = {
    "n_frequency": count(2592), "n_frequency_pattern": PATTERN, "scaling": number(25.0), "random_loc_seed": count(777),
    "wavelet_family": Field(lambda value: isinstance(value, str), "a wavelet's name", "db1"),
    "use_idwt": Field(a_switch, "a switch", True), "proportional_parameters": SWITCH,
}  # fmt: skip
HARMLESS: dict[str, str] = {}


def update(one: ModuleTensors) -> Update:
    """Return the update; raise `ValueError` for another number of coefficients than the config has."""
    one.has(*PARTS)
    count, expected = one.parts["waveft_spectrum"].parameters, one.by_pattern("n_frequency", "n_frequency_pattern")
    if not one["proportional_parameters"] and count != expected:
        raise ValueError(f"waveft_spectrum has {count} coefficients, the config says {expected}")
    layout = {"seed": one["random_loc_seed"], "wavelet": one["wavelet_family"] if one["use_idwt"] else None}
    built: Update = kinds.get("waveft").build(one.parts, one["scaling"], one["scaling"], layout=layout)
    return built
