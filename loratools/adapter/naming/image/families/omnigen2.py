"""OmniGen2: the original has names of diffusers' kind, and ComfyUI keeps them."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, same

_BLOCK = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.norm_q", "attn.norm_k", "norm2", "ffn_norm1",
    "ffn_norm2", "feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3",
)  # fmt: skip
_EMBED = "time_caption_embed"

FAMILY = Family(
    summary="OmniGen2",
    renames=same(
        "x_embedder", "ref_image_patch_embedder", f"{_EMBED}.timestep_embedder.linear_1",
        f"{_EMBED}.timestep_embedder.linear_2", f"{_EMBED}.caption_embedder.0", f"{_EMBED}.caption_embedder.1",
        *(f"{block}.{{}}.{x}" for block in ("layers", "noise_refiner", "ref_image_refiner")
          for x in (*_BLOCK, "norm1.linear", "norm1.norm")),
        *(f"context_refiner.{{}}.{x}" for x in (*_BLOCK, "norm1")),
        "norm_out.linear_1", "norm_out.linear_2",
    ),
    inputs={
        **{f"layers.{{}}.attn.to_{x}": (2520,) for x in "qkv"},
    },
    called=(r"omnigen-?_?2",),
    depths={"layers": (32,), "noise_refiner": (2,), "ref_image_refiner": (2,), "context_refiner": (2,)},
)  # fmt: skip
"""OmniGen2: one naming for all of its readers."""
