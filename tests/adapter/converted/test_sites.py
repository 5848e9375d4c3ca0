"""Updates on what transformers makes of a base's tensors, by hand: slices, experts, permuted rows, both ways round."""

from __future__ import annotations

import numpy as np
import pytest

from loratools.errors import IncompatibleAdapter
from tests.adapter.placement.placing import Arrays, adapter, delta, merge_by_hand, random_base

KIMI = {"model_type": "kimi_k25", "vision_config": {"model_type": "kimi_k25_vision", "num_attention_heads": 2}}
KIMI |= {"architectures": ["Kimi_K25ForConditionalGeneration"]}
MIXTRAL = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
HRM = {"model_type": "hrm_text", "architectures": ["HrmTextForCausalLM"]}
WQKV, VISION = "vision_tower.encoder.blocks.0.wqkv.weight", "model.vision_tower.layers.0.attn"


def differences(base: Arrays, merged: Arrays) -> Arrays:
    return {name: merged[name] - W for name, W in base.items()}


def test_q_lands_on_permuted_rows_of_a_fused_weight_and_v_on_plain_ones() -> None:
    """Head h of q has 4 rows in halves; the files have row 2j+p of a head where the module has row 2p+j."""
    given = adapter({f"{VISION}.q_proj": (8, 5), f"{VISION}.v_proj": (8, 5)})
    base = random_base({WQKV: (24, 5)})
    q, v = (delta(update) for update in given.updates.values())
    expected = np.zeros((24, 5))
    expected[[0, 2, 1, 3, 4, 6, 5, 7]] = q
    expected[16:] = v
    np.testing.assert_allclose(differences(base, merge_by_hand(base, given, KIMI))[WQKV], expected, atol=1e-12)


def test_a_fused_weight_of_files_lands_whole_on_a_base_of_files() -> None:
    given = adapter({WQKV.removesuffix(".weight"): (24, 5)})
    base = random_base({WQKV: (24, 5)})
    (change,) = map(delta, given.updates.values())
    np.testing.assert_allclose(differences(base, merge_by_hand(base, given, KIMI))[WQKV], change, atol=1e-12)


def test_an_expert_of_files_lands_inside_the_stack_that_transformers_saves() -> None:
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    down = "model.layers.0.mlp.experts.down_proj"
    old = "model.layers.0.block_sparse_moe.experts"
    given = adapter({f"{old}.2.w3": (6, 4), f"{old}.0.w1": (6, 4), f"{old}.1.w2": (4, 6)})
    base = random_base({stack: (3, 12, 4), down: (3, 4, 6)})
    w3, w1, w2 = map(delta, given.updates.values())
    expected = {stack: np.zeros((3, 12, 4)), down: np.zeros((3, 4, 6))}
    expected[stack][2, 6:], expected[stack][0, :6], expected[down][1] = w3, w1, w2
    changed = differences(base, merge_by_hand(base, given, MIXTRAL))
    for name, change in expected.items():
        np.testing.assert_allclose(changed[name], change, atol=1e-12)


def test_a_fused_projection_of_files_lands_on_the_projections_of_modules() -> None:
    parts = ("gate_proj", "q_proj", "k_proj", "v_proj")
    base = random_base({f"model.layers.0.self_attn.{part}.weight": (4, 3) for part in parts})
    given = adapter({"model.layers.0.attn.gqkv_proj": (16, 3)})
    (change,) = map(delta, given.updates.values())
    changed = differences(base, merge_by_hand(base, given, HRM))
    for i, part in enumerate(parts):
        rows = change[4 * i : 4 * (i + 1)]
        np.testing.assert_allclose(changed[f"model.layers.0.self_attn.{part}.weight"], rows, atol=1e-12)


def test_rows_that_a_permutation_takes_apart_are_refused_by_its_name() -> None:
    base = random_base({f"{VISION}.{part}.weight": (8, 5) for part in ("q_proj", "k_proj", "v_proj")})
    with pytest.raises(IncompatibleAdapter, match="by permute_for_rope, and the base has what comes of it"):
        merge_by_hand(base, adapter({"vision_tower.encoder.blocks.0.wqkv": (24, 5)}), KIMI)


def test_another_shape_is_refused_with_what_transformers_has() -> None:
    base = random_base({WQKV: (24, 5)})
    with pytest.raises(IncompatibleAdapter, match=r"shape \(9, 5\), .*q_proj\.weight in transformers has \(8, 5\)"):
        merge_by_hand(base, adapter({f"{VISION}.q_proj": (9, 5)}), KIMI)
