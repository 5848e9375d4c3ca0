"""The components of an image pipeline: the first segment of a module's name, or none inside a single model."""

from __future__ import annotations

COMPONENTS = frozenset({
    "unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "prior", "decoder",
    "connectors", "controlnet",
})  # fmt: skip
"""Parts of a pipeline that take adapters; the first segment of a name."""

MODEL_LEVEL = frozenset(
    {"down_blocks", "mid_block", "up_blocks", "transformer_blocks", "single_transformer_blocks", "blocks"}
)
"""First segments of names inside a model, as diffusers' `save_lora_adapter` and `load_attn_procs` write them."""


def component(module: str) -> str:
    """Return the component that a module belongs to, or "" where the name begins inside the model.

    >>> component("unet.mid_block.attentions.0.proj_in"), component("mid_block.attentions.0.proj_in")
    ('unet', '')
    """
    first = module.partition(".")[0]
    return first if first in COMPONENTS else ""


def inside(module: str) -> str:
    """Return a module's name without its component."""
    return module.removeprefix(f"{component(module)}.") if component(module) else module
