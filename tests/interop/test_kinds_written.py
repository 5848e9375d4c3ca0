"""Adapters of every kind, written in PEFT's dialect and in our own: PEFT loads them and merges the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loratools import dialects
from loratools.errors import LossyConversion
from loratools.surgery.convert import convert
from loratools.surgery.merge import merge
from loratools.surgery.validate import validate
from tests.interop.models import FAMILIES, load, merge_by_peft
from tests.interop.test_kinds import MIXED, difference, mixed, save_mixed, train

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("dialect", ["peft", "loratools"])
@pytest.mark.parametrize("name", sorted(MIXED))
def test_every_kind_is_written_as_it_was_read(name: str, dialect: str, tmp_path: Path) -> None:
    base = mixed()
    folder = save_mixed(tmp_path / "base", base)
    train(base, **MIXED[name][0]).save_pretrained(tmp_path / "adapter")
    theirs = merge_by_peft(base, tmp_path / "adapter").state_dict()
    convert(tmp_path / "adapter", tmp_path / "written", to=dialect, base=folder, allow_loss=True)
    before, after = (
        load_file(tmp_path / tensor_name / "adapter_model.safetensors") for tensor_name in ("adapter", "written")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[part], after[part]) for part in before)
    again = merge_by_peft(base, tmp_path / "written").state_dict()
    assert all(torch.equal(theirs[tensor_name], again[tensor_name]) for tensor_name in theirs)
    merge(folder, [tmp_path / "adapter"], tmp_path / "one")
    merge(folder, [tmp_path / "written"], tmp_path / "other")
    tensor_name, other = load(tmp_path / "one"), load(tmp_path / "other")
    assert all(torch.equal(tensor_name[tensor], other[tensor]) for tensor in tensor_name)


SAVED: dict[str, dict[str, Any]] = {
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 2], "lm_head": [9]}},
    "rows-of-a-list": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 2]},
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "copies": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "dora": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
}


@pytest.mark.parametrize("name", sorted(SAVED))
def test_what_peft_loads_again(name: str, tmp_path: Path) -> None:
    base = FAMILIES["llama"].build()
    base.save_pretrained(tmp_path / "base")
    train(base, **SAVED[name]).save_pretrained(tmp_path / "adapter")
    adapter = dialects.open_adapter(tmp_path / "adapter")
    dialects.save_adapter(adapter, tmp_path / "written", dialect="peft")
    theirs, again = (merge_by_peft(base, tmp_path / tensor_name).state_dict() for tensor_name in ("adapter", "written"))
    assert max(difference(again[tensor_name], theirs[tensor_name]) for tensor_name in theirs) == 0


@pytest.mark.parametrize("name", ["rows", "rows-of-a-list"])
def test_rows_are_sealed_and_peft_loads_them(name: str, tmp_path: Path) -> None:
    base = FAMILIES["llama"].build()
    base.save_pretrained(tmp_path / "base")
    train(base, **SAVED[name]).save_pretrained(tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "sealed", base=tmp_path / "base")
    assert validate(tmp_path / "sealed", tmp_path / "base").valid
    theirs, again = (merge_by_peft(base, tmp_path / folder).state_dict() for folder in ("adapter", "sealed"))
    assert max(difference(again[tensor], theirs[tensor]) for tensor in theirs) == 0
    merge(tmp_path / "base", [tmp_path / "sealed"], tmp_path / "merged")
    ours = load(tmp_path / "merged")
    assert max(difference(ours[tensor], theirs[tensor]) for tensor in ours) <= 1e-6


def mixture(architecture: str) -> Any:
    """Build a small mixture of experts whose stacks lie (out, in), or (in, out) and square, as those of gpt-oss."""
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8,
        "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 2,
    }  # fmt: skip
    sizes |= {"num_local_experts": 4} if architecture == "GptOss" else {"num_experts": 4, "moe_intermediate_size": 12}
    sizes |= {"layer_types": ["full_attention"]} if architecture == "GptOss" else {}
    config = getattr(transformers, f"{architecture}Config")(**sizes)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


PARAMETERS: dict[str, tuple[str, list[str]]] = {
    "stacks": ("Qwen3Moe", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    "one stack": ("Qwen3Moe", ["mlp.experts.down_proj"]),
    "router": ("Qwen3Moe", ["mlp.gate.weight"]),
    "linear": ("Qwen3Moe", ["q_proj.weight"]),
    "router and stacks": ("Qwen3Moe", ["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    "stacks (in, out)": ("GptOss", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    "square stack (in, out)": ("GptOss", ["mlp.experts.down_proj"]),
}


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_target_parameters_are_sealed_and_peft_loads_them(name: str, tmp_path: Path) -> None:
    architecture, parameters = PARAMETERS[name]
    base = mixture(architecture)
    base.save_pretrained(tmp_path / "base")
    train(base, target_modules=["v_proj"], target_parameters=parameters).save_pretrained(tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "sealed", base=tmp_path / "base")
    assert validate(tmp_path / "sealed", tmp_path / "base").valid
    before, after = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("adapter", "sealed"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[part], after[part]) for part in before)
    for folder in ("adapter", "sealed"):  # saved, for transformers stores some stacks expert by expert
        merge_by_peft(base, tmp_path / folder).save_pretrained(tmp_path / f"peft-{folder}")
    theirs, again = load(tmp_path / "peft-adapter"), load(tmp_path / "peft-sealed")
    assert all(torch.equal(theirs[tensor], again[tensor]) for tensor in theirs)
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "plain")
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text().replace('"gpt_oss"', '"of_another_name"'))  # the adapter says how they lie
    merge(tmp_path / "base", [tmp_path / "sealed"], tmp_path / "merged", check_base="warn")
    plain, ours = load(tmp_path / "plain"), load(tmp_path / "merged")
    assert all(torch.equal(plain[tensor], ours[tensor]) for tensor in plain)
    assert max(difference(ours[tensor], theirs[tensor]) for tensor in ours) <= 1e-6


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens", "lm_head"]], ids=["whole", "lora"])
def test_a_resized_vocabulary_sealed_with_its_base(tied: bool, targets: list[str], tmp_path: Path) -> None:
    """The base tells that the copies in the file are none; without it that is not known, and is said."""
    base = FAMILIES["llama"].build(tie_word_embeddings=tied)
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(70)
    targets = targets[:2] if tied else targets
    train(base, target_modules=targets).save_pretrained(tmp_path / "adapter")
    if len(targets) > 1:
        with pytest.raises(LossyConversion, match=r"only the base can tell"):
            convert(tmp_path / "adapter", tmp_path / "sealed")
    convert(tmp_path / "adapter", tmp_path / "sealed", base=tmp_path / "base")
    policy = "both" if tied and len(targets) > 1 else "error"
    for name in ("adapter", "sealed"):
        merge(tmp_path / "base", [tmp_path / name], tmp_path / f"by-{name}", tied=policy)
    one, other = load(tmp_path / "by-adapter"), load(tmp_path / "by-sealed")
    assert one["model.embed_tokens.weight"].shape == (70, 32)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
