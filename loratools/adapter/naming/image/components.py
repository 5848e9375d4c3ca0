"""The components of an image pipeline: the first segment of a module's name, or none inside a single model."""

from __future__ import annotations

COMPONENTS = frozenset({
    "unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "prior", "decoder",
    "connectors", "controlnet", "text_conditioner",
})  # fmt: skip
"""Parts of a pipeline that take adapters; the first segment of a name."""

MODEL_LEVEL = frozenset(
    {"down_blocks", "mid_block", "up_blocks", "transformer_blocks", "single_transformer_blocks", "blocks"}
)
"""First segments of names inside a model, as diffusers' `save_lora_adapter` and `load_attn_procs` write them."""

_ENCODERS = {
    "lora_te": "text_encoder", "lora_te1": "text_encoder", "lora_te2": "text_encoder_2", "lora_te3": "text_encoder_3",
}  # fmt: skip
"""What ai-toolkit calls text encoders beside an image model under diffusers' or the original's names."""

_INPUTS = frozenset({"img_in", "x_embedder", "patch_embedding", "patch_embed", "conv_in", "x_in"})
"""What image and video models call the layer of their input."""


def component(module: str) -> str:
    """Return the component that a module belongs to, or "" where the name begins inside the model.

    >>> component("unet.mid_block.attentions.0.proj_in"), component("mid_block.attentions.0.proj_in")
    ('unet', '')
    """
    first = module.partition(".")[0]
    return first if first in COMPONENTS else ""


def with_component(name: str) -> str:
    """Return a name with the component of a text encoder in place of what ai-toolkit has there.

    >>> with_component("lora_te1.text_model.encoder.layers.0.mlp.fc1")
    'text_encoder.text_model.encoder.layers.0.mlp.fc1'
    """
    first, dot, rest = name.partition(".")
    return f"{_ENCODERS.get(first, first)}{dot}{rest}"


def inside(module: str) -> str:
    """Return a module's name without its component."""
    return module.removeprefix(f"{component(module)}.") if component(module) else module


def one_weight(first: str, second: str) -> bool:
    """Tell whether one of two modules is the weight of the other alone: a difference beside factors, both added."""
    return f"{first}.weight" == second or f"{second}.weight" == first


def widening(module: str, wanted: tuple[int, ...], stored: tuple[int, ...]) -> str:
    """Return what to say of an update that has more input features than the base's weight; "" of any other."""
    wider = len(wanted) == len(stored) > 1 and wanted[0] == stored[0] and wanted[1] > stored[1]
    if not wider or _INPUTS.isdisjoint(module.split(".")):
        return ""
    return "; it widens the input, as control adapters do, and the base has to be widened too"
