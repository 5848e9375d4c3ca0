"""Checkpoints in every shape they come in, and each single fault of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratools.errors import BadFile, UnsupportedAdapter
from loratools.storage import files
from loratools.storage.checkpoint import Checkpoint, is_weights

INDEX = "model.safetensors.index.json"


def weights(count: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layers.{i}.weight": torch.randn(3, 4, generator=generator).bfloat16() for i in range(count)}


def shards(folder: Path, tensors: Mapping[str, torch.Tensor], ending: str = "safetensors", stem: str = "model") -> Path:
    """Two shards and an index, as transformers writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    weight_map = {}
    for i, part in enumerate((names[:2], names[2:]), 1):
        file = f"{stem}-{i:05d}-of-00002.{ending}"
        state = {name: tensors[name] for name in part}
        if ending == "bin":
            torch.save(state, folder / file)
        else:
            save_file(state, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def edit(path: Path, change: Callable[[dict[str, str]], object]) -> None:
    document = json.loads(path.read_text())
    change(document["weight_map"])
    path.write_text(json.dumps(document))


def same(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor], prefix: str = "") -> None:
    assert set(checkpoint.specs) == {prefix + name for name in tensors}
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(prefix + name), tensor)
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    inside = [name for shard in checkpoint.shards for name in shard.tensors]
    assert sorted(inside) == sorted(checkpoint.specs)


def refusal(path: Path, match: str) -> BadFile:
    with pytest.raises(BadFile, match=match) as caught:
        Checkpoint.open(path)
    assert "\n" not in caught.value.message
    return caught.value


def test_one_file(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "anything.safetensors", {"format": "pt"})
    checkpoint = Checkpoint.open(tmp_path / "anything.safetensors")
    same(checkpoint, weights())
    assert (checkpoint.root, checkpoint.indexes, checkpoint.config) == (tmp_path, {}, {})
    assert checkpoint.shards[0].metadata == {"format": "pt"}
    with pytest.raises(BadFile, match="no tensor 'x'"):
        checkpoint.read("x")


def test_shards_by_their_index_or_their_folder(tmp_path: Path) -> None:
    folder = shards(tmp_path / "model", weights())
    (folder / "config.json").write_text('{"model_type": "llama", "eps": NaN}')
    for path in (folder, folder / INDEX, str(folder)):
        checkpoint = Checkpoint.open(path)
        same(checkpoint, weights())
        assert list(checkpoint.indexes) == [folder / INDEX]
        assert checkpoint.config["model_type"] == "llama"
        assert checkpoint.root == folder
    error = refusal(folder / "model-00001-of-00002.safetensors", "one shard of several")
    assert str(folder) in str(error.hint)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard is missing": (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "no such file"),
    "a shard is truncated": (
        lambda f: os.truncate(f / "model-00002-of-00002.safetensors", 300), "00002-of-00002.*truncated"
    ),
    "a shard is a pointer": (
        lambda f: (f / "model-00001-of-00002.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "00001-of-00002.*Git-LFS pointer",
    ),
    "listed, not there": (
        lambda f: edit(f / INDEX, lambda m: m.update(ghost="model-00001-of-00002.safetensors")),
        r"^ghost: listed in the index, not in model-00001-of-00002\.safetensors$",
    ),
    "there, not listed": (
        lambda f: edit(f / INDEX, lambda m: m.pop("layers.0.weight")),
        r"^layers\.0\.weight: in model-00001-of-00002\.safetensors, not listed in the index$",
    ),
    "listed in the wrong shard": (
        lambda f: edit(f / INDEX, lambda m: m.update({"layers.0.weight": "model-00002-of-00002.safetensors"})),
        r"^layers\.0\.weight: listed in the index, not in model-00002",
    ),
    "a shard is a folder": (
        lambda f: edit(f / INDEX, lambda m: (os.mkdir(f / "d"), m.update(x="d"))), "cannot be read: Is a directory"  # noqa: PTH102
    ),
    "a shard is a pipe": (
        lambda f: edit(f / INDEX, lambda m: (os.mkfifo(f / "pipe"), m.update(x="pipe"))), "not a regular file"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_index_and_shards_are_cross_checked(tmp_path: Path, fault: str) -> None:
    folder = shards(tmp_path / "model", weights())
    damage, match = FAULTS[fault]
    damage(folder)
    error = refusal(folder, "index and shards do not agree")
    assert str(folder / INDEX) in error.message
    assert any(re.search(match, problem) for problem in error.problems), error.problems


def test_all_faults_are_listed_at_once_but_not_without_end(tmp_path: Path) -> None:
    folder = shards(tmp_path / "model", weights())
    edit(folder / INDEX, lambda m: (m.pop("layers.0.weight"), m.pop("layers.4.weight"), m.update(x="missing")))
    assert len(refusal(folder, r"3 problems").problems) == 3
    edit(folder / INDEX, lambda m: m.update({f"t{i}": f"file-{i}" for i in range(9_000)}))
    error = refusal(folder, r"9003 problems")
    assert len(error.problems) == 201
    assert error.problems[-1] == "and 8803 more"


@pytest.mark.parametrize(
    "name",
    ["../model-00001-of-00002.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", "a\\b.safetensors", "x\0",
     "a/..", "./model-00001-of-00002.safetensors"],
)  # fmt: skip
def test_a_shard_outside_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = shards(tmp_path / "inner" / "model", weights())
    save_file(weights(), tmp_path / "inner" / "model-00001-of-00002.safetensors")
    edit(folder / INDEX, lambda m: m.update(x=name))
    problems = refusal(folder, "do not agree").problems
    assert f"{name!r}: a shard must be a plain file name in the index's own folder" in problems


@pytest.mark.parametrize(
    ("text", "match"),
    [("", "not the JSON object"), ("[]", "not the JSON object"), ("{", "damaged JSON"), ("{}", "expected weight_map"),
     ('{"weight_map": []}', "expected weight_map"), ('{"weight_map": {"a": 1}}', "expected weight_map"),
     ('{"weight_map": {"a": null}}', "expected weight_map"), ('{"weight_map": {}}', "no tensors"),
     ('{"weight_map": {"a": "x", "a": "y"}}', "occurs twice"), ("\xff", "not valid UTF-8"),
     ('{"weight_map": {"\\ud800": "x"}}', "not valid UTF-8"), ("version https://git-lfs", "not the JSON object"),
     ('{"weight_map": ' + "[" * 200_000, "nested too deeply")],
)  # fmt: skip
def test_damaged_indexes(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / INDEX).write_bytes(text.encode("latin-1"))
    refusal(tmp_path, match)


def test_a_folder_without_an_index(tmp_path: Path) -> None:
    tensors = weights()
    names = list(tensors)
    save_file({name: tensors[name] for name in names[:2]}, tmp_path / "part-a.safetensors")
    save_file({name: tensors[name] for name in names[2:]}, tmp_path / "part-b.safetensors")
    save_file({"not": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    torch.save({"not": torch.zeros(1)}, tmp_path / "optimizer.bin")
    same(Checkpoint.open(tmp_path), tensors)
    save_file({names[0]: tensors[names[0]]}, tmp_path / "part-c.safetensors")
    error = refusal(tmp_path, "the same tensor is in two files")
    assert error.problems == (f"{names[0]}: in part-a.safetensors and in part-c.safetensors",)


def test_what_a_folder_can_lack(tmp_path: Path) -> None:
    refusal(tmp_path, r"no model weights .* found nothing")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in str(refusal(tmp_path, "no model weights").hint)
    refusal(tmp_path / "missing", "no such file or folder")
    save_file({}, tmp_path / "model.safetensors")
    refusal(tmp_path, "no tensors in it")


def test_the_first_choices(tmp_path: Path) -> None:
    """Where a folder holds several forms of one model, the usual one is read: safetensors, by index, by name."""
    shards(tmp_path, weights())
    same(Checkpoint.open(tmp_path), weights())
    for name in ("consolidated.safetensors", "consolidated-00001.safetensors"):  # Mistral's own names beside
        save_file({"wq": torch.ones(2)}, tmp_path / name)
    shards(tmp_path, weights(seed=1), "bin", "pytorch_model")
    torch.save(weights(seed=2), tmp_path / "pytorch_model.bin")
    same(Checkpoint.open(tmp_path), weights())
    single = tmp_path / "single"
    single.mkdir()
    save_file(weights(), single / "model.safetensors")
    save_file(weights(seed=1), single / "model.fp16.safetensors")
    save_file({"wq": torch.ones(2)}, single / "consolidated.safetensors")
    same(Checkpoint.open(single), weights())
    shards(tmp_path, weights(seed=3), stem="other")
    (tmp_path / INDEX).unlink()
    with pytest.raises(BadFile, match="weights of different models beside each other"):
        Checkpoint.open(tmp_path)  # pytorch_model.bin and its index: no other name means anything to transformers
    for path in tmp_path.glob("pytorch_model-*"):
        path.unlink()
    (tmp_path / "pytorch_model.bin.index.json").unlink()
    same(Checkpoint.open(tmp_path), weights(seed=2))
    (tmp_path / "pytorch_model.bin").unlink()
    same(Checkpoint.open(tmp_path), weights(seed=3))
    shards(tmp_path, weights(seed=3), stem="third")
    error = refusal(tmp_path, "several indexes: other.safetensors.index.json, third.safetensors.index.json")
    assert error.hint == "Give the path of one of them."


def test_legacy_files_single_and_sharded(tmp_path: Path) -> None:
    tensors = weights()
    tensors["tied"] = tensors["layers.0.weight"]
    whole = torch.arange(12.0)
    tensors["first"], tensors["second"] = whole[:6].view(2, 3), whole[6:]
    (tmp_path / "single").mkdir()
    torch.save(tensors, tmp_path / "single" / "pytorch_model.bin")
    for path in (tmp_path / "single", tmp_path / "single" / "pytorch_model.bin"):
        checkpoint = Checkpoint.open(path)
        same(checkpoint, tensors)
        assert checkpoint.specs["tied"] == checkpoint.specs["layers.0.weight"]
        assert checkpoint.specs["second"].start == checkpoint.specs["first"].stop
    same(Checkpoint.open(shards(tmp_path / "sharded", weights(), "bin", "pytorch_model")), weights())
    os.truncate(tmp_path / "sharded" / "pytorch_model-00002-of-00002.bin", 700)
    problems = refusal(tmp_path / "sharded", "do not agree").problems
    assert any("damaged or truncated zip" in problem for problem in problems)


def pipeline(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """A diffusers pipeline: one component sharded, one whole, others without weights or absent."""
    parts = {"unet": weights(), "text_encoder": weights(3, seed=1), "vae": {"w": torch.ones(2)}}
    shards(folder / "unet", parts["unet"], stem="diffusion_pytorch_model")
    for name, file in (("text_encoder", "model"), ("vae", "diffusion_pytorch_model")):
        (folder / name).mkdir()
        save_file(parts[name], folder / name / f"{file}.safetensors", {"format": "pt"})
    save_file({"w": torch.zeros(2)}, folder / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    (folder / "unlisted").mkdir()
    save_file({"w": torch.zeros(2)}, folder / "unlisted" / "model.safetensors")
    index = {"_class_name": "Pipeline", "_name_or_path": "x", "unet": ["diffusers", "UNet2DConditionModel"]}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    index |= {"vae": ["diffusers", "AutoencoderKL"], "safety_checker": [None, None], "image_encoder": ["x", "y"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return parts


def test_a_pipeline_s_components_are_prefixes(tmp_path: Path) -> None:
    parts = pipeline(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    same(checkpoint, {f"{part}.{name}": tensor for part, inner in parts.items() for name, tensor in inner.items()})
    assert checkpoint.components == ("unet", "text_encoder", "vae")
    assert list(checkpoint.indexes) == [tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json"]
    assert {shard.path.parent.name: shard.prefix for shard in checkpoint.shards} == {part: f"{part}." for part in parts}
    same(Checkpoint.open(tmp_path / "unet"), parts["unet"])
    (tmp_path / "unet" / "diffusion_pytorch_model-00001-of-00002.safetensors").unlink()
    refusal(tmp_path, "do not agree")


@pytest.mark.parametrize("name", ["..", ".", "../outside", "/", "unet/../../outside", ""])
def test_a_component_outside_the_pipeline_is_not_opened(tmp_path: Path, name: str) -> None:
    for folder in ("outside", "pipeline/unet"):
        (tmp_path / folder).mkdir(parents=True)
        save_file({folder[:7]: torch.ones(2)}, tmp_path / folder / "model.safetensors")
    for folder in (tmp_path, tmp_path / "pipeline"):
        save_file({"stray": torch.ones(2)}, folder / "model.safetensors")
    index = {name: ["diffusers", "X"], "unet": ["diffusers", "X"]}
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps(index))
    checkpoint = Checkpoint.open(tmp_path / "pipeline")
    assert list(checkpoint.specs) == ["unet.pipelin"]
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps({name: ["diffusers", "X"]}))
    refusal(tmp_path / "pipeline", "without any component")


def test_a_folder_of_links_as_the_hub_s_cache_has(tmp_path: Path) -> None:
    real = shards(tmp_path / "real", weights())
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(real.iterdir())):
        path.rename(blobs / f"{i:064x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{i:064x}")
    checkpoint = Checkpoint.open(snapshot)
    same(checkpoint, weights())
    assert all(shard.path.parent == snapshot for shard in checkpoint.shards)


def test_dtypes_that_torch_lacks_are_known_but_not_read(tmp_path: Path) -> None:
    raw = json.dumps({"w": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + b"abc")
    checkpoint = Checkpoint.open(tmp_path)
    assert files.read_bytes(checkpoint.specs["w"]) == b"abc"
    with pytest.raises(UnsupportedAdapter, match="F6_E2M3"):
        checkpoint.read("w")


def test_what_counts_as_weights() -> None:
    for name in ("a.safetensors", "b.bin", "c.gguf", "d.pth", "model.safetensors.index.json", "e.h5"):
        assert is_weights(Path(name)), name
    for name in ("config.json", "tokenizer.model", "README.md", "index.json", "merges.txt"):
        assert not is_weights(Path(name)), name
