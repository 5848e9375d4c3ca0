"""Every kind of update that PEFT writes, merged on disk, against PEFT's `merge_and_unload`: same names and numbers."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from loratools.errors import BadFile, IncompatibleAdapter, counted
from loratools.surgery.merge import MergeReport, merge
from loratools.surgery.verify import verify
from tests.interop.models import FAMILIES, load, merge_by_peft

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]


class Mixed(nn.Module):
    """One of everything that PEFT has a LoRA layer for, beside transformers' Conv1D, which GPT-2 has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(20, 12)
        self.conv1 = nn.Conv1d(12, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 6, 3)
        self.point = nn.Conv2d(6, 5, 1)
        self.conv3 = nn.Conv3d(2, 4, (1, 2, 3))
        self.mha = nn.MultiheadAttention(12, 3)
        self.linear = nn.Linear(12, 7)
        self.score = nn.Linear(7, 3)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        """PEFT wants a forward; the tests compare weights."""
        return X


def mixed() -> Any:
    """Return the plain module; what its attributes are, nn.Module does not tell."""
    return Mixed()


def save_mixed(folder: Path, model: nn.Module) -> Path:
    """Save a plain module as a checkpoint."""
    folder.mkdir()
    save_file({name: W.contiguous() for name, W in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def train(base: nn.Module, seed: int = 7, **settings: Any) -> Any:
    """Return a PEFT model around a copy of `base` in which everything that would be trained has moved."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    peft = get_peft_model(copy.deepcopy(base), LoraConfig(**{"r": 4, "lora_alpha": 10, **settings}))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad:
            step = torch.randn(parameter.shape, generator=generator)
            with torch.no_grad():
                if "magnitude" in name:
                    parameter.mul_(1 + 0.1 * step.abs())
                elif "lora_" in name:
                    parameter.copy_(0.2 * step)
                else:
                    parameter.add_(0.2 * step)
    return peft


def against_peft(base: Any, folder: Path, adapter: Path, tmp: Path, **options: Any) -> tuple[MergeReport, float]:
    """Merge with both; return our report and the largest difference, relative to each tensor's largest element."""
    theirs = merge_by_peft(base, adapter).state_dict()
    report = merge(folder, [adapter], tmp / "ours", retention="full", **options)
    ours = load(tmp / "ours")
    # A tied head is in the state twice and in the file once.
    known = {tensor.data_ptr() for name, tensor in theirs.items() if name in ours}
    assert {name for name in theirs if name not in ours and theirs[name].data_ptr() not in known} == set()
    assert ours.keys() <= theirs.keys()
    worst = max(difference(ours[name], theirs[name]) for name in ours)
    assert verify(tmp / "ours", folder, [adapter]).ok
    tensors = len(load_file(adapter / "adapter_model.safetensors"))
    (account,) = report.consumed
    assert account.tensors == tensors == account.applied + account.replaced + account.passed_over
    return report, worst


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return max|ours − theirs| / max|theirs|."""
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp_min(1e-30))


MIXED: Mapping[str, tuple[dict[str, Any], int]] = {
    "convolutions": ({"target_modules": ["conv1", "conv2", "point", "conv3"]}, 4),
    "convolutions-bias": ({"target_modules": ["conv1", "conv2", "point", "conv3", "linear"], "lora_bias": True}, 10),
    "embedding": ({"target_modules": ["embed"]}, 1),
    "attention": ({"target_modules": ["mha"]}, 2),
    "attention-rslora": ({"target_modules": ["mha", "linear"], "use_rslora": True}, 3),
    "bias-all": ({"target_modules": ["linear"], "bias": "all"}, 8),
    "bias-lora-only": ({"target_modules": ["linear", "conv1"], "bias": "lora_only"}, 4),
    "saved": ({"target_modules": ["linear"], "modules_to_save": ["score", "embed"]}, 4),
    "dora": ({"target_modules": ["linear", "conv1", "conv2", "point", "conv3", "embed"], "use_dora": True}, 6),
    "dora-ranks": (
        {"target_modules": ["linear", "conv2", "embed"], "use_dora": True, "rank_pattern": {"conv2": 2, "embed": 7}}, 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(MIXED))
def test_a_module_of_every_kind(name: str, tmp_path: Path) -> None:
    settings, changed = MIXED[name]
    base = mixed()
    folder = save_mixed(tmp_path / "base", base)
    train(base, **settings).save_pretrained(tmp_path / "adapter")
    report, worst = against_peft(base, folder, tmp_path / "adapter", tmp_path)
    assert report.changed == changed
    assert worst <= (1e-5 if "dora" in name else 1e-6)
    assert report.retention == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("family", ["gpt2", "gpt2-square", "llama", "qwen2", "phi3", "bert", "t5"])
def test_dora_of_families(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """GPT-2 stores [in, out], so that a feature's norm runs across rows, and over all tiles."""
    base = FAMILIES[family].build()
    base.save_pretrained(tmp_path / "base")
    train(base, target_modules=list(FAMILIES[family].targets), **settings).save_pretrained(tmp_path / "adapter")
    report, worst = against_peft(base, tmp_path / "base", tmp_path / "adapter", tmp_path)
    assert report.changed == FAMILIES[family].attention
    assert worst <= (1e-5 if settings else 1e-6)


def llama(**changes: Any) -> Any:
    """Return a tiny Llama of four numbers of rows and columns that differ."""
    return FAMILIES["llama"].build(**changes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["q_proj", "embed_tokens"]], ids=["linear", "embedding"])
def test_dora_in_half_precision(targets: list[str], dtype: torch.dtype, tmp_path: Path) -> None:
    """One rounding at the end: at most a few ties go another way than PEFT's float32 result, rounded."""
    base = llama().to(dtype)
    base.save_pretrained(tmp_path / "base")
    train(base, target_modules=targets, use_dora=True).save_pretrained(tmp_path / "adapter")
    exact = merge_by_peft(base.float(), tmp_path / "adapter").state_dict()
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "ours")
    ours = load(tmp_path / "ours")
    off = sum(int(torch.count_nonzero(ours[name] != exact[name].to(dtype))) for name in ours)
    assert off <= (3 if dtype == torch.bfloat16 else 30)
    assert all(difference(ours[name].float(), exact[name]) <= 2**-8 for name in ours)
    assert verify(tmp_path / "ours", tmp_path / "base", [tmp_path / "adapter"], exact=True).ok


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("second", [{"use_dora": True}, {}], ids=["dora-dora", "dora-lora"])
def test_several_adapters_compose_as_in_peft(second: dict[str, Any], transposed: bool, tmp_path: Path) -> None:
    from peft import PeftModel

    base = FAMILIES["gpt2"].build() if transposed else mixed()
    targets = ["c_attn", "wte"] if transposed else ["linear", "conv2", "embed"]
    if transposed:
        base.save_pretrained(tmp_path / "base")
    else:
        save_mixed(tmp_path / "base", base)
    train(base, 1, target_modules=targets, use_dora=True).save_pretrained(tmp_path / "a")
    train(base, 2, target_modules=targets[:2], **second).save_pretrained(tmp_path / "b")
    merged = {}
    for order in ("ab", "ba"):
        peft = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / order[0], adapter_name=order[0])
        peft.load_adapter(tmp_path / order[1], adapter_name=order[1])
        theirs = peft.merge_and_unload(adapter_names=list(order)).state_dict()
        report = merge(
            tmp_path / "base", [tmp_path / adapter_name for adapter_name in order], tmp_path / order, tied="both"
        )
        count = 3 if transposed else 2
        sentence = f"the order matters for {counted(count, 'tensor')}, and is as given: adapter 1, then 2"
        assert sentence in report.notes
        merged[order] = load(tmp_path / order)
        assert max(difference(W, theirs[name]) for name, W in merged[order].items()) <= 1e-5
        paths = [tmp_path / adapter_name for adapter_name in order]
        assert verify(tmp_path / order, tmp_path / "base", paths).ok
    assert max(difference(merged["ab"][name], merged["ba"][name]) for name in merged["ab"]) > 1e-3


def test_a_weight_scales_s_as_set_scale_does(tmp_path: Path) -> None:
    from peft import PeftModel

    base = mixed()
    folder = save_mixed(tmp_path / "base", base)
    train(base, target_modules=["linear", "conv2", "embed"], use_dora=True).save_pretrained(tmp_path / "adapter")
    peft: Any = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    for module in peft.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.3)
    theirs = peft.merge_and_unload().state_dict()
    merge(folder, [tmp_path / "adapter"], tmp_path / "ours", weights=[0.3])
    assert max(difference(W, theirs[name]) for name, W in load(tmp_path / "ours").items()) <= 1e-5


def test_a_feature_without_a_direction(tmp_path: Path) -> None:
    base = mixed()
    with torch.no_grad():
        base.linear.weight[2] = 0
    folder = save_mixed(tmp_path / "base", base)
    peft = train(base, target_modules=["linear"], use_dora=True)
    peft.base_model.model.linear.lora_B["default"].weight.data[2] = 0
    peft.save_pretrained(tmp_path / "adapter")
    with pytest.raises(IncompatibleAdapter, match=r"linear\.weight: W \+ ΔW is zero in all of output feature 2"):
        merge(folder, [tmp_path / "adapter"], tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_bias_that_the_base_lacks(tmp_path: Path) -> None:
    base = mixed()
    train(base, target_modules=["linear"], lora_bias=True).save_pretrained(tmp_path / "adapter")
    base.linear.bias = None
    with pytest.raises(IncompatibleAdapter) as raised:
        merge(save_mixed(tmp_path / "base", base), [tmp_path / "adapter"], tmp_path / "ours")
    assert raised.value.problems == (
        "linear: trained with a bias, and the base has no linear.bias with 7 numbers to add it to; found none",
    )


def test_grouped_convolutions_are_refused_as_in_peft(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Conv2d(8, 8, 3, groups=4))
    peft = train(base, target_modules=["0"])
    peft.save_pretrained(tmp_path / "adapter")
    with pytest.raises(NotImplementedError, match="groups > 1"):
        peft.merge_and_unload()
    with pytest.raises(BadFile) as raised:
        merge(save_mixed(tmp_path / "base", base), [tmp_path / "adapter"], tmp_path / "ours")
    assert "a convolution with 4 groups, which cannot be merged" in raised.value.problems[0]


def test_half_of_a_tensor_trained_whole(tmp_path: Path) -> None:
    base = mixed()
    folder = save_mixed(tmp_path / "base", base)
    train(base, target_modules=["linear"], modules_to_save=["score"]).save_pretrained(tmp_path / "adapter")
    with pytest.raises(IncompatibleAdapter) as raised:
        merge(folder, [tmp_path / "adapter"], tmp_path / "ours", weights=[0.5])
    assert raised.value.problems == (
        "score.bias: trained whole in adapter 1, which cannot have the weight 0.5",
        "score.weight: trained whole in adapter 1, which cannot have the weight 0.5",
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_a_fused_projection_and_a_part_of_it(settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    """One adapter trained on qkv_proj, another on q_proj: they share rows, and what they add to them."""
    base = FAMILIES["phi3"].build().to(dtype)
    base.save_pretrained(tmp_path / "base")
    train(base, 1, target_modules=["qkv_proj"], **settings).save_pretrained(tmp_path / "fused")
    tensors = load_file(tmp_path / "fused" / "adapter_model.safetensors")
    (tmp_path / "split").mkdir()
    rows = slice(0, 32)
    split = {
        name.replace("qkv_proj", "q_proj"): -0.5 * W[rows] if "lora_B" in name else W.clone()
        for name, W in tensors.items()
        if "magnitude" not in name
    }
    save_file({name: W.contiguous() for name, W in split.items()}, tmp_path / "split" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 10, "target_modules": ["q_proj"]}
    (tmp_path / "split" / "adapter_config.json").write_text(json.dumps(config))
    merge(tmp_path / "base", [tmp_path / "fused", tmp_path / "split"], tmp_path / "ours")
    ours, before = load(tmp_path / "ours"), load(tmp_path / "base")
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.qkv_proj"
        A, B = (tensors[f"base_model.model.{name}.lora_{factor}.weight"].double() for factor in "AB")
        W = before[f"{name}.weight"].double() + 2.5 * B @ A
        if settings:
            m = tensors[f"base_model.model.{name}.lora_magnitude_vector"].double()
            W *= (m / W.norm(dim=1))[:, None]
        W[rows] -= 0.5 * 2.5 * B[rows] @ A
        off = ours[f"{name}.weight"] != W.to(dtype)
        assert int(off.sum()) <= (2 if dtype == torch.bfloat16 else off.numel())
        assert difference(ours[f"{name}.weight"].float(), W.float()) <= (2**-8 if dtype == torch.bfloat16 else 1e-6)
    assert verify(tmp_path / "ours", tmp_path / "base", [tmp_path / "fused", tmp_path / "split"]).ok
    assert verify(tmp_path / "ours", tmp_path / "base", [tmp_path / "fused", tmp_path / "split"], exact=True).ok


def test_trained_biases_under_their_older_name(tmp_path: Path) -> None:
    """PEFT once wrote `linear.bias`, where it now writes `linear.base_layer.bias`; both take the bias's place."""
    base = mixed()
    folder = save_mixed(tmp_path / "base", base)
    train(base, target_modules=["linear", "conv1"], bias="lora_only").save_pretrained(tmp_path / "adapter")
    merge(folder, [tmp_path / "adapter"], tmp_path / "new")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    assert sum(name.endswith(".base_layer.bias") for name in tensors) == 2
    save_file({name.replace(".base_layer.bias", ".bias"): W for name, W in tensors.items()}, file, {"format": "pt"})
    report = merge(folder, [tmp_path / "adapter"], tmp_path / "old")
    assert (report.consumed[0].applied, report.consumed[0].replaced) == (4, 2)
    new, old = load(tmp_path / "new"), load(tmp_path / "old")
    assert all(torch.equal(new[name], old[name]) for name in new)
    assert torch.equal(new["linear.bias"], tensors["base_model.model.linear.base_layer.bias"])
