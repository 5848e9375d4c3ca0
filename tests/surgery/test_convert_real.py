"""Real adapters through a foreign dialect and back: bit for bit where the scaling is a power of two, else to 1e-6."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loratools import dialects
from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.convert import convert
from loratools.surgery.merge import merge

ADAPTERS = {
    "smol-lora": {16 / 8},
    "smol-rslora": {16 / 16**0.5, 16 / 32**0.5},  # ranks 4, 16 and 32
}
"""Name -> the scalings of its modules; one of them is no power of two."""

BLOCKS = ("model.layers.0.", "model.layers.29.")
"""What is merged: the factors of all blocks are compared, so the first and the last will do."""


@pytest.fixture(scope="module")
def blocks(real_models: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], Checkpoint]:
    """Return `blocks(dtype)`: the first and the last block of smol-base, stored in a dtype."""
    whole = Checkpoint.open(real_models / "smol-base")

    def make(dtype: torch.dtype) -> Checkpoint:
        folder = tmp_path_factory.mktemp("blocks")
        kept = {name: whole.read(name).to(dtype) for name in whole.specs if name.startswith(BLOCKS)}
        save_file(kept, folder / "model.safetensors")
        shutil.copy(whole.root / "config.json", folder)
        return Checkpoint.open(folder)

    return make


def there_and_back(original: Path, through: str, base: Checkpoint, folder: Path) -> tuple[Adapter, Adapter]:
    """Return an adapter as it was, and as it is once it went through a dialect and back to PEFT's."""
    convert(original, folder / "x", to=through, base=base)
    foreign = dialects.open_adapter(folder / "x", base=base)
    assert foreign.dialect == through
    convert(foreign, folder / "back", to="peft", base=base)
    before, after = dialects.open_adapter(original), dialects.open_adapter(folder / "back")
    assert before.updates.keys() == after.updates.keys()
    return before, after


def merged(base: Checkpoint, adapter: Adapter, folder: Path) -> dict[str, torch.Tensor]:
    kept = {module: update for module, update in adapter.updates.items() if module.startswith(BLOCKS)}
    merge(base, [replace(adapter, updates=kept)], folder)
    found = Checkpoint.open(folder)
    return {name: found.read(name) for name in found.specs}


@pytest.mark.parametrize("through", ["gguf", "mlx", "kohya", "diffusers"])
@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_a_power_of_two_is_exact_and_the_rest_near(
    name: str, through: str, real_models: Any, blocks: Callable[[torch.dtype], Checkpoint], tmp_path: Path
) -> None:
    base = Checkpoint.open(real_models / "smol-base")
    before, after = there_and_back(real_models / name, through, base, tmp_path)
    assert {update.scaling for update in before.updates.values()} == ADAPTERS[name]
    for module, update in before.updates.items():
        (A, B), (A2, B2) = factors(update), factors(after.updates[module])
        rank = update.rank
        assert torch.equal(A2[:rank], A)
        assert not A2[rank:].any()  # mlx-lm has one rank for all modules: the smaller ones are filled up with zeros
        assert not B2[:, rank:].any()
        if is_power_of_two(update.scaling):
            assert torch.equal(B2[:, :rank], B)
        else:
            torch.testing.assert_close(B2[:, :rank], B, rtol=2**-23, atol=0)
    small = blocks(torch.bfloat16)
    one, two = merged(small, before, tmp_path / "one"), merged(small, after, tmp_path / "two")
    assert one.keys() == two.keys()
    changed = 0
    for tensor in one:
        update = before.updates.get(tensor.removesuffix(".weight"))
        changed += update is not None and not torch.equal(one[tensor], small.read(tensor))
        if update is None or is_power_of_two(update.scaling):
            assert torch.equal(one[tensor], two[tensor]), tensor
    assert changed == sum(module.startswith(BLOCKS) for module in before.updates) > 0


def factors(update: Update) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and s·B in float64."""
    parts = update.parts
    return parts["lora_A.weight"].load().double(), update.scaling * parts["lora_B.weight"].load().double()


def is_power_of_two(scaling: float) -> bool:
    return math.frexp(scaling)[0] == 0.5


@pytest.mark.parametrize("through", ["gguf", "mlx", "kohya"])
@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_merged_weights_of_any_scaling_are_near(
    name: str, through: str, real_models: Any, blocks: Callable[[torch.dtype], Checkpoint], tmp_path: Path
) -> None:
    """The same factors under an alpha of 10.7, which no float32 holds, and of 3 for one module."""
    base = Checkpoint.open(real_models / "smol-base")
    shutil.copytree(real_models / name, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    config |= {"lora_alpha": 10.7, "alpha_pattern": {"model.layers.29.self_attn.q_proj": 3}}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    before, after = there_and_back(tmp_path / "a", through, base, tmp_path)
    assert not any(is_power_of_two(update.scaling) for update in before.updates.values() if update.alpha == 10.7)
    small = blocks(torch.float32)
    one, two = merged(small, before, tmp_path / "one"), merged(small, after, tmp_path / "two")
    assert one.keys() == two.keys()
    for tensor, wanted in one.items():
        torch.testing.assert_close(two[tensor], wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))
        assert not tensor.endswith("q_proj.weight") or not torch.equal(wanted, small.read(tensor))
