"""What a header says of an adapter: kept through every command, brought up to date, and said where it is lost."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from loratools import dialects
from loratools.adapter.model import Adapter
from loratools.decisions import warnings_to
from loratools.linalg.ranks.allocate import Ranks
from loratools.linalg.ranks.rules import Energy
from loratools.surgery.combine import combine
from loratools.surgery.combine.entries import COMBINED_FROM
from loratools.surgery.convert import convert
from loratools.surgery.resize import resize
from tests.dialects.adapters import Q0, lora
from tests.dialects.test_refused import LLAMA

UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_"
TAGS = {"10_mychar": {"mychar": 40, "smiling": 11}}
KEPT = {
    "modelspec.trigger_phrase": "mychar woman", "modelspec.thumbnail": "data:image/jpeg;base64,/9j/4AAQ",
    "ss_tag_frequency": json.dumps(TAGS), "ss_output_name": "mychar", "ss_network_module": "networks.lora",
}  # fmt: skip


def kohya(path: Path, dtype: torch.dtype = torch.float16, **entries: str) -> Path:
    generator = torch.Generator().manual_seed(0)
    file = {}
    for name in ("q", "k"):
        file[f"{UNET}{name}.lora_down.weight"] = torch.randn(4, 32, generator=generator).to(dtype)
        file[f"{UNET}{name}.lora_up.weight"] = torch.randn(32, 4, generator=generator).to(dtype)
        file[f"{UNET}{name}.alpha"] = torch.tensor(2.0, dtype=dtype)
    sizes = {"ss_network_dim": "4", "ss_network_alpha": "2.0", "modelspec.hash_sha256": "0xold"}
    save_file(file, path, metadata=sizes | KEPT | entries)
    return path


def entries(folder: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    (path,) = folder.glob("*.safetensors") if folder.is_dir() else [folder]
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_resize_stays_in_dialect_and_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    source = kohya(tmp_path / "a.safetensors", dtype)
    for target in (tmp_path / "b.safetensors", tmp_path / "b"):
        report = resize(source, target, 2)
        said, tensors = entries(target)
        assert KEPT.items() <= said.items()
        assert (said["ss_network_dim"], float(said["ss_network_alpha"])) == ("2", 2.0)
        assert said["modelspec.hash_sha256"] == f"0x{said['sshs_model_hash']}"
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}
        assert sorted(tensors) == sorted(entries(source)[1])
        assert tensors[f"{UNET}q.alpha"] == 2
        _, before = entries(source)
        wanted, found = (
            t[f"{UNET}q.lora_up.weight"].double() @ t[f"{UNET}q.lora_down.weight"].double() * s
            for t, s in ((before, 0.5), (tensors, 1.0))
        )
        error = float((wanted - found).norm() / wanted.norm())
        least = float(torch.linalg.svdvals(wanted)[2:].norm() / wanted.norm())
        assert error == pytest.approx(least, rel=2e-2)
        assert report.error == pytest.approx(report.optimum, rel=2e-2)
    assert dialects.open_adapter(resize(source, tmp_path / "ours", 2, to="loratools").output).dialect == "loratools"
    resize(source, tmp_path / "f32", 2, dtype="f32")
    assert entries(tmp_path / "f32")[1][f"{UNET}q.lora_up.weight"].dtype == torch.float32


@pytest.mark.parametrize("dialect", ["kohya", "comfy", "diffusers", "peft", "mlx", "loratools"])
def test_they_come_through_every_dialect_with_a_header(tmp_path: Path, dialect: str) -> None:
    convert(kohya(tmp_path / "a.safetensors"), tmp_path / "b", to=dialect, allow_loss=True)
    again = dialects.open_adapter(tmp_path / "b", dialect=dialect)
    assert KEPT.items() <= again.settings["metadata"].items()
    assert "0xold" not in str(again.settings["metadata"]) or dialect == "loratools"
    convert(tmp_path / "b", tmp_path / "c", to="kohya", allow_loss=True)
    said, _ = entries(tmp_path / "c")
    assert KEPT.items() <= said.items()
    assert "0xold" not in said.values()


@pytest.mark.parametrize("dialect", ["gguf", "torchtune", "loralib"])
def test_what_has_no_place_is_said(tmp_path: Path, dialect: str) -> None:
    adapter = Adapter({Q0: lora(1)}, settings={**LLAMA, "metadata": KEPT})
    warnings: list[str] = []
    with warnings_to(warnings.append):
        dialects.save_adapter(adapter, tmp_path / "a", dialect=dialect, allow_loss=True)
    (warning,) = warnings
    assert "has no place for what the header said: modelspec.thumbnail, modelspec.trigger_phrase, ss_" in warning


TRAINED = {
    **KEPT, "ss_network_dim": "4", "ss_network_alpha": "2.0", "ss_base_model_version": "sd_v1", "ss_epoch": "10",
    "ss_learning_rate": "0.0001", "modelspec.title": "mychar", "training_info": '{"step": 900}',
    "modelspec.architecture": "stable-diffusion-v1/lora", "modelspec.tags": "hat, mychar",
}  # fmt: skip
OF_BYTES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
SIZES = {"ss_network_dim": "2", "ss_network_alpha": "2.0"}
COMMENT = {"ss_training_comment": "dimension is resized from 4 to 2; "}
AGAIN = {"kohya", "comfy", "diffusers", "peft", "mlx", "loratools"}


def test_seventeen_entries_through_every_command(tmp_path: Path) -> None:
    """The table: what is left of a kohya file's 17 entries, after each command and after the way back to kohya."""
    source = kohya(tmp_path / "a.safetensors", **TRAINED, **dict.fromkeys(OF_BYTES, "of the old bytes"))
    assert len(entries(source)[0]) == 17
    done: dict[str, Path] = {"resize": tmp_path / "resize", "combine": tmp_path / "combine"}
    resize(source, done["resize"], 2)
    combine([source, source], done["combine"], weights=[0.5, 0.5])
    for dialect in sorted(AGAIN):
        convert(source, there := tmp_path / dialect, to=dialect, allow_loss=True)
        convert(there, back := tmp_path / f"{dialect} and back", to="kohya", allow_loss=True)
        done |= {f"{dialect} and back": back} | ({dialect: there} if dialect != "loratools" else {})
    changed = {"resize": {**SIZES, **COMMENT}, "combine": {"ss_network_alpha": "4.0"}}
    of_dialects = {"lora_adapter_metadata", "format", "ss_base_model", "ss_sd_model_name", COMBINED_FROM}
    of_dialects |= {"modelspec.merged_from"}
    for command, path in done.items():
        said, tensors = entries(path)
        left = {name: value for name, value in said.items() if name not in OF_BYTES and name not in of_dialects}
        assert left == TRAINED | changed.get(command, {}), command
        (file,) = path.glob("*.safetensors")
        raw = file.read_bytes()
        data = hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()
        assert (said["sshs_model_hash"], said["modelspec.hash_sha256"]) == (data, f"0x{data}"), command
        assert len(said["sshs_legacy_hash"]) == 8, command
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}, command


@pytest.mark.parametrize("target", ["comfy", "kohya"])
def test_an_alpha_of_the_header_is_that_of_no_other_rank(tmp_path: Path, target: str) -> None:
    names = [f"diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_{name}" for name in "qk"]
    file = {}
    for name, rank in zip(names, (4, 8), strict=True):
        file |= {f"{name}.lora_A.weight": torch.randn(rank, 32), f"{name}.lora_B.weight": torch.randn(32, rank)}
        file[f"{name}.alpha"] = torch.tensor(float(rank))
    save_file(file, tmp_path / "a.safetensors", metadata={"lora_alpha": "4", "ss_network_alpha": "4"})
    convert(tmp_path / "a.safetensors", tmp_path / "b", to=target, allow_loss=True)
    assert {update.scaling for update in dialects.open_adapter(tmp_path / "b").updates.values()} == {1.0}
    resize(tmp_path / "b", tmp_path / "c", 2)
    assert {update.scaling for update in dialects.open_adapter(tmp_path / "c").updates.values()} == {1.0}
    resize(tmp_path / "b", tmp_path / "d", Ranks(Energy(0.9)))
    again = dialects.open_adapter(tmp_path / "d")
    assert {update.scaling for update in again.updates.values()} == {1.0}
    assert again.settings["metadata"]["lora_alpha"] == "Dynamic"
    assert {update.rank for update in again.updates.values()} != {4}


def test_foreign_entries_stay_where_kohya_adds_its_own(tmp_path: Path) -> None:
    adapter = Adapter({Q0: lora(1)}, settings={**LLAMA, "metadata": {"training_info": "{}", "software": "x"}})
    dialects.save_adapter(adapter, tmp_path / "a", dialect="kohya", allow_loss=True)
    said, _ = entries(tmp_path / "a")
    assert (said["training_info"], said["software"], said["ss_network_module"]) == ("{}", "x", "networks.lora")
