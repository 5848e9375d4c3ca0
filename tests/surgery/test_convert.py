"""Converting: what the base tells, and what is recorded where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loratools import dialects
from loratools.errors import IncompatibleAdapter, LossyConversion
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.convert import convert
from loratools.surgery.merge import merge
from tests.conftest import Result


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("to", ["peft", "mlx", "kohya", "gguf", "diffusers"])
def test_a_base_tells_names_and_heads_without_sealing_what_cannot_be_sealed(
    prepared: Path, tmp_path: Path, to: str
) -> None:
    base = Checkpoint.open(prepared / "base")
    found = convert(prepared / "adapter", tmp_path / "x", to=to, base=base)
    assert (found.losses, found.dialect) == ((), to)
    again = dialects.open_adapter(tmp_path / "x", base=base)
    assert again.dialect == to
    merge(base, [dialects.open_adapter(prepared / "adapter")], tmp_path / "one")
    merge(base, [again], tmp_path / "two")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)  # s = 2, and all is moved by powers of two


def test_a_sealed_adapter_remembers_what_gguf_needs(prepared: Path, tmp_path: Path) -> None:
    convert(prepared / "adapter", tmp_path / "sealed", base=prepared / "base")
    with pytest.raises(LossyConversion) as refusal:
        convert(tmp_path / "sealed", tmp_path / "a.gguf", to="gguf")
    assert [line.partition(":")[0] for line in refusal.value.problems] == ["base model", "provenance"]
    assert convert(tmp_path / "sealed", tmp_path / "a.gguf", to="gguf", allow_loss=True).modules == 4


def test_the_adapter_must_fit_the_base(prepared: Path, tmp_path: Path) -> None:
    from tests.make import tiny

    small = tiny.save_llama(tmp_path / "small", {n: t[:8] for n, t in tiny.llama_weights(1).items()})
    with pytest.raises(IncompatibleAdapter):
        convert(prepared / "adapter", tmp_path / "a.gguf", to="gguf", base=small)
    assert not (tmp_path / "a.gguf").exists()


def test_profiles_and_alpha_on_the_command_line(workplace: Path, shell: Callable[..., Result]) -> None:
    done = shell("loratools convert adapter -o x --to peft --profile serving --base base --json", workplace)
    assert done.code == 0, done.err
    config: dict[str, Any] = json.loads((workplace / "x" / "adapter_config.json").read_text())
    assert (config["target_modules"], config["rank_pattern"]) == (["q_proj", "v_proj"], {})
    done = shell("loratools convert adapter -o x --to mlx --profile serving", workplace)
    assert (done.code, "--profile is for --to peft" in done.err) == (2, True)
    torch.save({"a.b.lora_A": torch.ones(2, 3), "a.b.lora_B": torch.ones(4, 2)}, workplace / "l.pt")
    done = shell("loratools convert l.pt -o y", workplace)
    assert (done.code, "--alpha" in done.err) == (1, True)
    done = shell("loratools convert l.pt -o y --alpha 6", workplace)
    assert done.code == 0, done.err
    assert dialects.open_adapter(workplace / "y").updates["a.b"].scaling == 3.0
    done = shell("loratools dialects --json", workplace)
    listed = {one["name"]: one for one in json.loads(done.out)["dialects"]}
    assert listed.keys() >= {"comfy", "diffusers", "gguf", "kohya", "loralib", "loratools", "mlx", "peft"}
    assert "provenance" in listed["kohya"]["cannot"]
