"""Qwen-Image, Edit and Layered: one naming, everywhere.

ComfyUI and kohya's trainers took diffusers' model, names and all.
"""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, same

FAMILY = Family(
    summary="Qwen-Image",
    renames=same(
        "img_in", "txt_in", "txt_norm", "norm_out.linear", "proj_out", "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.linear_2", "time_text_embed.addition_t_embedding",
        *(
            f"transformer_blocks.{{}}.{module}"
            for module in (
                "img_mod.1", "txt_mod.1", "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj",
                "txt_mlp.net.2", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj",
                "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out", "attn.norm_q", "attn.norm_k",
                "attn.norm_added_q", "attn.norm_added_k",
            )
        ),
    ),
    inputs={
        **{f"transformer_blocks.{{}}.attn.to_{x}": (3072,) for x in "qkv"},
    },
    called=(r"qwen[-_ ]?image",),
    depths={"transformer_blocks": (60,)},
)  # fmt: skip
"""Qwen-Image; `img_mlp.net` and `img_mod.1` are its own."""
