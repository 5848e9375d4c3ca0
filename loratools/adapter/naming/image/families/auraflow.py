"""AuraFlow (and Pony 7): nothing is fused; the last modulation has shift before scale in the original."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, within

_ATTENTION = {
    "q": ("to_q", "add_q_proj"), "k": ("to_k", "add_k_proj"), "v": ("to_v", "add_v_proj"),
    "o": ("to_out.0", "to_add_out"),
}  # fmt: skip
_MLP = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}

FAMILY = Family(
    summary="AuraFlow",
    renames={
        "init_x_linear": "pos_embed.proj", "cond_seq_linear": "context_embedder",
        "t_embedder.mlp.0": "time_step_proj.linear_1", "t_embedder.mlp.2": "time_step_proj.linear_2",
        **within("double_layers.{}", "joint_transformer_blocks.{}", {
            **{f"attn.w2{x}": f"attn.{image}" for x, (image, _) in _ATTENTION.items()},
            **{f"attn.w1{x}": f"attn.{text}" for x, (_, text) in _ATTENTION.items()},
            **{f"mlpX.{theirs}": f"ff.{ours}" for theirs, ours in _MLP.items()},
            **{f"mlpC.{theirs}": f"ff_context.{ours}" for theirs, ours in _MLP.items()},
            "modX.1": "norm1.linear", "modC.1": "norm1_context.linear",
        }),
        **within("single_layers.{}", "single_transformer_blocks.{}", {
            **{f"attn.w1{x}": f"attn.{both}" for x, (both, _) in _ATTENTION.items()},
            **{f"mlp.{theirs}": f"ff.{ours}" for theirs, ours in _MLP.items()},
            "modCX.1": "norm1.linear",
        }),
        "final_linear": "proj_out", "modF.1": "norm_out.linear",
    },
    swapped=frozenset({"modF.1"}),
    inputs={f"{blocks}_transformer_blocks.{{}}.attn.to_{x}": (3072,) for blocks in ("joint", "single") for x in "qkv"},
    called=(r"aura-?_?flow", r"pony-?_?v?7"),
    depths={
        "double_layers": (4,), "single_layers": (32,), "joint_transformer_blocks": (4,),
        "single_transformer_blocks": (32,),
    },
)  # fmt: skip
"""AuraFlow 0.1 to 0.3."""
