"""PEFT's matching rules, against PEFT itself."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratools.dialects.peft.config import PeftConfig
from loratools.dialects.peft.patterns import ConfigFile, PatternKeys

MODULES = [
    f"{stem}.{layer}.{block}"
    for stem, layer, block in product(
        ("model.layers", "transformer.h", "model.language_model.layers", "layers"),
        (0, 1, 11),
        ("self_attn.q_proj", "mlp.experts.1.up_proj", "attn.c_attn", "q_proj"),
    )
] + ["lm_head", "model.embed_tokens", "q_proj", "model.1.q_proj"]

FRAGMENTS = [
    "q_proj",
    "up_proj",
    "layers.1",
    ".*",
    r"layers\.\d+\..*",
    "self_attn.q_proj",
    "^model",
    "proj",
    "(q|up)_proj",
]

CONFIGS: list[dict[str, Any]] = [
    {"target_modules": targets, **options}
    for targets, options in product(
        (["q_proj"], ["q_proj", "c_attn", "model.layers.1.self_attn.q_proj"], ["proj"], ["lm_head"]),
        (
            {},
            {"exclude_modules": ["self_attn.q_proj"]},
            {"exclude_modules": r".*\.1\..*"},
            {"layers_to_transform": 1},
            {"layers_to_transform": [0, 11]},
            {"layers_to_transform": []},
            {"layers_to_transform": [1], "layers_pattern": "h"},
            {"layers_to_transform": [1], "layers_pattern": ["layers", "h"]},
            {"layers_to_transform": [1], "layers_pattern": ["experts"]},
            {"modules_to_save": ["self_attn", "lm_head"]},
        ),
    )
] + [
    {"target_modules": expression, **options}
    for expression, options in product(
        (r".*q_proj", r"model\.layers\.[01]\..*", r"q_proj", r".*(q|up)_proj"), ({}, {"exclude_modules": ["up_proj"]})
    )
]


@pytest.mark.interop
@pytest.mark.parametrize("fields", CONFIGS, ids=str)
def test_targets_are_those_of_peft(fields: dict[str, Any], tmp_path: Any) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    theirs = LoraConfig(**fields)
    ours = PeftConfig.parse({"peft_type": "LORA", **fields}, tmp_path).targets
    assert {module: ours.select(module) for module in MODULES} == {
        module: bool(check_target_module_exists(theirs, module)) for module in MODULES
    }


@pytest.mark.interop
@given(st.lists(st.sampled_from(FRAGMENTS + MODULES), max_size=5, unique=True), st.sampled_from(MODULES))
def test_the_first_pattern_wins_as_in_peft(patterns: list[str], module: str) -> None:
    from peft.utils.other import get_pattern_key

    ours = PatternKeys(patterns, "rank_pattern", ConfigFile(Path())).first(module)
    assert (module if ours is None else ours) == get_pattern_key(patterns, module)
