"""Files that sd-scripts saved by `torch.save`: the same adapter as the safetensors file, without a header."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratools import dialects
from loratools.adapter.kinds import Update
from loratools.dialects._frame.listing import Listing
from loratools.errors import BadFile
from loratools.surgery.convert import convert
from loratools.surgery.inspect import inspect
from tests.dialects.adapters import factors

UNET = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_"
ENCODER = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"


def state() -> dict[str, torch.Tensor]:
    tensors = {}
    for seed, flat in enumerate((f"{UNET}q", f"{UNET}v", ENCODER)):
        a, b = factors(seed, rank=4)
        tensors |= {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b, f"{flat}.alpha": torch.tensor(2.0)}
    return tensors


def parts(updates: dict[str, Update]) -> dict[str, tuple[float, dict[str, list[object]]]]:
    return {
        module: (update.scaling, {part: lazy.load().tolist() for part, lazy in update.parts.items()})
        for module, update in updates.items()
    }


@pytest.mark.parametrize("name", ["lora.pt", "lora.ckpt", "pytorch_lora.bin"])
@pytest.mark.parametrize("alone", [True, False], ids=["file", "folder"])
def test_a_pickled_file_is_the_safetensors_one(name: str, alone: bool, tmp_path: Path) -> None:
    save_file(state(), tmp_path / "same.safetensors")
    (tmp_path / "a").mkdir()
    torch.save(state(), tmp_path / "a" / name)
    path = tmp_path / "a" / name if alone else tmp_path / "a"
    adapter = dialects.open_adapter(path)
    assert adapter.dialect == "kohya"
    assert {update.scaling for update in adapter.updates.values()} == {0.5}  # alpha 2 of rank 4
    assert parts(dict(adapter.updates)) == parts(dict(dialects.open_adapter(tmp_path / "same.safetensors").updates))
    assert (
        dialects.detect(Listing.of(path))[1].reason
        == f"9 of the tensors in {name} are called as {UNET}q.lora_down.weight"
    )
    assert inspect(path).total.tensors == 6


def test_it_becomes_a_safetensors_file(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "lora.pt")
    convert(tmp_path / "lora.pt", tmp_path / "out.safetensors", to="kohya")
    assert parts(dict(dialects.open_adapter(tmp_path / "out.safetensors").updates)) == parts(
        dict(dialects.open_adapter(tmp_path / "lora.pt").updates)
    )


def test_names_beside_kohyas_are_told(tmp_path: Path) -> None:
    torch.save(state() | {"unet.conv_in.weight": torch.ones(2)}, tmp_path / "lora.pt")
    with pytest.raises(BadFile, match=r"1 name is none of kohya's: unet\.conv_in\.weight"):
        dialects.open_adapter(tmp_path / "lora.pt")
