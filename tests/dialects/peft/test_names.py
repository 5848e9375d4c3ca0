from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratools import dialects
from loratools.dialects.peft.names import group, unwrap
from loratools.errors import LoraToolsError
from loratools.format import keys
from loratools.storage.lazy import LazyTensor
from tests.dialects.adapters import peft_folder

MODULE = "model.layers.0.self_attn.q_proj"
SEGMENT = st.text("abcdefgh_0123456789", min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        (f"base_model.model.{MODULE}.lora_A.weight", (MODULE, "lora_A.weight")),
        (f"base_model.model.{MODULE}.lora_magnitude_vector", (MODULE, "lora_magnitude_vector")),
        (f"base_model.model.{MODULE}.lora_A.default.weight", (MODULE, "lora_A.default.weight")),
        ("base_model.model.wte.lora_embedding_B", ("wte", "lora_embedding_B")),
        ("base_model.model.e.token_adapter.trainable_tokens_delta", ("e", "token_adapter.trainable_tokens_delta")),
        ("base_model.model.mlp.experts.base_layer.lora_A.weight", ("mlp.experts.base_layer", "lora_A.weight")),
        ("base_model.model.lm_head.weight", ("lm_head.weight", "")),
        (f"{MODULE}.lora_A.weight", None),
        ("base_model.model.", None),
        ("base_model.model.lora_A.weight", None),
        ("base_model.model.a..lora_A.weight", None),
        ("base_model.model.a.lora_A.weight.", None),
    ],
)
def test_split(name: str, split: tuple[str, str] | None) -> None:
    assert keys.split(name) == split


@given(st.lists(SEGMENT, min_size=1, max_size=5).map(".".join), st.sampled_from(["", *keys.PARTS]))
def test_join_and_split_are_inverse(module: str, part: str) -> None:
    assert keys.split(keys.join(module, part)) == (module, part)


def test_unwrap_leaves_names_alone_that_only_look_wrapped() -> None:
    assert unwrap("base_model.model.module.q.lora_A.weight") == "base_model.model.module.q.lora_A.weight"
    assert unwrap("module._orig_mod.module.base_model.x") == "base_model.x"


@pytest.mark.parametrize("adapter", ["default", "weight2", "lora"])
@pytest.mark.parametrize("part", list(keys.PARTS))
def test_an_adapter_s_name_is_taken_out_of_every_part(part: str, adapter: str) -> None:
    kind, dot, rest = part.partition(".")
    if part == "token_adapter.trainable_tokens_delta":
        raw = f"{part}.{adapter}"
    elif part == "lora_magnitude_vector":
        raw = f"{part}.{adapter}.weight"  # PEFT keeps it in a module of its own
    else:
        raw = f"{kind}.{adapter}{dot}{rest}"
    lazy = LazyTensor("F32", (1,), lambda: pytest.fail("read"))
    groups = group({keys.join(MODULE, raw): lazy}, biases=False)
    assert groups.modules == {MODULE: {part: lazy}}
    assert groups.adapters == {adapter}
    assert groups.faults == []


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_damaged_files_are_read_or_refused_in_a_sentence(tmp_path: Path, file: str) -> None:
    folder = peft_folder(tmp_path / "a", rank_pattern={"q_proj": 4}, alpha_pattern={".*v_proj": 16})
    sound = (folder / file).read_bytes()
    chance = random.Random(0)
    accepted: list[set[int]] = []
    refusals: list[str] = []
    for _ in range(300):
        damaged = bytearray(sound)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(min(len(damaged), 1200))] = chance.choice(b'\0"{}[]:,0179abz.()*+\xff')
        (folder / file).write_bytes(damaged[: chance.choice([len(damaged)] * 3 + [chance.randrange(len(damaged))])])
        try:
            adapter = dialects.open_adapter(folder)
        except LoraToolsError as error:
            refusals.append(error.message)
        else:
            accepted.append({update.rank for update in adapter.updates.values()})
    assert len(refusals) > 100
    assert max(map(len, refusals)) < 1000
    assert accepted == [{4}] * (300 - len(refusals))
    assert len(accepted) > 10
