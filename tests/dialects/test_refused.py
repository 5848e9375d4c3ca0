"""What is refused by name, whatever the dialect: empty tensors, pointers, hollow files, pickles with code."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loratools import dialects
from loratools.adapter.model import Adapter
from loratools.errors import BadFile
from loratools.storage.checkpoint import Checkpoint

from .adapters import Q0, lora

LLAMA = {"base_config": {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 2}}
UNET = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
FLUX = "diffusion_model.double_blocks.3.img_attn.proj"
WRITTEN = {
    "peft": Q0, "loratools": Q0, "mlx": Q0, "gguf": Q0, "loralib": Q0, "torchtune": Q0, "kohya": UNET,
    "diffusers": UNET, "comfy": FLUX,
}  # fmt: skip
"""Every dialect that writes, and a module that it has a name for."""

READ_ONLY = {
    "tinker": "adapter_model.safetensors", "megatron": "lora.nemo", "mistral": "lora.safetensors",
    "mlx_vlm": "adapters.safetensors",
}  # fmt: skip
"""The others, and a file that each reads."""


def written(dialect: str, folder: Path) -> Path:
    """Return the file of tensors that a dialect writes for one module."""
    adapter = Adapter({WRITTEN[dialect]: lora(1)}, settings=LLAMA)
    dialects.save_adapter(adapter, folder, dialect=dialect, allow_loss=True)
    (file,) = (path for path in folder.iterdir() if path.suffix != ".json")
    return file


@pytest.mark.parametrize("dialect", sorted(set(WRITTEN) - {"gguf"}))  # in which no side can be zero
@pytest.mark.parametrize("shape", [(0,), (0, 4), (12, 0)])
def test_empty_tensors_are_refused_by_name_in_every_dialect(
    dialect: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    file = written(dialect, tmp_path / "a")
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(file)
    else:
        metadata, tensors = None, torch.load(file, weights_only=True)
    (up,) = (
        name
        for name in tensors
        if name.endswith(("lora_B.weight", "lora_up.weight", "lora_b", "lora_B", "lora_b.weight"))
    )
    tensors[up] = torch.ones(shape)
    if metadata is not None or file.suffix == ".safetensors":
        save_file(tensors, file, metadata)
    else:
        torch.save(tensors, file)
    with pytest.raises(BadFile, match="empty") as refusal:
        dialects.open_adapter(
            tmp_path / "a", dialect=dialect, alpha=None if dialect == "loratools" else 8, base=base(tmp_path / "base")
        )
    assert dialect == "loratools" or "ZeRO-3" in str(refusal.value)


def base(folder: Path) -> Checkpoint:
    folder.mkdir()
    save_file({f"{module}.weight": torch.ones(12, 10) for module in WRITTEN.values()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(LLAMA["base_config"]))
    return Checkpoint.open(folder)


@pytest.mark.parametrize("dialect", [*WRITTEN, *READ_ONLY])
@pytest.mark.parametrize("alone", [True, False], ids=["file", "folder"])
def test_pointers_are_refused_by_name_in_every_dialect(dialect: str, alone: bool, tmp_path: Path) -> None:
    if dialect in WRITTEN:
        file = written(dialect, tmp_path / "a")
    else:
        file = tmp_path / "a" / READ_ONLY[dialect]
        file.parent.mkdir()
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(BadFile, match="this is a Git-LFS pointer, not the file itself") as refusal:
        dialects.open_adapter(file if alone else tmp_path / "a")
    assert file.name in refusal.value.message
    assert refusal.value.hint == "Fetch it with `git lfs pull`."


class Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("hacked",)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "lora.pt", "pytorch_lora_weights.bin"])
@pytest.mark.parametrize("alone", [True, False], ids=["file", "folder"])
@pytest.mark.parametrize(
    ("save", "sentence"),
    [
        (lambda path: torch.save({"x.lora_A": torch.ones(2, 2), "y": Exploit()}, path), "holds more than tensors"),
        (lambda path: torch.save({}, path), "an empty state dict"),
        (lambda path: path.write_bytes(pickle.dumps({"y": Exploit()})), "will not be opened: posix.mkdir"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(439)), "damaged or truncated zip file"),
    ],
    ids=["code", "empty", "bare", "443"],
)
def test_files_of_torch_that_are_refused_by_name(
    name: str, alone: bool, save: Callable[[Path], None], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "a"
    folder.mkdir()
    save(folder / name)
    with pytest.raises(BadFile, match=sentence) as refusal:
        dialects.open_adapter(folder / name if alone else folder)
    assert name in refusal.value.message
    assert not (tmp_path / "hacked").exists()
