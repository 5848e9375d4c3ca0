"""Mixtures of experts as transformers saves them and PEFT adapts them: stacked, by expert, and one on the other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools.errors import UnsupportedAdapter
from loratools.surgery.convert import convert
from loratools.surgery.merge import merge
from loratools.surgery.unmerge import unmerge
from loratools.surgery.verify import verify
from tests.surgery.models import load

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore:The following rank_pattern keys")]

SIDES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def mixtral() -> torch.nn.Module:
    config = transformers.MixtralConfig(**SIDES, intermediate_size=48, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def qwen() -> torch.nn.Module:
    config = transformers.Qwen3MoeConfig(
        **SIDES, intermediate_size=48, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, head_dim=8
    )
    return transformers.Qwen3MoeForCausalLM(config)


def gpt_oss(intermediate: int = 24) -> torch.nn.Module:
    config = transformers.GptOssConfig(
        **SIDES, intermediate_size=intermediate, num_local_experts=4, num_experts_per_tok=2, head_dim=8
    )
    return transformers.GptOssForCausalLM(config)


def gpt_oss_square() -> torch.nn.Module:
    """down_proj is square in each expert, as in the real ones."""
    return gpt_oss(32)


def qwen_square() -> torch.nn.Module:
    """gate_up_proj is square in each expert, 2·I = H."""
    config = transformers.Qwen3MoeConfig(
        **SIDES, intermediate_size=48, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, head_dim=8
    )
    return transformers.Qwen3MoeForCausalLM(config)


MODELS = {model.__name__: model for model in (mixtral, qwen, gpt_oss, gpt_oss_square, qwen_square)}


def prepare(make: Callable[[], torch.nn.Module], folder: Path, parameters: list[str]) -> dict[str, Tensor]:
    """Save a model as transformers does and as it is in memory, and an adapter; return PEFT's merge of them."""
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(folder / "base")
    stacked = folder / "stacked"
    stacked.mkdir()
    save_file({name: W.contiguous() for name, W in model.state_dict().items()}, stacked / "model.safetensors")
    (stacked / "config.json").write_text((folder / "base" / "config.json").read_text())
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=parameters,
        rank_pattern={r".*\.down_proj": 2} if len(parameters) > 1 else {},
    )  # fmt: skip
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder / "adapter")
    return {name: W.detach().clone() for name, W in adapted.merge_and_unload(safe_merge=False).state_dict().items()}


def nemotron(moe: int) -> torch.nn.Module:
    """Experts without a gate."""
    config = transformers.NemotronHConfig(
        vocab_size=40, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8, ssm_state_size=8,
        mamba_num_heads=4, mamba_head_dim=8, n_groups=1, intermediate_size=24, n_routed_experts=4, n_group=1,
        num_experts_per_tok=2, moe_shared_expert_intermediate_size=8, n_shared_experts=1, topk_group=1,
        moe_intermediate_size=moe, layers_block_type=["attention", "moe"], num_hidden_layers=2,
    )  # fmt: skip
    return transformers.NemotronHForCausalLM(config)


SEVERAL = {
    "nemotron": (lambda: nemotron(12), ["mixer.experts.up_proj", "mixer.experts.down_proj"]),
    "nemotron_square": (lambda: nemotron(16), ["mixer.experts.down_proj", "mixer.experts.up_proj"]),
    "gpt_oss_biases": (gpt_oss, [*PARAMETERS, *(f"{name}_bias" for name in PARAMETERS)]),
    "gpt_oss_bias": (gpt_oss, ["mlp.experts.down_proj_bias", "mlp.experts.gate_up_proj_bias"]),
}


@pytest.mark.parametrize("name", sorted(SEVERAL))
def test_several_parameters_of_one_module_are_told_apart_as_the_class_registers_them(name: str, tmp_path: Path) -> None:
    make, parameters = SEVERAL[name]
    torch.manual_seed(0)
    model = make()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=[], target_parameters=parameters)
    adapted = peft.get_peft_model(model, config)
    for tensor, parameter in adapted.named_parameters():
        if "lora_" in tensor:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "expected")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    found, wanted = load(tmp_path / "merged"), load(tmp_path / "expected")
    assert found.keys() == wanted.keys()
    assert all(close(found[tensor], wanted[tensor]) for tensor in wanted)
    assert verify(tmp_path / "merged", tmp_path / "base", tmp_path / "adapter").ok
    convert(tmp_path / "adapter", tmp_path / "sealed", base=tmp_path / "base")
    merge(tmp_path / "base", tmp_path / "sealed", tmp_path / "again")
    again = load(tmp_path / "again")
    assert all(close(again[tensor], wanted[tensor]) for tensor in wanted)


def close(one: Tensor, other: Tensor) -> bool:
    return float((one - other).abs().max()) <= 1e-6 * float(other.abs().max())


def reloaded(folder: Path) -> dict[str, Tensor]:
    """Return the weights as transformers has them in memory."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return dict(model.state_dict())


@pytest.mark.parametrize("parameters", [PARAMETERS, PARAMETERS[:1], PARAMETERS[1:]], ids=["both", "gate_up", "down"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_as_peft_merges(name: str, parameters: list[str], tmp_path: Path) -> None:
    wanted = prepare(MODELS[name], tmp_path, parameters)
    report = merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged", keep_residual=True)
    account = report.consumed[0]
    assert account.applied == account.tensors == 2 * (2 + 2 * len(parameters))
    before, after = load(tmp_path / "base"), load(tmp_path / "merged")
    assert {n: W.shape for n, W in before.items()} == {n: W.shape for n, W in after.items()}
    model = reloaded(tmp_path / "merged")
    assert model.keys() == wanted.keys()
    assert all(close(model[tensor], wanted[tensor]) for tensor in wanted)
    assert verify(tmp_path / "merged", tmp_path / "base", [tmp_path / "adapter"]).ok
    assert unmerge(tmp_path / "merged", [tmp_path / "adapter"], tmp_path / "unmerged").proved == "root hash"
    merge(tmp_path / "stacked", [tmp_path / "adapter"], tmp_path / "other")
    other = load(tmp_path / "other")
    assert all(close(other[tensor], wanted[tensor]) for tensor in wanted)


def by_expert(folder: Path, model: str, names: tuple[str, str, str], module: str) -> Path:
    """Write the adapter of a stack anew, as an adapter of each expert's own projections."""
    from loratools import dialects

    tensors: dict[str, Tensor] = {}
    for update in dialects.open_adapter(folder / "adapter").updates.items():
        path, stack = update
        if stack.kind != "experts":
            continue
        layer = path.split(".layers.")[1].split(".")[0]
        for e in range(4):
            B, A = stack.members[e].factored().load()
            halves = torch.tensor_split(B, 2) if stack.parameter == "gate_up_proj" else (B,)
            if model.startswith("gpt_oss") and len(halves) == 2:
                halves = (B[0::2], B[1::2])
            for name, half in zip(names[:2] if len(halves) == 2 else names[2:], halves, strict=True):
                key = f"base_model.model.model.layers.{layer}.{module}.experts.{e}.{name}"
                tensors |= {f"{key}.lora_A.weight": A.clone(), f"{key}.lora_B.weight": half.clone()}
    (folder / "each").mkdir()
    save_file(tensors, folder / "each" / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": list(names)}
    config["rank_pattern"] = {names[2]: 2}
    (folder / "each" / "adapter_config.json").write_text(json.dumps(config))
    return folder / "each"


@pytest.mark.parametrize("name", sorted(MODELS))
def test_an_adapter_of_each_expert_gives_the_same(name: str, tmp_path: Path) -> None:
    prepare(MODELS[name], tmp_path, PARAMETERS)
    old = name == "mixtral"
    names = ("w1", "w3", "w2") if old else ("gate_proj", "up_proj", "down_proj")
    each = by_expert(tmp_path, name, names, "block_sparse_moe" if old else "mlp")
    for base in ("base", "stacked"):
        merge(tmp_path / base, [tmp_path / "adapter"], tmp_path / f"{base}-stack")
        merge(tmp_path / base, [each], tmp_path / f"{base}-each")
        one, other = load(tmp_path / f"{base}-stack"), load(tmp_path / f"{base}-each")
        experts = [tensor for tensor in one if ".experts." in tensor]
        assert experts
        assert all(close(one[tensor], other[tensor]) for tensor in experts)


def test_experts_split_over_shards(tmp_path: Path) -> None:
    prepare(mixtral, tmp_path, PARAMETERS)
    weights = load(tmp_path / "base")
    folder = tmp_path / "split"
    folder.mkdir()
    (folder / "config.json").write_text((tmp_path / "base" / "config.json").read_text())
    weight_map = {name: f"model-{i % 5 + 1:05d}-of-00005.safetensors" for i, name in enumerate(weights)}
    for file in set(weight_map.values()):
        save_file({n: W for n, W in weights.items() if weight_map[n] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "whole")
    merge(folder, [tmp_path / "adapter"], tmp_path / "merged")
    one, other = load(tmp_path / "whole"), load(tmp_path / "merged")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["qwen", "gpt_oss"])
def test_an_old_peft_had_in_and_out_the_other_way_round(name: str, tmp_path: Path) -> None:
    """PEFT 0.18 took every stack for (E, in, out): its formula, computed here, is ΔW[e] = (B[e]·A[e])ᵀ."""
    prepare(MODELS[name], tmp_path, PARAMETERS[1:])
    stacked = load(tmp_path / "stacked")
    tensors, expected = {}, {}
    for layer in range(2):
        tensor = f"model.layers.{layer}.mlp.experts.down_proj"
        count, first, second = stacked[tensor].shape
        A, B = torch.randn(count * 3, first), torch.randn(second, 3 * count)
        key = f"base_model.model.model.layers.{layer}.mlp.experts"
        tensors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
        delta = torch.einsum("ore,eri->eio", B.reshape(second, 3, count), A.reshape(count, 3, first))
        expected[tensor] = stacked[tensor] + 2 * delta
    (tmp_path / "old").mkdir()
    save_file(tensors, tmp_path / "old" / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": [], "target_parameters": PARAMETERS[1:]}
    for version in ("0.18.1", None):
        (tmp_path / "old" / "adapter_config.json").write_text(json.dumps({**config, "peft_version": version}))
        merge(tmp_path / "stacked", [tmp_path / "old"], tmp_path / "merged", force=True)
        model = load(tmp_path / "merged")
        assert all(close(model[tensor], expected[tensor]) for tensor in expected)


def test_the_saved_stack_of_a_conversion_loads_in_peft(tmp_path: Path) -> None:
    wanted = prepare(qwen, tmp_path, PARAMETERS)
    convert(tmp_path / "adapter", tmp_path / "again", to="peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "again").merge_and_unload().state_dict()
    assert all(close(merged[name], wanted[name]) for name in wanted)
    assert (
        load_file(tmp_path / "again" / "adapter_model.safetensors").keys()
        == load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning:peft")
@pytest.mark.parametrize(
    ("make", "targets"),
    [(qwen, ["q_proj", "gate_proj", "up_proj", "down_proj"]), (mixtral, ["q_proj", "w1", "w2", "w3"])],
)
def test_the_usual_targets_of_a_mixture_are_saved_as_parameters_without_a_path(
    make: Callable[[], torch.nn.Module], targets: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=8, target_modules=targets))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    assert "gate_up_proj" in json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_parameters"]
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    wanted, found = adapted.merge_and_unload().state_dict(), reloaded(tmp_path / "merged")
    assert all(close(found[name], wanted[name]) for name in wanted)
    assert verify(tmp_path / "merged", tmp_path / "base", tmp_path / "adapter", exact=True).ok


@pytest.mark.parametrize("field", ["lora_B_layout", "unsloth_fused_expert_lora"])
def test_columns_of_b_expert_after_expert_are_told_by_the_config(field: str, tmp_path: Path) -> None:
    prepare(qwen, tmp_path, PARAMETERS)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "wanted")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, B in tensors.items():
        if ".experts." in name and "lora_B" in name:
            tensors[name] = B.reshape(len(B), -1, 4).transpose(1, 2).reshape(B.shape).contiguous()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    path = tmp_path / "adapter" / "adapter_config.json"
    config, mark = json.loads(path.read_text()), {"lora_B_layout": "grouped_by_expert"}
    fused = {"unsloth_fused_expert_lora": {"parameters": {"gate_up_proj": mark, "down_proj": mark}}}
    path.write_text(json.dumps(config | (mark if field in mark else fused)))
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged, wanted = load(tmp_path / "merged"), load(tmp_path / "wanted")
    assert all(torch.equal(W, wanted[name]) for name, W in merged.items())
    path.write_text(json.dumps(config | {field: "interleaved"}))
    with pytest.raises(UnsupportedAdapter, match="grouped_by_expert"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "none")


@pytest.mark.parametrize("square", [False, True])
def test_a_stack_of_one_expert_is_added_as_it_is(square: bool, tmp_path: Path) -> None:
    """PEFT adds B·A to a parameter (1, out, in) without looking at its class, which only square ones survive."""
    sides = SIDES | {"hidden_size": 32, "num_hidden_layers": 1}
    config = transformers.Qwen3MoeConfig(
        **sides, intermediate_size=48, moe_intermediate_size=32 if square else 24, num_experts=1, num_experts_per_tok=1,
        head_dim=8,
    )  # fmt: skip
    wanted = prepare(lambda: transformers.Qwen3MoeForCausalLM(config), tmp_path, PARAMETERS[1:])
    merge(tmp_path / "stacked", tmp_path / "adapter", tmp_path / "merged")
    found = load(tmp_path / "merged")
    assert all(close(found[tensor], wanted[tensor]) for tensor in wanted)
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for version in ("0.18.1", "0.19.0") if square else ():  # their formula for one expert is the same
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**fields, "peft_version": version}))
        merge(tmp_path / "stacked", tmp_path / "adapter", tmp_path / version)
        assert all(torch.equal(W, found[tensor]) for tensor, W in load(tmp_path / version).items())
