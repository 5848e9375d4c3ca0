"""Flux.3 of Black Forest Labs: nothing is fused; its last modulation has shift before scale, diffusers' after it."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, within

_BLOCK = {
    "q_proj": "attn.to_q", "k_proj": "attn.to_k", "v_proj": "attn.to_v", "attn_out": "attn.to_out.0",
    "norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k",
    "mlp_in": "ff.linear_in", "mlp_out": "ff.linear_out",
}  # fmt: skip
_MODES = ("image", "image_cond", "txt")
_BLOCKS = (
    *((f"content_mode_blocks.{mode}.{{}}", f"mode_blocks.{mode}.{{}}") for mode in _MODES[:2]),
    ("txt_mode_blocks.{}", "txt_mode_blocks.{}"), ("single_blocks.{}", "single_transformer_blocks.{}"),
)  # fmt: skip

FAMILY = Family(
    summary="Flux.3",
    renames={
        **{f"emb_in.{mode}": f"x_embedders.{mode}" for mode in _MODES[:2]}, "txt_in": "context_embedder",
        **{
            f"{theirs}.{layer}_layer": f"{ours}.linear_{number}"
            for theirs, ours in (("time_in", "timestep_embedder"), ("ref_time_in", "target_timestep_embedder"))
            for layer, number in (("in", 1), ("out", 2))
        },
        **{
            f"{stream}_stream_modulations.{mode}.lin": f"{stream}_stream_modulations.{mode}.linear"
            for stream in ("early", "single") for mode in _MODES
        },
        **{a: b for original, diffusers in _BLOCKS for a, b in within(original, diffusers, _BLOCK).items()},
        "final_layer.image.linear": "proj_out", "final_layer.image.adaLN_modulation.1": "norm_out.linear",
    },
    swapped=frozenset({"final_layer.image.adaLN_modulation.1"}),
    inputs={f"single_transformer_blocks.{{}}.attn.to_{x}": (3072,) for x in "qkv"},
    called=(r"flux\.?-?3\b",),
    depths={
        "content_mode_blocks.image": (5,), "content_mode_blocks.image_cond": (5,), "txt_mode_blocks": (5,),
        "mode_blocks.image": (5,), "mode_blocks.image_cond": (5,),
        "single_blocks": (28,), "single_transformer_blocks": (28,),
    },
)  # fmt: skip
"""Flux.3 with its step-distilled form, which embeds a second time."""
