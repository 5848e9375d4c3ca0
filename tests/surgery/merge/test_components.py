"""A pipeline with quantized components: each component's config.json says what the merge left of its codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools.options import Quantized

BLOCK = "transformer_blocks.0.attn"
STATED = {"quant_method": "fp8", "weight_block_size": [16, 32], "modules_to_not_convert": ["proj_out"]}


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """Two components in FP8 by blocks, which their config.json alone gives the sides of; and one plain."""
    root = tmp_path / "base"
    generator = torch.Generator().manual_seed(0)
    index: dict[str, Any] = {"_class_name": "FluxPipeline"}
    for component, library, modules in (
        ("transformer", "diffusers", [f"{BLOCK}.to_q", f"{BLOCK}.to_out.0"]),
        ("text_encoder", "transformers", ["encoder.block.0.layer.0.SelfAttention.q"]),
        ("vae", "diffusers", []),
    ):
        folder = root / component
        folder.mkdir(parents=True)
        tensors = {"norm.weight": torch.ones(4).bfloat16()}
        for module in modules:
            tensors[f"{module}.weight"] = torch.randn(32, 64, generator=generator).to(torch.float8_e4m3fn)
            tensors[f"{module}.weight_scale_inv"] = torch.rand(2, 2, generator=generator)
        file = "diffusion_pytorch_model.safetensors" if library == "diffusers" else "model.safetensors"
        save_file(tensors, folder / file)
        config = {"_class_name": component, **({"quantization_config": STATED} if modules else {})}
        (folder / "config.json").write_text(json.dumps(config))
        index[component] = [library, "Any"]
    (root / "model_index.json").write_text(json.dumps(index))
    name = f"transformer.{BLOCK}.to_q"
    factors = {f"{name}.lora_A.weight": torch.ones(2, 64) / 9, f"{name}.lora_B.weight": torch.ones(32, 2) / 9}
    save_file(factors, tmp_path / "lora.safetensors")
    return root


@pytest.mark.parametrize(
    ("policy", "plain", "of_transformer"),
    [
        ("dequantize", 3, None),
        ("partial", 1, {**STATED, "modules_to_not_convert": ["proj_out", f"{BLOCK}.to_q"]}),
        ("requantize", 0, STATED),
    ],
)
def test_components(tmp_path: Path, pipeline: Path, policy: Quantized, plain: int, of_transformer: Any) -> None:
    out, lora = tmp_path / "out", tmp_path / "lora.safetensors"
    loratools.merge(pipeline, lora, out, quantized=policy, force=True)
    stated = {
        component: json.loads((out / component / "config.json").read_text()).get("quantization_config")
        for component in ("transformer", "text_encoder", "vae")
    }
    of_text = None if policy == "dequantize" else STATED
    assert stated == {"transformer": of_transformer, "text_encoder": of_text, "vae": None}
    base, merged = (load_file(root / "transformer" / "diffusion_pytorch_model.safetensors") for root in (pipeline, out))
    text = load_file(out / "text_encoder" / "model.safetensors")
    weights = [W for name, W in (merged | text).items() if W.dim() == 2 and not name.endswith("scale_inv")]
    assert sum(W.dtype == torch.bfloat16 for W in weights) == plain
    scale = base[f"{BLOCK}.to_q.weight_scale_inv"].double().repeat_interleave(16, 0).repeat_interleave(32, 1)
    wanted = base[f"{BLOCK}.to_q.weight"].double() * scale + 2 / 81
    if policy != "requantize":
        assert torch.equal(merged[f"{BLOCK}.to_q.weight"], wanted.float().bfloat16())
    assert loratools.verify(out, pipeline, lora).ok


def test_each_component_computes_in_a_dtype_of_its_own(tmp_path: Path, pipeline: Path) -> None:
    """What its config.json says, else that of most of its own plain numbers."""
    folder = pipeline / "text_encoder"
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "shared.weight": torch.ones(64, 64).half()}, folder / "model.safetensors")
    loratools.dequantize(pipeline, tmp_path / "out")
    of_encoder = load_file(tmp_path / "out" / "text_encoder" / "model.safetensors")
    of_transformer = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert of_encoder["encoder.block.0.layer.0.SelfAttention.q.weight"].dtype == torch.float16
    assert of_transformer[f"{BLOCK}.to_q.weight"].dtype == torch.bfloat16
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    loratools.dequantize(pipeline, tmp_path / "other")
    of_encoder = load_file(tmp_path / "other" / "text_encoder" / "model.safetensors")
    assert of_encoder["encoder.block.0.layer.0.SelfAttention.q.weight"].dtype == torch.bfloat16
