"""LN_TUNING: layers, most of them normalizations, that were trained whole and take the place of the base's."""

from __future__ import annotations

from collections.abc import Mapping

from loratools.dialects.peft.types import Field, ModuleTensors
from loratools.storage.lazy import LazyTensor

_PREFIX = "ln_tuning_layers."
PARTS = {f"{_PREFIX}{{word}}": "a parameter of the layer"}
WHOLE = _PREFIX
FIELDS: dict[str, Field] = {}
HARMLESS: dict[str, str] = {}


def whole(one: ModuleTensors) -> Mapping[str, LazyTensor]:
    """Return the parameters, by their names in the layer."""
    return {part.removeprefix(_PREFIX): lazy for part, lazy in one.parts.items()}
