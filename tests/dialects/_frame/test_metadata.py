"""What a header says of an adapter: kept through every command, brought up to date, and said where it is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from loratools import dialects
from loratools.adapter.model import Adapter
from loratools.decisions import warnings_to
from loratools.dialects._frame.metadata import joined
from loratools.surgery.combine import combine
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


def test_entries_of_several_adapters(tmp_path: Path) -> None:
    other = {
        "modelspec.trigger_phrase": "a hat, mychar woman", "modelspec.thumbnail": "data:x", "ss_output_name": "hat",
        "ss_tag_frequency": json.dumps({"10_mychar": {"smiling": 1}, "3_hat": {"hat": 3}}), "modelspec.title": "hat",
        "modelspec.hash_sha256": "0xother",
    }  # fmt: skip
    warnings: list[str] = []
    with warnings_to(warnings.append):
        combine([kohya(tmp_path / "a.safetensors"), kohya(tmp_path / "b.safetensors", **other)], tmp_path / "c")
    said = dialects.open_adapter(tmp_path / "c").settings["metadata"]
    assert said["modelspec.trigger_phrase"] == "mychar woman, a hat"
    assert json.loads(said["ss_tag_frequency"]) == {"10_mychar": {"mychar": 40, "smiling": 12}, "3_hat": {"hat": 3}}
    assert (said["modelspec.thumbnail"], said["modelspec.title"]) == (KEPT["modelspec.thumbnail"], "hat")
    assert "ss_output_name" not in said
    assert warnings[0].startswith("adapters 1 and 2 have the same tensors")
    assert [warning for warning in warnings if "header" in warning or "thumbnail" in warning] == [
        "entries of the headers in which the adapters differ are not carried: ss_output_name",
        "of the adapters' modelspec.thumbnail the first is carried",
    ]
    convert(tmp_path / "c", tmp_path / "d.safetensors", to="kohya", allow_loss=True)
    assert entries(tmp_path / "d.safetensors")[0]["ss_network_dim"] == "4"  # of the same factors twice


@pytest.mark.parametrize("value", ["{", "[1]", '{"a": {"b": "c"}}', '{"a": 1}'])
def test_tags_that_are_none_are_named(value: str) -> None:
    adapters = [Adapter({}, settings={"metadata": {"ss_tag_frequency": v}}) for v in (json.dumps(TAGS), value)]
    warnings: list[Any] = []
    with warnings_to(warnings.append):
        assert joined(adapters) == {}
    assert "not carried: ss_tag_frequency" in warnings[0]
