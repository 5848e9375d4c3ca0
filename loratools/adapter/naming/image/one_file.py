"""Modules of a checkpoint that is one file, as the original repositories of Stable Diffusion wrote it, in an adapter.

    model.diffusion_model.input_blocks.…                diffusion_model.input_blocks.…
    cond_stage_model.transformer.text_model.…           text_encoder.text_model.…
    conditioner.embedders.1.model.transformer.resblocks.…  text_encoder_2.text_model.encoder.layers.…

`placement/image.py` leads the other way, for all names that a base may have.
"""

from __future__ import annotations

import re
from dataclasses import replace

from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter
from loratools.adapter.naming.image.groups import ORIGINAL

_ROOTS = {
    "model.diffusion_model.": f"{ORIGINAL}.",
    "cond_stage_model.transformer.": "text_encoder.",
    "conditioner.embedders.0.transformer.": "text_encoder.",
}
_OPEN_CLIP = {
    "cond_stage_model.model.": "text_encoder.",
    "conditioner.embedders.0.model.": "text_encoder_2.",
    "conditioner.embedders.1.model.": "text_encoder_2.",
}
_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(.+?)(\.bias)?")
_IN_LAYER = {
    "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2", "ln_1": "layer_norm1",
    "ln_2": "layer_norm2", **{f"attn.{part}_proj": f"self_attn.{part}_proj" for part in "qkv"},
}  # fmt: skip
FUSED = {"attn.in_proj_weight": "", "attn.in_proj_bias": ".bias"}
"""OpenCLIP's parameters that hold q, k and v one above the other, and what follows the name of each."""


def named(module: str) -> tuple[str, ...]:
    """Return what an adapter calls a module, or a parameter: one name, three where q, k and v are in it in this order.

    A module of any other model keeps its name.

    >>> named("model.diffusion_model.out.2")
    ('diffusion_model.out.2',)
    """
    for root, component in _ROOTS.items():
        if module.startswith(root):
            return (component + module.removeprefix(root),)
    inside_of = next((root for root in _OPEN_CLIP if module.startswith(root)), "")
    match = _LAYER.fullmatch(module.removeprefix(inside_of)) if inside_of else None
    if match is None:
        return (module,)
    layer = f"{_OPEN_CLIP[inside_of]}text_model.encoder.layers.{match[1]}."
    if match[2] in FUSED:
        return tuple(f"{layer}self_attn.{part}_proj{FUSED[match[2]]}" for part in "qkv")
    inside = _IN_LAYER.get(match[2])
    return (f"{layer}{inside}{match[3] or ''}" if inside else module,)


def renamed(adapter: Adapter) -> Adapter:
    """Return an adapter whose modules have the names of a checkpoint in one file under those that adapters have.

    One of any other model, and modules that hold several in one, keep their names.
    """
    updates: dict[str, Update] = {}
    for module, update in adapter.updates.items():
        names = named(module)
        updates[names[0] if len(names) == 1 else module] = update
    return replace(adapter, updates=updates) if len(updates) == len(adapter.updates) else adapter
