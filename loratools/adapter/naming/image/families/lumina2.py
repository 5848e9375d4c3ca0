"""Lumina-Image 2.0 (and its kin, NetaYume): q, k and v are fused in the original, with fewer keys and values."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, Fused, same, within

_BLOCK = {
    "attention.out": "attn.to_out.0", "attention.q_norm": "attn.norm_q", "attention.k_norm": "attn.norm_k",
    "attention_norm2": "norm2", **{f"feed_forward.w{n}": f"feed_forward.linear_{n}" for n in (1, 2, 3)},
    **same("ffn_norm1", "ffn_norm2"),
}  # fmt: skip
_MODULATED = _BLOCK | {"adaLN_modulation.1": "norm1.linear", "attention_norm1": "norm1.norm"}
_BLOCKS = {
    "layers.{}": _MODULATED, "noise_refiner.{}": _MODULATED, "context_refiner.{}": _BLOCK | {"attention_norm1": "norm1"}
}  # fmt: skip

FAMILY = Family(
    summary="Lumina-Image 2.0",
    renames={
        **same("x_embedder"),
        "cap_embedder.0": "time_caption_embed.caption_embedder.0",
        "cap_embedder.1": "time_caption_embed.caption_embedder.1",
        "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
        **{a: b for block, inside in _BLOCKS.items() for a, b in within(block, block, inside).items()},
        "final_layer.adaLN_modulation.1": "norm_out.linear_1", "final_layer.linear": "norm_out.linear_2",
    },
    fused={
        f"{block}.attention.qkv": Fused(tuple(f"{block}.attn.to_{x}" for x in "qkv"), (1, None, None))
        for block in _BLOCKS
    },
    encoders={"text_encoder": ("lora_te_", "gemma2_2b")},
    inputs={
        **{f"layers.{{}}.attn.to_{x}": (2304,) for x in "qkv"}, "layers.{}.attention.qkv": (2304,),
    },
    called=(r"lumina-?_?(image)?-?_?(v?2)", r"neta"),
    depths={"layers": (26,), "noise_refiner": (2,), "context_refiner": (2,)},
    proportions={f"{block}.attention.qkv": (5, 3) for block in _BLOCKS},
)  # fmt: skip
"""Lumina-Image 2.0: 24 heads of queries, 8 of keys and values."""
