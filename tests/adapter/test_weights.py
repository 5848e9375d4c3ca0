"""Block weights: a list of numbers is for the blocks of the model that an adapter changes, in its family's order."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from loratools.adapter import kinds
from loratools.adapter.model import Adapter
from loratools.adapter.naming.image import families
from loratools.adapter.naming.image.groups import Group
from loratools.adapter.naming.image.readings import NAMINGS, Reading
from loratools.adapter.weights import Weight
from loratools.adapter.weights.layouts import layouts_of
from loratools.adapter.weights.scaled import scaled
from loratools.errors import LoraToolsError, UnsupportedAdapter
from loratools.storage.lazy import LazyTensor
from loratools.surgery.merge import merge
from loratools.surgery.switch import switch
from loratools.surgery.unmerge import unmerge
from loratools.surgery.verify import verify

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


CASES: list[tuple[dict[str, tuple[int, int]], dict[str, tuple[str, slice]], str, dict[str, float]]] = [
    ({f"blocks.{i}.self_attn.{x}": (6, 6) for i in range(3) for x in "qk"},
     {f"diffusion_model.blocks.{i}.self_attn.{x}": (f"blocks.{i}.self_attn.{x}", slice(None))
      for i in range(3) for x in "qk"},
     "lbw:1,0.5,0,-2" + ",1" * 27,
     {f"diffusion_model.blocks.{i}.self_attn.{x}": w for i, w in enumerate((0.5, 0, -2)) for x in "qk"}),
    ({f"double_blocks.{i}.img_attn.qkv": (24, 8) for i in range(2)} | {"single_blocks.0.linear1": (56, 8)},
     {f"transformer.transformer_blocks.{i}.attn.to_{x}":
      (f"double_blocks.{i}.img_attn.qkv", slice(8 * j, 8 * j + 8)) for i in range(2) for j, x in enumerate("qkv")}
     | {"transformer.single_transformer_blocks.0.attn.to_q": ("single_blocks.0.linear1", slice(0, 8))},
     "lbw:1,1,1,3,0" + ",1" * 17 + ",-0.5" + ",1" * 38,
     {f"transformer.transformer_blocks.{i}.attn.to_{x}": w for i, w in enumerate((3, 0)) for x in "qkv"}
     | {"transformer.single_transformer_blocks.0.attn.to_q": -0.5}),
    ({f"blocks.{i}.self_attn.q": (6, 6) for i in range(3)},
     {f"diffusion_model.blocks.{i}.self_attn.q": (f"blocks.{i}.self_attn.q", slice(None)) for i in range(3)},
     "0.5,*.blocks.1.*=0",
     {f"diffusion_model.blocks.{i}.self_attn.q": w for i, w in enumerate((0.5, 0, 0.5))}),
]  # fmt: skip


@pytest.mark.parametrize(("shapes", "places", "words", "weights"), CASES)
def test_a_merge_has_them_and_what_follows_it_too(
    shapes: dict[str, tuple[int, int]], places: dict[str, tuple[str, slice]], words: str, weights: dict[str, float],
    tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    draw = np.random.default_rng(5)
    base = {f"{name}.weight": draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    factors, expected = {}, {name: W.astype(np.float64) for name, W in base.items()}
    for module, (name, rows) in places.items():
        out, width = base[f"{name}.weight"][rows].shape
        A, B = (draw.normal(size=shape).astype(np.float32) for shape in ((2, width), (out, 2)))
        factors |= {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
        expected[f"{name}.weight"][rows] += weights[module] * (B.astype(np.float64) @ A.astype(np.float64))
    save_file(base, tmp_path / "base.safetensors")
    save_file(factors, tmp_path / "adapter.safetensors")
    model, lora, out = tmp_path / "base.safetensors", tmp_path / "adapter.safetensors", tmp_path / "merged"
    merge(model, lora, out, weights=[words], keep_residual=True)
    assert "left out, with weight 0: " in caplog.text
    made = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, W in expected.items():
        np.testing.assert_allclose(made[name], W, atol=1e-5, rtol=1e-5)
    assert json.loads((out / "loratools.json").read_text())["adapters"][0]["weights"] == words
    assert verify(out, model, lora, weights=words).ok
    assert not verify(out, model, lora).ok
    with pytest.raises(LoraToolsError, match=re.escape(f"merged with weight {words}, given 1")):
        unmerge(out, lora, tmp_path / "no", weights=1.0)
    for number, given in enumerate((None, words)):
        unmerge(out, lora, tmp_path / f"back{number}", weights=given)
        back = {n: t for file in (tmp_path / f"back{number}").glob("*.safetensors") for n, t in load_file(file).items()}
        assert all((back[name] == W).all() for name, W in base.items())
    switch(out, lora, lora, tmp_path / "switched", weights=[words])
    again = {n: t for file in (tmp_path / "switched").glob("*.safetensors") for n, t in load_file(file).items()}
    assert all((again[name] == tensor).all() for name, tensor in made.items())


def test_what_has_no_weight_of_its_own_is_refused_by_name() -> None:
    full = kinds.get("full").build({"diff": LazyTensor.of(torch.ones(4, 4))}, 1.0, 1.0)
    one = Adapter({"a.q_proj": full, "b.q_proj": full})
    with pytest.raises(UnsupportedAdapter) as refusal:
        scaled(one, "a.*=0.5", "one")
    assert refusal.value.problems == ("a.q_proj: kind full with weight 0.5",)
    assert list(scaled(one, "a.*=0", "one").updates) == ["b.q_proj"]
    with pytest.raises(LoraToolsError, match="for nothing"):
        scaled(one, "k_proj=0", "one")


@pytest.mark.parametrize(("kind", "parts"), [
    ("lora", {"lora_A.weight": (2, 6), "lora_B.weight": (4, 2)}),
    ("loha", {"hada_w1_a": (4, 2), "hada_w1_b": (2, 6), "hada_w2_a": (4, 2), "hada_w2_b": (2, 6)}),
    ("lokr", {"lokr_w1": (2, 2), "lokr_w2": (2, 3)}),
])  # fmt: skip
def test_a_scaled_module_has_the_weight_times_its_change(kind: str, parts: dict[str, tuple[int, ...]]) -> None:
    lazies = {name: LazyTensor.of(torch.randn(shape)) for name, shape in parts.items()}
    update = kinds.get(kind).build(lazies, 0.5, 1.0)
    made = scaled(Adapter({"a": update}), "a=-3,2", "one").updates["a"]
    torch.testing.assert_close(made.delta_weight(), -3 * update.delta_weight())


def test_patterns_may_be_kohyas_flattened_names() -> None:
    encoder = "text_model.encoder.layers.0.mlp.fc1"
    modules = ["diffusion_model.input_blocks.4.1.proj_in", f"text_encoder.{encoder}", f"text_encoder_2.{encoder}"]
    for pattern, numbers in {
        "lora_te1*": [1.0, 0.5, 1.0], "lora_te2_*_fc1": [1.0, 1.0, 0.5], "lora_te*": [1.0, 0.5, 0.5],
        "lora_unet_input_blocks_4_1_proj_in": [0.5, 1.0, 1.0], "re:lora_(unet|te1)_.*": [0.5, 0.5, 1.0],
        "text_encoder.*": [1.0, 0.5, 1.0],
    }.items():  # fmt: skip
        weight = Weight.parse(f"{pattern}=0.5")
        assert [weight.of(module) for module in modules] == numbers, pattern
        assert weight.unmatched(modules) == []
    assert Weight.parse("lora_te3_*=0").unmatched(["text_encoder.x", "model.layers.0.q_proj"]) == ["lora_te3_*"]


def test_a_pattern_for_nothing_shows_a_name_that_is_there() -> None:
    with pytest.raises(LoraToolsError) as caught:
        scaled(adapter(["text_encoder.a.fc1"]), "q_proj=0", "adapter 1")
    assert caught.value.problems == ("adapter 1: q_proj names none of its modules, such as text_encoder.a.fc1",)
