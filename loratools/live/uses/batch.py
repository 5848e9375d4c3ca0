"""The rows of a batch, as far as a model shows them: in its own inputs, and in those of its modules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from loratools.errors import IncompatibleAdapter
from loratools.live.below.stack import frames
from loratools.live.site import Site

_INPUTS = (
    "input_ids", "inputs_embeds", "decoder_input_ids", "input_values", "input_features", "hidden_states", "sample",
)  # fmt: skip
SEQUENCE_FIRST = "its tokens first and its rows second (batch_first=False)"
_ROUTED = "tokens of the whole batch, chosen by a router"
_RELATIVE = "distances between tokens, the same for all rows"
_DISTANCE = re.compile(r"(^|_)(rel|relative|distance)(_|$)")


def sizes(args: tuple[Any, ...], settings: Mapping[str, Any]) -> list[int]:
    """Return the first sides of those of a model's inputs that have a row for each of the batch, as far as known."""
    known = (settings.get(name) for name in _INPUTS)
    tensors = (value for value in (*args, *known) if isinstance(value, Tensor) and value.dim())
    return [len(tensor) for tensor in tensors]


def apart(site: Site, path: str) -> str | None:
    """Return what the input of a module is, where the model's code is known to give it other than rows; or None."""
    above, _, last = path.rpartition(".")
    if "experts" in path.split("."):
        return _ROUTED
    if isinstance(site, nn.Embedding) and _DISTANCE.search(last):
        return _RELATIVE
    attention = getattr(site._lora.model.get_submodule(above), "self_attn", None)
    return SEQUENCE_FIRST if getattr(attention, "batch_first", True) is False else None


def repeats() -> int | None:
    """Return how often transformers' `generate`, where it runs now, repeats each row, one after the other; or None."""
    for name, module, frame in frames():
        if (name, module) == ("generate", "transformers.generation.utils"):
            options = frame.f_locals.get("generation_config")
            counts = (getattr(options, each, None) for each in ("num_beams", "num_return_sequences"))
            return max((count for count in counts if count), default=1)
    return None


def other_rows(what: str, shown: str, rows: int, size: int = 0) -> IncompatibleAdapter:
    """Return the exception for an input that is not the rows of the batch."""
    times = size // rows if rows and size and size % rows == 0 else 0
    if times > 1:
        hint = (
            f"Where each row was repeated {times} times, one after the other, repeat the names too: "
            f"[name for name in names for _ in range({times})]."
        )
    else:
        hint = (
            "Give one name for each row. Serve the rows of each adapter apart (`lora.use`), or leave this module out "
            "of the adapters."
        )
    return IncompatibleAdapter(
        f"{what}: its input is {shown}, and the batch has {rows} rows by the names of `route`, so it cannot be told "
        "which adapter goes with which",
        hint=hint,
    )
