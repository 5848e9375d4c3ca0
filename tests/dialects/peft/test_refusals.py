"""Every refusal by its sentence: what is damaged (`BadFile`), and what is sound but not read (`UnsupportedAdapter`)."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loratools import dialects
from loratools.dialects.peft import patterns
from loratools.errors import BadFile, UnsupportedAdapter
from tests.dialects.adapters import Q0, Q1, V0, opened, peft_folder, state, write_config

State = dict[str, torch.Tensor]
A0, B0 = f"base_model.model.{Q0}.lora_A.weight", f"base_model.model.{Q0}.lora_B.weight"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"init_lora_weights": "pissa"}, "PEFT changes the base model whenever this adapter is loaded"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights = pissa_niter_16: PEFT changes the base"),
        ({"init_lora_weights": "OLoRA"}, "init_lora_weights = OLoRA: PEFT changes the base"),
        ({"init_lora_weights": "corda", "corda_config": {}}, "init_lora_weights = corda: PEFT changes the base"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights = loftq: PEFT changes the base"),
        ({"init_lora_weights": "newest"}, "init_lora_weights = newest: not known here; it may change the base model"),
        ({"use_qalora": True}, "QA-LoRA pools the input in groups before A"),
        ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA stores block-diagonal factors"),
        ({"alora_invocation_tokens": [1, 2]}, "an activated LoRA acts only after its invocation tokens"),
        ({"arrow_config": {"top_k": 3}}, "an arrow router chooses among several adapters"),
        ({"kasa_config": {}}, "KaSA also takes the smallest singular components out of the base model"),
        ({"monteclora_config": {}}, "MonteCLoRA samples its factors"),
        ({"enable_lora": [True, False, True]}, r"PEFT 0.2's fused attention \(enable_lora\) has grouped factors"),
    ],
)
def test_configs_that_are_sound_but_not_plain_lora(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UnsupportedAdapter, match=sentence) as refusal:
        dialects.open_adapter(peft_folder(tmp_path / "a", **changes))
    assert len(refusal.value.problems) == 1
    assert "adapter_config.json" in refusal.value.message


@pytest.mark.parametrize(
    "changes",
    [{"init_lora_weights": init} for init in (True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga", "EVA")]
    + [
        {"megatron_config": {"tp": 2}, "megatron_core": "megatron.core"},
        {"loftq_config": {}, "corda_config": None, "eva_config": {"rho": 2.0}, "runtime_config": {}},
        {"enable_lora": None, "merge_weights": False, "fan_in_fan_out": True},
        {"velora_config": {"num_groups": 2}, "qalora_group_size": 16, "use_qalora": False},
        {"modules_to_save": [], "bias": "lora_only", "lora_bias": False, "target_parameters": []},
    ],
)
def test_fields_that_change_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    adapter = dialects.open_adapter(peft_folder(tmp_path / "a", **changes))
    assert {update.scaling for update in adapter.updates.values()} == {2.0}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"r": 0}, "r: expected a rank above zero, found '0'"),
        ({"r": True}, "r: expected a rank above zero, found 'True'"),
        ({"r": "4"}, "r: expected a rank above zero"),
        ({"lora_alpha": "16"}, "lora_alpha: expected a number, found '16'"),
        ({"use_rslora": 1}, "use_rslora: expected a switch, found '1'"),
        ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern: expected names to ranks"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern: expected names to numbers"),
        ({"target_modules": {"q_proj": 1}}, "target_modules: expected a list of names or a regular expression"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform: expected layer numbers"),
        ({"bias": "some"}, "bias: expected none, all or lora_only, found 'some'"),
        ({"target_modules": "(q_proj"}, r"target_modules: '\(q_proj' is not a regular expression: missing \)"),
        ({"alpha_pattern": {"*": 1}}, "alpha_pattern: .* is not a regular expression"),
        ({"rank_pattern": {r"(a)\9": 4}}, "rank_pattern: .* is not a regular expression: invalid group reference"),
        ({"exclude_modules": "x" * 20_001}, "exclude_modules: a regular expression of 20001 characters; at most 20000"),
        ({"target_modules": ".*_proj", "layers_to_transform": 0}, "PEFT allows no layers_to_transform"),
    ],
)
def test_configs_that_peft_would_not_accept(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadFile, match=sentence):
        dialects.open_adapter(peft_folder(tmp_path / "a", **changes))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", "(?:.|.)*[xyz][xyz]"),
        ("exclude_modules", "(?:.|.)*[xyz][xyz]"),
        ("modules_to_save", ["(?:.|.)*[xyz][xyz]"]),
        ("rank_pattern", {"(?:.|.)*[xyz][xyz]": 4}),
        ("alpha_pattern", {"(?:.|.)*[xyz][xyz]": 4}),
    ],
)
def test_an_expression_that_runs_away_is_named(
    tmp_path: Path, field: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.02)
    sentence = rf"adapter_config.json: {field}: the regular expression .*xyz.* takes too long to match 'model.layers"
    with pytest.raises(UnsupportedAdapter, match=sentence):
        dialects.open_adapter(peft_folder(tmp_path / "a", **{field: value}))


def test_all_wrong_fields_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(BadFile) as refusal:
        dialects.open_adapter(peft_folder(tmp_path / "a", r=-1, lora_alpha=None, bias=3, task_type=[]))
    assert [line.split(":")[0] for line in refusal.value.problems] == ["r", "bias", "task_type"]


def without(name: str) -> Callable[[State], None]:
    """Return a change that takes a tensor out."""
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[State], None]:
    """Return a change that puts a tensor in."""
    return lambda tensors: tensors.update({name: torch.zeros(shape, dtype=dtype)})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without(B0), rf"{B0}: missing, while its partner is there"),
        (without(A0), rf"{A0}: missing, while its partner is there"),
        (put(A0, 3, 10), rf"{Q0}: A \(3, 10\) and B \(12, 4\) do not share a rank"),
        (put(A0, 4, 10, dtype=torch.int8), rf"{A0}: I8 numbers, expected floating point"),
        (put("base_model.model.x.fc.lora_A.weight", 4, 10), "x.fc: has tensors, but the config does not target it"),
        (
            put("model.x.lora_A.weight", 4, 10),
            r"1 tensor whose names do not begin with base_model.model.: model.x",
        ),
        (put(A0.replace("lora_A", "lora_A.other"), 4, 10), "a second tensor for base_model.model.model.layers.0"),
        (put(A0, 0), "1 of 6 tensors are empty or flattened: saved under DeepSpeed ZeRO-3 or FSDP without gathering"),
        (put(B0, 48), "1 of 6 tensors are empty or flattened"),
        (put("base_model.model._flat_param", 480), "1 of 7 tensors are empty or flattened"),
    ],
)
def test_tensors_that_contradict_each_other_or_the_config(
    tmp_path: Path, change: Callable[[State], None], sentence: str
) -> None:
    tensors = state()
    change(tensors)
    with pytest.raises(BadFile, match=sentence):
        dialects.open_adapter(peft_folder(tmp_path / "a", tensors))


def test_two_adapters_in_one_dump(tmp_path: Path) -> None:
    tensors = state(middle=".one") | {
        name.replace("layers.0", "layers.5"): tensor.clone() for name, tensor in state(middle=".two").items()
    }
    tensors = {name: tensor for name, tensor in tensors.items() if "layers.1.self_attn.q_proj.lora_A.two" not in name}
    with pytest.raises(BadFile, match="several adapters in one file: one, two; save them one by one"):
        dialects.open_adapter(peft_folder(tmp_path / "a", tensors))


def test_a_rank_that_the_config_contradicts(tmp_path: Path) -> None:
    with pytest.raises(BadFile) as refusal:
        dialects.open_adapter(peft_folder(tmp_path / "a", r=8, rank_pattern={"v_proj": 4}))
    assert refusal.value.problems == tuple(
        f"{module}: its tensors have rank 4, the config says 8" for module in (Q0, Q1)
    )


@pytest.mark.parametrize(
    ("changes", "stray"),
    [
        ({"target_modules": ["q_proj"]}, [V0]),
        ({"target_modules": ["proj"]}, [Q0, Q1, V0]),
        ({"target_modules": r".*layers\.0.*"}, [Q1]),
        ({"exclude_modules": ["v_proj"]}, [V0]),
        ({"exclude_modules": r".*\.0\..*"}, [Q0, V0]),
        ({"layers_to_transform": [0]}, [Q1]),
        ({"layers_to_transform": 1, "layers_pattern": "layers"}, [Q0, V0]),
        ({"layers_to_transform": [0, 1], "layers_pattern": ["h"]}, [Q0, Q1, V0]),
        ({"modules_to_save": ["v_proj"]}, [V0]),
    ],
)
def test_modules_that_the_config_does_not_target(tmp_path: Path, changes: dict[str, Any], stray: list[str]) -> None:
    with pytest.raises(BadFile) as refusal:
        dialects.open_adapter(peft_folder(tmp_path / "a", **changes))
    assert sorted(refusal.value.problems) == sorted(
        f"{module}: has tensors, but the config does not target it, so PEFT would ignore them" for module in stray
    )


def test_a_target_by_full_name_that_has_no_tensors(tmp_path: Path) -> None:
    missing = "model.layers.1.self_attn.v_proj"
    with pytest.raises(BadFile) as refusal:
        dialects.open_adapter(peft_folder(tmp_path / "a", target_modules=[Q0, Q1, V0, missing]))
    assert refusal.value.problems == (f"{missing}: the config targets it by its full name, but it has no tensors",)


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        (f"{Q0}.lora_diag", (4,), rf"{Q0}: no kind of update .* lora_diag \(1-D\)"),
        (f"{Q0}.lora_new.weight", (4,), rf"{Q0}: no kind of update .* lora_new.weight \(1-D\)"),
    ],
)
def test_tensors_of_kinds_that_are_not_read_are_named(
    tmp_path: Path, name: str, shape: tuple[int, ...], sentence: str
) -> None:
    tensors = state()
    tensors[f"base_model.model.{name}"] = torch.ones(shape)
    with pytest.raises(UnsupportedAdapter, match=sentence):
        dialects.open_adapter(peft_folder(tmp_path / "a", tensors))


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        (f"{Q0}.lora_magnitude_vector", (9,), "has shape (9,), expected one number for each of 12 features"),
        (f"{Q0}.lora_magnitude_vector", (3, 4), "has shape (3, 4), expected one number for each of 12 features"),
        (f"{Q0}.lora_B.bias", (9,), "lora_B.bias has shape (9,), expected (12,)"),
        (
            "model.embed_tokens.token_adapter.trainable_tokens_delta",
            (2, 10),
            "nothing says which token indices these rows are for (trainable_token_indices)",
        ),
    ],
)
def test_parts_that_do_not_fit_the_others(tmp_path: Path, name: str, shape: tuple[int, ...], sentence: str) -> None:
    tensors = state()
    tensors[f"base_model.model.{name}"] = torch.ones(shape)
    with pytest.raises(BadFile) as refusal:
        dialects.open_adapter(peft_folder(tmp_path / "a", tensors))
    assert sentence in refusal.value.problems[0]


def test_trained_biases_replace_and_untrained_ones_are_copies(tmp_path: Path) -> None:
    tensors = state()
    tensors[f"base_model.model.{Q0}.base_layer.bias"] = torch.ones(12)
    adapter = dialects.open_adapter(peft_folder(tmp_path / "a", tensors, bias="lora_only"))
    assert (list(adapter.replacements), list(adapter.copies)) == ([f"{Q0}.bias"], [])
    adapter = dialects.open_adapter(peft_folder(tmp_path / "b", tensors))
    assert (list(adapter.replacements), list(adapter.copies)) == ([], [f"{Q0}.bias"])


def test_what_a_raw_dump_kept_beside_trained_tensors(tmp_path: Path) -> None:
    """PEFT's wrapper of modules_to_save holds both; only the trained one means anything."""
    tensors = state()
    tensors["base_model.model.score.modules_to_save.default.weight"] = torch.ones(2, 10)
    tensors["base_model.model.score.original_module.weight"] = torch.zeros(2, 10)
    adapter, warnings = opened(peft_folder(tmp_path / "a", tensors))
    assert (list(adapter.replacements), list(adapter.copies)) == (["score.weight"], [])
    torch.testing.assert_close(adapter.replacements["score.weight"].load(), torch.ones(2, 10))
    assert f"{tmp_path / 'a'}: score.weight: copies of the base model's, which PEFT does not load" in warnings


def test_dora_without_its_magnitude(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=rf"{Q0}.lora_magnitude_vector: missing, and the config says use_dora"):
        dialects.open_adapter(peft_folder(tmp_path / "a", use_dora=True))


def test_missing_files(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(BadFile, match=r"adapter_config.json: no such file, and without it the scaling is unknown"):
        dialects.open_adapter(folder)
    write_config(tmp_path / "b")
    with pytest.raises(
        BadFile, match=r"no adapter_model.safetensors or adapter_model.bin .* holds adapter_config.json"
    ):
        dialects.open_adapter(tmp_path / "b")
    with pytest.raises(BadFile, match="no such file or folder"):
        dialects.open_adapter(tmp_path / "c")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_git_lfs_pointers(tmp_path: Path, ending: str) -> None:
    write_config(tmp_path)
    (tmp_path / f"adapter_model.{ending}").write_bytes(POINTER)
    with pytest.raises(BadFile, match="Git-LFS pointer, not the file itself"):
        dialects.open_adapter(tmp_path)


def test_an_empty_bin(tmp_path: Path) -> None:
    write_config(tmp_path)
    torch.save({}, tmp_path / "adapter_model.bin")
    size = (tmp_path / "adapter_model.bin").stat().st_size
    with pytest.raises(BadFile, match=rf"an empty state dict \({size} bytes\)"):
        dialects.open_adapter(tmp_path)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("the pickle was executed",))


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    write_config(tmp_path)
    torch.save(state() | {"evil": Evil()}, tmp_path / "adapter_model.bin")
    with pytest.raises(BadFile, match="this pickle holds more than tensors and will not be opened"):
        dialects.open_adapter(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps({"evil": Evil(), "pad": b"0" * 2000}))
    with pytest.raises(BadFile, match="this pickle holds more than tensors and will not be opened"):
        dialects.open_adapter(tmp_path)


def test_a_damaged_config_and_a_giant_one(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a")
    config = folder / "adapter_config.json"
    config.write_text(config.read_text()[:-5])
    with pytest.raises(BadFile, match="damaged JSON"):
        dialects.open_adapter(folder)
    config.write_text(json.dumps({"peft_type": "LORA", "pad": " " * 16_000_000}))
    with pytest.raises(BadFile, match="larger than 16000000 bytes"):
        dialects.open_adapter(folder)


def test_an_adapter_without_tensors(tmp_path: Path) -> None:
    write_config(tmp_path)
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(BadFile, match="no LoRA tensors in it"):
        dialects.open_adapter(tmp_path)
