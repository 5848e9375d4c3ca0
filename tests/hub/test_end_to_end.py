"""From a base on the Hub to a merged model on the Hub: trained live, pushed, pulled elsewhere, merged, verified."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import loratools
from loratools import live
from loratools.adapter.naming.image import families
from loratools.errors import BadFile, LoraToolsError
from tests.hub.server import LocalHub
from tests.hub.server import card as the_hubs
from tests.hub.trips import contents
from tests.make import gguf_models, tiny

FIELDS = frozenset((
    "language", "license", "license_name", "license_link", "library_name", "tags", "datasets", "metrics",
    "base_model", "base_model_relation", "pipeline_tag", "thumbnail", "widget", "inference", "model-index",
    "new_version",
))  # fmt: skip
"""Fields of a model card that the Hub documents."""


def fields_of(hub: LocalHub, repo: str) -> dict[str, Any]:
    """Return the fields of a repository's card as huggingface_hub reads them, checked as the Hub checks them."""
    text = hub.files(repo)["README.md"].decode()
    assert the_hubs.check(text) == ([], [])
    fields: dict[str, Any] = ModelCard(text, ignore_metadata_errors=False).data.to_dict()
    assert fields.keys() <= FIELDS
    return fields


def stated(fields: dict[str, Any], *names: str) -> tuple[Any, ...]:
    """Return fields of a card, None for one that is not there."""
    return tuple(fields.get(name) for name in names)


def test_train_push_pull_merge_verify(hub: LocalHub, workplace: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    base = contents(workplace / "base")
    hub.seed(
        "lab/base", {**base, "README.md": b"---\nlicense: apache-2.0\npipeline_tag: text-generation\n---\n# Base\n"}
    )
    model = transformers.AutoModelForCausalLM.from_pretrained("lab/base", dtype=torch.float32)
    tokens = torch.randint(0, model.config.vocab_size, (4, 16), generator=torch.Generator().manual_seed(0))
    lora = live.attach(model, rank=4, alpha=8, targets=["q_proj", "v_proj"], seed=0)
    optimizer = torch.optim.AdamW(lora.parameters(), lr=2e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    saved = lora.save(tmp_path / "trained")
    assert saved.base is not None
    assert saved.base.id == "lab/base"
    with torch.no_grad():
        trained = model(input_ids=tokens).logits

    loratools.push(tmp_path / "trained", "lab/trained")
    files = hub.files("lab/trained")
    assert files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "lab/base"
    told = stated(fields_of(hub, "lab/trained"), "base_model", "library_name", "license", "pipeline_tag")
    assert told == ("lab/base", "peft", "apache-2.0", "text-generation")
    assert str(tmp_path) not in json.dumps({name: data.decode(errors="replace") for name, data in files.items()})

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    pulled = loratools.pull("lab/trained", elsewhere / "adapter")
    assert pulled.base is not None
    assert pulled.base.id == "lab/base"
    report = loratools.merge("hf://lab/base", elsewhere / "adapter", elsewhere / "merged", dtype="f32")
    assert report.verified == len(saved.updates)
    assert loratools.verify(elsewhere / "merged", "hf://lab/base", "hf://lab/trained").ok
    merged = transformers.AutoModelForCausalLM.from_pretrained(elsewhere / "merged", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=tokens).logits, trained, rtol=1e-4, atol=1e-5)
    fresh = transformers.AutoModelForCausalLM.from_pretrained("lab/base", dtype=torch.float32)
    with torch.no_grad():
        through_peft = peft.PeftModel.from_pretrained(fresh, elsewhere / "adapter")(input_ids=tokens).logits
    torch.testing.assert_close(through_peft, trained, rtol=1e-4, atol=1e-5)

    loratools.push(elsewhere / "merged", "lab/merged")
    told = stated(fields_of(hub, "lab/merged"), "base_model", "library_name", "license", "pipeline_tag")
    assert told == ("lab/base", "transformers", "apache-2.0", "text-generation")
    sent = hub.files("lab/merged")
    assert sent.keys() == contents(elsewhere / "merged").keys()
    again = loratools.pull("lab/merged", elsewhere / "again")
    assert again.commit
    back = loratools.unmerge(elsewhere / "again", "hf://lab/trained", elsewhere / "back", base="hf://lab/base")
    assert back.proved == "tensor digests"
    for name, W in load_file(workplace / "base" / "model-00001-of-00002.safetensors").items():
        assert torch.equal(load_file(elsewhere / "back" / "model-00001-of-00002.safetensors")[name], W)


@pytest.mark.parametrize("where", ["weights", "config"])
def test_an_adapter_whose_seal_does_not_hold_is_not_pushed(hub: LocalHub, workplace: Path, where: str) -> None:
    folder = workplace / "sealed"
    if where == "weights":
        path = folder / "adapter_model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))
    else:
        path = folder / "adapter_config.json"
        config: dict[str, Any] = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "lora_alpha": 9}))
    hub.log.clear()
    with pytest.raises(BadFile):
        loratools.push(folder, "lab/broken")
    assert hub.log.select() == []


def image_model(folder: Path) -> Path:
    """Write a model of SDXL's names in one file, with a VAE, and an adapter of kohya's for it; return the model."""
    names = [name.replace("{}", "0") for name in families.get("sdxl").original]
    generator = torch.Generator().manual_seed(0)
    weights = {f"model.diffusion_model.{name}.weight": torch.randn(8, 8, generator=generator) for name in names}
    save_file(weights | {"first_stage_model.decoder.conv_in.weight": torch.zeros(2, 2)}, folder / "sdxl.safetensors",
              {"modelspec.title": "Dawn", "modelspec.hash_sha256": "0x1"})  # fmt: skip
    flat = names[0].replace(".", "_")
    factors = {
        f"lora_unet_{flat}.lora_{part}.weight": torch.randn(shape, generator=generator)
        for part, shape in (("down", (2, 8)), ("up", (8, 2)))
    }
    save_file(factors | {f"lora_unet_{flat}.alpha": torch.tensor(2.0)}, folder / "style.safetensors")
    return folder / "sdxl.safetensors"


def test_a_model_in_one_file_is_pushed_and_comes_back(hub: LocalHub, tmp_path: Path) -> None:
    base = image_model(tmp_path)
    hub.seed("lab/xl", {"sdxl.safetensors": base.read_bytes(), "README.md": b"---\nlicense: openrail\n---\n"})
    loratools.push(tmp_path / "style.safetensors", "lab/style", base_model="lab/xl")
    assert hub.files("lab/style").keys() == {"style.safetensors", "README.md"}
    merged = tmp_path / "merged.safetensors"
    loratools.merge("hf://lab/xl/sdxl.safetensors", "hf://lab/style", merged, keep_residual=True)
    loratools.push(merged, "lab/merged", base_model="lab/xl")
    assert hub.files("lab/merged").keys() == {"merged.safetensors", "README.md"}
    told = stated(fields_of(hub, "lab/merged"), "base_model", "base_model_relation", "library_name", "license")
    assert told == ("lab/xl", "finetune", "diffusion-single-file", "openrail")
    card = hub.files("lab/merged")["README.md"].decode()
    assert "hf download lab/merged merged.safetensors --local-dir ComfyUI/models/checkpoints" in card
    for place in ("hf://lab/merged", "hf://lab/merged/merged.safetensors"):
        assert loratools.verify(place, base, tmp_path / "style.safetensors").ok
    loratools.pull("lab/merged", tmp_path / "down")
    assert (tmp_path / "down" / "merged.safetensors").read_bytes() == merged.read_bytes()
    with safe_open(tmp_path / "down" / "merged.safetensors", "pt") as file:
        assert file.metadata()["modelspec.title"] == "Dawn"
    report = loratools.unmerge(merged, tmp_path / "style.safetensors", tmp_path / "back.safetensors")
    assert report.proved == "root hash"


@pytest.mark.parametrize("output", ["merged.safetensors", None])
def test_a_file_is_sent_while_it_is_made(
    hub: LocalHub, tmp_path: Path, shell: Callable[..., Any], output: str | None
) -> None:
    base = image_model(tmp_path)
    where = f"-o {output}" if output else "--no-local"
    command = f"loratools merge {base.name} style.safetensors {where} --push lab/merged --base-model lab/xl"
    done = shell(command, tmp_path, HF_ENDPOINT=hub.endpoint, HF_TOKEN=hub.token, HF_HUB_DISABLE_XET="1")
    assert done.code == 0, done.err
    sent = hub.files("lab/merged")
    if output:
        assert sent.keys() == {output, "README.md"}
        assert sent[output] == (tmp_path / output).read_bytes()
    else:
        assert sent.keys() == {base.name, "loratools.json", "README.md"}
    assert fields_of(hub, "lab/merged")["library_name"] == "diffusion-single-file"


def test_gguf_files_are_pushed(hub: LocalHub, workplace: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = gguf_models.save_llama(tmp_path / "model.gguf", tiny.llama_weights(), "F16")
    loratools.push(model, "lab/model", license="mit")
    assert hub.files("lab/model").keys() == {"model.gguf", "README.md"}
    assert "llama-cli -hf lab/model -hff model.gguf" in hub.files("lab/model")["README.md"].decode()
    assert "library_name" not in fields_of(hub, "lab/model")
    adapter = tmp_path / "adapter.gguf"
    loratools.convert(workplace / "adapter", adapter, to="gguf", base=model)
    loratools.push(adapter, "lab/adapter", base_model="lab/base", license="mit")
    assert hub.files("lab/adapter").keys() == {"adapter.gguf", "README.md"}
    assert fields_of(hub, "lab/adapter")["base_model"] == "lab/base"
    loratools.pull("lab/adapter", tmp_path / "down")
    assert (tmp_path / "down" / "adapter.gguf").read_bytes() == adapter.read_bytes()


def test_a_pickle_and_a_stranger_are_not_pushed(hub: LocalHub, tmp_path: Path) -> None:
    torch.save({"model.norm.weight": torch.ones(2)}, tmp_path / "model.ckpt")
    (tmp_path / "notes.txt").write_text("no tensors")
    hub.log.clear()
    with pytest.raises(BadFile, match="can run code") as caught:
        loratools.push(tmp_path / "model.ckpt", "lab/model")
    assert "safetensors" in str(caught.value.hint)
    with pytest.raises(LoraToolsError):
        loratools.push(tmp_path / "notes.txt", "lab/model")
    assert hub.log.select() == []
