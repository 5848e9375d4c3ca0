"""FOURIERFT: single coefficients of a Fourier transform, their places drawn from a seed (kind `fourierft`)."""

from __future__ import annotations

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.dialects.peft.types import PATTERN, ModuleTensors, count, number

PARTS = {"fourierft_spectrum": "coefficients: (n,)"}
FIELDS = {
    "n_frequency": count(1000), "n_frequency_pattern": PATTERN, "scaling": number(150.0), "random_loc_seed": count(777),
}  # fmt: skip
HARMLESS: dict[str, str] = {}


def update(one: ModuleTensors) -> Update:
    """Return the update; raise `ValueError` for another number of coefficients than the config has."""
    one.has(*PARTS)
    count, expected = one.parts["fourierft_spectrum"].parameters, one.by_pattern("n_frequency", "n_frequency_pattern")
    if count != expected:
        raise ValueError(f"fourierft_spectrum has {count} coefficients, the config says {expected}")
    layout = {"seed": one["random_loc_seed"]}
    built: Update = kinds.get("fourierft").build(one.parts, one["scaling"], one["scaling"], layout=layout)
    return built
