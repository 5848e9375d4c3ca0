"""ACE-Step 1.5: the decoder, whose adapters come from PEFT under the names of Qwen3."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, same, within

_ATTENTION = {
    "q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "o_proj": "to_out.0", "q_norm": "norm_q", "k_norm": "norm_k",
}  # fmt: skip

FAMILY = Family(
    summary="ACE-Step 1.5",
    renames={
        **within("layers.{}", "layers.{}", {
            **within("self_attn", "self_attn", _ATTENTION), **within("cross_attn", "cross_attn", _ATTENTION),
            **same("self_attn_norm", "cross_attn_norm", "mlp_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        }),
        **same(*(f"{embed}.{layer}" for embed in ("time_embed", "time_embed_r") for layer in
                 ("linear_1", "linear_2", "time_proj"))),
        "proj_in.1": "proj_in_conv", "proj_out.1": "proj_out_conv",
        **same("condition_embedder", "norm_out", "scale_shift_table", "layers.{}.scale_shift_table"),
    },
    called=(r"ace[-_ ]?step[-_ ]?v?1[._]?5",),
)  # fmt: skip
"""ACE-Step 1.5's diffusion transformer."""
