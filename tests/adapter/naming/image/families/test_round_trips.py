"""Every family by its whole road: a LoRA of all modules in each naming, converted into the others, merged into bases.

What a row of the change must be comes from the file's factors by numpy, and from where diffusers' own converters put
that row, which each family's own test proves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools.adapter.naming.image import families
from loratools.adapter.naming.image.families import Family
from tests.make.image_families import TARGETS, lora, originals, rows, shapes_of
from tests.make.image_models import MODELS, build

pytest.importorskip("diffusers")
pytestmark = pytest.mark.slow

Deltas = Mapping[str, "np.ndarray[tuple[int, ...], np.dtype[np.float64]]"]
DIALECTS = ("comfy", "kohya", "diffusers")
OTHER_NAMES = (
    ("hunyuan_video", "hunyuan_video_comfy"), ("hunyuan_video_15", "hunyuan_video_15_comfy"),
    ("hunyuan_image", "hunyuan_image_tencent"), ("qwen_image_21", "qwen_image_21_comfy"),
)  # fmt: skip
"""Families of the same models, which some files have under other original names."""


@dataclass(frozen=True)
class Case:
    """A model's modules under both namings, and the change that a LoRA of all of them makes under each."""

    family: Family
    original: Mapping[str, tuple[int, ...]]
    diffusers: Mapping[str, tuple[int, ...]]
    places: Mapping[str, tuple[str, list[int]]]

    def write(self, dialect: str, path: Path) -> tuple[Deltas, Deltas]:
        """Write the LoRA in a dialect; return what it changes by the original's names and by diffusers'."""
        flat = dialect == "kohya"
        theirs = dialect == "comfy" and not self.family.diffusers_in_comfy
        theirs |= flat and self.family.kohya != "diffusers"
        shapes = self.original if theirs else self.diffusers
        before = self.family.prefixes.get(dialect, "diffusion_model." if dialect == "comfy" else "lora_unet_")
        tensors = lora(shapes, prefix="transformer." if dialect == "diffusers" else before, kohya=flat)
        save_file(tensors, path)
        down, up = ("lora_down", "lora_up") if flat else ("lora_A", "lora_B")
        delta = {}
        for module, shape in shapes.items():
            name = before + module.replace(".", "_") if flat else f"{before}{module}"
            name = f"transformer.{module}" if dialect == "diffusers" else name
            a, b = (tensors[f"{name}.{side}.weight"].double().numpy() for side in (down, up))
            product = b.reshape(len(b), -1) @ a.reshape(len(a), -1)
            delta[module] = product.reshape(shape) * (0.5 if flat else 1)
        if theirs:
            return delta, {module: delta[where][order] for module, (where, order) in self.places.items()}
        return self.back(delta), delta

    def back(self, delta: Deltas) -> Deltas:
        """Return the change of the original's weights for that of diffusers'."""
        whole = {module: np.zeros(shape) for module, shape in self.original.items()}
        for module, (where, order) in self.places.items():
            whole[where][order] = delta[module]
        return whole


@cache
def case(name: str, family: str = "") -> Case:
    """Return a model's case; `family` is one whose names some files of these models have. Default: the usual one."""
    named = families.get(family or MODELS[name][0])
    shapes = shapes_of(build(name), TARGETS)
    places = rows(named, shapes)
    known = {module: shape for module, shape in shapes.items() if module in places}
    return Case(named, originals(named, known), known, places)


def names_for(name: str, reader: str) -> str:
    """Return the family under whose original names a reader has a model's modules."""
    return next(
        (
            one
            for pair in OTHER_NAMES
            if MODELS[name][0] in pair
            for one in pair
            if reader in families.get(one).prefixes
        ),
        MODELS[name][0],
    )


def same(ours: Deltas, theirs: Deltas) -> None:
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())[:8]
    for module, delta in theirs.items():
        assert ours[module].shape == delta.shape, module
        np.testing.assert_allclose(ours[module], delta, rtol=0, atol=1e-5, err_msg=module)


@pytest.mark.sweep(24)
@pytest.mark.parametrize("source", DIALECTS)
@pytest.mark.parametrize("name", MODELS)
def test_a_lora_of_every_module_is_converted_into_each_dialect(name: str, source: str, tmp_path: Path) -> None:
    one = case(name)
    _, ours = one.write(source, tmp_path / "lora.safetensors")
    for target in DIALECTS:
        loratools.convert(tmp_path / "lora.safetensors", tmp_path / target, to=target)
        read = loratools.open_adapter(tmp_path / target)
        delta = {
            module.partition(".")[2]: each.delta_weight().double().numpy() for module, each in read.updates.items()
        }
        there = case(name, names_for(name, target)).back(ours)
        theirs = target == "comfy" and not one.family.diffusers_in_comfy
        theirs |= target == "kohya" and delta.keys() == there.keys()
        same(delta, there if theirs else ours)


@pytest.mark.sweep(24)
@pytest.mark.parametrize("source", DIALECTS)
@pytest.mark.parametrize("name", MODELS)
def test_it_is_merged_into_a_base_of_either_naming(name: str, source: str, tmp_path: Path) -> None:
    one = case(name)
    original, ours = one.write(source, tmp_path / "lora.safetensors")
    for naming, shapes, delta, before in (
        ("original", one.original, original, "model.diffusion_model."),
        ("bare", one.original, original, ""),
        ("diffusers", one.diffusers, ours, ""),
    ):
        generator = torch.Generator().manual_seed(1)
        weights = {f"{before}{m}.weight": torch.randn(shapes[m], generator=generator) for m in sorted(shapes)}
        base = tmp_path / f"{naming}.safetensors"
        save_file(weights, base)
        loratools.merge(base, tmp_path / "lora.safetensors", tmp_path / f"{naming}-merged")
        merged = load_file(next((tmp_path / f"{naming}-merged").glob("*.safetensors")))
        change = {name: (merged[name].double() - weights[name].double()).numpy() for name in weights}
        same(change, {f"{before}{module}.weight": value for module, value in delta.items()})


@pytest.mark.parametrize(("source", "base"), [*OTHER_NAMES, *(pair[::-1] for pair in OTHER_NAMES)])
def test_a_model_that_some_files_have_under_other_names(source: str, base: str, tmp_path: Path) -> None:
    name = next(name for name, (family, _, _) in MODELS.items() if family in (source, base))
    one, other, path = case(name, source), case(name, base), tmp_path / "lora.safetensors"
    _, ours = one.write("comfy", path)
    generator = torch.Generator().manual_seed(1)
    weights = {f"{m}.weight": torch.randn(other.original[m], generator=generator) for m in sorted(other.original)}
    save_file(weights, tmp_path / "base.safetensors")
    loratools.merge(tmp_path / "base.safetensors", path, tmp_path / "merged")
    merged = load_file(next((tmp_path / "merged").glob("*.safetensors")))
    change = {name: (merged[name].double() - weights[name].double()).numpy() for name in weights}
    same(change, {f"{module}.weight": value for module, value in other.back(ours).items()})
    for reader in ("comfy", "kohya"):
        loratools.convert(path, tmp_path / reader, to=reader)
        read = loratools.open_adapter(tmp_path / reader)
        delta = {
            module.partition(".")[2]: each.delta_weight().double().numpy() for module, each in read.updates.items()
        }
        same(delta, case(name, names_for(name, reader)).back(ours))
