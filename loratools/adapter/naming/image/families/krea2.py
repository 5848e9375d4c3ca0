"""Krea 2: nothing is fused; names differ."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, within

_BLOCK = {
    "attn.wq": "attn.to_q", "attn.wk": "attn.to_k", "attn.wv": "attn.to_v", "attn.wo": "attn.to_out.0",
    "attn.gate": "attn.to_gate", "attn.qknorm.qnorm": "attn.norm_q", "attn.qknorm.knorm": "attn.norm_k",
    "mlp.gate": "ff.gate", "mlp.up": "ff.up", "mlp.down": "ff.down", "prenorm": "norm1", "postnorm": "norm2",
}  # fmt: skip
_BLOCKS = (
    ("blocks.{}", "transformer_blocks.{}"),
    ("txtfusion.layerwise_blocks.{}", "text_fusion.layerwise_blocks.{}"),
    ("txtfusion.refiner_blocks.{}", "text_fusion.refiner_blocks.{}"),
)

FAMILY = Family(
    summary="Krea 2",
    renames={
        "first": "img_in", "tmlp.0": "time_embed.linear_1", "tmlp.2": "time_embed.linear_2", "tproj.1": "time_mod_proj",
        "txtmlp.0": "txt_in.norm", "txtmlp.1": "txt_in.linear_1", "txtmlp.3": "txt_in.linear_2",
        "txtfusion.projector": "text_fusion.projector",
        **{a: b for original, diffusers in _BLOCKS for a, b in within(original, diffusers, _BLOCK).items()},
        "last.norm": "final_layer.norm", "last.linear": "final_layer.linear",
    },
    inputs={f"transformer_blocks.{{}}.attn.to_{x}": (6144,) for x in "qkv"},
    called=(r"krea-?_?2",),
    depths={"blocks": (28,), "transformer_blocks": (28,)},
)  # fmt: skip
"""Krea 2; the original's norms call their weight `scale`."""
