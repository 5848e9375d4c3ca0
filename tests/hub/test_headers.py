"""`inspect` and the schema hash of what is on the Hub, from headers alone: what is moved, and that it is the same."""

import json
from pathlib import Path
from typing import Any

import pytest

from loratools.errors import BadFile, HubError
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.header import read_header
from loratools.storage.sources import local
from loratools.surgery.inspect import AdapterSummary, CheckpointSummary, inspect
from tests.hub.server import LocalHub
from tests.hub.server.sample import safetensors
from tests.hub.trips import REPO, stored

ADAPTER = f"hf://{REPO}"


def lora(layers: int) -> dict[str, bytes]:
    """Return an adapter as PEFT writes it, with F32 factors of some size for `layers` layers."""
    import torch
    from safetensors.torch import save

    tensors = {}
    for layer in range(layers):
        for target in ("q_proj", "k_proj", "v_proj", "o_proj"):
            name = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            tensors[f"{name}.lora_A.weight"] = torch.zeros(4, 256)
            tensors[f"{name}.lora_B.weight"] = torch.zeros(256, 4)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "lab/base", "r": 4, "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    }  # fmt: skip
    return {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": save(tensors, {"format": "pt"}),
        "README.md": b"# long\n" * 30_000,
        "tokenizer.json": b"{}" + b" " * 500_000,
    }


@pytest.mark.parametrize(("layers", "requests"), [(20, 1), (72, 2)])
def test_inspect_moves_the_header_and_no_more(hub: LocalHub, layers: int, requests: int) -> None:
    files = lora(layers)
    hub.seed(REPO, files)
    length = 8 + int.from_bytes(files["adapter_model.safetensors"][:8], "little")
    assert length < 100_000
    summary = inspect(local(ADAPTER, need="header"))
    assert isinstance(summary, AdapterSummary)
    assert len(summary.modules) == 4 * layers
    assert summary.total.nbytes == layers * 4 * 2 * 4 * 256 * 4
    moved = sum(entry.bytes_in + entry.bytes_out for entry in hub.log.select())
    assert moved <= 101_000
    assert moved <= max(length, 65_536) + 3_000
    ranges = [entry.range for entry in hub.log.select("GET", origin="cdn")]
    assert ranges == ["bytes=0-65535", f"bytes=65536-{length - 1}"][:requests]
    assert hub.log.leaks() == []


def test_inspect_of_a_model_is_that_of_the_local_one(hub: LocalHub, workplace: Path) -> None:
    stored(hub, workplace / "base", "lab/base")
    ours, theirs = inspect(workplace / "base"), inspect(local("hf://lab/base", need="header"))
    assert isinstance(ours, CheckpointSummary)
    assert isinstance(theirs, CheckpointSummary)
    assert (theirs.schema, theirs.total, theirs.shards) == (ours.schema, ours.total, ours.shards)
    assert (theirs.architecture, theirs.tensors) == (ours.architecture, ours.tensors)


def test_a_pipeline(hub: LocalHub) -> None:
    weights = safetensors({"conv.weight": 20_000})
    hub.seed(
        REPO,
        {
            "model_index.json": b'{"_class_name": "P", "unet": ["d", "U"], "safety": [null, null], "tok": ["t", "T"]}',
            "unet/diffusion_pytorch_model.safetensors": weights,
            "unet/diffusion_pytorch_model.fp16.safetensors": weights,
            "unet/config.json": b"{}",
            "tok/vocab.json": b"{}",
            "safety/model.safetensors": weights,
            "single.safetensors": weights,
        },
    )
    path = local(ADAPTER, need="header")
    assert list(Checkpoint.open(path).specs) == ["unet.conv.weight"]
    assert len(hub.log.select("GET", origin="cdn")) == 1


def test_one_file_of_several(hub: LocalHub) -> None:
    files = lora(2)
    hub.seed(REPO, {"a/" + name: data for name, data in files.items()} | {"b.safetensors": safetensors({"x": 3})})
    path = local(f"{ADAPTER}/a/adapter_model.safetensors", need="header")
    assert len(read_header(path).tensors) == 16
    assert isinstance(inspect(path), AdapterSummary)


@pytest.mark.parametrize(
    "fault",
    [{"status": 503}, {"cut_after": 100}, {"lose_reply": True}, {"status": 429, "headers": {"Retry-After": "1"}}],
    ids=["503", "cut", "no answer", "429"],
)
@pytest.mark.parametrize(
    "kind", ["/api/models/[^/]+/[^/]+$", "/tree/", "adapter_config", r"resolve.*safetensors", "objects"]
)
def test_faults_that_pass(hub: LocalHub, naps: list[float], kind: str, fault: dict[str, Any]) -> None:
    hub.seed(REPO, lora(2))
    armed = hub.faults.add("GET", kind, times=2, **fault)
    assert isinstance(inspect(local(ADAPTER, need="header")), AdapterSummary)
    assert armed.hits == 2


def test_a_whole_file_in_answer_to_a_range_is_not_read_to_its_end(hub: LocalHub) -> None:
    files = {**lora(1), "adapter_model.safetensors": safetensors({"x.lora_A.weight": 4_000_000})}
    hub.seed(REPO, files)
    hub.faults.add("GET", "/objects/", ignore_range=True)
    path = local(ADAPTER, need="header")
    assert read_header(path / "adapter_model.safetensors").tensors["x.lora_A.weight"].shape == (4_000_000,)
    assert hub.log.bytes_out("GET", "/objects/") < 8_000_000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff" * 8 + b"{}", "not a safetensors file, or truncated"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git-LFS pointer"),
        (safetensors({"x": 10})[:-1], "truncated"),
        (b"", "found 0 bytes"),
    ],
)
def test_a_file_that_is_no_safetensors_file(hub: LocalHub, data: bytes, message: str) -> None:
    hub.seed(REPO, {**lora(1), "adapter_model.safetensors": data})
    with pytest.raises(BadFile, match=message):
        read_header(local(ADAPTER, need="header") / "adapter_model.safetensors")


def test_pickles_have_no_header(hub: LocalHub) -> None:
    files = lora(1)
    del files["adapter_model.safetensors"]
    hub.seed(REPO, {**files, "adapter_model.bin": b"PK"})
    with pytest.raises(BadFile, match=r"adapter_model.bin has no header") as caught:
        local(ADAPTER, need="header")
    assert f"loratools pull {REPO}" in str(caught.value.hint)


def test_an_index_that_leads_out_of_the_folder(hub: LocalHub) -> None:
    index = {"weight_map": {"x": "../../etc/passwd"}}
    hub.seed(
        REPO,
        {
            "config.json": b"{}",
            "model.safetensors.index.json": json.dumps(index).encode(),
            "model-00001-of-00001.safetensors": b"x",
        },
    )
    with pytest.raises(BadFile, match="do not belong together") as caught:
        local(ADAPTER, need="checkpoint")
    assert any("leads out of the folder" in problem for problem in caught.value.problems)


def test_an_existing_local_path_wins(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf:" / "tester" / "sent").mkdir(parents=True)
    assert local(ADAPTER) == Path("hf:/tester/sent")
    assert local(tmp_path) == tmp_path
    assert local("not/there") == Path("not/there")
    assert hub.log.select() == []


def test_the_cache_is_used_again_and_offline(hub: LocalHub, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    stored(hub, workplace / "adapter", REPO)
    first = local(ADAPTER)
    hub.log.clear()
    assert local(ADAPTER) == first
    assert hub.log.select("GET", "resolve|objects") == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert local(ADAPTER) == first
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, and the cache does not hold it"):
        local("hf://lab/other")
