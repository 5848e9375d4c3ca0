"""Files with the flattened names of real image models, read without the base: each module comes back under its name."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loratools import dialects

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

SDXL = {
    "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "sd-1": ("UNet2DConditionModel", {"cross_attention_dim": 768}, "unet"),
    "sdxl": ("UNet2DConditionModel", SDXL, "unet"),
    "sd3": ("SD3Transformer2DModel", {"num_layers": 24, "dual_attention_layers": tuple(range(13))}, "transformer"),
    "flux": ("FluxTransformer2DModel", {"guidance_embeds": True}, "transformer"),
    "qwen-image": ("QwenImageTransformer2DModel", {}, "transformer"),
    "wan": ("WanTransformer3DModel", {"image_dim": 1280, "added_kv_proj_dim": 5120}, "transformer"),
    "hunyuan-video": ("HunyuanVideoTransformer3DModel", {}, "transformer"),
    "lumina2": ("Lumina2Transformer2DModel", {}, "transformer"),
}
PREFIXES = {"unet": ("lora_unet_",), "transformer": ("lora_transformer_", "lora_unet_")}


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_comes_back_under_its_own_name(name: str, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    kind, settings, component = MODELS[name]
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(diffusers, kind)(**settings)
    linear = sorted(path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    assert len(linear) > 100
    for prefix in PREFIXES[component]:
        flat = {f"{prefix}{path.replace('.', '_')}": path for path in linear}
        assert len(flat) == len(linear)  # no two names become one
        tensors = {}
        for number, head in enumerate(flat, 1):
            tensors[f"{head}.lora_down.weight"] = torch.tensor([[float(number)]])
            tensors[f"{head}.lora_up.weight"] = torch.ones(1, 1)
        save_file(tensors, tmp_path / f"{prefix}.safetensors")
        adapter = dialects.open_adapter(tmp_path / f"{prefix}.safetensors")
        assert adapter.dialect == "kohya"
        assert adapter.updates.keys() == {f"{component}.{path}" for path in linear}
        for number, path in enumerate(flat.values(), 1):  # and none has another's factors
            assert adapter.updates[f"{component}.{path}"].delta_weight().item() == number
