"""Block weights: a list of numbers is for the blocks of the model that an adapter changes, in its family's order."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from loratools.adapter import kinds
from loratools.adapter.model import Adapter
from loratools.adapter.naming.image import families
from loratools.adapter.naming.image.groups import Group
from loratools.adapter.naming.image.readings import NAMINGS, Reading
from loratools.adapter.weights import Weight
from loratools.adapter.weights.layouts import layouts_of
from loratools.errors import LoraToolsError
from loratools.storage.lazy import LazyTensor

WAN = ("self_attn.q", "cross_attn.k_img")


def adapter(modules: Sequence[str]) -> Adapter:
    A, B = (LazyTensor.of(torch.ones(shape)) for shape in ((2, 4), (4, 2)))
    one = kinds.get("lora").build({"lora_A.weight": A, "lora_B.weight": B}, 1.0, 2.0)
    return Adapter(dict.fromkeys(modules, one))


def wan(blocks: Sequence[int]) -> list[str]:
    return [f"diffusion_model.blocks.{block}.{name}" for block in blocks for name in WAN]


def listed(count: int) -> Weight:
    """Return a weight with the numbers 0, 1, 2, … so that each module's weight is its place."""
    return Weight.parse("lbw:" + ",".join(map(str, range(count))))


@pytest.mark.parametrize(("modules", "count", "places"), [
    (["diffusion_model.patch_embedding", *wan([0, 29])], 31, [0, 1, 1, 30, 30]),
    (["diffusion_model.patch_embedding", *wan([0, 29])], 41, [0, 1, 1, 30, 30]),
    (wan([1]), 3, [2, 2]), (wan([44]), 46, [45, 45]),
    ([*wan([2]), "diffusion_model.vace_blocks.1.before_proj"], 49, [3, 3, 42]),
    (["transformer.blocks.3.ffn.net.0.proj", "transformer_2.blocks.4.attn1.to_q"], 31, [4, 5]),
    ([f"transformer.transformer_blocks.{block}.attn.add_k_proj" for block in (0, 59)]
     + ["transformer.transformer_blocks.59.img_mlp.net.2"], 61, [1, 60, 60]),
    (["diffusion_model.layers.25.attention.out", "diffusion_model.noise_refiner.1.attention.out",
      "diffusion_model.context_refiner.0.attention.out", "diffusion_model.cap_embedder.1",
      "diffusion_model.final_layer.linear", "diffusion_model.layers.0.adaLN_modulation.1"], 31, [26, 28, 29, 0, 0, 1]),
    (["diffusion_model.joint_blocks.23.x_block.attn.proj",
      "text_encoder.text_model.encoder.layers.3.mlp.fc1"], 25, [24, 0]),
])  # fmt: skip
def test_numbers_are_for_what_is_in_no_block_and_for_each_block(
    modules: list[str], count: int, places: list[int]
) -> None:
    weight = listed(count).bound(adapter(modules), "one")
    assert [weight.of(module) for module in modules] == places
    assert [weight.negated().of(module) for module in modules] == [-place for place in places]


@pytest.mark.parametrize("count", [1, 2, 30, 32, 61])
def test_another_count_is_refused_with_the_expected_places(count: int) -> None:
    with pytest.raises(LoraToolsError, match=r"expected 31 of Wan.*1 for what is in no block, 30 for blocks.* or 41"):
        listed(count).bound(adapter(wan([0, 7])), "one")


def test_flux_has_the_list_that_image_people_write_and_that_of_its_family() -> None:
    modules = ["diffusion_model.double_blocks.18.img_attn.proj", "diffusion_model.single_blocks.37.modulation.lin"]
    for count, places in ((61, [21, 59]), (58, [19, 57])):
        weight = listed(count).bound(adapter(modules), "one")
        assert [weight.of(module) for module in modules] == places
    with pytest.raises(LoraToolsError, match=r"expected 61 for Flux.1 .CLIP, T5.* or 58 of Flux.1"):
        listed(31).bound(adapter(modules), "one")


def test_a_language_model_has_no_blocks() -> None:
    with pytest.raises(LoraToolsError, match="lists of 12"):
        listed(33).bound(adapter(["model.layers.0.mlp.up_proj"]), "one")


IMAGES = [name for name in families.names() if families.get(name).component not in ("unet", "text_encoder")]


@pytest.mark.parametrize("name", IMAGES)
def test_the_blocks_of_a_family_come_in_one_order_under_both_names(name: str) -> None:
    """Each family's modules in block 0 of every list, by either naming: their readings have the same layouts."""
    family = families.get(name)
    if family.beside:
        return
    whole = [pair for pair in family.renames.items() if "{}" in pair[0] and not pair[0].startswith("mixins")]
    found = [
        list(layouts_of(Group("", adapter([pair[side].format(0, 0, 0) for pair in whole]).updates, (), ()), reading))
        for side, reading in enumerate(Reading(name, naming) for naming in NAMINGS)
    ]
    assert found[0]
    for first, second in zip(*found, strict=True):
        assert len(first) == len(second) == len(first.names)
        assert [first.place(a.format(0, 0, 0)) for a, _ in whole] == [second.place(b.format(0, 0, 0)) for _, b in whole]
