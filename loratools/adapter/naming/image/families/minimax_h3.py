"""MiniMax-H3: the original stacks q, k and v; its gate comes before the value, in diffusers after it.

The shards of MiniMax interleave q, k and v by heads; single files have the stack that the reference makes of them.
"""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, Fused, within

_BLOCK = {
    "attn.out_proj": "attn.to_out.0", "attn.q_norm": "attn.norm_q", "attn.k_norm": "attn.norm_k",
    "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2", "norm1": "norm1", "norm2": "norm2",
}  # fmt: skip
_BLOCKS = (
    ("blocks.{}", "transformer_blocks.{}"), ("token_refiner.blocks.{}", "token_refiner.refiner_blocks.{}"),
)  # fmt: skip

FAMILY = Family(
    summary="MiniMax-H3",
    renames={
        "video_patch_proj": "proj_in", "audio_patch_proj": "audio_proj_in", "condition_proj": "context_embedder",
        "time_embedder.proj_in": "time_embedder.linear_1", "time_embedder.proj_out": "time_embedder.linear_2",
        **{a: b for original, diffusers in _BLOCKS for a, b in within(original, diffusers, _BLOCK).items()},
        "blocks.{}.adaln_proj.linear": "transformer_blocks.{}.adaln_proj.linear",
        "token_refiner.final_norm": "token_refiner.final_norm",
        "final_layer.norm": "norm_out.norm", "final_layer.adaln_proj.linear": "norm_out.linear",
        "final_layer.video_out": "proj_out", "final_layer.audio_out": "audio_proj_out",
    },
    fused={
        f"{original}.attn.qkv_proj": Fused(tuple(f"{diffusers}.attn.to_{x}" for x in "qkv"))
        for original, diffusers in _BLOCKS
    },
    swapped=frozenset(f"{original}.mlp.fc1" for original, _ in _BLOCKS),
    inputs={
        **{f"transformer_blocks.{{}}.attn.to_{x}": (5376,) for x in "qkv"},
        "blocks.{}.attn.qkv_proj": (5376,),
    },
    by_heads=frozenset(f"{original}.attn.qkv_proj" for original, _ in _BLOCKS),
    called=(r"minimax-?_?h3",),
    depths={"blocks": (50,), "transformer_blocks": (50,)},
)  # fmt: skip
"""MiniMax-H3, both of its partitions."""
