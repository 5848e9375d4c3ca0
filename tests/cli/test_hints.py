"""A hint names options of the command that runs, or says whose they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratools.cli._hints import placed
from tests.conftest import Result

OPTIONS = {"merge": ["--tied", "--base", "--force"], "switch": ["--tied", "--force"], "inspect": ["--modules"]}


@pytest.mark.parametrize(
    ("hint", "command", "added"),
    [
        ("Use --tied untie.", "merge", ""),
        ("Use --tied untie.", "inspect", " (--tied is an option of merge and switch)"),
        ("--tied or --base X", "switch", " (--base is an option of merge)"),
        ("--tied, --base", "inspect", " (--tied is an option of merge and switch; --base is an option of merge)"),
        ("loratools merge A --base B", "inspect", ""),
        ("`merge --tied` does it", "inspect", ""),
        ("merge with --tied", "inspect", " (--tied is an option of merge and switch)"),
        ("run it with --unheard-of", "inspect", ""),
        ("nothing", "inspect", ""),
    ],
)  # fmt: skip
def test_options_of_other_commands(hint: str, command: str, added: str) -> None:
    assert placed(hint, command, OPTIONS) == hint + added


Shell = Callable[..., Result]


def test_loralib_is_told_its_alpha_by_convert(shell: Shell, tmp_path: Path) -> None:
    torch.save({"q.lora_A": torch.ones(2, 4), "q.lora_B": torch.ones(4, 2)}, tmp_path / "a.pt")
    done = shell("loratools inspect a.pt", tmp_path)
    assert done.code == 1
    assert "loratools convert a.pt -o OUTPUT --alpha NUMBER" in done.err
    assert shell("loratools convert a.pt -o b --alpha 4", tmp_path).code == 0
    assert json.loads(shell("loratools inspect b --json", tmp_path).out)["groups"][0]["scaling"] == 2


def test_the_alpha_of_a_call_is_said(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    save_file(
        {f"base_model.model.m.q.lora_{x}.weight": torch.ones(2, 2) for x in "AB"},
        tmp_path / "a" / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    done = shell("loratools convert a -o b --alpha 8 --json", tmp_path)
    assert "alpha 8, which the call gives, is taken in place of 4" in json.loads(done.out)["warnings"][0]
    assert shell("loratools convert a -o c --alpha nan", tmp_path).code == 2
    assert shell("loratools convert b -o c --alpha 8", tmp_path).code == 2  # ours, whose seal covers the scaling
