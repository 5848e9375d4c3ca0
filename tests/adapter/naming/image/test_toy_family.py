"""A new family is one file: put beside the others, its adapters are read, converted and merged under every naming."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools.adapter.naming.image import families
from loratools.dialects import open_adapter
from loratools.storage.checkpoint import Checkpoint

TOY = '''
"""Toy: q and a gate of twice its size in one weight, a gate whose halves change places."""

from loratools.adapter.naming.image.families import Family, Fused, within

FAMILY = Family(
    summary="Toy",
    renames={**within("towers.{}", "tower_blocks.{}", {"mix.out": "attn.to_out.0"}), "last.gate": "norm_out.linear"},
    fused={"towers.{}.mix.in": Fused(("tower_blocks.{}.attn.to_q", "tower_blocks.{}.attn.gate"), (None, 2))},
    swapped=frozenset({"last.gate"}),
)
'''

H, BLOCK = 6, 123  # there may be any number of blocks
SHAPES = {f"towers.{BLOCK}.mix.in": (3 * H, H), f"towers.{BLOCK}.mix.out": (H, H), "last.gate": (2 * H, H)}
OURS = {
    f"tower_blocks.{BLOCK}.attn.to_q": (f"towers.{BLOCK}.mix.in", range(H)),
    f"tower_blocks.{BLOCK}.attn.gate": (f"towers.{BLOCK}.mix.in", range(H, 3 * H)),
    f"tower_blocks.{BLOCK}.attn.to_out.0": (f"towers.{BLOCK}.mix.out", range(H)),
    "norm_out.linear": ("last.gate", [*range(H, 2 * H), *range(H)]),
}
"""Module of diffusers -> the original's module and its rows there."""

FORMS = {
    "comfy": ("diffusion_model.{}", ".", "lora_A.weight", "lora_B.weight"),
    "bare": ("{}", ".", "lora_A.weight", "lora_B.weight"),
    "kohya": ("lora_unet_{}", "_", "lora_down.weight", "lora_up.weight"),
    "lycoris": ("lycoris_{}", "_", "lora_down.weight", "lora_up.weight"),
}
"""Form of a file -> what a module's name becomes, what stands for its dots, and the names of its factors."""


@pytest.fixture(autouse=True)
def one_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put a file beside the others of `families/`, where nothing else is changed."""
    (tmp_path / "families").mkdir()
    (tmp_path / "families" / "toy.py").write_text(TOY)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path / "families")])
    families.names.cache_clear()
    yield
    monkeypatch.undo()
    families.names.cache_clear()
    sys.modules.pop(f"{families.__name__}.toy", None)


def factors() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return (A, B) of each module of the original."""
    generator = torch.Generator().manual_seed(0)
    return {
        module: (torch.randn(2, width, generator=generator), torch.randn(out, 2, generator=generator))
        for module, (out, width) in SHAPES.items()
    }


def wanted() -> dict[str, np.ndarray]:
    """Return ΔW of each module of diffusers, computed from the original's in float64."""
    whole = {module: B.numpy().astype(float) @ A.numpy().astype(float) for module, (A, B) in factors().items()}
    return {ours: whole[theirs][list(rows)] for ours, (theirs, rows) in OURS.items()}


def saved(form: str, folder: Path) -> Path:
    pattern, dot, down, up = FORMS[form]
    tensors = {}
    for module, (A, B) in factors().items():
        name = pattern.format(module.replace(".", dot))
        tensors |= {f"{name}.{down}": A, f"{name}.{up}": B}
    save_file(tensors, folder / f"{form}.safetensors")
    return folder / f"{form}.safetensors"


def under_ours(deltas: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return ΔW of diffusers' modules, of those under the original's names."""
    return {ours: deltas[theirs][list(rows)] for ours, (theirs, rows) in OURS.items()}


def same(deltas: Mapping[str, np.ndarray]) -> None:
    assert deltas.keys() == wanted().keys()
    for module, delta in wanted().items():
        np.testing.assert_allclose(deltas[module], delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_it_is_read_without_a_base_and_becomes_diffusers(form: str, tmp_path: Path) -> None:
    adapter = open_adapter(saved(form, tmp_path))
    assert adapter.updates.keys() == {f"diffusion_model.{module}" for module in SHAPES}
    loratools.convert(tmp_path / f"{form}.safetensors", tmp_path / "ours.safetensors", to="diffusers")
    ours = open_adapter(tmp_path / "ours.safetensors").updates
    same({name.removeprefix("transformer."): update.delta_weight().numpy() for name, update in ours.items()})


@pytest.mark.parametrize("form", ["comfy", "kohya"])
def test_it_becomes_the_originals_again(form: str, tmp_path: Path) -> None:
    loratools.convert(saved(form, tmp_path), tmp_path / "ours.safetensors", to="diffusers")
    loratools.convert(tmp_path / "ours.safetensors", tmp_path / "back.safetensors", to=form)
    assert load_file(tmp_path / "back.safetensors").keys() - load_file(saved(form, tmp_path)).keys() == (
        {f"lora_unet_{module.replace('.', '_')}.alpha" for module in SHAPES} if form == "kohya" else set()
    )
    back = open_adapter(tmp_path / "back.safetensors").updates
    same(under_ours({name.removeprefix("diffusion_model."): u.delta_weight().numpy() for name, u in back.items()}))


@pytest.mark.parametrize("layout", ["pipeline", "component", "one file", "bare file"])
@pytest.mark.parametrize("form", ["comfy", "kohya", "diffusers"])
def test_it_is_merged_and_taken_out_of_a_base_of_any_naming(form: str, layout: str, tmp_path: Path) -> None:
    adapter = saved("comfy" if form == "diffusers" else form, tmp_path)
    if form == "diffusers":
        loratools.convert(adapter, tmp_path / "ours.safetensors", to="diffusers")
        adapter = tmp_path / "ours.safetensors"
    root = {"pipeline": "", "component": "", "one file": "model.diffusion_model.", "bare file": ""}[layout]
    original = "file" in layout
    shapes = SHAPES if original else {name: delta.shape for name, delta in wanted().items()}
    base = tmp_path / "base"
    home = base / "transformer" if layout == "pipeline" else base
    home.mkdir(parents=True)
    if layout == "pipeline":
        (base / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", "Toy"]}))
    weights = {f"{root}{module}.weight": torch.randn(shape) for module, shape in shapes.items()}
    save_file(weights, home / "model.safetensors")
    loratools.merge(base, adapter, tmp_path / "new", keep_residual=True)
    assert loratools.verify(tmp_path / "new", base, adapter).ok
    before, after = Checkpoint.open(base), Checkpoint.open(tmp_path / "new")
    deltas = {
        name.removeprefix("transformer.").removeprefix(root).removesuffix(".weight"):
        (after.read(name).double() - before.read(name).double()).numpy()
        for name in before.specs
    }  # fmt: skip
    same(under_ours(deltas) if original else deltas)
    loratools.unmerge(tmp_path / "new", adapter, tmp_path / "old")
    old = Checkpoint.open(tmp_path / "old")
    assert all(torch.equal(old.read(name), before.read(name)) for name in before.specs)
