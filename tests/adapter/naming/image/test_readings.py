"""Every family's names are found again from their flattened form, and names of several families are nobody's guess."""

from __future__ import annotations

import re
from typing import Any

import pytest

from loratools.adapter.naming.image import families, readings
from loratools.adapter.naming.image.patterns import Patterns
from loratools.adapter.naming.image.readings import ENCODER, Reading
from loratools.dialects.kohya.names import dotted, flattened
from tests.make.image_families import model_of, shapes_of

IMAGES = [name for name in families.names() if families.get(name).component != ENCODER]


def modules(reading: Reading) -> list[str]:
    """Return a module of each pattern, in block 3, and in the other one where there are two numbers."""
    family = reading.family
    patterns = family.original if reading.naming == "original" else family.diffusers
    return [pattern.format("3", "1", "0") for pattern in patterns]


@pytest.mark.parametrize("naming", readings.NAMINGS)
@pytest.mark.parametrize("name", families.names())
def test_no_two_names_become_one_and_each_is_found_again(name: str, naming: families.Naming) -> None:
    reading = Reading(name, naming)
    names = modules(reading)
    first = ENCODER if reading.family.component == ENCODER else readings_component(reading, names)
    flat, _ = flattened([f"{first}.{module}" for module in names])
    assert len(set(flat.values())) == len(names)
    for module in names:
        found = reading.find(module.replace(".", "_"), flat=True)
        assert found is not None
        assert found[0].format(*found[1]) == module


def readings_component(reading: Reading, names: list[str]) -> str:
    same = readings.leads(reading, names, "diffusers")
    return reading.family.component if all(lead.names == (m,) for m, lead in same.items()) else "diffusion_model"


@pytest.mark.parametrize("naming", readings.NAMINGS)
@pytest.mark.parametrize("name", IMAGES)
def test_what_leads_to_the_other_naming_leads_back(name: str, naming: families.Naming) -> None:
    forth = Reading(name, naming)
    other: families.Naming = "diffusers" if naming == "original" else "original"
    for module, lead in readings.leads(forth, modules(forth), other).items():
        back = readings.leads(Reading(name, other), lead.names, naming)
        assert all(module in place.names for place in back.values())
        assert [place.part for place in back.values()] == (
            [None] if len(lead.names) == 1 and lead.part is None else
            list(range(len(lead.names))) if lead.part is None else [None]
        )  # fmt: skip
        assert {place.swapped for place in back.values()} == {lead.swapped}


def test_flat_names_that_two_families_share_are_never_silently_one_of_them() -> None:
    """Every flat name of every family, alone: it is found as one module, or refused."""
    several: dict[str, set[str]] = {}
    for name in (name for name in IMAGES if "kohya" in families.get(name).prefixes):
        for naming in readings.NAMINGS:
            for module in modules(Reading(name, naming)):
                several.setdefault(module.replace(".", "_"), set()).add(module)
    shared = {flat for flat, dots in several.items() if len(dots) > 1}
    assert "double_blocks_3_img_attn_qkv" in shared
    for flat in sorted(shared):
        _, faults = dotted([("lora_unet_", flat)], {}, None)
        assert len(faults) == 1
        assert "could be" in faults[0]


def test_a_number_that_a_pattern_spells_out_is_that_number() -> None:
    patterns = Patterns(["blocks.{}.mlp.0", "blocks.{}.mlp.2", "norm1"])
    assert patterns.find("blocks.13.mlp.2") == ("blocks.{}.mlp.2", ("13",))
    assert patterns.find("blocks.13.mlp.1") is None
    assert patterns.find("norm2") is None
    assert Patterns(["blocks.{}.mlp.0"], flat=True).find("blocks_13_mlp_0") == ("blocks.{}.mlp.0", ("13",))


PUBLISHED: dict[str, tuple[str, dict[str, int]]] = {
    "flux": ("FluxTransformer2DModel", {}), "flux2": ("Flux2Transformer2DModel", {}),
    "chroma": ("ChromaTransformer2DModel", {}), "qwen_image": ("QwenImageTransformer2DModel", {}),
    "sd3": ("SD3Transformer2DModel", {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}),
    "hunyuan_video": ("HunyuanVideoTransformer3DModel", {}),
    "hunyuan_video_15": ("HunyuanVideo15Transformer3DModel", {}),
    "hunyuan_image": ("HunyuanImageTransformer2DModel", {}), "ltx": ("LTXVideoTransformer3DModel", {}),
    "cosmos": ("CosmosTransformer3DModel", {}), "mochi": ("MochiTransformer3DModel", {}),
    "cogvideox": ("CogVideoXTransformer3DModel", {}), "sana": ("SanaTransformer2DModel", {}),
    "pixart": ("PixArtTransformer2DModel", {"sample_size": 128}), "z_image": ("ZImageTransformer2DModel", {}),
    "ideogram4": ("Ideogram4Transformer2DModel", {}), "fibo2": ("BriaFibo2Transformer2DModel", {}),
    "lumina2": ("Lumina2Transformer2DModel", {}),
}  # fmt: skip
"""Classes that are as deep and as wide by default as what was published, or with these numbers."""

ALONE = {
    "qwen_image", "hunyuan_video_15", "hunyuan_image", "ltx", "cosmos", "mochi", "sana", "pixart", "z_image",
    "ideogram4", "fibo2", "lumina2", "sd3",
}  # fmt: skip
"""Families whose attentions, all of them, lead to names that no other's do, or are as wide as no other's."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("blocks", [None, 3])
@pytest.mark.parametrize("name", PUBLISHED)
def test_attentions_of_published_models_are_never_read_as_another_familys(name: str, blocks: int | None) -> None:
    """Adapters of attentions alone have names that many families share: widths and depths tell, or it stays open."""
    diffusers: Any = pytest.importorskip("diffusers")
    cls, config = PUBLISHED[name]
    every = shapes_of(model_of(getattr(diffusers, cls), **config))
    shapes = {
        m: s for m, s in every.items() if re.search(r"\.\d+\..*attn\w*\.to_[qkv]$|\.\d+\.attention\.to_[qkv]$", m)
    }
    shapes = {m: s for m, s in shapes.items() if blocks is None or int(re.findall(r"\d+", m)[0]) < blocks}
    assert len(shapes) >= 6
    left = readings.told([r for r in readings.fitting(shapes) if r.naming == "diffusers"], shapes)
    assert name in {reading.name for reading in left}
    if name in ALONE and blocks is None:
        places = [readings.leads(r, shapes, "original") for r in left if r.family.prefixes.get("comfy")]
        assert all(place == places[0] for place in places)


@pytest.mark.parametrize("name", ["sd", "flux", "wan", "ltx2"])
def test_the_readings_with_most_modules_are_those_that_find_most_one_by_one(name: str) -> None:
    names = modules(Reading(name, "original"))
    names += [*names[:3], "no.such.module", "blocks.1"]  # a name that is given twice counts twice
    found = {reading: sum(1 for module in names if reading.find(module)) for reading in readings.every()}
    count, best = readings.most(names)
    assert count == max(found.values()) >= len(names) - 2
    assert best == [reading for reading in found if found[reading] == count]
