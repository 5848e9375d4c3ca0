"""Z-Image, Base, Turbo, Edit and Omni: the original fuses q, k and v in equal parts, as ComfyUI's checkpoints do.

musubi-tuner and OneTrainer train diffusers' modules and flatten those; ComfyUI reads the original's flattened names.
"""

from __future__ import annotations

from loratools.adapter.naming.image.families import Family, Fused, same, within

_BLOCKS = ("layers", "noise_refiner", "context_refiner", "siglip_refiner")
_SAME = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2", *(f"feed_forward.w{n}" for n in (1, 2, 3)))
_RENAMED = {"attention.out": "attention.to_out.0", "attention.q_norm": "attention.norm_q",
            "attention.k_norm": "attention.norm_k"}  # fmt: skip

FAMILY = Family(
    summary="Z-Image",
    renames={
        "x_embedder": "all_x_embedder.2-1", "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
        **same(
            "t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.0", "cap_embedder.1",
            "siglip_embedder.0", "siglip_embedder.1",
            "layers.{}.adaLN_modulation.0", "noise_refiner.{}.adaLN_modulation.0",
        ),
        **{
            original: diffusers
            for block in _BLOCKS
            for original, diffusers in within(f"{block}.{{}}", f"{block}.{{}}", _RENAMED | same(*_SAME)).items()
        },
    },
    fused={
        f"{block}.{{}}.attention.qkv": Fused(tuple(f"{block}.{{}}.attention.to_{x}" for x in "qkv"))
        for block in _BLOCKS
    },
    inputs={
        **{f"layers.{{}}.attention.to_{x}": (3840,) for x in "qkv"}, "layers.{}.attention.qkv": (3840,),
    },
    called=(r"z-?_?image", r"zimage"),
    depths={"layers": (30,), "noise_refiner": (2,), "context_refiner": (2,)},
    proportions={f"{block}.{{}}.attention.qkv": (3, 1) for block in _BLOCKS},
)  # fmt: skip
"""Z-Image; Lumina 2 has the same fused names with fewer keys and values."""
