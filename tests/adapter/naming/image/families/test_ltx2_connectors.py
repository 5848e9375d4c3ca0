"""LTX-2's connectors: the rules of diffusers' script, and its reading of a LoRA of the projection before them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loratools
from loratools.adapter.naming.image.families import ltx2
from loratools.adapter.naming.image.families.ltx2_connectors import FAMILY
from tests.adapter.naming.image.families.scripts import replaced
from tests.make.image_families import TARGETS, lora, model_of, originals, prove, shapes_of
from tests.make.image_models import build

pytest.importorskip("diffusers")

RENAMES = {
    "video_embeddings_connector": "video_connector", "audio_embeddings_connector": "audio_connector",
    "transformer_1d_blocks": "transformer_blocks", "q_norm": "norm_q", "k_norm": "norm_k",
    "text_embedding_projection.aggregate_embed": "text_proj_in",
    "text_embedding_projection.video_aggregate_embed": "video_text_proj_in",
    "text_embedding_projection.audio_aggregate_embed": "audio_text_proj_in",
}  # fmt: skip
"""What diffusers' script replaces in every name, and the projections of 2.0 and of 2.3."""


def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {replaced(name, RENAMES): tensor for name, tensor in tensors.items()}


def _connectors(*, each: bool) -> nn.Module:
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

    return model_of(
        LTX2TextConnectors, caption_channels=12, text_proj_in_factor=2, video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8, audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=4, video_gated_attn=each, audio_gated_attn=each,
        per_modality_projections=each, video_hidden_dim=16, audio_hidden_dim=8,
    )  # fmt: skip


@pytest.mark.parametrize("each", [False, True], ids=["2.0", "2.3"])
def test_the_scripts_rules_move_rows_where_the_family_says(each: bool) -> None:
    prove(FAMILY, _connectors(each=each), convert)


def test_a_lora_of_all_of_it_is_what_diffusers_makes_of_it_and_is_merged(tmp_path: Path) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_ltx2_lora_to_diffusers as convert_lora

    model = originals(ltx2.FAMILY, shapes_of(build("ltx2"), TARGETS))
    connectors = originals(FAMILY, shapes_of(_connectors(each=False), TARGETS))
    top = {module: shape for module, shape in connectors.items() if module.startswith("text_embedding_projection.")}
    inside = model | {module: shape for module, shape in connectors.items() if module not in top}
    tensors = lora(inside) | lora(top, prefix="")
    save_file(tensors, tmp_path / "lora.safetensors")
    loratools.convert(tmp_path / "lora.safetensors", tmp_path / "diffusers", to="diffusers")
    ours = loratools.open_adapter(tmp_path / "diffusers").updates
    theirs = convert_lora(dict(tensors)) | convert_lora(dict(tensors), "text_embedding_projection")
    for module, update in ours.items():
        if module.startswith("connectors.") and "text_proj_in" not in module:
            continue  # diffusers leaves them in the transformer, which has no such modules
        a, b = (theirs[f"{module}.lora_{factor}.weight"] for factor in "AB")
        torch.testing.assert_close(update.delta_weight(), b @ a, rtol=0, atol=1e-5, msg=module)
    assert {module.partition(".")[0] for module in ours} == {"transformer", "connectors"}
    loratools.convert(tmp_path / "diffusers", tmp_path / "comfy", to="comfy")
    assert set(load_file(next((tmp_path / "comfy").glob("*.safetensors")))) == set(tensors)
    names = {module: f"model.diffusion_model.{module}" for module in inside} | {module: module for module in top}
    weights = {f"{name}.weight": torch.zeros((inside | top)[module]) for module, name in sorted(names.items())}
    save_file(weights, tmp_path / "base.safetensors")
    for adapter in ("lora.safetensors", "diffusers"):
        loratools.merge(tmp_path / "base.safetensors", tmp_path / adapter, tmp_path / f"merged-{Path(adapter).stem}")
        merged = load_file(next((tmp_path / f"merged-{Path(adapter).stem}").glob("*.safetensors")))
        for module, name in names.items():
            before = module if module in top else f"diffusion_model.{module}"
            a, b = (tensors[f"{before}.lora_{factor}.weight"] for factor in "AB")
            torch.testing.assert_close(merged[f"{name}.weight"], b @ a, rtol=0, atol=1e-5, msg=module)
