"""Flux.2 dev and klein: double blocks as in Flux.1 with other MLPs; single blocks are fused in diffusers too."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, _flux, within

_EMBEDDER = "time_guidance_embed.{}_embedder.linear_{}"

FAMILY = Family(
    summary="Flux.2 dev and klein",
    renames={
        "img_in": "x_embedder", "txt_in": "context_embedder",
        "time_in.in_layer": _EMBEDDER.format("timestep", 1), "time_in.out_layer": _EMBEDDER.format("timestep", 2),
        "guidance_in.in_layer": _EMBEDDER.format("guidance", 1),
        "guidance_in.out_layer": _EMBEDDER.format("guidance", 2),
        **{f"{x}.lin": f"{x}.linear" for x in (
            "double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation",
        )},
        **within(*_flux.DOUBLE, {
            **_flux.DOUBLE_PROJECTIONS, **_flux.DOUBLE_NORMS,
            "img_mlp.0": "ff.linear_in", "img_mlp.2": "ff.linear_out",
            "txt_mlp.0": "ff_context.linear_in", "txt_mlp.2": "ff_context.linear_out",
        }),
        **within(*_flux.SINGLE, {
            "linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out", **_flux.SINGLE_NORMS,
        }),
        "final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
    fused=_flux.DOUBLE_QKV,
    swapped=frozenset({"final_layer.adaLN_modulation.1"}),
    inputs={
        **{f"transformer_blocks.{{}}.attn.to_{x}": (6144, 4096, 3072) for x in "qkv"},
        "double_blocks.{}.img_attn.qkv": (6144, 4096, 3072), "single_blocks.{}.linear1": (6144, 4096, 3072),
    },
    called=(r"flux\.?-?2\b", r"klein"),
    depths={
        "double_blocks": (8, 5), "single_blocks": (48, 24, 20),
        "transformer_blocks": (8, 5), "single_transformer_blocks": (48, 24, 20),
    },
    proportions={
        "double_blocks.{}.img_attn.qkv": (3, 1), "double_blocks.{}.txt_attn.qkv": (3, 1),
        "double_blocks.{}.img_mlp.0": (6, 1), "double_blocks.{}.img_mlp.2": (1, 3),
        "double_blocks.{}.txt_mlp.0": (6, 1), "double_blocks.{}.txt_mlp.2": (1, 3),
        "single_blocks.{}.linear1": (9, 1), "single_blocks.{}.linear2": (1, 4),
    },
)  # fmt: skip
"""Flux.2 dev, klein 9B and klein 4B."""
