"""What `loratools find` shows of names: whole in a pipe, and in a narrow terminal what tells them apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratools.cli._run import run
from loratools.cli.find import shortened


def test_names_keep_what_tells_them_apart() -> None:
    names = ["ohwx_woman.safetensors", "inkstyle_locon.safetensors", "old/ohwx-000008.safetensors"]
    assert shortened(names, 40) == names
    assert shortened(names, 16) == ["ohwx_woman", "inkstyle_locon", "old/ohwx-000008"]
    assert shortened(names, 9) == ["ohwx…oman", "inks…ocon", "old/…0008"]
    assert shortened(["model-1.5.safetensors", "folder/adapter"], 8) == ["mode…ors", "fold…ter"]
    assert shortened(["", "v1-5-pruned.safetensors"], 11) == ["", "v1-5-pruned"]


def test_in_a_pipe_nothing_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    file = f"{'long' * 12}.safetensors"
    factors = {f"{name}.lora_down.weight": torch.ones(2, 8), f"{name}.lora_up.weight": torch.ones(8, 2)}
    save_file(factors, tmp_path / file)
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["find", str(tmp_path)]) == 0
    assert file in capsys.readouterr().out


def test_why_adapters_are_compared_by_their_parameters_is_said_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    wrong = torch.ones(2, 8)
    wrong[0, 0] = torch.nan
    factors = {f"{name}.lora_down.weight": wrong, f"{name}.lora_up.weight": torch.ones(8, 2)}
    save_file(factors, tmp_path / "wrong.safetensors")
    for command in (["find"], ["compare", "--all"]):
        assert run([*command, str(tmp_path)]) == 0
        said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("by parameters"))
        assert "NaN" in said
        assert "base" not in said
