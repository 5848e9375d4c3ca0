"""PEFT's other types: every field of every config has a meaning, and what does not go together is said."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loratools import dialects, inspect
from loratools.decisions import warnings_to
from loratools.dialects.peft import typed, types
from loratools.dialects.peft.types._refused import REFUSED
from loratools.errors import BadFile, LoraToolsError, UnsupportedAdapter
from loratools.storage.checkpoint import Checkpoint

Q = "base_model.model.model.layers.0.self_attn.q_proj"
IA3 = {f"{Q}.ia3_l": torch.ones(6, 1)}
LOHA = {f"{Q}.hada_{name}": torch.ones(4, 2) if name.endswith("a") else torch.ones(2, 3)
        for name in ("w1_a", "w1_b", "w2_a", "w2_b")}  # fmt: skip


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """Return what is warned of while the test runs."""
    messages: list[str] = []
    with warnings_to(messages.append):
        yield messages


def folder(path: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """Write an adapter of a type; its config targets q_proj."""
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"target_modules": ["q_proj"], **config}))
    return path


@pytest.mark.parametrize("name", sorted({*types.names()}))
def test_every_field_of_a_type_has_one_meaning(name: str) -> None:
    """What PEFT writes is implemented, harmless or refused; its defaults are those taken, and are not refused."""
    pytest.importorskip("peft")
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    members = {member.value: config for member, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    module = types.get(name)
    tables = [set(module.FIELDS), set(module.HARMLESS), set(getattr(module, "REFUSED", {})) - set(module.FIELDS)]
    assert sum(map(len, tables)) == len(set().union(*tables))
    if name not in members:
        pytest.skip("a type of an older PEFT")
    fields = {field.name: field for field in dataclasses.fields(members[name])}
    general = {*typed._TYPES, *typed._HARMLESS}
    assert fields.keys() - general - set().union(*tables) == set()
    assert set().union(*tables) - fields.keys() == set()
    for field, ours in module.FIELDS.items():
        default = fields[field].default
        if default is dataclasses.MISSING:
            default = fields[field].default_factory() if callable(fields[field].default_factory) else None
        assert (ours.default or None) == (default or None), field
        assert default is None or ours.test(default), field
    refused = getattr(module, "REFUSED", {})
    assert [
        field for field, (refuses, _) in refused.items() if fields[field].default and refuses(fields[field].default)
    ] == []


@pytest.mark.parametrize(
    ("tensors", "config", "sentence"),
    [
        (LOHA, {"peft_type": "LOHA", "r": 3}, "its tensors have rank 2, the config says 3"),
        ({f"{Q}.hada_w1_a": torch.ones(4, 2)}, {"peft_type": "LOHA", "r": 2}, "no hada_w1_b, hada_w2_a, hada_w2_b"),
        (LOHA, {"peft_type": "LOHA", "r": "2"}, "r: expected a rank above zero, found '2'"),
        (LOHA, {"peft_type": "LOHA", "r": 2, "target_modules": ["k_proj"]}, "the config does not target it"),
        (IA3, {"peft_type": "LOHA"}, "ia3_l: no tensor of a LOHA adapter, and not in modules_to_save"),
        (IA3, {"peft_type": "IA3", "feedforward_modules": ["q_proj"]}, r"ia3_l has shape \(6, 1\), expected \(1, in\)"),
        ({**IA3, f"{Q}.base_layer.ia3_l": torch.ones(6, 1)}, {"peft_type": "IA3"}, "an adapter inside another one"),
        ({f"{Q}.ia3_l": torch.ones(0, 1)}, {"peft_type": "IA3"}, "1 of 1 tensors are empty or flattened"),
        ({**IA3, "lonely": torch.ones(1)}, {"peft_type": "IA3"}, "names do not begin with base_model.model.: lonely"),
        ({f"{Q}.q\n.ia3_l": torch.ones(6, 1)}, {"peft_type": "IA3"}, "with a line break in the name"),
        (LOHA, {"peft_type": "LOHA", "r": 0}, r"1 field that cannot be used"),
        ({f"{Q}.vera_lambda_b": torch.ones(6), f"{Q}.vera_lambda_d": torch.ones(2, 2)}, {"peft_type": "VERA", "r": 4},
         r"vera_lambda_d \(2, 2\), expected vectors"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(
    tensors: dict[str, torch.Tensor], config: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(LoraToolsError, match=sentence) as raised:
        dialects.open_adapter(folder(tmp_path / "a", tensors, **config))
    assert isinstance(raised.value, BadFile)


def test_a_type_that_is_not_known_and_those_that_cannot_merge(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedAdapter, match="peft_type 'NEWEST' is not known; known are LORA, "):
        inspect(folder(tmp_path / "a", IA3, peft_type="NEWEST"))
    assert not REFUSED.keys() & {*types.names()}


def test_a_raw_dump_with_an_adapters_name_is_the_same_adapter(tmp_path: Path) -> None:
    plain = dialects.open_adapter(folder(tmp_path / "a", LOHA, peft_type="LOHA", r=2))
    raw = dialects.open_adapter(
        folder(tmp_path / "b", {f"{name}.style": W for name, W in LOHA.items()}, peft_type="LOHA", r=2)
    )
    (module,) = plain.updates
    assert plain.updates.keys() == raw.updates.keys()
    assert plain.updates[module].parts.keys() == raw.updates[module].parts.keys()
    assert torch.equal(plain.updates[module].delta_weight(), raw.updates[module].delta_weight())
    assert plain.updates[module].scaling == 8 / 2


def test_the_users_alpha_takes_the_place_of_the_files(tmp_path: Path) -> None:
    adapter = folder(tmp_path / "a", LOHA, peft_type="LOHA", r=2, alpha=8, alpha_pattern={"q_proj": 3})
    (update,) = dialects.open_adapter(adapter, alpha=6).updates.values()
    assert (update.alpha, update.scaling) == (6, 3)
    assert inspect(adapter).peft_type == "LOHA"  # type: ignore[union-attr]


def test_a_lone_layer_0_is_kept_as_a_list(tmp_path: Path) -> None:
    adapter = dialects.open_adapter(folder(tmp_path / "a", LOHA, peft_type="LOHA", r=2, layers_to_transform=0))
    assert adapter.settings["layers_to_transform"] == [0]


OFT = {f"{Q}.oft_R.weight": torch.full((2, 3), 0.1)}
PLAIN_OFT = {"peft_type": "OFT", "coft": False, "num_cayley_neumann_terms": 5, "peft_version": "0.21.0"}


def test_null_is_off_for_a_switch_that_is_on_by_default(tmp_path: Path, warned: list[str]) -> None:
    """As for PEFT, which asks whether the value is true."""
    null = dialects.open_adapter(folder(tmp_path / "a", OFT, **PLAIN_OFT, use_cayley_neumann=None))
    off = dialects.open_adapter(folder(tmp_path / "b", OFT, **PLAIN_OFT, use_cayley_neumann=False))
    on = dialects.open_adapter(folder(tmp_path / "c", OFT, **PLAIN_OFT, use_cayley_neumann=True))
    layouts = [next(iter(adapter.updates.values())).layout for adapter in (null, off, on)]
    assert layouts[0] == layouts[1] != layouts[2]
    assert warned == []


@pytest.mark.parametrize(
    ("tensors", "config", "sentences"),
    [
        (LOHA, {"peft_type": "LOHA", "r": 2}, ["the config does not say alpha; 8, PEFT's default, is taken"]),
        (LOHA, {"peft_type": "LOHA", "r": 2, "alpha": None}, ["the config does not say alpha; 8"]),
        (LOHA, {"peft_type": "LOHA", "r": 2, "alpha": 8}, []),
        (OFT, {**PLAIN_OFT}, ["the config does not say use_cayley_neumann; true, PEFT's default, is taken"]),
        (OFT, {"peft_type": "OFT", "use_cayley_neumann": True, "num_cayley_neumann_terms": 5},
         ["trained with PEFT before 0.18, whose Cayley-Neumann series was slightly another"]),
        (IA3, {"peft_type": "IA3"}, []),
    ],
)  # fmt: skip
def test_a_default_that_decides_the_result_is_said(
    tensors: dict[str, torch.Tensor], config: dict[str, Any], sentences: list[str], tmp_path: Path, warned: list[str]
) -> None:
    dialects.open_adapter(folder(tmp_path / "a", tensors, **config))
    assert len(warned) == len(sentences)
    assert all(sentence in message for sentence, message in zip(sentences, warned, strict=True))


@pytest.mark.parametrize(
    ("name", "part", "shape", "config"),
    [
        ("IA3", "ia3_l", (6, 1), {}),
        ("HRA", "hra_u", (6, 2), {"r": 2}),
        ("LN_TUNING", "ln_tuning_layers.weight", (6, 6), {}),
        ("BEFT", "beft_bias", (1, 6), {}),
        ("LORA", "lora_A.weight", (2, 6), {"r": 2, "lora_alpha": 2}),
    ],
)
def test_a_layer_that_the_config_targets_and_the_file_lacks_is_said(
    name: str, part: str, shape: tuple[int, ...], config: dict[str, Any], tmp_path: Path, warned: list[str]
) -> None:
    """Of a type with one tensor a module nothing else tells that one is missing; the base does."""
    base = tmp_path / "base"
    base.mkdir()
    modules = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    save_file({f"{m}.{each}": torch.ones(6, 6)[: 6 if each == "weight" else 1].squeeze(0).contiguous()
               for m in modules for each in ("weight", "bias")}, base / "model.safetensors")  # fmt: skip
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tensors = {f"base_model.model.{m}.{part}": torch.ones(shape) for m in modules}
    if name == "LORA":
        tensors |= {f"base_model.model.{m}.lora_B.weight": torch.ones(6, 2) for m in modules}
    every = folder(tmp_path / "all", tensors, peft_type=name, **config)
    less = {key: tensor for key, tensor in tensors.items() if modules[1] not in key}
    some = folder(tmp_path / "some", less, peft_type=name, **config)
    some_layers = folder(tmp_path / "layers", less, peft_type=name, layers_to_transform=[0, 2], **config)
    opened = Checkpoint.open(base)
    dialects.open_adapter(every, base=opened)
    dialects.open_adapter(some_layers, base=opened)
    assert warned == []
    dialects.open_adapter(some, base=opened)
    assert len(warned) == 1
    assert f"no tensors for {modules[1]}, which the config targets" in warned[0]
