"""PEFT loads what we write, and computes the formulas that the specification states."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from loratools.adapter.model import Adapter
from loratools.dialects import open_adapter
from loratools.format import keys, reader, validate, writer
from loratools.storage.header import read_header
from loratools.storage.lazy import LazyTensor
from tests import spec

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

CONFIGS: dict[str, dict[str, Any]] = {
    "list": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "rank_pattern": {"down_proj": 3}},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "o_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 7},
        "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 40, "o_proj": 3},
    },
    "head saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, num_key_value_heads=2, tie_word_embeddings=False, **sizes)
    ).eval()


def randomized(model: Any) -> Any:
    """Give all trained tensors random values, as if they had been trained."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def opened(folder: Path) -> Adapter:
    """Read PEFT's folder; tensors trained whole are set aside from the dialect, and put back as replacements."""
    file = folder / "adapter_model.safetensors"
    paths = {name: pair[0] for name in load_file(file) if (pair := keys.split(name)) and not pair[1]}
    aside = Path(shutil.copytree(folder, folder.with_name("aside")))
    rest = {name: value for name, value in load_file(file).items() if name not in paths}
    save_file(rest, aside / file.name, {"format": "pt"})
    config = json.loads((aside / "adapter_config.json").read_text()) | {"modules_to_save": None}
    (aside / "adapter_config.json").write_text(json.dumps(config))
    specs = read_header(file).tensors
    whole = {path: LazyTensor.stored(specs[name]) for name, path in paths.items()}
    return replace(open_adapter(aside), replacements=whole)


@pytest.mark.parametrize("label", CONFIGS)
def test_logits_are_those_of_the_original(label: str, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    model = randomized(get_peft_model(llama(), LoraConfig(r=4, lora_alpha=10, task_type="CAUSAL_LM", **CONFIGS[label])))
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        wanted = model(tokens).logits
    model.save_pretrained(tmp_path / "peft")
    writer.write(opened(tmp_path / "peft"), tmp_path / "sealed")
    assert validate.validate(tmp_path / "sealed") == []
    with torch.no_grad():
        found = PeftModel.from_pretrained(llama(), tmp_path / "sealed").eval()(tokens).logits
        plain = llama()(tokens).logits
    assert torch.equal(found, wanted)
    assert not torch.allclose(plain, wanted, atol=1e-2)
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("sealed", "peft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class Toy(nn.Module):
    """One layer of each sort."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 6)
        self.embedding = nn.Embedding(9, 6)
        self.conv = nn.Conv2d(3, 4, (2, 3))
        self.conv1d = nn.Conv1d(3, 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


LAYERS = ["linear", "embedding", "conv", "conv1d"]


def parts_of(model: Any, layer: str) -> dict[str, tuple[str, list[int], bytes]]:
    """Return the parts of a layer as the second reader takes them, in binary64."""
    from peft import get_peft_model_state_dict

    return {
        name.partition(f"{layer}.")[2]: ("F64", list(value.shape), value.double().numpy().tobytes())
        for name, value in get_peft_model_state_dict(model).items()
    }


@pytest.mark.parametrize("layer", LAYERS)
def test_formulas_of_the_delta_weight(layer: str) -> None:
    from peft import LoraConfig, get_peft_model
    from updates import delta_weight, fits

    model = randomized(get_peft_model(Toy(), LoraConfig(r=2, lora_alpha=3, target_modules=[layer])))
    parts = parts_of(model, layer)
    kind = {"linear": "lora", "embedding": "embedding"}.get(layer, "conv")
    entry = {"kind": kind, "rank": 2, "alpha": 3, "scaling": 1.5}
    assert fits(entry, {part: shape for part, (_, shape, _) in parts.items()})
    wanted = getattr(model.base_model.model, layer).get_delta_weight("default")
    found = torch.tensor(delta_weight(entry, parts), dtype=torch.float64)
    assert found.shape == wanted.shape
    assert torch.allclose(found, wanted.detach().double(), atol=1e-6)


@pytest.mark.parametrize("layer", ["linear", "embedding", "conv"])
def test_formula_of_dora(layer: str) -> None:
    from peft import LoraConfig, get_peft_model
    from updates import delta_weight, fits

    base = Toy()
    W = getattr(base, layer).weight.detach().double().clone()
    model = randomized(get_peft_model(base, LoraConfig(r=2, lora_alpha=3, target_modules=[layer], use_dora=True)))
    parts = parts_of(model, layer)
    entry = {"kind": "dora", "rank": 2, "alpha": 3, "scaling": 1.5}
    assert fits(entry, {part: shape for part, (_, shape, _) in parts.items()})
    whole = W + torch.tensor(delta_weight(entry, parts), dtype=torch.float64)
    m = torch.frombuffer(bytearray(parts["lora_magnitude_vector"][2]), dtype=torch.float64)
    by_output = whole.T if layer == "embedding" else whole.flatten(1)
    found = m[:, None] * by_output / by_output.norm(dim=1, keepdim=True)
    found = found.T if layer == "embedding" else found.view_as(W)
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.allclose(found, getattr(merged, layer).weight.detach().double(), atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_formula_of_stacked_experts(transposed: bool) -> None:
    from peft import LoraConfig, get_peft_model
    from updates import delta_weight, fits

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.is_transposed = transposed
            self.down = nn.Parameter(torch.randn(3, 4, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = Experts()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.experts(x)

    config = LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=["experts.down"])
    model = randomized(get_peft_model(Model(), config))
    parts = parts_of(model, "experts")
    layout = {"experts": 3, "parameter": "down", "transposed": transposed}
    entry = {"kind": "experts", "rank": 2, "alpha": 3, "scaling": 1.5, "layout": layout}
    assert fits(entry, {part: shape for part, (_, shape, _) in parts.items()})
    wanted = model.base_model.model.experts.get_delta_weight("default").detach().double()
    found = torch.tensor(delta_weight(entry, parts), dtype=torch.float64)
    assert found.shape == (3, 4, 5)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_peft_loads_the_vectors_of_its_kinds_and_refuses_the_others() -> None:
    from peft import LoraConfig

    for name in spec.cases("valid"):
        path = spec.adapter_of("valid", name)
        if not path.is_dir():
            continue
        if json.loads((path / "adapter_config.json").read_text())["peft_type"] != "LORA":
            with pytest.raises(KeyError, match="LORATOOLS"):
                LoraConfig.from_pretrained(str(path))
        else:
            assert LoraConfig.from_pretrained(str(path)).r == reader_rank(path)


def reader_rank(path: Path) -> int:
    subject = validate.open_subject(path)
    assert not isinstance(subject, validate.Problem)
    return int(subject.manifest["rank"])


def test_second_write_is_the_first(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = randomized(get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"])))
    model.save_pretrained(tmp_path / "peft")
    first = writer.write(open_adapter(tmp_path / "peft"), tmp_path / "one")
    assert writer.write(reader.read(tmp_path / "one"), tmp_path / "two") == first
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
