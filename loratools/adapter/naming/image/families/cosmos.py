"""Cosmos-Predict2 and 2.5 of NVIDIA, and Anima, which is one of them with a text adapter."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, same, within

_BLOCK = {
    **{
        f"adaln_modulation_{part}.{layer}": f"norm{number}.linear_{layer}"
        for number, part in enumerate(("self_attn", "cross_attn", "mlp"), 1)
        for layer in (1, 2)
    },
    **{
        f"{theirs}.{name}": f"{ours}.{to}"
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for name, to in {
            "q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "output_proj": "to_out.0", "q_norm": "norm_q",
            "k_norm": "norm_k",
        }.items()
    },
    **within("cross_attn", "attn2", same("q_img", "k_img", "v_img", "q_img_norm", "k_img_norm")),
    "mlp.layer1": "ff.net.0.proj", "mlp.layer2": "ff.net.2",
}  # fmt: skip

FAMILY = Family(
    summary="Cosmos-Predict2, Anima",
    renames={
        "x_embedder.proj.1": "patch_embed.proj",
        "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
        "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
        "t_embedding_norm": "time_embed.norm",
        **within("blocks.{}", "transformer_blocks.{}", _BLOCK),
        "final_layer.linear": "proj_out",
        "final_layer.adaln_modulation.1": "norm_out.linear_1", "final_layer.adaln_modulation.2": "norm_out.linear_2",
        **same("crossattn_proj.0", "img_context_proj.0"),
    },
    depths={"blocks": (20, 28, 36), "transformer_blocks": (20, 28, 36)},
    inputs={
        **{f"transformer_blocks.{{}}.attn1.to_{x}": (2048, 4096, 5120) for x in "qkv"},
        "transformer_blocks.{}.attn2.to_k": (1024,), "transformer_blocks.{}.attn2.to_v": (1024,),
    },
    encoders={"text_encoder": ("lora_te_", "qwen3_06b")},
    called=(r"cosmos", r"(?<![a-z])anima(?![a-z])"),
)  # fmt: skip
"""Cosmos-Predict2's transformer."""
