"""The pitfalls of adapter files, and where each is tested; those that no other module tests are tested here.

`REGISTER` has one line for each: what goes wrong, and the tests that would fail if it did.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratools import dialects
from loratools.adapter.model import Adapter
from loratools.adapter.naming.image import rename
from loratools.errors import UnsupportedAdapter
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.merge import merge
from tests.make import tiny

from .adapters import Q0, Q1, V0, expect, lora, peft_folder, state

REGISTER: dict[str, tuple[str, ...]] = {
    "1 rsLoRA divides by the root of r; GGUF has no word for it": (
        "dialects.peft.test_peft:test_rslora_divides_by_the_root_of_r",
        "dialects.test_pitfalls:test_gguf_gets_the_scaling_of_rslora_as_its_alpha",
        "dialects.peft.test_profiles:test_one_rank_one_scaling_and_no_patterns",
    ),
    "2 stacked experts: A expert-major, B expert-minor": (
        "adapter.placement.test_experts:test_delta_is_expert_major_in_A_and_minor_in_B",
        "interop.test_experts:test_as_peft_merges",
    ),
    "3 stacked experts without parameter names": ("interop.test_experts:test_as_peft_merges",),
    "4 gate and up interleaved or one after the other": (
        "adapter.placement.test_experts:test_single_experts_in_a_stack",
        "interop.test_experts:test_an_adapter_of_each_expert_gives_the_same",
    ),
    "5 inits that change the base": (
        "dialects.peft.test_refusals:test_configs_that_are_sound_but_not_plain_lora",
        "interop.test_combine_peft:test_training_of_a_changed_base_as_peft_converts_it",
    ),
    "6 r and alpha are 8 where the config has none": (
        "dialects.peft.test_peft:test_missing_r_and_alpha_are_what_peft_takes_and_noted",
    ),
    "7 overlapping patterns change places when saved": (
        "dialects.peft.test_interop:test_overlapping_rank_patterns_that_saving_reordered",
        "dialects.peft.test_peft:test_alpha_patterns_in_the_order_of_the_file",
    ),
    "8 trainable_tokens_delta replaces rows": (
        "adapter.kinds.test_parts:test_rows_take_the_place_of_others",
        "interop.test_whole:test_rows_of_single_tokens",
    ),
    "9 whole tensors though modules_to_save is null": (
        "dialects.test_pitfalls:test_a_whole_tensor_that_the_config_does_not_mention_is_a_replacement",
    ),
    "10 copies of embeddings are no change": (
        "interop.test_whole:test_copies_of_the_base_are_compared_and_never_added",
        "dialects.test_copies:test_a_copy_that_nothing_compared_is_a_named_loss",
    ),
    "11 MLX: transposed factors, literal scale": (
        "dialects.test_mlx:test_the_scale_is_literal_and_an_alpha_beside_it_means_nothing",
        "dialects.test_mlx:test_delta_weights_are_those_of_mlx_lm",
    ),
    "12 diffusers loses the scale; its kohya files say alpha = rank": (
        "dialects.test_diffusers:test_a_file_of_an_older_script_has_the_scale_that_diffusers_applies",
        "dialects.kohya.test_kohya:test_a_file_that_diffusers_turned_into_kohya_names",
    ),
    "13 flattened names need a list": (
        "dialects.test_unflatten:test_every_layer_comes_back_under_its_own_name",
        "adapter.naming.image.test_readings:test_no_two_names_become_one_and_each_is_found_again",
        "dialects.kohya.test_kohya:test_the_base_decides_where_it_is_given",
    ),
    "14 split_qkv: rank 3r, alpha of r, a block-sparse up": (
        "dialects.test_pitfalls:test_split_qkv_is_what_a_loader_computes_and_comes_apart_at_its_true_rank",
    ),
    "15 DoRA's axis": (
        "adapter.kinds.test_parts:test_magnitudes_of_every_shape_in_the_wild",
        "dialects.kohya.test_kohya:test_a_magnitude_for_each_input_is_not_taken_for_one_for_each_output",
        "dialects.test_pitfalls:test_doras_of_embeddings_in_mlx_are_refused",
    ),
    "16 a whole LoKr ignores alpha": ("dialects.test_pitfalls:test_a_whole_lokr_ignores_alpha",),
    "17 LyCORIS' merge_to scales twice, its forward once": (
        "interop.test_lycoris:test_the_merged_layer_computes_what_forward_does",
    ),
    "18 RoPE: rows of B are permuted for some models": (
        "dialects.gguf.test_gguf:test_rows_of_q_and_k_come_back_from_llamas_order",
        "dialects.gguf.test_gguf:test_rows_of_qwen_stay",
        "interop.test_torchtune:test_the_merged_model_computes_what_torchtune_does",
    ),
    "19 Conv1D: square matrices hide it": (
        "adapter.placement.test_resolve:test_square_conv1d_is_transposed",
        "interop.test_bases:test_square_conv1d_alone_without_config",
        "interop.test_families:test_merged_weights_are_those_of_peft",
    ),
    "20 loralib: no alpha; eval mode holds the change already": (
        "dialects.test_loralib:test_alpha_must_be_told",
        "dialects.test_loralib:test_a_whole_state_dict_is_refused_for_it_may_hold_the_change_already",
    ),
    "21 tied heads": (
        "interop.test_bases:test_tied_head_is_refused_until_a_policy_is_named",
        "interop.test_bases:test_untied_head_computes_what_peft_computes_unmerged",
    ),
    "22 aLoRA, QA-LoRA, BD-LoRA, arrow": (
        "dialects.peft.test_refusals:test_configs_that_are_sound_but_not_plain_lora",
    ),
    "23 Megatron interleaves q, k and v by groups": (
        "dialects.megatron.test_megatron:test_an_archive_of_nemo",
        "dialects.megatron.test_megatron:test_it_merges_as_megatron_would",
    ),
    "24 names in memory and names on disk": (
        "interop.test_bases:test_prefixes_that_drift",
        "interop.test_experts:test_an_old_peft_had_in_and_out_the_other_way_round",
    ),
    "25 bases called -bnb-4bit": ("dialects.test_pitfalls:test_an_adapter_of_a_4_bit_base_merges_into_its_sibling",),
    "26 empty tensors, pointers, empty .bin": (
        "dialects.test_refused:test_empty_tensors_are_refused_by_name_in_every_dialect",
        "dialects.test_refused:test_pointers_are_refused_by_name_in_every_dialect",
        "dialects.test_refused:test_files_of_torch_that_are_refused_by_name",
        "dialects.peft.test_refusals:test_an_empty_bin",
    ),
    "27 safetensors: metadata in any order, names twice": (
        "storage.test_header:test_faults_are_refused_by_their_sentence",
        "dialects.contract:DialectContract",
    ),
    "28 alpha in half precision": ("dialects.kohya.test_kohya:test_alphas_in_every_dtype_and_none_at_all",),
    "29 grouped convolutions": ("interop.test_kinds:test_grouped_convolutions_are_refused_as_in_peft",),
    "30 PEFT and MLX call their configs alike": (
        "dialects.test_pitfalls:test_one_file_name_two_dialects",
    ),
}  # fmt: skip


def test_the_register_is_whole() -> None:
    assert [int(line.split()[0]) for line in REGISTER] == list(range(1, 31))


@pytest.mark.parametrize("pitfall", REGISTER)
def test_every_pitfall_is_tested_by_name(pitfall: str) -> None:
    for entry in REGISTER[pitfall]:
        module, _, name = entry.partition(":")
        source = Path(__file__).parents[1].joinpath(*module.split(".")).with_suffix(".py").read_text()
        assert f"def {name}(" in source or f"class {name}" in source, entry


def test_gguf_gets_the_scaling_of_rslora_as_its_alpha(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    rslora = peft_folder(tmp_path / "a", state(rank=16), r=16, lora_alpha=8, use_rslora=True)
    opened = dialects.open_adapter(rslora)
    assert {update.scaling for update in opened.updates.values()} == {2.0}  # 8/√16, and not 8/16
    known = {"base_config": {"model_type": "qwen2"}}
    dialects.save_adapter(Adapter(opened.updates, settings=known), tmp_path / "a.gguf", dialect="gguf")
    (alpha,) = gguf.GGUFReader(tmp_path / "a.gguf").get_field("adapter.lora.alpha").parts[-1]
    assert float(alpha) / 16 == 2.0  # llama.cpp divides by r, never by its root


def test_a_whole_tensor_that_the_config_does_not_mention_is_a_replacement(tmp_path: Path) -> None:
    """As a real GPT-2 classifier was saved: `score.weight` in the file, `modules_to_save: null` in the config."""
    head = torch.randn(3, 10)
    tensors = state() | {"base_model.model.score.weight": head}
    adapter = dialects.open_adapter(peft_folder(tmp_path / "a", tensors, modules_to_save=None, task_type="SEQ_CLS"))
    assert adapter.replacements.keys() == {"score.weight"}
    assert torch.equal(adapter.replacements["score.weight"].load(), head)
    assert adapter.updates.keys() == {Q0, Q1, V0}


def test_split_qkv_is_what_a_loader_computes_and_comes_apart_at_its_true_rank(tmp_path: Path) -> None:
    """sd-scripts saves three adapters of rank r as one: down of 3r rows, a block-diagonal up, alpha as it was.

    Whoever loads that divides alpha by 3r. So does this; apart again, each projection has rank r and that scaling.
    """
    width, r, alpha = 3072, 4, 4.0
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(3 * r, width, generator=generator)
    ups = [torch.randn(width, r, generator=generator) for _ in range(3)]
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file(
        {
            f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": torch.block_diag(*ups),
            f"{name}.alpha": torch.tensor(alpha),
            "lora_unet_double_blocks_0_img_mlp_0.lora_down.weight": torch.ones(1, width),  # tells that it is Flux
            "lora_unet_double_blocks_0_img_mlp_0.lora_up.weight": torch.ones(4 * width, 1),
        },
        tmp_path / "a.safetensors",
    )  # fmt: skip
    adapter = dialects.open_adapter(tmp_path / "a.safetensors")
    fused = adapter.updates["diffusion_model.double_blocks.0.img_attn.qkv"]
    assert (fused.rank, fused.scaling) == (3 * r, alpha / (3 * r))
    apart = rename.to_diffusers(adapter).updates
    for i, part in enumerate("qkv"):
        update = apart[f"transformer.transformer_blocks.0.attn.to_{part}"]
        assert (update.rank, update.scaling) == (r, alpha / (3 * r))
        assert torch.equal(update.parts["lora_A.weight"].load(), down[i * r : (i + 1) * r])
        assert torch.equal(update.parts["lora_B.weight"].load(), ups[i])


def test_doras_of_embeddings_in_mlx_are_refused(tmp_path: Path) -> None:
    """mlx-lm's magnitude has a number for each token, PEFT's one for each dimension."""
    A, B = torch.randn(20, 2), torch.randn(2, 8)
    name = "model.embed_tokens"
    save_file(
        {f"{name}.lora_a": A, f"{name}.lora_b": B, f"{name}.m": torch.ones(20)}, tmp_path / "adapters.safetensors"
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_parameters": {"scale": 2.0}}))
    with pytest.raises(UnsupportedAdapter) as refusal:
        dialects.open_adapter(tmp_path)
    assert "a magnitude for each token in mlx-lm, one for each dimension in PEFT" in refusal.value.problems[0]


@pytest.mark.parametrize("alpha", [1.0, 1e10])
def test_a_whole_lokr_ignores_alpha(tmp_path: Path, alpha: float) -> None:
    """Neither factor is decomposed: s is 1, whatever alpha says; ai-toolkit writes enormous ones."""
    w1, w2 = torch.randn(4, 4, dtype=torch.float64), torch.randn(80, 80, dtype=torch.float64)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2, f"{name}.alpha": torch.tensor(alpha)}
    save_file(tensors, tmp_path / "a.safetensors")
    (update,) = dialects.open_adapter(tmp_path / "a.safetensors").updates.values()
    assert update.kind == "lokr"
    torch.testing.assert_close(update.delta_weight().double(), torch.kron(w1, w2), rtol=1e-6, atol=1e-6)


def test_an_adapter_of_a_4_bit_base_merges_into_its_sibling(tmp_path: Path) -> None:
    """Unsloth's adapters name a -bnb-4bit repository; a name is no hash, so the 16-bit base is taken, and right."""
    weights, lora_factors = tiny.llama_weights(), tiny.lora_factors()
    base = Checkpoint.open(tiny.save_llama(tmp_path / "base", weights))
    folder = tiny.save_peft(tmp_path / "a", lora_factors)
    config = json.loads((folder / "adapter_config.json").read_text())
    named = config | {"base_model_name_or_path": "unsloth/llama-3-8b-bnb-4bit"}
    (folder / "adapter_config.json").write_text(json.dumps(named))
    adapter = dialects.open_adapter(folder)
    assert adapter.base is not None
    assert (adapter.base.id, adapter.base.sealed) == ("unsloth/llama-3-8b-bnb-4bit", False)
    merge(base, [adapter], tmp_path / "out")
    merged = Checkpoint.open(tmp_path / "out")
    wanted = tiny.merged_weights(weights, lora_factors, 8 / 4)
    assert all(torch.equal(merged.read(name), tensor) for name, tensor in wanted.items())


def test_one_file_name_two_dialects(tmp_path: Path) -> None:
    """PEFT's and mlx-lm's configuration have one name; the fields and the tensors tell, and the tensors decide."""
    peft = peft_folder(tmp_path / "peft", num_layers=4)
    assert dialects.detect(dialects.Listing.of(peft))[0] == "peft"
    mlx = tmp_path / "mlx"
    dialects.save_adapter(Adapter({Q0: lora(1)}), mlx, dialect="mlx")
    assert (mlx / "adapter_config.json").is_file()
    assert dialects.detect(dialects.Listing.of(mlx))[0] == "mlx"
    config = json.loads((mlx / "adapter_config.json").read_text()) | {"peft_type": "LORA"}
    (mlx / "adapter_config.json").write_text(json.dumps(config))
    name, evidence = dialects.detect(dialects.Listing.of(mlx))
    assert (name, evidence.score) == ("mlx", 90)
    expect(dialects.open_adapter(mlx), Q0, 1, 2.0)
