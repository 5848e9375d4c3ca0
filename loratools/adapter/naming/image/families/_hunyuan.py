"""What HunyuanVideo, HunyuanVideo 1.5 and HunyuanImage share: modules of Tencent's code, and ComfyUI's names for them.

Tencent's files of HunyuanVideo have q, k and v in one weight; those of 1.5 and of HunyuanImage have them apart, and
ComfyUI repacks them into one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from loratools.adapter.naming.image.families import Fused, same, within

_DOUBLE = within("double_blocks.{}", "transformer_blocks.{}", {
    "img_attn_proj": "attn.to_out.0", "txt_attn_proj": "attn.to_add_out",
    "img_attn_q_norm": "attn.norm_q", "img_attn_k_norm": "attn.norm_k",
    "txt_attn_q_norm": "attn.norm_added_q", "txt_attn_k_norm": "attn.norm_added_k",
    "img_mlp.fc1": "ff.net.0.proj", "img_mlp.fc2": "ff.net.2",
    "txt_mlp.fc1": "ff_context.net.0.proj", "txt_mlp.fc2": "ff_context.net.2",
    "img_mod.linear": "norm1.linear", "txt_mod.linear": "norm1_context.linear",
})  # fmt: skip
_REFINER = within("txt_in.individual_token_refiner.blocks.{}", "context_embedder.token_refiner.refiner_blocks.{}", {
    **same("norm1", "norm2"), "self_attn_proj": "attn.to_out.0", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm_out.linear",
})  # fmt: skip
COMMON = {
    "img_in.proj": "x_embedder.proj",
    "txt_in.input_embedder": "context_embedder.proj_in",
    **{
        f"txt_in.{theirs}": f"context_embedder.time_text_embed.{ours}"
        for theirs, ours in {
            "t_embedder.mlp.0": "timestep_embedder.linear_1", "t_embedder.mlp.2": "timestep_embedder.linear_2",
            "c_embedder.linear_1": "text_embedder.linear_1", "c_embedder.linear_2": "text_embedder.linear_2",
        }.items()
    },
    **_REFINER, **_DOUBLE,
    "final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear",
}  # fmt: skip
"""Renames of modules that all have: embedders, the token refiner, double blocks, the final layer."""

SINGLE = within("single_blocks.{}", "single_transformer_blocks.{}", {
    "linear2": "proj_out", "modulation.linear": "norm.linear", "q_norm": "attn.norm_q", "k_norm": "attn.norm_k",
})  # fmt: skip
"""Renames inside a single block."""

BYT5 = within("byt5_in", "context_embedder_2", {
    "layernorm": "norm", "fc1": "linear_1", "fc2": "linear_2", "fc3": "linear_3",
})  # fmt: skip
"""Renames of the second text embedder, of 1.5 and HunyuanImage."""

REFINER_QKV = {
    "txt_in.individual_token_refiner.blocks.{}.self_attn_qkv": Fused(
        tuple(f"context_embedder.token_refiner.refiner_blocks.{{}}.attn.to_{x}" for x in "qkv")
    )
}
"""The token refiner's q, k and v, one weight in all of Tencent's files."""

_DOUBLE_PARTS = {"img": ("to_q", "to_k", "to_v"), "txt": ("add_q_proj", "add_k_proj", "add_v_proj")}
DOUBLE_QKV = {
    f"double_blocks.{{}}.{stream}_attn_qkv": Fused(tuple(f"transformer_blocks.{{}}.attn.{part}" for part in parts))
    for stream, parts in _DOUBLE_PARTS.items()
}
"""A double block's q, k and v where they are one weight."""

DOUBLE_APART = {
    f"double_blocks.{{}}.{stream}_attn_{x}": f"transformer_blocks.{{}}.attn.{part}"
    for stream, parts in _DOUBLE_PARTS.items()
    for x, part in zip("qkv", parts, strict=True)
}
"""A double block's q, k and v where they are three."""

_SINGLE_PARTS = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
SINGLE_LINEAR1 = {
    "single_blocks.{}.linear1": Fused(
        tuple(f"single_transformer_blocks.{{}}.{part}" for part in _SINGLE_PARTS), (1, 1, 1, 4)
    )
}
"""A single block's q, k, v and first layer of the MLP."""

SWAPPED = frozenset({"final_layer.adaLN_modulation.1"})
"""Tencent's last modulation has shift before scale, diffusers' has scale before shift."""

PROPORTIONS = {
    "double_blocks.{}.img_attn_qkv": (3, 1), "double_blocks.{}.txt_attn_qkv": (3, 1),
    **{f"double_blocks.{{}}.{stream}_mlp.{layer}": sides for stream in ("img", "txt")
       for layer, sides in (("fc1", (4, 1)), ("fc2", (1, 4)))},
    "single_blocks.{}.linear1": (7, 1), "single_blocks.{}.linear2": (1, 5),
}  # fmt: skip
"""Those of HunyuanVideo; under ComfyUI's names they tell it from Flux.2."""

Value = TypeVar("Value")

_COMFY = (
    ("txt_in.t_embedder.mlp.0", "txt_in.t_embedder.in_layer"),
    ("txt_in.t_embedder.mlp.2", "txt_in.t_embedder.out_layer"),
    ("txt_in.c_embedder.linear_1", "txt_in.c_embedder.in_layer"),
    ("txt_in.c_embedder.linear_2", "txt_in.c_embedder.out_layer"), ("_mod.linear", "_mod.lin"),
    ("_attn_qkv", "_attn.qkv"), ("mlp.fc1", "mlp.0"), ("mlp.fc2", "mlp.2"), ("_attn_q_norm", "_attn.norm.query_norm"),
    ("_attn_k_norm", "_attn.norm.key_norm"), (".q_norm", ".norm.query_norm"), (".k_norm", ".norm.key_norm"),
    ("_attn_proj", "_attn.proj"), (".modulation.linear", ".modulation.lin"), ("_in.mlp.0", "_in.in_layer"),
    ("_in.mlp.2", "_in.out_layer"),
)  # fmt: skip


def as_comfy(modules: Mapping[str, Value]) -> dict[str, Value]:
    """Return modules under the names that they have in ComfyUI's model, which are Flux's.

    >>> as_comfy({"double_blocks.{}.img_mlp.fc1": 1})
    {'double_blocks.{}.img_mlp.0': 1}
    """
    names = {}
    for name, value in modules.items():
        for theirs, comfy in _COMFY:
            name = name.replace(theirs, comfy)
        names[name] = value
    return names
