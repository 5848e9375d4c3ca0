"""Chroma: Flux.1's blocks without modulations of their own, which a guidance layer makes."""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, _flux, same, within

_GUIDANCE = "distilled_guidance_layer"

FAMILY = Family(
    summary="Chroma",
    renames={
        "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
        **same(f"{_GUIDANCE}.in_proj", f"{_GUIDANCE}.out_proj", f"{_GUIDANCE}.norms.{{}}"),
        **within(f"{_GUIDANCE}.layers.{{}}", f"{_GUIDANCE}.layers.{{}}", {
            "in_layer": "linear_1", "out_layer": "linear_2",
        }),
        **within(*_flux.DOUBLE, {
            **_flux.DOUBLE_PROJECTIONS, **_flux.DOUBLE_NORMS, **_flux.DOUBLE_MLPS,
        }),
        **within(*_flux.SINGLE, {"linear2": "proj_out", **_flux.SINGLE_NORMS}),
    },
    fused={**_flux.DOUBLE_QKV, **_flux.SINGLE_LINEAR1},
    encoders={"text_encoder": ("lora_te1_", "t5xxl")},
    inputs=_flux.INPUTS,
    called=(r"chroma",),
    depths={**_flux.DEPTHS, f"{_GUIDANCE}.layers": (5,)},
    proportions=_flux.PROPORTIONS,
)  # fmt: skip
"""Chroma: where it shares a name with Flux.1, both namings agree."""
