"""CogVideoX: the rules of diffusers' script move every row where the family's data say."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from loratools.adapter.naming.image.families.cogvideox import FAMILY
from tests.adapter.naming.image.families.scripts import replaced
from tests.make.image_families import prove
from tests.make.image_models import build

pytest.importorskip("diffusers")

RENAMES = {
    "transformer.final_layernorm": "norm_final", "transformer": "transformer_blocks", "attention": "attn1",
    "mlp": "ff.net", "dense_h_to_4h": "0.proj", "dense_4h_to_h": "2", ".layers": "", "dense": "to_out.0",
    "input_layernorm": "norm1.norm", "post_attn1_layernorm": "norm2.norm", "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2", "ofs_embed.0": "ofs_embedding.linear_1",
    "ofs_embed.2": "ofs_embedding.linear_2", "mixins.patch_embed": "patch_embed",
    "mixins.final_layer.norm_final": "norm_out.norm", "mixins.final_layer.linear": "proj_out",
    "mixins.final_layer.adaLN_modulation.1": "norm_out.linear",
}  # fmt: skip
"""What diffusers' script replaces in every name, in this order."""


def convert(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """Convert as the script does, but for the modulations."""
    converted = {}
    for name, tensor in tensors.items():
        name = replaced(name, RENAMES)
        if "query_key_value" in name:
            for letter, part in zip("qkv", torch.chunk(tensor, 3), strict=True):
                converted[name.replace("query_key_value", f"to_{letter}")] = part
        elif "_layernorm_list" in name:
            layer, kind = name.split(".")[-2:]
            letter = "q" if "query" in name else "k"
            converted[f"transformer_blocks.{layer}.attn1.norm_{letter}.{kind}"] = tensor
        else:
            converted[name] = tensor
    return converted


def test_the_scripts_rules_move_rows_where_the_family_says() -> None:
    modulations = [f"transformer_blocks.{layer}.norm{n}.linear" for layer in (0, 1) for n in (1, 2)]
    prove(FAMILY, build("cogvideox"), convert, without=modulations)
