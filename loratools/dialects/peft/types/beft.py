"""BEFT: numbers that are added to the bias (kind `beft`)."""

from __future__ import annotations

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.dialects.peft.types import Field, ModuleTensors
from loratools.format import keys
from loratools.storage.lazy import LazyTensor

PARTS = {"beft_bias": "what is added to the bias: (1, out)"}
PLACE = "{module}.bias"
FIELDS: dict[str, Field] = {}
HARMLESS: dict[str, str] = {}


KIND = "beft"


def stored(module: str, update: Update) -> dict[str, LazyTensor]:
    """Return the numbers as a row."""
    numbers = update.parts["beft_bias"]
    return {keys.join(module.removesuffix(".bias"), "beft_bias"): numbers.reshaped((1, numbers.parameters))}


def update(one: ModuleTensors) -> Update:
    """Return the update."""
    built: Update = kinds.get("beft").build(one.parts, 1.0, 1.0)
    return built
