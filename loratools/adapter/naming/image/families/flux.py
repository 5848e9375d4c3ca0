"""Flux.1 of Black Forest Labs.

The original keeps q, k, v in one weight, and q, k, v and the MLP's first layer in one in the single blocks. Its last
modulation has shift before scale, diffusers' has scale before shift. Flux.2 has the same names with other MLPs.
"""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, _flux, within

FAMILY = Family(
    summary="Flux.1",
    renames={
        "img_in": "x_embedder", "txt_in": "context_embedder",
        **{
            f"{theirs}_in.{layer}_layer": f"time_text_embed.{ours}_embedder.linear_{number}"
            for theirs, ours in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))
            for layer, number in (("in", 1), ("out", 2))
        },
        **within(*_flux.DOUBLE, {
            **_flux.DOUBLE_PROJECTIONS, **_flux.DOUBLE_MLPS,
            "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear",
        }),
        **within(*_flux.SINGLE, {"linear2": "proj_out", "modulation.lin": "norm.linear"}),
        "final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
    fused={**_flux.DOUBLE_QKV, **_flux.SINGLE_LINEAR1},
    swapped=frozenset({"final_layer.adaLN_modulation.1"}),
    encoders={"text_encoder": ("lora_te1_", "clip_l"), "text_encoder_2": ("lora_te3_", "t5xxl")},
    inputs=_flux.INPUTS,
    called=(r"flux\.?-?1\b",),
    depths=_flux.DEPTHS,
    proportions=_flux.PROPORTIONS,
)  # fmt: skip
"""Flux.1, with the proportions that tell it from Flux.2."""
