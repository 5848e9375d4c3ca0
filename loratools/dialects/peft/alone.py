"""A file under PEFT's names without its config, as people pass it on: what its header says, else scale 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratools.adapter.model import Adapter
from loratools.dialects._frame.build import Draft, check_faults
from loratools.dialects._frame.listing import Listing
from loratools.dialects.peft.names import group, unwrap
from loratools.format import keys
from loratools.storage.lazy import LazyTensor


def is_part(name: str) -> bool:
    """Tell whether a tensor's name, with or without PEFT's prefix, ends in a factor of PEFT's.

    >>> is_part("layers.0.self_attn.q_proj.lora_A.default.weight"), is_part("layers.0.self_attn.q_proj.weight")
    (True, False)
    """
    return bool((split := keys.split(_prefixed(name))) and split[1].startswith(("lora_A", "lora_B", "lora_embedding_")))


def stated_config(header: Mapping[str, str]) -> dict[str, Any] | None:
    """Return PEFT's config where an entry of a header holds it as JSON, with `peft_type`; None where none does."""
    for text in header.values():
        if "peft_type" in text:
            from loratools.dialects._frame.alphas import json_object

            if (config := json_object(text)) and "peft_type" in config:
                return config
    return None


def read(listing: Listing, tensors: Mapping[str, LazyTensor], header: Mapping[str, str]) -> Adapter:
    """Return the adapter of tensors under PEFT's names, or without their prefix.

    The alpha is the user's, else that of the header, else the scale is 1, which is said. Raises as `peft.read`.
    """
    groups = group({_prefixed(name): lazy for name, lazy in tensors.items()}, biases=False)
    check_faults(listing.path, groups.faults)
    draft = Draft(listing.path, groups.modules, alpha=listing.alpha)
    from loratools.dialects._frame import alphas

    alphas.fill(draft, header)
    return Adapter(draft.build(), groups.whole, dialect="peft", copies=groups.copies)


def _prefixed(name: str) -> str:
    bare = unwrap(name)
    return bare if bare.startswith(keys.PREFIX) else f"{keys.PREFIX}{bare}"
