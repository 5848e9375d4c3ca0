"""Names of a checkpoint in one file become those of adapters; they lead back into the file that they come from."""

from __future__ import annotations

import pytest
import torch

from loratools.adapter.kinds.lora import LoraUpdate
from loratools.adapter.model import Adapter
from loratools.adapter.naming.image import one_file
from loratools.adapter.placement.image import for_base
from loratools.storage.lazy import LazyTensor

_OPEN_CLIP = "conditioner.embedders.1.model.transformer.resblocks.3"
_HF = "text_encoder_2.text_model.encoder.layers.3"


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("model.diffusion_model.input_blocks.4.1.proj_in", ["diffusion_model.input_blocks.4.1.proj_in"]),
        ("cond_stage_model.transformer.text_model.final_layer_norm", ["text_encoder.text_model.final_layer_norm"]),
        (f"{_OPEN_CLIP}.mlp.c_fc", [f"{_HF}.mlp.fc1"]),
        (f"{_OPEN_CLIP}.ln_2.bias", [f"{_HF}.layer_norm2.bias"]),
        (f"{_OPEN_CLIP}.attn.in_proj_weight", [f"{_HF}.self_attn.{part}_proj" for part in "qkv"]),
        (f"{_OPEN_CLIP}.attn.in_proj_bias", [f"{_HF}.self_attn.{part}_proj.bias" for part in "qkv"]),
        ("conditioner.embedders.1.model.text_projection", ["conditioner.embedders.1.model.text_projection"]),
        ("first_stage_model.decoder.conv_in", ["first_stage_model.decoder.conv_in"]),
        ("model.layers.0.self_attn.q_proj", ["model.layers.0.self_attn.q_proj"]),
    ],
)
def test_names(module: str, names: list[str]) -> None:
    assert one_file.named(module) == tuple(names)


def test_they_lead_back() -> None:
    modules = [
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q", f"{_OPEN_CLIP}.mlp.c_fc",
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1",
    ]  # fmt: skip
    shapes = {f"{module}.weight": (8, 4) for module in modules} | {f"{_OPEN_CLIP}.attn.in_proj_weight": (12, 4)}
    A, B = LazyTensor.of(torch.ones(2, 4)), LazyTensor.of(torch.ones(8, 2))
    adapter = Adapter({module: LoraUpdate(A, B, 1.0, 2.0) for module in modules})
    renamed = one_file.renamed(adapter)
    assert not renamed.updates.keys() & set(modules)
    assert for_base(renamed, shapes).updates.keys() == set(modules)
