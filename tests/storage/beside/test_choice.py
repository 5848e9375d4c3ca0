"""Which files of a folder are the model's: by names, as transformers and diffusers choose; and what verbs do."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loratools import dialects
from loratools.decisions import warnings_to
from loratools.errors import BadFile, LoraToolsError
from loratools.storage.beside.choice import Choice, choose
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.hash import hash_checkpoint
from loratools.surgery.inspect import inspect
from loratools.surgery.merge import merge
from loratools.surgery.verify import verify
from tests.surgery.models import load, lora, random, save_adapter, save_base

USUAL = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
OTHERS = (
    "model.fp16.safetensors",
    "model.safetensors.index.fp16.json",
    "consolidated.safetensors",
    "other.safetensors",
)
W = {"a.weight": random(8, 8), "b.weight": random(8, 8, seed=1)}


@pytest.mark.parametrize("names", [c for n in (1, 2, 3, 4) for c in combinations(USUAL, n)], ids=" ".join)
def test_it_is_what_transformers_takes(names: tuple[str, ...], tmp_path: Path) -> None:
    modeling = pytest.importorskip("transformers.modeling_utils")
    for name in (*names, *OTHERS):
        (tmp_path / name).write_text('{"metadata": {}, "weight_map": {"a": "shard.safetensors"}}')
    resolve: Any = modeling._get_resolved_checkpoint_files
    resolved, sharded = resolve(str(tmp_path), None, None, None, None, False)
    chosen = choose({*names, *OTHERS})
    assert chosen is not None
    assert (chosen.index is not None) == (sharded is not None)
    assert sharded is not None or [Path(path).name for path in resolved] == list(chosen.files)
    assert chosen.index is None or chosen.index == next(
        name for name in USUAL if name in names and name.endswith(".json")
    )


def test_what_is_stated_wins() -> None:
    names = {"model.safetensors", "mine.safetensors"}
    assert choose(names, stated="mine.safetensors") == Choice(None, ("mine.safetensors",), ("model.safetensors",))
    assert choose(names, stated="missing.safetensors") == choose(names, stated=3) == choose(names)


def test_diffusers_looks_for_the_index_first() -> None:
    stem = "diffusion_pytorch_model.safetensors"
    for diffusers in (True, False):
        names = {stem, f"{stem}.index.json", "diffusion_pytorch_model.fp16.safetensors"}
        assert choose(names, diffusers=diffusers) == Choice(f"{stem}.index.json", (), (stem,))
    both = {stem, "model.safetensors"}
    assert choose(both, diffusers=True) == Choice(None, (stem,), ("model.safetensors",))
    assert choose(both) == Choice(None, ("model.safetensors",), (stem,))


def test_nothing_usual_is_there() -> None:
    assert choose({"config.json", "adapter_model.safetensors", "optimizer.bin"}) is None
    assert choose({"x.safetensors"}) == Choice(files=("x.safetensors",))
    assert choose({"x.safetensors", "pytorch_model.bin"}) == Choice(files=("pytorch_model.bin",))
    assert choose({"model.safetensors.index.fp16.json", "s"}) == Choice(index="model.safetensors.index.fp16.json")
    numbered = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert choose(numbered) == Choice(files=tuple(numbered))
    with pytest.raises(BadFile, match="do not make up a model") as refusal:
        choose([*numbered[:2], "model-00001-of-00002.safetensors"])
    assert refusal.value.problems == (
        "model: 1 of 2 are there; missing: 2",
        "model: 2 of 3 are there; missing: 3",
        "model: files of several savings",
    )


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_adapter(tmp_path / "adapter", lora({"a": (8, 8)}))
    return save_base(tmp_path / "base", W, shards=2, model_type="llama")


def heard(run: Any) -> list[str]:
    warnings: list[str] = []
    with warnings_to(warnings.append):
        run()
    return warnings


def test_a_single_file_of_other_weights_beside_shards(sharded: Path, tmp_path: Path) -> None:
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    merge(sharded, adapter, out)
    save_file({name: torch.zeros(8, 8) for name in W}, sharded / "model.safetensors")
    save_file({name: torch.zeros(8, 8) for name in W}, out / "model.safetensors")
    verbs = (
        lambda: merge(sharded, adapter, tmp_path / "again"), lambda: verify(out, sharded, adapter),
        lambda: hash_checkpoint(sharded, "schema"), lambda: inspect(sharded),
    )  # fmt: skip
    for run in verbs:
        with pytest.raises(BadFile, match="weights of different models beside each other") as refusal:
            run()
        index = "model.safetensors.index.json: other tensors than model.safetensors, which transformers would load here"
        assert refusal.value.problems == (index,)
    assert not (tmp_path / "again").exists()
    assert Checkpoint.open(sharded / "model.safetensors.index.json").read("a.weight").equal(W["a.weight"])


@pytest.mark.parametrize("how", ["fewer", "more", "another dtype", "one bit"])
def test_any_difference_counts(how: str, sharded: Path) -> None:
    single = dict(W)
    if how == "fewer":
        del single["b.weight"]
    elif how == "more":
        single["c.weight"] = random(2, 2)
    else:
        single["b.weight"] = (
            W["b.weight"].half() if how == "another dtype" else torch.nextafter(W["b.weight"], W["a.weight"])
        )
    save_file(single, sharded / "model.safetensors")
    with pytest.raises(BadFile, match="weights of different models"):
        Checkpoint.open(sharded)


def test_the_same_weights_twice_are_read_once_and_said(sharded: Path, tmp_path: Path) -> None:
    save_file(W, sharded / "model.safetensors", {"format": "pt"})
    said = heard(lambda: merge(sharded, tmp_path / "adapter", tmp_path / "out"))
    assert said[0] == f"{sharded}: model.safetensors is read; model.safetensors.index.json holds the same tensors"
    assert "2 files stay behind" not in said[1]
    assert sorted(path.name for path in (tmp_path / "out").glob("model*")) == ["model.safetensors"]
    assert load(tmp_path / "out")["b.weight"].equal(W["b.weight"])


def test_what_was_not_looked_at_is_named(sharded: Path, tmp_path: Path) -> None:
    merge(sharded, tmp_path / "adapter", tmp_path / "out")
    (sharded / "original").mkdir()
    names = ["pytorch_model.bin", "consolidated.safetensors", "model.fp16.safetensors", "original/x.pth",
             "model-00001-of-00003.safetensors", "flax_model.msgpack", "model.gguf"]  # fmt: skip
    for name in names:
        (sharded / name).write_bytes(b"\x00")
    for run in (
        lambda: verify(tmp_path / "out", sharded, tmp_path / "adapter"),
        lambda: hash_checkpoint(sharded), lambda: inspect(sharded),
    ):  # fmt: skip
        (said,) = set(heard(run))
        assert said.startswith(f"{sharded}: 7 files that may be weights were not looked at: ")
        assert sorted(said.rpartition(": ")[2].split(", ")) == sorted(names)


def test_a_component_is_judged_like_a_folder(tmp_path: Path) -> None:
    unet = save_base(tmp_path / "pipe" / "unet", W)
    (unet / "model.safetensors").rename(unet / "diffusion_pytorch_model.safetensors")
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet"]}))
    save_file(W, unet / "diffusion_pytorch_model.fp16.safetensors")
    (tmp_path / "pipe" / "sd.safetensors").write_bytes(b"\x00")
    (said,) = heard(lambda: hash_checkpoint(tmp_path / "pipe", "schema"))
    assert said.endswith("2 files that may be weights were not looked at: sd.safetensors, "
                         "unet/diffusion_pytorch_model.fp16.safetensors")  # fmt: skip
    save_file({"a.weight": torch.zeros(8, 8)}, unet / "model.safetensors")
    with pytest.raises(BadFile, match="weights of different models"):
        Checkpoint.open(tmp_path / "pipe")


@pytest.mark.parametrize(
    "link",
    [
        "model.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "model_index.json",
        "model-00001-of-00002.safetensors",
    ],
)
def test_links_that_lead_elsewhere_are_refused(link: str, sharded: Path, tmp_path: Path) -> None:
    (sharded / link).unlink(missing_ok=True)
    (tmp_path / "elsewhere").write_text("{}")
    (sharded / link).symlink_to("../elsewhere")
    with pytest.raises(BadFile, match=r"leads? out of it") as refusal:
        hash_checkpoint(sharded)
    assert refusal.value.problems == (f"{sharded / link}: leads to {tmp_path / 'elsewhere'}",)


def test_a_linked_component(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet"]}))
    (tmp_path / "pipe" / "unet").symlink_to(sharded)
    with pytest.raises(BadFile, match=r"leads? out of it"):
        Checkpoint.open(tmp_path / "pipe")


def test_a_gguf_file_is_given_by_its_own_path(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(32))
    with pytest.raises(BadFile, match="no model weights") as refusal:
        Checkpoint.open(tmp_path)
    assert refusal.value.hint == "A GGUF model is given by the path of its file."
    with pytest.raises(BadFile, match="no tensors in it"):
        Checkpoint.open(tmp_path / "model.gguf")


def test_adapters_beside_each_other(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", lora({"a": (8, 8)}))
    tensors = load(folder)
    for name in ("adapter_model.bin", "stray.npz", "optimizer.pt"):
        (folder / name).write_bytes(b"\x00")
    (said,) = heard(lambda: dialects.open_adapter(folder))
    shown = "adapter_model.bin, stray.npz"
    assert said == f"{folder}: adapter_model.safetensors is read; not looked at: {shown}"
    shard = folder / "adapter_model-00001-of-00001.safetensors"
    save_file(tensors, shard)
    dialects.open_adapter(folder)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, shard)
    with pytest.raises(BadFile, match="two adapters in one folder"):
        dialects.open_adapter(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_links_in_an_adapter(name: str, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", lora({"a": (8, 8)}))
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LoraToolsError, match=r"leads? out of it"):
        dialects.open_adapter(folder)
