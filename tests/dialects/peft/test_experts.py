"""What PEFT's versions make of stacks of experts, by their formulas, and what its files leave open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools import dialects
from loratools.errors import BadFile, IncompatibleAdapter, LossyConversion
from loratools.surgery.convert import convert
from loratools.surgery.merge import merge
from tests.surgery.models import load, random

EXPERTS, RANK, H = 4, 2, 8
NAME = "model.layers.0.mlp.experts"
KEY = f"base_model.model.{NAME}"
FIELDS = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "target_modules": []}


def base(folder: Path, model_type: str, **stacks: tuple[int, int]) -> dict[str, Tensor]:
    """Write a base of one layer with these stacks; return its tensors."""
    folder.mkdir()
    tensors = {f"{NAME}.{name}": random(EXPERTS, *sides, seed=i) for i, (name, sides) in enumerate(stacks.items())}
    tensors["model.embed_tokens.weight"] = random(20, H)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "tie_word_embeddings": False}))
    return tensors


def adapter(folder: Path, sides: list[tuple[int, int]], parameters: list[str], **fields: Any) -> list[Tensor]:
    """Write wrappers with these (in, out), innermost first; return B·A of each as PEFT sums them, (E, out, in)."""
    folder.mkdir()
    tensors, deltas = {}, []
    for depth, (inner, out) in enumerate(sides):
        A, B = random(EXPERTS * RANK, inner, seed=depth + 10), random(out, RANK * EXPERTS, seed=depth + 20)
        path = KEY + ".base_layer" * (len(sides) - 1 - depth)
        tensors |= {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
        deltas.append(3 * torch.einsum("ore,eri->eoi", B.reshape(out, RANK, EXPERTS), A.reshape(EXPERTS, RANK, inner)))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {**FIELDS, "target_parameters": [f"mlp.experts.{name}" for name in parameters], **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas


@pytest.mark.parametrize(
    ("fields", "qwen3_moe", "gpt_oss"),
    [
        ({}, True, True),  # PEFT 0.17 wrote no version
        ({"peft_version": "0.18.1"}, True, True),
        ({"peft_version": "0.18.2.dev0"}, True, True),
        ({"peft_version": "0.19.0"}, True, False),
        ({"peft_version": "0.19.1"}, False, True),
        ({"peft_version": "0.21.0"}, False, True),
        ({"peft_version": "0.21.1.dev0@1234567"}, False, True),
        ({"peft_version": "0.19.0.dev0"}, None, None),
        ({"peft_version": "0.19.1.dev0"}, None, None),
        ({"peft_version": "main"}, None, None),
        ({"arrow_config": None}, None, None),  # a field that came with peft_version, which somebody took out
        ({"lora_ga_config": None, "peft_version": None}, None, None),
    ],
)
def test_a_square_stack_lies_as_the_version_has_it(
    fields: dict[str, Any], qwen3_moe: bool | None, gpt_oss: bool | None, tmp_path: Path
) -> None:
    (delta,) = adapter(tmp_path / "adapter", [(H, H)], ["down_proj"], **fields)
    for model_type, turned in (("qwen3_moe", qwen3_moe), ("gpt_oss", gpt_oss)):
        before = base(tmp_path / model_type, model_type, down_proj=(H, H))[f"{NAME}.down_proj"]
        if turned is None:
            with pytest.raises(IncompatibleAdapter, match="peft_version"):
                merge(tmp_path / model_type, tmp_path / "adapter", tmp_path / "merged", force=True)
            continue
        merge(tmp_path / model_type, tmp_path / "adapter", tmp_path / "merged", force=True)
        found = load(tmp_path / "merged")[f"{NAME}.down_proj"]
        assert torch.allclose(found, before + (delta.transpose(1, 2) if turned else delta), atol=1e-5)


def test_a_missing_version_is_evidence_only_where_shapes_leave_it_open(tmp_path: Path) -> None:
    (delta,) = adapter(tmp_path / "adapter", [(6, H)], ["down_proj"])
    before = base(tmp_path / "base", "qwen3_moe", down_proj=(H, 6))[f"{NAME}.down_proj"]
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert torch.allclose(load(tmp_path / "merged")[f"{NAME}.down_proj"], before + delta, atol=1e-5)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "peft_version": "0.18.0"}))
    with pytest.raises(IncompatibleAdapter, match="stored"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "other")


@pytest.mark.parametrize("listed", [["up_proj", "down_proj"], ["down_proj", "up_proj"]])
def test_the_order_of_target_parameters_means_nothing(listed: list[str], tmp_path: Path) -> None:
    """PEFT wraps in the order in which the class registers: NemotronH has up_proj first."""
    up, down = adapter(tmp_path / "adapter", [(H, H), (H, H)], listed, peft_version="0.21.0")
    before = base(tmp_path / "base", "nemotron_h", up_proj=(H, H), down_proj=(H, H))
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    found = load(tmp_path / "merged")
    assert torch.allclose(found[f"{NAME}.up_proj"], before[f"{NAME}.up_proj"] + up, atol=1e-5)
    assert torch.allclose(found[f"{NAME}.down_proj"], before[f"{NAME}.down_proj"] + down, atol=1e-5)
    base(tmp_path / "other", "unheard_of", up_proj=(H, H), down_proj=(H, H))
    with pytest.raises(IncompatibleAdapter, match="registers") as refusal:
        merge(tmp_path / "other", tmp_path / "adapter", tmp_path / "none")
    assert "--model-type" in str(refusal.value)


def test_an_order_that_only_the_base_tells_takes_its_own_alpha_along(tmp_path: Path) -> None:
    """Names of no class of transformers: the shapes of the base tell, and alpha follows the parameter."""
    first, second = adapter(
        tmp_path / "adapter", [(H, 6), (6, H)], ["w_in", "w_out"], peft_version="0.21.0",
        alpha_pattern={r".*\.w_out": 60},
    )  # fmt: skip
    with pytest.raises(LossyConversion, match="which of w_in, w_out it is for"):
        convert(tmp_path / "adapter", tmp_path / "sealed", to="loratools")
    base(tmp_path / "unheard", "unheard_of", w_out=(6, H), w_in=(H, 6))
    with pytest.raises(IncompatibleAdapter, match="registers w_in, w_out"):  # or the other way round and transposed
        merge(tmp_path / "unheard", tmp_path / "adapter", tmp_path / "none")
    before = base(tmp_path / "base", "qwen3_moe", w_out=(6, H), w_in=(H, 6))
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    found = load(tmp_path / "merged")
    assert torch.allclose(found[f"{NAME}.w_out"], before[f"{NAME}.w_out"] + 10 * first, atol=1e-4)
    assert torch.allclose(found[f"{NAME}.w_in"], before[f"{NAME}.w_in"] + second, atol=1e-5)
    sealed = convert(tmp_path / "adapter", tmp_path / "sealed", base=tmp_path / "base", to="loratools")
    assert sealed.modules == 2
    merge(tmp_path / "base", tmp_path / "sealed", tmp_path / "again")
    again = load(tmp_path / "again")
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_a_rank_pattern_tells_the_order(tmp_path: Path) -> None:
    """Ranks 2 and 3 of four experts: 8 rows of A are no multiple of 3, so that the first wrapper has rank 2."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    tensors = {}
    for path, rank in ((f"{KEY}.base_layer", 2), (KEY, 3)):
        tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = random(4 * rank, H), random(H, 4 * rank)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {**FIELDS, "target_parameters": ["experts.a", "experts.b"], "rank_pattern": {r".*\.a": 3}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    updates = dialects.open_adapter(folder).updates
    assert updates[f"{NAME}.base_layer"].layout["parameter"] == "b"
    assert updates[NAME].layout == {"experts": 4, "parameter": "a", "transposed": None}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 5, "rank_pattern": {}}))
    with pytest.raises(BadFile, match="no multiple of the rank 5"):
        dialects.open_adapter(folder)


@pytest.mark.parametrize("version", ["0.18.1", "0.19.0", "0.21.0", "0.19.1.dev0"])
def test_a_converted_stack_says_for_which_peft_it_is(version: str, tmp_path: Path) -> None:
    adapter(tmp_path / "adapter", [(H, H)], ["down_proj"], peft_version=version)
    convert(tmp_path / "adapter", tmp_path / "peft", to="peft")
    written = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["peft_version"]
    assert written == {"0.21.0": "0.19.1", "0.19.1.dev0": "unknown"}.get(version, version)
    for model_type in ("qwen3_moe", "gpt_oss"):
        base(tmp_path / model_type, model_type, down_proj=(H, H))
        if "dev" in version:
            with pytest.raises(IncompatibleAdapter, match="peft_version"):
                merge(tmp_path / model_type, tmp_path / "peft", tmp_path / "none")
            continue
        merged = []
        for name in ("adapter", "peft"):
            merge(tmp_path / model_type, tmp_path / name, tmp_path / "merged", force=True)
            merged.append(load(tmp_path / "merged")[f"{NAME}.down_proj"])
        assert torch.equal(*merged)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("version", ["0.18.1", "0.19.0", "0.21.0"])
def test_with_a_base_stacks_are_written_as_the_peft_of_today_reads_them(
    version: str, model_type: str, tmp_path: Path
) -> None:
    """PEFT 0.21 adds B·A to a stack, and its transpose where the class says is_transposed."""
    adapter(tmp_path / "adapter", [(H, H)], ["down_proj"], peft_version=version)
    before = base(tmp_path / "base", model_type, down_proj=(H, H))[f"{NAME}.down_proj"]
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    wanted = load(tmp_path / "merged")[f"{NAME}.down_proj"]
    for to in ("peft", "loratools"):
        convert(tmp_path / "adapter", tmp_path / to, base=tmp_path / "base", to=to)
        (file,) = (tmp_path / to).glob("*.safetensors")
        tensors = load_file(file)
        A, B = (next(W for name, W in tensors.items() if part in name) for part in ("lora_A", "lora_B"))
        delta = 3 * torch.einsum("ore,eri->eoi", B.reshape(H, RANK, EXPERTS), A.reshape(EXPERTS, RANK, H))
        by_peft = before + (delta.transpose(1, 2) if model_type == "gpt_oss" else delta)
        assert torch.allclose(by_peft, wanted, atol=1e-5)
        merge(tmp_path / "base", tmp_path / to, tmp_path / f"merged-{to}")
        assert torch.allclose(load(tmp_path / f"merged-{to}")[f"{NAME}.down_proj"], wanted, atol=1e-5)


def test_a_name_without_a_path_is_for_every_module_that_has_the_parameter(tmp_path: Path) -> None:
    """As PEFT takes it: of four names the experts have two, and the shared experts, stacked too, three."""
    layer, sides = "model.layers.0.mlp", {"gate_up_proj": (12, H), "down_proj": (H, 6)}
    shared = {"gate_proj": (4, H), "up_proj": (4, H), "down_proj": (H, 4)}
    before = {f"{layer}.experts.{name}": random(EXPERTS, *shape, seed=1) for name, shape in sides.items()}
    before |= {f"{layer}.shared_experts.{name}": random(2, *shape, seed=2) for name, shape in shared.items()}
    (tmp_path / "base").mkdir()
    save_file(before, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "inkling_text"}))
    tensors, wanted = {}, dict(before)
    for module, parameters, count in (("experts", sides, EXPERTS), ("shared_experts", shared, 2)):
        for depth, (name, (out, inner)) in enumerate(parameters.items()):
            A, B = random(count * RANK, inner, seed=depth + 3), random(out, RANK * count, seed=depth + 9)
            path = f"base_model.model.{layer}.{module}" + ".base_layer" * (len(parameters) - 1 - depth)
            tensors |= {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
            delta = torch.einsum("ore,eri->eoi", B.reshape(out, RANK, count), A.reshape(count, RANK, inner))
            wanted[f"{layer}.{module}.{name}"] = before[f"{layer}.{module}.{name}"] + 3 * delta
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    names = ["down_proj", "gate_proj", "gate_up_proj", "up_proj"]
    config = {**FIELDS, "target_modules": ["q_proj"], "target_parameters": names, "peft_version": "0.21.2"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    found = load(tmp_path / "merged")
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], W, atol=1e-5) for name, W in wanted.items())


def test_a_plain_layer_is_no_holder_of_a_parameter_without_a_path(tmp_path: Path) -> None:
    adapter(tmp_path / "adapter", [(H, 12), (6, H)], ["gate_up_proj", "down_proj"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    name = "base_model.model.model.layers.0.self_attn.k_proj"
    stranger = {f"{name}.lora_A.weight": random(RANK, H, seed=1), f"{name}.lora_B.weight": random(H, RANK, seed=2)}
    save_file(load_file(path) | stranger, path)
    config = {**FIELDS, "target_parameters": ["gate_up_proj", "down_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(BadFile, match="k_proj: has tensors, but the config does not target it"):
        dialects.open_adapter(tmp_path / "adapter")
