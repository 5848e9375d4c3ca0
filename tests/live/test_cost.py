"""What a LoRA costs: the paper's numbers for GPT-3, and what PEFT counts on real classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import loratools
from loratools.errors import IncompatibleAdapter, InvalidOption
from loratools.live.cost import Shapes, cost, shapes_of
from tests.make import tiny

L, D = 96, 12288


def gpt3() -> Shapes:
    """GPT-3's shape with the names of the paper's Table 5, in 16 bits."""
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (50257, D), "wpe.weight": (2048, D)}
    for i in range(L):
        shapes |= {f"h.{i}.attn.{name}.weight": (D, D) for name in ("q", "k", "v", "o")}
        shapes |= {f"h.{i}.mlp.up.weight": (4 * D, D), f"h.{i}.mlp.down.weight": (D, 4 * D)}
    parameters = sum(rows * columns for rows, columns in shapes.values())
    return Shapes("gpt3", shapes, {}, 2 * parameters)


def test_the_papers_adapter_of_gpt_3() -> None:
    """§4.2: r = 4 on q and v; the paper says 35 MB, of 350 GB, and 354 GB for 100 tasks instead of 35 TB."""
    found = cost(gpt3(), 4, ["q", "v"])
    assert found.parameters == 18_874_368
    assert found.nbytes == {"F32": 75_497_472, "BF16": 37_748_736, "F16": 37_748_736}
    assert found.optimizer == 8 * 18_874_368
    assert found.base_parameters == pytest.approx(175e9, rel=0.01)
    assert found.tasks_with == found.base_nbytes + 100 * 37_748_736
    assert found.tasks_with == pytest.approx(354e9, rel=0.01)
    assert found.tasks_without == pytest.approx(35e12, rel=0.01)
    assert found.share == pytest.approx(18_874_368 / found.base_parameters)
    assert found.base_optimizer == 8 * found.base_parameters


TABLE_5 = [("q", 8), ("k", 8), ("v", 8), ("o", 8), ("q k", 4), ("q v", 4), ("q k v o", 2)]


@pytest.mark.parametrize(("targets", "rank"), TABLE_5)
def test_table_5(targets: str, rank: int) -> None:
    """The same 18.9 M parameters ("18M") on each choice of weights; and the budget gives each one's rank back."""
    names = targets.split()
    assert cost(gpt3(), rank, names).parameters == 18_874_368
    assert cost(gpt3(), None, names, budget=18_900_000).rank == rank
    assert cost(gpt3(), None, names, budget=18_874_367).rank == rank - 1


def test_a_budget_that_does_not_reach() -> None:
    with pytest.raises(InvalidOption, match="rank 1 on these 192 modules has 4718592 parameters"):
        cost(gpt3(), None, ["q", "v"], budget=4_718_591)


def test_stacks_and_convolutions() -> None:
    shapes = {"mlp.experts.gate_up_proj": (4, 6, 8), "conv.weight": (8, 4, 3, 3), "norm.weight": (8,)}
    model = Shapes("toy", shapes, {}, 0)
    assert cost(model, 2, ["gate_up_proj"]).parameters == 2 * 4 * (6 + 8)
    assert cost(model, 2, ["conv"]).parameters == 2 * (4 * 9 + 8)


def test_targets_that_name_nothing(tmp_path: Path) -> None:
    base = tiny.save_llama(tmp_path / "base", tiny.llama_weights())
    with pytest.raises(IncompatibleAdapter, match=r"2 targets name nothing") as caught:
        loratools.estimate(base, targets=["q_prj", "v_proj", "norm"])
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["q_prj", "norm"]
    assert "q_proj" in caught.value.problems[0]


def test_wrong_numbers_are_all_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption) as caught:
        loratools.estimate(tmp_path, 0, budget=-1, dtype="int8", tasks=0)
    assert len(caught.value.problems) == 5


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 128},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 32},
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "rotary_dim": 8},
    "qwen3_moe": {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2,
                  "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "num_experts": 4,
                  "head_dim": 16},
    "roberta": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
                "vocab_size": 128},
}  # fmt: skip
TARGETS = {
    "llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "gptj": ["q_proj", "v_proj"], "qwen3_moe": ["q_proj", "o_proj"],
    "roberta": ["query", "value"],
}  # fmt: skip


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("all_linear", [False, True])
def test_peft_counts_the_same(model_type: str, all_linear: bool, tmp_path: Path) -> None:
    """From config.json alone."""
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    if all_linear and model_type == "qwen3_moe":
        pytest.skip("PEFT gives routers no factors of this class, and experts only by target_parameters")
    config = {"model_type": model_type, "dtype": "bfloat16", **CONFIGS[model_type]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    targets: Any = "all-linear" if all_linear else TARGETS[model_type]
    found = loratools.estimate(tmp_path, 4, targets)
    assert loratools.estimate(tmp_path / "config.json", 4, targets).parameters == found.parameters
    known = transformers.AutoConfig.for_model(**config)
    kind = transformers.AutoModelForCausalLM
    model = kind.from_config(known)
    before = sum(parameter.numel() for parameter in model.parameters())
    options = {"task_type": "CAUSAL_LM", "fan_in_fan_out": model_type == "gpt2"}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, **options))
    assert found.parameters == wrapped.get_nb_trainable_parameters()[0]
    assert found.base_parameters == before
    assert found.base_nbytes == 2 * before


def test_a_config_that_nobody_knows(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "nobodys", "auto_map": {"AutoConfig": "evil.Evil"}}')
    with pytest.raises(IncompatibleAdapter, match=r"makes no model of this config\.json"):
        loratools.estimate(tmp_path)


def test_headers_and_config_agree(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    base = tiny.save_llama(tmp_path / "base", tiny.llama_weights())
    by_headers = shapes_of(base)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_bytes((base / "config.json").read_bytes())
    by_config = shapes_of(alone)
    assert dict(by_headers.shapes) == dict(by_config.shapes)
