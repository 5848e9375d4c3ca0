"""IA3: a number for each output feature or, of feed-forward modules, each input (kind `ia3`)."""

from __future__ import annotations

from typing import Any

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.dialects.peft.types import Field, ModuleTensors

PARTS = {"ia3_l": "factors: (out, 1), of a feed-forward module (1, in), of a convolution (1, n, 1, …)"}
HARMLESS = {"init_ia3_weights": "how training was initialized"}


def _names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


FIELDS = {"feedforward_modules": Field(_names, "a list of names or a regular expression", [])}


def update(one: ModuleTensors) -> Update:
    """Return the update, on inputs where the config calls the module feed-forward."""
    one.has(*PARTS)
    on_input, shape = one.named("feedforward_modules"), one.parts["ia3_l"].shape
    side = "in" if on_input else "out"
    if len(shape) < 2 or (len(shape) == 2 and shape[int(not on_input)] != 1):
        expected = "(1, in)" if on_input else "(out, 1)"
        raise ValueError(f"ia3_l has shape {shape}, expected {expected}: the config has it scale the {side}puts")
    built: Update = kinds.get("ia3").build(one.parts, 1.0, 1.0, layout={"on_input": on_input})
    return built
