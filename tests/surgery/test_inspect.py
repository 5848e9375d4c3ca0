"""Summaries against what was written, and against the safetensors library."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from loratools import dialects
from loratools.cli._run import run
from loratools.cli._show import encode
from loratools.errors import BadFile, UnknownKind
from loratools.surgery.inspect import AdapterSummary, Amount, CheckpointSummary, Group, inspect
from tests.make import tiny


def adapter(path: Path) -> AdapterSummary:
    found = inspect(path)
    assert isinstance(found, AdapterSummary)
    return found


def checkpoint(path: Path) -> CheckpointSummary:
    found = inspect(path)
    assert isinstance(found, CheckpointSummary)
    return found


def test_adapter(prepared: Path) -> None:
    found = adapter(prepared / "adapter")
    q, v = 4 * (64 + 64), 4 * (64 + 32)
    assert found.dialect == "peft"
    assert found.groups == (Group("lora", 4, 8, 2.0, 4, ("model.layers.[0-1].self_attn.{q,v}_proj",)),)
    assert [(one.module, one.shape, one.parameters, one.nbytes) for one in found.modules] == [
        (f"model.layers.{layer}.self_attn.{name}", shape, parameters, 4 * parameters)
        for layer in (0, 1)
        for name, shape, parameters in (("q_proj", (64, 64), q), ("v_proj", (32, 64), v))
    ]
    assert found.total == Amount(8, 2 * (q + v), 8 * (q + v))
    assert found.dtypes == {"F32": found.total}
    assert found.replacements == ()
    assert found.base is not None
    assert (found.base.id, found.base.sealed) == ("tiny-llama", False)
    assert (found.digest, found.provenance) == (None, ())


def test_a_single_file_is_the_same_adapter(prepared: Path) -> None:
    folder, file = adapter(prepared / "adapter"), adapter(prepared / "adapter" / "adapter_model.safetensors")
    assert (folder.groups, folder.modules, folder.total) == (file.groups, file.modules, file.total)


def test_sealed_adapter_states_digest_and_base(prepared: Path) -> None:
    found = adapter(prepared / "sealed")
    with safe_open(prepared / "sealed" / "adapter_model.safetensors", "pt") as file:
        manifest = json.loads(file.metadata()["loratools"])
    assert found.dialect == "loratools"
    assert found.digest == manifest["digest"]
    assert found.base is not None
    stated = manifest["base_model"]["hash"]
    assert (found.base.schema, found.base.root) == (stated["schema"], stated["root"])
    assert dict(found.base.tensors) == stated["tensors"]
    assert sorted(found.base.tensors) == sorted(f"{one.module}.weight" for one in found.modules)


def test_groups_where_scaling_differs(tmp_path: Path) -> None:
    factors = tiny.lora_factors(["self_attn.q_proj", "mlp.up_proj"], rank=4)
    for layer in (0, 1):
        A, B = factors[f"model.layers.{layer}.mlp.up_proj"]
        factors[f"model.layers.{layer}.mlp.up_proj"] = torch.cat([A, A]), torch.cat([B, B], 1)
    tiny.save_peft(
        tmp_path / "a",
        factors,
        alpha=8,
        r=4,
        use_rslora=True,
        rank_pattern={"up_proj": 8},
        alpha_pattern={"0.mlp.up_proj": 2},
    )
    found = adapter(tmp_path / "a")
    expected = {
        ("lora", 4, 8, 8 / math.sqrt(4), 2, ("model.layers.[0-1].self_attn.q_proj",)),
        ("lora", 8, 2, 2 / math.sqrt(8), 1, ("model.layers.0.mlp.up_proj",)),
        ("lora", 8, 8, 8 / math.sqrt(8), 1, ("model.layers.1.mlp.up_proj",)),
    }
    assert {(g.kind, g.rank, g.alpha, g.scaling, g.modules, g.targets) for g in found.groups} == expected
    assert found.groups[0].modules == 2


def test_checkpoint(prepared: Path) -> None:
    found = checkpoint(prepared / "base")
    weights = tiny.llama_weights()
    total = Amount(len(weights), sum(W.numel() for W in weights.values()), sum(W.nbytes for W in weights.values()))
    assert (found.architecture, found.model_type, found.tied) == ("LlamaForCausalLM", "llama", False)
    assert found.total == total
    assert found.dtypes == {"BF16": total}
    assert list(found.shards) == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert sum(shard.nbytes for shard in found.shards.values()) == total.nbytes
    assert {(one.name, one.shape) for one in found.tensors} == {(name, tuple(W.shape)) for name, W in weights.items()}
    assert found.quantization is None


def test_checkpoint_of_a_bare_file(tmp_path: Path) -> None:
    save_file(
        {"w": torch.zeros(2, 3, dtype=torch.float16), "i": torch.zeros(4, dtype=torch.int8)}, tmp_path / "x.safetensors"
    )
    found = checkpoint(tmp_path / "x.safetensors")
    assert (found.architecture, found.tied, found.model_type) == (None, None, None)
    assert found.dtypes == {"F16": Amount(1, 6, 12), "I8": Amount(1, 4, 4)}
    assert found.shards == {"x.safetensors": Amount(2, 10, 16)}


def test_what_the_header_of_a_bare_file_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = {"modelspec.architecture": "stable-diffusion-xl-v1-base", "modelspec.title": "tiny"}
    for name, entries in (("x.safetensors", said), ("bare.safetensors", None)):
        save_file({"w": torch.zeros(2, 3)}, tmp_path / name, metadata=entries)
    assert checkpoint(tmp_path / "x.safetensors").architecture == "stable-diffusion-xl-v1-base"
    for arguments in (["inspect"], ["inspect", "--metadata"]):
        assert run([*arguments, str(tmp_path / "x.safetensors")]) == 0
        out = capsys.readouterr().out
        assert "architecture  stable-diffusion-xl-v1-base\n" in out
        assert ("2 entries in the header:\n" in out) == ("--metadata" in arguments)
        assert ("\n  modelspec.title = tiny\n" in out) == ("--metadata" in arguments)
        assert run([*arguments, str(tmp_path / "x.safetensors"), "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document.get("metadata") == (said if "--metadata" in arguments else None)
        assert "entries" not in document
    assert run(["inspect", "--metadata", str(tmp_path / "bare.safetensors")]) == 0
    assert "\nno entries in the header\n" in capsys.readouterr().out
    save_file({"w": torch.zeros(2, 3)}, tmp_path / "one.safetensors", metadata={"a": "b"})
    assert run(["inspect", "--metadata", str(tmp_path / "one.safetensors")]) == 0
    assert "\n1 entry in the header:\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "tensors",
    [
        {"emb_params": (4, 8)}, {"clip_l": (4, 8), "clip_g": (4, 16)}, {"<cat-toy>": (8,)},
        {"<cat-toy>": (8,), "<dog toy>": (2, 8)},
    ],
    ids=["web-ui", "sdxl", "diffusers", "several"],
)  # fmt: skip
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_an_embedding_is_no_model_and_no_adapter(
    ending: str, tensors: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    path = tmp_path / f"e.{ending}"
    state = {name: torch.ones(shape) for name, shape in tensors.items()}
    save_file(state, path) if ending == "safetensors" else torch.save(state, path)
    for read in (inspect, dialects.open_adapter):
        with pytest.raises(UnknownKind) as refusal:
            read(path)
        assert refusal.value.message == f"{path}: a textual-inversion embedding, not a LoRA"
        assert not refusal.value.problems


def test_what_only_resembles_an_embedding_is_none(tmp_path: Path) -> None:
    save_file({"clip_l": torch.ones(4, 8, 3, 3), "clip_g": torch.ones(4)}, tmp_path / "x.safetensors")
    assert checkpoint(tmp_path / "x.safetensors").total.tensors == 2


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes, 4 bits"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "gptq, 3 bits"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "of an unnamed method, 4 bits"),
        ({"quantization_config": None}, None),
    ],
)
def test_quantization_is_noted(config: dict, said: str | None, tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert checkpoint(tmp_path).quantization == said


def test_a_config_of_nonsense_does_no_harm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"w": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    nonsense = {"architectures": [{}], "model_type": [1], "tie_word_embeddings": {"a": []}, "quantization_config": [4]}
    (tmp_path / "config.json").write_text(json.dumps(nonsense))
    found = checkpoint(tmp_path)
    assert (found.architecture, found.model_type, found.tied, found.quantization) == ("{}", None, None, None)
    assert run(["inspect", str(tmp_path)]) == 0
    assert "parameters    6" in capsys.readouterr().out


def test_pipeline_components_are_prefixes(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "P", "unet": ["d", "U"], "scheduler": ["d", "S"]})
    )
    for name in ("unet", "scheduler"):
        (tmp_path / name).mkdir()
    save_file({"conv_in.weight": torch.zeros(2, 3)}, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    found = checkpoint(tmp_path)
    assert found.components == ("unet",)
    assert [one.name for one in found.tensors] == ["unet.conv_in.weight"]
    assert list(found.shards) == ["unet/diffusion_pytorch_model.safetensors"]


def test_a_pipeline_and_its_components_say_what_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
             "text_encoder": ["transformers", "CLIPTextModel"], "vae": ["diffusers", "AutoencoderKL"]}  # fmt: skip
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    stated = {"unet": {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30.0"}, "vae": {},
              "text_encoder": {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}}  # fmt: skip
    for name, config in stated.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        file = "model.safetensors" if name == "text_encoder" else "diffusion_pytorch_model.safetensors"
        save_file({"w": torch.zeros(2, 3)}, tmp_path / name / file)
    found = checkpoint(tmp_path)
    assert found.architecture == "StableDiffusionPipeline"
    assert found.classes == {"text_encoder": "CLIPTextModel", "unet": "UNet2DConditionModel"}
    assert run(["inspect", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "architecture  StableDiffusionPipeline\n" in said
    assert "components    unet (UNet2DConditionModel), text_encoder (CLIPTextModel), vae\n" in said
    assert run(["inspect", str(tmp_path), str(tmp_path / "unet"), str(tmp_path / "text_encoder")]) == 0
    lines = [line.partition(": model, ")[2].partition(",")[0] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["StableDiffusionPipeline", "UNet2DConditionModel", "CLIPTextModel"]
    assert checkpoint(tmp_path / "unet").classes == {"": "UNet2DConditionModel"}
    assert checkpoint(tmp_path / "text_encoder").classes == {}
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": None}))
    assert checkpoint(tmp_path).architecture is None


def test_the_record_of_a_merge_is_passed_on(workplace: Path) -> None:
    assert checkpoint(workplace / "base").record is None
    record = {"operation": "merge", "tool": "loratools 0.1.0", "adapters": [{"weight": 0.5}]}
    (workplace / "base" / "loratools.json").write_text(json.dumps(record))
    assert checkpoint(workplace / "base").record == record


@pytest.mark.parametrize("name", ["adapter", "sealed", "base"])
def test_summaries_are_data(name: str, prepared: Path) -> None:
    found = inspect(prepared / name)
    document = json.loads(encode({"found": found}))["found"]
    assert document["type"] == found.type
    assert document["total"]["nbytes"] == found.total.nbytes


def test_a_named_dialect_is_used(prepared: Path) -> None:
    found = inspect(prepared / "sealed", "peft")
    assert isinstance(found, AdapterSummary)
    assert (found.dialect, found.digest) == ("peft", None)
    with pytest.raises(UnknownKind, match="no dialect 'morse'"):
        inspect(prepared / "adapter", "morse")


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(BadFile, match="no model weights"):
        inspect(tmp_path)
    with pytest.raises(BadFile, match="no such file or folder"):
        inspect(tmp_path / "nowhere")


@pytest.mark.real
def test_real_adapters_and_model(real_models: Path) -> None:
    lora = adapter(real_models / "smol-lora")
    assert lora.groups == (Group("lora", 8, 16, 2.0, 60, ("model.layers.[0-29].self_attn.{q,v}_proj",)),)
    assert lora.total.parameters == 30 * 8 * (576 + 576 + 576 + 192)
    rslora = adapter(real_models / "smol-rslora")
    assert len(rslora.modules) == 210
    assert {(group.rank, group.scaling) for group in rslora.groups} == {(16, 4.0), (4, 4.0), (32, 16 / math.sqrt(32))}
    base = checkpoint(real_models / "smol-base")
    assert (base.total.parameters, base.tied, len(base.shards)) == (134_515_008, True, 5)
